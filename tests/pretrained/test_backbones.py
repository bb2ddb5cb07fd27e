"""A backbone is right or refused: families of transformers as tiny random models (scripts/measure_backbones.py)."""

import importlib.util
import json
import logging

import pytest
import torch
import transformers

from latentlab import attention
from latentlab.backbone import branch_outputs, decoder_layers, longest_sequence
from latentlab.cli import main
from latentlab.model import LatentReasoner, State
from latentlab.pretrained import load_model
from latentlab.pretrained.selfcheck import Gap, _likeliest, check_backbone, compare
from latentlab.problems import Problem
from latentlab.rollouts import rollout
from latentlab.runtime.environment import repository_root
from latentlab.study.results import load_result, published_folder
from latentlab.verify import table

spec = importlib.util.spec_from_file_location(
    "measure_backbones", repository_root() / "scripts" / "measure_backbones.py"
)
assert spec and spec.loader
measure_backbones = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure_backbones)
build, FAMILIES = measure_backbones.build, measure_backbones.FAMILIES
PROBLEMS = [Problem("a", "tom has 3 apples", (), "1", "x"), Problem("b", "tom has", (), "1", "x")]
ROWS = ["embeddings", "thoughts", "log_probs", "attention_masks", "mlp_masks", "answers", "gradient"]
REFUSED = {
    "Falcon": "which cannot be run with latent thoughts and masks",
    "Falcon, ALiBi": "which cannot be run with latent thoughts and masks",
    "OPT": "expected layers that add an attention and an mlp branch to the residual stream",
    "Bloom": "no attribute 'max_position_embeddings'",
    "MPT": "no attribute 'max_position_embeddings'",
    "GPT-J": "whose own forward differs from the engine's in thoughts by",
    "GPT-Neo, window 24": "whose own forward differs from the engine's in thoughts by",
    "GPT-OSS": "expected layers that add an attention and an mlp branch to the residual stream",
    "Mamba": "expected layers of softmax attention alone",
}


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(REFUSED)))
def test_a_supported_family_equals_its_plain_forward(name):
    model, passes, layers = build(name), [], []
    model.lm.base_model.register_forward_hook(lambda *_: passes.append(0))
    decoder_layers(model.lm)[-1].register_forward_hook(lambda *_: layers.append(0))
    gaps = compare(model, full=True)
    assert [gap.name for gap in gaps] == ROWS
    assert not [gap for gap in gaps if not gap.ok]
    model.max_new_tokens = 1
    passes.clear(), layers.clear()
    rollout(model, PROBLEMS, num_generations=2, masks=None, temperature=0.0, run_seed=0, step=0)
    # The question ends in the last layer; the other passes are the latent steps and that of <end>.
    assert len(passes) == len(layers) == model.num_thoughts + 1


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_family_that_is_not_supported_is_refused_in_one_line(name):
    model = build(name)
    with pytest.raises(ValueError, match=REFUSED[name]) as caught:
        check_backbone(model)
    line = str(caught.value)
    assert line.startswith("backbone: got ") and type(model.lm).__name__ in line and "\n" not in line
    assert line.endswith("use a family that docs/backbones.md lists as supported")


def skip_windows(patch):
    patch.setattr(attention, "_near", lambda window, new, length, device: torch.ones(new, length, dtype=torch.bool))


def skip_caps(patch):
    patch.setattr(attention, "_capped", lambda scores, softcap: scores)


def skip_the_models_own_head(patch):
    patch.setattr(LatentReasoner, "head", lambda self, hidden: self.lm.get_output_embeddings()(hidden))


def start_at_position_one(patch):
    real = State.__init__
    patch.setattr(State, "__init__", lambda self, *, position, **rest: real(self, position=position + 1, **rest))


@pytest.mark.parametrize(
    ("name", "mistake", "differ"),
    [
        ("Mistral, window 24", skip_windows, "thoughts by .*, log_probs by"),
        ("Gemma-3, window 24", skip_windows, "thoughts by"),
        ("Phi-3, window 24", skip_windows, "thoughts by"),
        ("Gemma-2, window 24, caps 5 and 3", skip_caps, "thoughts by"),
        ("Granite, all multipliers", skip_the_models_own_head, "differs from the engine's in log_probs by"),
        ("Cohere, logit_scale 0.25", skip_the_models_own_head, "differs from the engine's in log_probs by"),
        ("Gemma-2, window 24, caps 5 and 3", skip_the_models_own_head, "in log_probs by"),
        ("GPT-2", start_at_position_one, "thoughts by"),
    ],
)
def test_what_the_engine_would_leave_out_is_seen(name, mistake, differ, monkeypatch):
    mistake(monkeypatch)
    with pytest.raises(ValueError, match=differ):
        check_backbone(build(name))


WIDE = {
    "Mistral": {"sliding_window": 400},
    "Phi3": {"sliding_window": 400},
    "Gemma3": {**measure_backbones.FAMILIES["Gemma-3, window 24"][1], "sliding_window": 400},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 400, "max_window_layers": 1},
    "Llama": {"sliding_window": 400},  # which Llama does not read
    "GPTNeo": {**measure_backbones.FAMILIES["GPT-Neo, window 24"][1], "window_size": 400},  # read once, at the start
}


@pytest.fixture
def wide(monkeypatch):
    def build_wide(name):
        settings = {**measure_backbones.GQA, **WIDE[name], "max_position_embeddings": 600}
        monkeypatch.setitem(FAMILIES, name, (FAMILIES["Gemma-3, window 24"][0] if name == "Gemma3" else name, settings))
        model, lengths = build(name), []
        model.lm.base_model.register_forward_pre_hook(
            lambda _, args, given: lengths.extend(x.shape[1] for x in given.values() if torch.is_tensor(x)),
            with_kwargs=True,
        )
        return model, lengths

    return build_wide


@pytest.mark.parametrize("name", ["Mistral", "Phi3", "Gemma3", "Qwen2"])
def test_a_wide_window_is_compared_as_a_small_one(name, wide):
    model, lengths = wide(name)
    before = [repr(vars(module)) for module in model.lm.modules() if "window" in repr(vars(module))]
    check_backbone(model)
    assert max(lengths) < 32 and model.lm.config.sliding_window == 400 and longest_sequence(model.lm.config) == 600
    assert before == [repr(vars(module)) for module in model.lm.modules() if "window" in repr(vars(module))]


def test_a_window_that_is_not_read_as_it_is_set_is_exceeded(wide):
    model, lengths = wide("Llama")
    check_backbone(model)
    assert max(lengths) > 400
    with pytest.raises(ValueError, match="differs from the engine's in thoughts by"):
        check_backbone(wide("GPTNeo")[0])


@pytest.mark.parametrize("name", ["Mistral", "Phi3", "Gemma3", "Qwen2"])
def test_a_wide_window_that_the_engine_would_leave_out_is_seen(name, wide, monkeypatch):
    skip_windows(monkeypatch)
    with pytest.raises(ValueError, match="thoughts by"):
        check_backbone(wide(name)[0])


def test_granites_entropy_is_that_of_its_scaled_logits():
    model = build("Granite, all multipliers")
    ids = torch.tensor([[5, 6, 7]])
    hidden = model.lm.base_model(ids, use_cache=False).last_hidden_state
    entropy, plain = (
        torch.distributions.Categorical(logits=x).entropy() for x in (model.head(hidden), model.lm(ids).logits)
    )
    torch.testing.assert_close(entropy, plain, rtol=0, atol=1e-12)
    unscaled = torch.distributions.Categorical(logits=model.lm.lm_head(hidden)).entropy()
    assert (plain - unscaled).min() > 0.1


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("Phi-3, window 24", ("self_attn.o_proj", "mlp.down_proj")),
        ("Gemma-2, window 24, caps 5 and 3", ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("Gemma-3, window 24", ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("OLMo-2", ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("GLM-4", ("post_self_attn_layernorm", "post_mlp_layernorm")),
        ("GPT-NeoX", ("attention.dense", "mlp.dense_4h_to_h")),
        ("Phi", ("self_attn.dense", "mlp.fc2")),
        ("Cohere, logit_scale 0.25", ("self_attn.o_proj", "mlp.down_proj")),
        ("Mixtral", ("self_attn.o_proj", "mlp")),
    ],
)
def test_masks_sit_on_what_is_added_to_the_residual_stream(name, sites):
    lm = build(name).lm
    names = {module: name for name, module in lm.named_modules()}
    found = [names[module] for module in branch_outputs(lm, ("attention", "mlp"))]
    assert [x.split(".", 3)[-1] for x in found] == list(sites) * 2


def test_weights_that_are_nan_make_no_other_family():
    lm = build("Phi-3, window 24").lm
    with torch.no_grad():
        lm.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    assert branch_outputs(lm, ("mlp",)) == [layer.mlp.down_proj for layer in lm.model.layers]


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({}, 96),
        ({"sliding_window": 24}, 96),
        ({"max_position_embeddings": 9000, "sliding_window": 4096}, 4096),
        ({"max_position_embeddings": 9000, "sliding_window": None}, 9000),
    ],
)
def test_no_sequence_is_longer_than_what_was_compared(settings, longest):
    config = transformers.MistralConfig(**{**measure_backbones.GQA, "sliding_window": None, **settings})
    assert longest_sequence(config) == longest


def test_longrope_ends_where_its_frequencies_switch():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    rope |= {"original_max_position_embeddings": 48}
    config = transformers.Phi3Config(
        **{**measure_backbones.GQA, "rope_parameters": rope, "original_max_position_embeddings": 48}
    )
    assert longest_sequence(config) == 48


def saved(name, folder):
    model = build(name)
    model.lm.float().save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["Gemma-2, window 24, caps 5 and 3", "Phi-3, window 24", "Granite, all multipliers"])
def test_load_model_reads_a_supported_family(name, tmp_path):
    model = load_model(saved(name, tmp_path), num_thoughts=2, max_new_tokens=4)
    assert all(gap.ok for gap in compare(model, full=True))


@pytest.mark.parametrize("name", ["Falcon", "GPT-J", "Mamba"])
def test_load_model_refuses_the_others(name, tmp_path):
    with pytest.raises(ValueError, match=r"^backbone: got .*; use a family"):
        load_model(saved(name, tmp_path), num_thoughts=2, max_new_tokens=4)


@pytest.mark.parametrize("name", ["Granite, all multipliers", "Bloom"])
def test_verify_compares_a_checkpoint(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "run_verify", lambda device, dtype: [])
    code = main(["verify", str(saved(name, tmp_path))])
    out, err = capsys.readouterr()
    if name in REFUSED:
        assert (code, out) == (2, "") and err.splitlines()[-1].startswith("latentlab: backbone: got ")
    else:
        assert code == 0 and [line.split()[0] for line in out.splitlines()[1:-1]] == ROWS


def test_answers_do_not_hang_on_ties_of_latent_tokens():
    model = build("GPT-2")
    probe = LatentReasoner(model.lm, model.tokenizer, num_thoughts=2, max_new_tokens=4)
    logits = torch.zeros(1, model.lm.config.vocab_size)
    marker = model.tokenizer.convert_tokens_to_ids("<<")
    for latent in (model.start_id, model.latent_id, model.end_id):  # load_model copies the row of "<<"
        logits[:, [marker, latent]] = 1.0
        logits[:, latent] += 1e-7
        assert _likeliest(probe, logits).tolist() == [marker]


def test_a_model_with_a_pad_token_is_examined_without_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    branch_outputs(build("GPT-2").lm, ("attention", "mlp"))
    assert not caplog.records


def test_a_row_of_a_checkpoint_that_fails_fails_verify(monkeypatch, capsys):
    monkeypatch.setattr(table, "run_verify", lambda device, dtype: [])
    monkeypatch.setattr(table, "compare", lambda model, full: [Gap("thoughts", 0.5, 1e-5)])
    assert main(["verify", "tiny"]) == 1 and "thoughts fails" in capsys.readouterr().out


def test_the_published_page_is_what_its_result_says():
    path = published_folder() / "backbones.json"
    result = load_result(path)
    assert result and json.loads(path.read_text())["name"] == "backbones"
    assert (repository_root() / "docs" / "backbones.md").read_text() == measure_backbones.page(result)
    rows = result["metrics"]["families"]
    assert [row["family"] for row in rows] == list(FAMILIES)
    assert {row["family"] for row in rows if "refused" in row} == set(REFUSED)
    assert all(gap["ok"] for row in rows for gap in row.get("gaps", {}).values())
