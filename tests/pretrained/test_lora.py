"""lora.py: an adapter is exact under masks, is saved alone, names its base, and merges into a plain model."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentlab.backbone import branch_gaps
from latentlab.cli import main
from latentlab.masks import MaskSpec
from latentlab.pretrained import load_model, merge_adapter, save_model
from latentlab.pretrained.adapters import attach_adapter
from latentlab.pretrained.selfcheck import compare
from latentlab.rollouts import replay_gap, rollout
from latentlab.training.steps import trained
from tests.conftest import small_config
from tests.pretrained.test_backbones import build

LORA = {"r": 4, "alpha": 8}
only_gpt2 = pytest.mark.parametrize("base", ["gpt2"], indirect=True)


@pytest.fixture(params=["gpt2", "llama"])  # Conv1D and a tied head; Linear and an untied one
def base(request, make_model, tmp_path):
    folder = tmp_path / "base"
    save_model(make_model(request.param), folder)
    return folder


def adapted(base, **lora):
    return changed(load_model(base), **lora)


def changed(model, **lora):
    """`model` with an adapter whose matrices and rows are all away from their start."""
    attach_adapter(model, small_config(lora={**LORA, **lora}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trained(model):
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def logits(model, ids=((7, 8, 2, 3, 4, 9),)):
    with torch.no_grad():
        return model.lm(torch.tensor(ids), use_cache=False).logits


def refused(error, pattern, *arguments, **settings):
    with pytest.raises(error, match=pattern) as caught:
        load_model(*arguments, **settings)
    assert "\n" not in str(caught.value)


def test_a_new_adapter_changes_nothing_and_trains_the_maps_and_the_latent_rows_alone(base):
    plain, model = load_model(base), load_model(base)
    attach_adapter(model, small_config(lora=LORA))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)
    assert type(model.lm) is type(plain.lm)
    named = [name for name, weight in model.lm.named_parameters() if weight.requires_grad]
    maps = {name.split(".")[-4] for name in named if ".lora_" in name}
    gpt2 = {"c_attn", "c_fc", "c_proj"}
    assert maps == (gpt2 if maps & gpt2 else {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")})
    assert [tuple(model.lm.get_parameter(name).shape) for name in named if ".lora_" not in name] == [(3, 32)]
    again = load_model(base)
    attach_adapter(again, small_config(lora=LORA))
    assert all(torch.equal(a, b) for a, b in zip(trained(model), trained(again), strict=True))


def test_the_engine_and_its_masks_are_exact_with_an_adapter(base):
    model = adapted(base).double()
    assert max(branch_gaps(model.lm)) < 1e-12
    assert not [gap for gap in compare(model, full=True) if not gap.ok]
    assert (logits(model) - logits(load_model(base).double())).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["Gemma", "Gemma-3, window 24", "Llama, tied head, biases", "Phi", "Mixtral"])
def test_families_with_scaled_or_tied_tables_biases_and_experts(family):
    model = build(family)
    model.provenance["sha256"] = "0"
    changed(model)
    assert not [gap for gap in compare(model, full=True) if not gap.ok]
    before = logits(model)
    torch.testing.assert_close(logits(merge_adapter(model)), before, rtol=0, atol=1e-5)


@only_gpt2
def test_masks_looked_up_before_the_adapter_act_on_it(base, problems):
    model, known = load_model(base), adapted(base)
    model.branches(("attention", "mlp"))
    attach_adapter(model, small_config(lora=LORA))
    assert [type(m) for m in model.branches(("attention", "mlp"))] == [
        type(m) for m in known.branches(("attention", "mlp"))
    ]


def test_rollouts_replay_as_without_an_adapter(base, problems):
    model = adapted(base)
    out = rollout(model, problems, num_generations=4, masks=MaskSpec(), temperature=1.0, run_seed=0, step=0)
    assert replay_gap(model.score(out, masks=out.masks), out) < 1e-5


def test_the_adapter_is_saved_alone_reloaded_and_merged(base, tmp_path):
    model = adapted(base)
    save_model(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = load_model(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model)) and again.num_thoughts == model.num_thoughts
    assert {"kind": "adapter", "base_sha256": load_model(base).provenance["sha256"]}.items() <= again.provenance.items()
    save_model(again, tmp_path / "second")
    for file in ("adapter_model.safetensors", "adapter_config.json", "latentlab.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()
    before = logits(again.double())
    save_model(merge_adapter(again).float(), tmp_path / "merged")
    plain = load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), before.float(), rtol=0, atol=1e-4)
    assert len(trained(plain)) == len(list(load_model(base).parameters()))
    merged = merge_adapter(load_model(tmp_path / "adapter").double())
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-12)


def test_peft_reads_what_is_saved(base, tmp_path):
    from peft import PeftModel

    model = adapted(base)
    save_model(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(load_model(base).lm, tmp_path / "adapter")
    with torch.no_grad():
        ids = torch.tensor([[7, 8, 2, 3, 4, 9]])
        torch.testing.assert_close(theirs(ids).logits, logits(model), rtol=0, atol=1e-4)


def test_the_rows_get_the_gradient_of_a_whole_table(base):
    """Against the same loss on the merged model, whose table trains in one piece."""
    model = adapted(base).double()
    save_model(model, base.parent / "adapter")
    whole = merge_adapter(load_model(base.parent / "adapter").double())
    ids = [whole.start_id, whole.latent_id, whole.end_id]
    for each in (model, whole):
        each.lm(torch.tensor([[7, *ids, 9]]), use_cache=False).logits.log_softmax(-1)[0, :, 5].sum().backward()
    rows = next(weight for weight in trained(model) if weight.shape == (3, 32))
    torch.testing.assert_close(rows.grad, whole.lm.get_input_embeddings().weight.grad[ids], rtol=0, atol=1e-12)
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    assert frozen and all(weight.grad is None for weight in frozen)


# -- what does not fit ----------------------------------------------------------------------------------------------


@only_gpt2
def test_another_base_is_refused(base, tmp_path):
    save_model(adapted(base), tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, base / "model.safetensors", metadata={"format": "pt"})
    refused(ValueError, "^adapter .*: got a base .* with weights .*, expected .*; restore it", tmp_path / "adapter")


@only_gpt2
def test_a_missing_base_is_named_with_what_to_do_and_its_new_place_counts(base, tmp_path):
    save_model(adapted(base), tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    refused(FileNotFoundError, "^adapter .*: got no base model .*; restore it, or write its new", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "moved")}))
    load_model(tmp_path / "adapter")


@only_gpt2
@pytest.mark.parametrize("kind", ["cut", "missing", "shape", "nan", "gone"])
def test_a_damaged_adapter_is_one_line(base, tmp_path, kind):
    save_model(adapted(base), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    changed = {"missing": {}, "shape": {name: torch.zeros(2, 2)}, "nan": {name: weights[name] / 0}}.get(kind)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif kind == "gone":
        path.unlink()
    else:
        save_file({k: v for k, v in weights.items() if k != name} | changed, path)
    refused(ValueError, "^adapter .*: could not read adapter_model.safetensors", tmp_path / "adapter")


@only_gpt2
@pytest.mark.parametrize("damage", [{"r": "x"}, {"target_modules": ["nosuch"]}, {"peft_type": None}])
def test_a_damaged_adapter_config_is_one_line(base, tmp_path, damage):
    save_model(adapted(base), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    refused(ValueError, "^adapter .*: could not use adapter_config.json .*; restore it", tmp_path / "adapter")


@only_gpt2
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 2}, r"^lora\.r: got 2, expected 4 as in the adapter that the model has; set it so"),
        ({"r": 0}, r"^lora\.r: got 0, expected 4 as in the adapter"),
        ({"alpha": 5}, r"^lora\.alpha: got 5, expected 8 as in the adapter"),
        ({"targets": ["nosuch"]}, r"^lora\.targets: got nosuch, expected some of .*_proj.*; correct it$"),
    ],
)
def test_an_adapter_goes_on_under_its_own_settings_only(base, lora, message):
    model = adapted(base)
    before = [weight.clone() for weight in trained(model)]
    attach_adapter(model, small_config(lora=LORA))
    assert all(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))
    with pytest.raises(ValueError, match=message) as caught:
        attach_adapter(model, small_config(lora={**LORA, **lora}))
    assert "\n" not in str(caught.value)


def test_one_target_alone(base):
    name = "c_fc" if "gpt2" in load_model(base).lm.config.model_type else "q_proj"
    model = adapted(base, targets=[name])
    assert {key.split(".")[-4] for key, w in model.lm.named_parameters() if w.requires_grad and ".lora_" in key} == {
        name
    }


def test_weights_in_no_file_have_no_adapter(gpt2):
    with pytest.raises(ValueError, match=r"^lora\.r: got 4 for weights that are in no file, expected a saved base"):
        attach_adapter(gpt2, small_config(lora=LORA))


@only_gpt2
def test_without_peft_there_is_one_line(base, tmp_path, monkeypatch, capsys):
    save_model(adapted(base), tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "latentlab.pretrained.lora")
    monkeypatch.delattr("latentlab.pretrained.lora")
    assert main(["evaluate", str(tmp_path / "adapter"), "--preset", "smoke"]) == 1
    said = capsys.readouterr().err
    assert said == "latentlab: lora: got no package peft, expected it for LoRA; pip install 'latentlab[lora]'\n"
