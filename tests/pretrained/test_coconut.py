"""Coconut checkpoints as others publish them load, and what is exported loads with plain transformers."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from latentlab.pretrained import coconut, loading
from latentlab.pretrained.loading import load_model, save_model
from latentlab.problems import Problem
from latentlab.rollouts import rollout
from latentlab.verify.engine import WORDS

TEXT = "one two ?\n<|start-latent|><|latent|><|end-latent|>"


def published_examples(folder: Path) -> dict:
    """Write a small GPT-2 with native dropout as base/, meta/checkpoint_3 and hf/; return its lm and tokenizer."""
    vocabulary = {word: i for i, word in enumerate(("<eos>", "<unk>", *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=2, n_embd=16, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )  # with GPT-2's native dropout of 0.1
    config.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tokenizer.add_tokens(list(coconut.TOKENS))  # the official order: start, end, latent
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        lm = GPT2LMHeadModel(config)
    state = {f"{coconut.PREFIX}{key}": value for key, value in lm.state_dict().items()}
    (folder / "meta").mkdir()
    torch.save(
        {**state, "embedding.weight": lm.get_input_embeddings().weight.detach()}, folder / "meta" / "checkpoint_3"
    )
    for key, token in zip(coconut.CONFIG_IDS, coconut.TOKENS, strict=True):
        setattr(lm.config, key, tokenizer.convert_tokens_to_ids(token))
    logging.disable_progress_bar()
    lm.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    return {"lm": lm, "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small GPT-2 written by hand in both layouts: {"folder", "lm", "tokenizer"}."""
    folder = tmp_path_factory.mktemp("published")
    return {"folder": folder, **published_examples(folder)}


@pytest.fixture
def load(source):
    """load("meta" | "hf"): that layout through loading.load_model."""

    def make(layout, **settings):
        if layout == "hf":
            return load_model(source["folder"] / "hf", **settings)
        return load_model(source["folder"] / "meta" / "checkpoint_3", base=str(source["folder"] / "base"), **settings)

    return make


def logits(lm, ids):
    with torch.no_grad():
        return lm.eval()(torch.tensor([ids])).logits


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_published_layout_gives_its_sources_logits(source, load, layout):
    model, ids = load(layout), source["tokenizer"](TEXT)["input_ids"]
    assert model.tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert torch.equal(logits(model.lm, ids), logits(source["lm"], ids))
    assert (model.start_id, model.end_id, model.latent_id) == (10, 11, 12)  # the official order of the added rows
    assert (model.num_thoughts, model.max_new_tokens) == (6, 64)
    assert load(layout, num_thoughts=2).num_thoughts == 2
    assert len(model.provenance["sha256"]) == 64


def test_the_source_has_native_dropout_and_loaded_models_have_none(source, load):
    assert any(m.p > 0 for m in source["lm"].modules() if isinstance(m, torch.nn.Dropout))
    for layout in ("meta", "hf"):
        model = load(layout).train()
        assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
        assert not [key for key in loading.NATIVE_DROPOUT if getattr(model.lm.config, key, 0)]


def test_a_loaded_checkpoint_rolls_out_and_its_latent_tokens_are_not_text(load):
    model = load("meta", num_thoughts=2, max_new_tokens=4)
    out = rollout(
        model, [Problem("a", "one ?", (), "1", "t")], num_generations=8, masks=None, temperature=1.0, run_seed=0, step=0
    )
    assert out.thoughts.shape == (8, 2, 16) and not any("latent" in text for text in out.text)


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_export_is_bit_exact_for_plain_transformers_and_for_us(source, load, layout, tmp_path):
    model = load(layout, num_thoughts=3, max_new_tokens=5)
    save_model(model, tmp_path)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    weights = model.lm.state_dict()
    for other in (plain.state_dict(), again.lm.state_dict()):
        assert other.keys() == weights.keys() and all(torch.equal(other[key], weights[key]) for key in weights)
    ids = source["tokenizer"](TEXT)["input_ids"]
    assert all(t(TEXT)["input_ids"] == ids for t in (tokenizer, model.tokenizer, again.tokenizer))
    assert torch.equal(logits(plain, ids), logits(source["lm"], ids))
    assert (again.num_thoughts, again.max_new_tokens) == (3, 5)


def test_a_folder_with_one_state_dict_is_that_state_dict(source):
    folder = source["folder"] / "meta"
    assert coconut.state_dict_file(str(folder)) == folder / "checkpoint_3"
    assert coconut.state_dict_file(str(source["folder"] / "hf")) is None
    assert coconut.state_dict_file("no/such/folder") is None


def test_a_distributed_prefix_and_old_buffers_do_not_matter(source, tmp_path):
    state = torch.load(source["folder"] / "meta" / "checkpoint_3", weights_only=True)
    state["base_causallm.transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "checkpoint_9")
    model = load_model(tmp_path / "checkpoint_9", base=str(source["folder"] / "base"))
    ids = source["tokenizer"](TEXT)["input_ids"]
    assert torch.equal(logits(model.lm, ids), logits(source["lm"], ids))


def test_a_trained_head_beside_a_tied_config_is_kept_and_saved(source, tmp_path):
    head = torch.randn(13, 16)
    path = edited(source, lambda s: {**s, f"{coconut.PREFIX}lm_head.weight": head}, tmp_path / "checkpoint_2")
    model = load_model(path, base=str(source["folder"] / "base"))
    save_model(model, tmp_path / "saved")
    for lm in (model.lm, load_model(tmp_path / "saved").lm):
        assert torch.equal(lm.lm_head.weight, head) and not torch.equal(lm.transformer.wte.weight, head)


def test_loading_a_state_dict_takes_no_random_number(load):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    load("meta")
    assert torch.equal(before, torch.random.get_rng_state())


def edited(source, edit, path):
    state = torch.load(source["folder"] / "meta" / "checkpoint_3", weights_only=True)
    torch.save(edit(state), path)
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: {key.removeprefix(coconut.PREFIX): v for key, v in s.items()}, r"got no key base_causallm"),
        (
            lambda s: {k: v for k, v in s.items() if "h.1.mlp.c_proj.bias" not in k},
            "no weights for .*c_proj.bias .1 missing",
        ),
        (lambda s: {**s, "base_causallm.adapter": torch.ones(1)}, "does not describe, adapter .1 in all"),
        (
            lambda s: {k: v[:-3] if "wte" in k else v for k, v in s.items()},
            r"wte.*\[10, 16\].*\[13, 16\].* three latent",
        ),
        (
            lambda s: {k: v[:, :8] if "wpe" in k else v for k, v in s.items()},
            "wpe.weight of shape .32, 8., expected .32, 16.",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "wte" not in k and "lm_head" not in k},
            "no weights for lm_head.weight .2 missing",
        ),
        (
            lambda s: {**s, "embedding.weight": s["embedding.weight"] + 1},
            "embedding.weight other than the input embedding",
        ),
        (lambda s: {**s, "adapter": torch.ones(1)}, "does not describe, adapter"),
        (
            lambda s: {k: v / 0 if "h.1.ln_1.weight" in k else v for k, v in s.items()},
            "NaN or inf in .*h.1.ln_1.weight",
        ),
        (lambda s: [1, 2], "got no key base_causallm"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_one_clear_line(source, tmp_path, edit, message):
    path = edited(source, edit, tmp_path / "checkpoint_1")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path, base=str(source["folder"] / "base"))
    assert "\n" not in str(caught.value)


def test_a_damaged_or_malicious_file_is_refused(source, tmp_path):
    class Run:
        def __reduce__(self):
            return (print, ("code from a checkpoint ran",))

    for content in (b"", b"not a checkpoint", pickle.dumps(Run(), protocol=2)):
        (tmp_path / "checkpoint_1").write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint_1: could not be read"):
            load_model(tmp_path / "checkpoint_1", base=str(source["folder"] / "base"))


def test_several_checkpoints_or_no_base_are_one_clear_line(source, tmp_path):
    for n in (1, 2):
        (tmp_path / f"checkpoint_{n}").write_bytes(b"")
    with pytest.raises(ValueError, match="got 2 files"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="base model: could not get"):
        load_model(source["folder"] / "meta" / "checkpoint_3", base=str(tmp_path / "nothing"))


def test_a_base_of_another_kind_is_one_clear_line(source, tmp_path):
    AutoTokenizer.from_pretrained(source["folder"] / "base").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="got model_type t5, which is no decoder-only causal LM"):
        load_model(source["folder"] / "meta" / "checkpoint_3", base=str(tmp_path))


def rewritten(source, tmp_path, **config):
    """The HF folder with other values in config.json."""
    model = load_model(source["folder"] / "hf")
    model.lm.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return tmp_path


def test_config_ids_that_are_not_set_are_taken_from_the_tokenizer(source, tmp_path):
    unset = dict.fromkeys(coconut.CONFIG_IDS, -100)  # the published class's default
    assert load_model(rewritten(source, tmp_path, **unset)).latent_id == 12


def test_config_ids_that_disagree_with_the_tokenizer_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="expected the config's"):
        load_model(rewritten(source, tmp_path, latent_id=5))


def test_a_tokenizer_without_the_tokens_gets_them_where_the_config_says(source, tmp_path):
    folder = rewritten(source, tmp_path, latent_id=10, latent_start_id=11, latent_end_id=12)
    AutoTokenizer.from_pretrained(source["folder"] / "base").save_pretrained(folder)
    model = load_model(folder)
    assert (model.latent_id, model.start_id, model.end_id) == (10, 11, 12)
