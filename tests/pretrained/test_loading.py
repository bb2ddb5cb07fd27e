"""pretrained/: building, loading and storing, and one clear line for every checkpoint that is none."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)

from latentlab.cli import main
from latentlab.data.word_problems import WORDS, word_problems
from latentlab.model import END, LATENT, START
from latentlab.pretrained import loading, weights
from latentlab.pretrained.loading import load_model, model_from_config, save_model, weights_hash
from latentlab.pretrained.scratch import build_model, word_tokenizer
from latentlab.problems import Problem
from latentlab.reward import exact_answer
from latentlab.rollouts import rollout
from latentlab.training import curriculum
from tests.conftest import tiny_gpt2
from tests.core.test_cli import TOY_WORDS

SIZE = {"num_thoughts": 2, "max_new_tokens": 5}


def refused(error_type, name, message, **settings):
    with pytest.raises(error_type, match=message) as error:
        load_model(name, **(settings or SIZE))
    assert "\n" not in str(error.value)


@pytest.fixture
def saved(tmp_path):
    save_model(tiny_gpt2(), tmp_path / "model")
    return tmp_path / "model"


# -- words ----------------------------------------------------------------------------------------------------------


def test_every_word_problem_is_known_and_its_decoded_answer_grades_right():
    tokenizer = word_tokenizer(WORDS)
    for problem in word_problems("train", 50, seed=0, steps=4):
        text = "\n".join([*problem.steps, f"### {problem.answer}"])
        for part in (problem.question + "\n" + START, text):
            ids = tokenizer(part, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids).replace(" ", "") == part.replace(" ", "")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert exact_answer(tokenizer.decode(ids, skip_special_tokens=True), problem) == 1.0
        assert exact_answer(tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True), problem) == 1.0
        wrong = tokenizer(f"### {int(problem.answer) + 1}", add_special_tokens=False)["input_ids"]
        assert exact_answer(tokenizer.decode(wrong), problem) == 0.0


def test_a_number_a_mark_and_a_latent_token_are_one_token_each():
    tokenizer = word_tokenizer(WORDS)
    texts = ["17", "<<", ">>", "###", "\n", START, LATENT, END, "books", "?"]
    assert [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts] == [1] * len(texts)
    assert tokenizer.convert_ids_to_tokens(tokenizer("<<29*2=8>>\n" + START)["input_ids"]) == [
        "<<",
        "29",
        "*",
        "2",
        "=",
        "8",
        ">>",
        "\n",
        START,
    ]


# -- building -------------------------------------------------------------------------------------------------------


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = (tiny_gpt2(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm.transformer.wte.weight, c.lm.transformer.wte.weight)
    assert a.lm.config.vocab_size == len(a.tokenizer) == len(WORDS) + 5


def test_a_preset_without_checkpoint_is_built_from_its_shape(config):
    model = model_from_config(config(backbone={"n_layer": 3}))
    assert len(model.lm.transformer.h) == 3 and model.num_thoughts == 2 and model.provenance["kind"] == "from scratch"


def test_init_from_keeps_what_the_checkpoint_says(config, saved):
    model = model_from_config(config(max_new_tokens=9), init_from=str(saved))
    assert (model.num_thoughts, model.max_new_tokens) == (2, 5)


# -- storing and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ["thought", "pause"])
def test_a_saved_model_answers_as_before(tmp_path, problems, make_model, feedback):
    for name in ("gpt2", "llama"):
        model = make_model(name)
        model.feedback = feedback
        save_model(model, tmp_path / name)
        again = load_model(str(tmp_path / name))
        assert (again.num_thoughts, again.max_new_tokens, again.feedback) == (2, 5, feedback)
        settings = {"num_generations": 2, "masks": None, "temperature": 1.0, "run_seed": 0, "step": 0}
        a, b = (rollout(m, problems, **settings) for m in (model, again))
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logp, b.logp)
        assert again.provenance == {"name": name, "kind": "folder"} | weights_hash(tmp_path / name)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        ids = torch.tensor([tokenizer(problems[0].question)["input_ids"]])
        assert torch.equal(plain(ids).logits, model.lm(ids).logits)
        assert tokenizer.convert_tokens_to_ids([START, LATENT, END]) == [model.start_id, model.latent_id, model.end_id]


@pytest.mark.parametrize("text", ["[1]", "none", "", '{"kind": 3}', '{"kind": null}', "{}", '{"kind": "mine"}'])
def test_a_users_own_provenance_file_counts_only_if_it_names_a_kind(saved, text):
    (saved / "PROVENANCE.json").write_text(text)
    assert load_model(saved).provenance["kind"] == ("mine" if "mine" in text else "folder")


def test_only_safetensors_are_written(saved):
    assert [path.name for path in saved.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")] == []
    assert (saved / "model.safetensors").exists()


def test_storing_and_loading_write_nothing_to_the_screen(tmp_path):
    """In a process of its own: what transformers says, it says once."""
    code = (
        "import sys, latentlab.pretrained.loading as b\n"
        "shape = dict(n_layer=1, n_embd=8, n_head=1, n_positions=16, seed=0, num_thoughts=1, max_new_tokens=2)\n"
        "b.save_model(b.build_model(('1',), **shape), sys.argv[1])\n"
        "b.save_model(b.load_model(sys.argv[1]), sys.argv[1] + 'again')"
    )
    root = Path(loading.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("held", ["config.json", "model.safetensors", ""])
def test_a_model_is_never_saved_over_another(tmp_path, held):
    folder = tmp_path / "m"
    if held:
        folder.mkdir()
    (folder / held).write_text("mine")
    with pytest.raises(FileExistsError, match=f"^save_model: got .*, where {held or 'm'} is, expected a new folder"):
        save_model(tiny_gpt2(), folder)
    assert (folder / held).read_text() == "mine" and len(list(tmp_path.rglob("*.*"))) == bool(held)


def test_the_hash_is_of_the_weights(saved):
    before = weights_hash(saved)["sha256"]
    weights = load_file(saved / "model.safetensors")
    weights["transformer.ln_f.bias"][0] += 1
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert weights_hash(saved)["sha256"] != before and weights_hash(saved / "nothing") == {}


def test_weights_of_the_hub_have_a_hash_too(saved, monkeypatch):
    asked = []
    monkeypatch.setattr(
        loading, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(saved)
    )
    assert loading.weights_hash("someone/model") == loading.weights_hash(saved) != {}
    assert asked == [("someone/model", {"local_files_only": True})]


def test_a_foreign_checkpoint_gets_three_latent_tokens_that_start_as_its_marker(llama_folder):
    vocabulary = AutoTokenizer.from_pretrained(llama_folder).get_vocab()
    plain = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert START not in vocabulary
    model = load_model(llama_folder, **SIZE)
    ids = [model.start_id, model.latent_id, model.end_id]
    assert sorted(ids) == [len(vocabulary) + i for i in range(3)]
    for new, old in ((model.lm.get_input_embeddings(), plain.model.embed_tokens), (model.lm.lm_head, plain.lm_head)):
        assert len(new.weight) == len(vocabulary) + 3
        assert torch.equal(new.weight[: len(vocabulary)], old.weight)
        assert all(torch.equal(new.weight[i], old.weight[vocabulary["<<"]]) for i in ids)
    assert model.tokenizer("5" + START)["input_ids"][-1] == model.start_id


def test_a_foreign_checkpoint_must_be_told_its_thoughts(llama_folder):
    refused(
        ValueError,
        llama_folder,
        "without latentlab.json, .*curriculum --init-from .*num_thoughts= and",
        feedback="thought",
    )
    refused(ValueError, llama_folder, "or pass num_thoughts= to load_model", max_new_tokens=3)


def test_special_tokens_that_were_there_stay_special(llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path / "chat")
    lm = AutoModelForCausalLM.from_pretrained(llama_folder)
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lm.save_pretrained(tmp_path / "chat")
    model = load_model(tmp_path / "chat", **SIZE)
    ids = model.tokenizer("<|im_start|>### 7")["input_ids"]
    assert model.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "###7"


def test_native_dropout_is_switched_off(tmp_path):
    """A GPT-2 config carries dropout 0.1 at three sites; under SDPA one of them is no module."""
    tokenizer = word_tokenizer(WORDS)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_embd=16, n_head=2, n_positions=32, eos_token_id=0, bos_token_id=0
    )
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, **SIZE)
    model.train()
    assert not [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.lm(ids).logits, model.lm(ids).logits)
    assert model.lm.config.attn_pdrop == model.lm.config.resid_pdrop == model.lm.config.embd_pdrop == 0.0


# -- what is no checkpoint ------------------------------------------------------------------------------------------


def test_a_folder_without_a_model(tmp_path):
    refused(
        FileNotFoundError, tmp_path, "^checkpoint: got the folder .* without config.json and .*safetensors, expected"
    )
    (tmp_path / "config.json").write_text("{}")
    refused(FileNotFoundError, tmp_path, "^checkpoint: got the folder .* expected a saved model")


def test_a_path_that_is_no_folder(tmp_path):
    refused(FileNotFoundError, tmp_path / "missing", "^checkpoint: got .*missing, which is no folder, expected")
    refused(FileNotFoundError, "./missing", "which is no folder")
    refused(FileNotFoundError, "runs/a/best", "which is no folder")


def test_a_hub_out_of_reach(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # it is read at import
    for name in ("latentlab-tests/no-such-model", "no-such-model-anywhere"):
        refused(
            FileNotFoundError,
            name,
            f"^Hub: could not get {name} .*; connect to the Hub, or pass a folder .*scripts/fetch_smollm2.py",
        )


def test_an_exception_without_words_is_a_line_too(saved, monkeypatch):
    monkeypatch.setattr(
        loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(EOFError())
    )
    refused(ValueError, saved, "^checkpoint .*: could not be read .EOFError")


@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_damaged_weights(saved, keep):
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    refused(ValueError, saved, "^checkpoint .*model: could not be read .*; it is damaged or incomplete, use another")


def test_weights_that_do_not_fit_the_config(saved):
    config = json.loads((saved / "config.json").read_text())
    for change, message in (
        ({"n_embd": 64}, r"model: got transformer.h.0.attn.c_attn.bias of shape \[96\], expected \[192\]; use"),
        ({"n_layer": 3}, r"model: got no weights for transformer.h.2.attn.c_attn.bias \(12 missing\), expected all"),
        ({"n_layer": 1}, r"not describe, transformer.h.1.attn.c_attn.weight \(11 in all\), expected no others"),
        ({"tie_word_embeddings": False}, r"model: got no weights for lm_head.weight \(1 missing\), expected all"),
    ):
        (saved / "config.json").write_text(json.dumps(config | change))
        refused(ValueError, saved, message)


# -- what is another kind of model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "model.safetensors",
            "version https://git-lfs.github.com/spec/v1\n",
            "model.safetensors: got a Git LFS pointer",
        ),
        (
            "config.json",
            "version https://git-lfs.github.com/spec/v1\n",
            "config.json: got a Git LFS pointer, .*lfs pull",
        ),
        ("config.json", "<!DOCTYPE html><html>", "config.json: got an HTML page, .*; download the raw file"),
        ("tokenizer.json", "\n<html>", "tokenizer.json: got an HTML page"),
        (
            "config.json",
            {"model_type": "nonsense"},
            "got model_type nonsense, unknown to transformers 5.*; use a model",
        ),
        ("config.json", {"model_type": "t5"}, "got model_type t5, which is no decoder-only causal LM; use a model"),
        ("config.json", {"model_type": "bart", "is_encoder_decoder": True}, "got model_type bart, which is no decoder"),
        ("config.json", {"model_type": "clip"}, "got model_type clip, which is no decoder-only causal LM"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq, .*is not quantised"),
        (
            "config.json",
            {"quantization_config": {"load_in_4bit": True}},
            "quantised by an unnamed method, expected float",
        ),
    ],
)
def test_a_folder_of_another_kind_says_which(saved, file, content, message):
    if isinstance(content, dict):
        content = json.dumps(json.loads((saved / file).read_text()) | content)
    (saved / file).write_text(content)
    refused(ValueError, saved, message)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "got an adapter, .*; merge it into its base model"),
        ("model-Q4_K_M.gguf", "got GGUF weights, expected model.safetensors; use the original"),
        ("pytorch_model.bin", "got weights as pickles, which are not read, .*; load them with transformers"),
        ("pytorch_model-00001-of-00002.bin", "got weights as pickles"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_has(saved, file, message):
    (saved / "model.safetensors").unlink()
    (saved / file).write_bytes(b"{}")
    refused(ValueError, saved, f"^checkpoint {saved}: {message}")


def test_a_plain_lm_starts_a_curriculum_with_the_presets_settings_and_nothing_else(config, llama_folder, saved):
    preset = config(max_new_tokens=9)
    model = model_from_config(preset, init_from=str(llama_folder), curriculum=True)
    assert (model.num_thoughts, model.max_new_tokens) == (preset.num_thoughts, 9)
    assert model_from_config(preset, init_from=str(saved), curriculum=True).max_new_tokens == 5
    with pytest.raises(ValueError, match=f"train it with `latentlab curriculum --init-from {llama_folder}`, or pass"):
        model_from_config(preset, init_from=str(llama_folder))


def test_the_curriculum_verb_takes_a_plain_lm_and_the_others_say_how(llama_folder, tmp_path, capfd):
    small = [*TOY_WORDS, "--curriculum.mask.sites", "mlp"]
    start, out = ["--init-from", str(llama_folder), *small], tmp_path / "run"
    assert main(["curriculum", *start, "--out", str(out)]) == 0
    assert load_model(out).num_thoughts == 2
    capfd.readouterr()
    for words in (["grpo", *start, "--out", str(tmp_path / "no")], ["evaluate", str(llama_folder), *small]):
        assert main(words) == 2
        assert f"train it with `latentlab curriculum --init-from {llama_folder}`" in capfd.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("setting", [{"max_new_tokens": 0}, {"max_new_tokens": -1}, {"num_thoughts": -2}])
def test_settings_out_of_range_are_refused_from_file_and_in_code(saved, setting):
    refused(ValueError, saved, "^LatentReasoner: got num_thoughts=.*, expected ints >= 0 and >= 1", **setting)
    (saved / "latentlab.json").write_text(json.dumps(SIZE | setting))
    refused(ValueError, saved, r"latentlab\.json: got .*expected num_thoughts", feedback="thought")


@pytest.mark.parametrize("setting", [{"num_thoughts": True}, {"max_new_tokens": 2.0}, {"max_new_tokens": "5"}])
def test_settings_of_another_type_are_refused(saved, setting, unchecked):
    refused(ValueError, saved, "^LatentReasoner: got num_thoughts=", **setting)
    (saved / "latentlab.json").write_text(json.dumps(SIZE | setting))
    refused(ValueError, saved, r"latentlab\.json: got .*expected num_thoughts", feedback="thought")


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("kind", ["flash_attention_2", "kernels-community/flash-attn", "nonsense"])
def test_another_implementation_of_attention_is_named(saved, key, kind):
    edit(saved / "config.json", **{key: kind})
    refused(ValueError, saved, f"^checkpoint {saved}: got {key} {kind} in config.json, expected sdpa, .*remove the")


@pytest.mark.parametrize("source", ["someone/else--tok.FooTokenizer", "tok.FooTokenizer"])
def test_custom_code_is_named(tmp_path, source):
    plain_folder(saved := tmp_path / "llama", fresh(HEADS["llama"]))
    edit(saved / "tokenizer_config.json", tokenizer_class="FooTokenizer", auto_map={"AutoTokenizer": [source, None]})
    refused(
        ValueError, saved, f"^checkpoint {saved}: got custom code .auto_map., which is not run, .*use another model"
    )


def test_a_missing_package_is_named(saved, monkeypatch):
    def fail(*_, **__):
        raise ImportError("requires the\nprotobuf library")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", fail)
    refused(ValueError, saved, "needs a package that is not installed .requires the protobuf library.; install it$")


def test_a_hub_model_that_is_not_there_is_still_one_line(monkeypatch):
    monkeypatch.setattr(loading, "hub_answers", lambda: True)
    monkeypatch.setattr(loading.PretrainedConfig, "get_config_dict", lambda name: ({"model_type": "gpt2"}, {}))
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("x")))
    refused(FileNotFoundError, "no-such/model", "^Hub: could not get no-such/model .x.; connect")


def test_a_config_that_asks_for_tuples_loads(saved):
    edit(saved / "config.json", return_dict=False)
    assert load_model(saved).lm.config.return_dict


def edit(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


# -- what the file holds is what the model computes with ------------------------------------------------------------


def plain_folder(folder, config, words=WORDS, change=None, tokenizer=None):
    """A model as others save it, of `config` and random weights that `change` edits: its state dict."""
    (tokenizer := tokenizer or plain_tokenizer(words)).save_pretrained(folder)
    config.vocab_size = config.vocab_size if config.vocab_size != 1 else len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    save_file(state := (change or dict)(state), folder / "model.safetensors", metadata={"format": "pt"})
    return state


def plain_tokenizer(words=WORDS, vocabulary=None, pattern=r"\n|<<|>>|###|\d+|[A-Za-z]+|[^\sA-Za-z\d]", **special):
    """A word tokenizer without latent tokens."""
    vocabulary = vocabulary or {text: i for i, text in enumerate(("<eos>", "<unk>", *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "<eos>", "unk_token": "<unk>", **special})


IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
SMALL_GPT2 = {"vocab_size": 1, "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, **IDS}
SMALL_LLAMA = {"vocab_size": 1, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2} | IDS
SMALL_LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
TIED = {"tie_word_embeddings": True}
HEADS = {
    "gpt2": GPT2Config(**SMALL_GPT2),
    "gpt2 untied": GPT2Config(**SMALL_GPT2, tie_word_embeddings=False),
    "gpt2 padded": GPT2Config(**SMALL_GPT2 | {"vocab_size": 128}),
    "llama": LlamaConfig(**SMALL_LLAMA),
    "llama tied": LlamaConfig(**SMALL_LLAMA, **TIED),
    "phi, a head with bias": PhiConfig(**SMALL_LLAMA | {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("layers.0.block_sparse_moe.experts.2.w1", "layers.0.block_sparse_moe.experts.2.w1.weight .1 missing."),
        ("layers.1.block_sparse_moe.experts.0.w3", "layers.1.block_sparse_moe.experts.0.w3.weight .1 missing."),
        ("layers.1.block_sparse_moe.experts.3.w2", r"mlp.experts.down_proj of shape \[3, 16, 24\], expected \[4"),
    ],
)
def test_a_missing_expert_is_named(tmp_path, part, message):
    config = MixtralConfig(**SMALL_LLAMA, num_local_experts=4)
    plain_folder(tmp_path, config, change=lambda state: {k: v for k, v in state.items() if part not in k})
    refused(ValueError, tmp_path, f"^checkpoint {tmp_path}: got .*{message}.*; use another checkpoint")


HYBRIDS = {
    "Lfm2": {"layer_types": ["full_attention", "conv"]},
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4},
    "GraniteMoeHybrid": {"layer_types": ["attention", "mamba"], "mamba_n_heads": 4, "mamba_n_groups": 1},
}
HYBRIDS["Qwen3Next"] |= {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
HYBRIDS["GraniteMoeHybrid"] |= {"mamba_d_head": 8, "num_local_experts": 4}


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_says_which_layers_it_has(tmp_path, name):
    plain_folder(tmp_path, getattr(transformers, f"{name}Config")(**SMALL_LLAMA | HYBRIDS[name]))
    kind = "conv" if name == "Lfm2" else "linear_attention"
    refused(
        ValueError, tmp_path, f"^backbone: got {name}ForCausalLM with layers of type {kind}, expected .*; use a family"
    )


def fresh(config):
    return type(config).from_dict(config.to_dict())


def expect_saved_equal(model, folder):
    """A saved model reloads bit for bit, here and in plain transformers."""
    save_model(model, folder)
    again, plain = load_model(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "How many books ? 17 <<\n" + START + LATENT + END + " ### 5"
    ids = model.tokenizer(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"] == again.tokenizer(text)["input_ids"]
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    state = model.lm.state_dict()
    for lm in (again.lm, plain):
        assert lm.dtype == torch.float32 and lm.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in lm.state_dict().items())
        assert torch.equal(lm(torch.tensor([ids])).logits, model.lm(torch.tensor([ids])).logits)
        assert lm.config.vocab_size == len(lm.get_input_embeddings().weight) == len(lm.get_output_embeddings().weight)


@pytest.mark.parametrize("name", HEADS)
def test_a_foreign_model_is_the_files_tensors_and_three_rows_like_the_markers(name, tmp_path):
    state = plain_folder(tmp_path / "a", fresh(HEADS[name]))
    model = load_model(tmp_path / "a", **SIZE)
    held, marker = model.lm.state_dict(), model.tokenizer.convert_tokens_to_ids("<<")
    new = [model.start_id, model.latent_id, model.end_id]
    assert new == [len(WORDS) + 2 + i for i in range(3)]
    for key, value in state.items():
        padded = len(value) == 128
        old = held[key][: len(WORDS) + 2] if padded else held[key][: len(value)]
        assert torch.equal(old, value[: len(old)])
    for parameters in (model.lm.get_input_embeddings(), model.lm.get_output_embeddings()):
        assert all(torch.equal(p[i], p[marker]) for p in parameters.parameters() for i in new)
    expect_saved_equal(model, tmp_path / "b")


@pytest.mark.parametrize("name", ["gpt2", "gpt2 padded", "llama tied"])
@pytest.mark.parametrize("latent", [False, True])
def test_a_trained_head_beside_a_tied_config_is_kept(name, latent, tmp_path):
    """As in plain transformers; also where the latent tokens are there, so that nothing is resized."""
    key = "lm_head.weight"
    tokenizer = plain_tokenizer()
    if latent:
        tokenizer.add_special_tokens({"additional_special_tokens": [START, LATENT, END]})

    def trained(state):
        embedding = next(v for k, v in state.items() if "wte" in k or "embed_tokens" in k)
        return state | {key: torch.randn_like(embedding)}

    head = plain_folder(tmp_path / "a", fresh(HEADS[name]), change=trained, tokenizer=tokenizer)[key]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "a").lm_head.weight, head)
    model, kept = load_model(tmp_path / "a", **SIZE), len(WORDS) + (5 if latent else 2)
    assert torch.equal(model.lm.lm_head.weight[:kept], head[:kept])
    expect_saved_equal(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False


def biases(state):
    return state | {
        f"model.layers.0.self_attn.{x}_proj.bias": torch.ones(16 if x == "q" else 8) for x in ("q", "k", "v")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (biases, r"does not describe, model.layers.0.self_attn.k_proj.bias \(3 in all\), expected no others"),
        (lambda s: s | {"score.weight": torch.ones(1)}, r"does not describe, score.weight \(1 in all\)"),
        (lambda s: {k: v for k, v in s.items() if k != "lm_head.weight"}, "no weights for lm_head.weight .1 missing"),
        (lambda s: {k: v for k, v in s.items() if "norm" not in k}, "no weights for model.layers.0.input_layernorm"),
        (
            lambda s: s | {"model.norm.weight": torch.full((16,), torch.nan)},
            "NaN or inf in model.norm.weight, expected",
        ),
        (lambda s: {k: v / (1 - ("up" in k)) for k, v in s.items()}, "NaN or inf in model.layers.0.mlp.up_proj.weight"),
        (lambda s: s | {"model.norm.weight": torch.ones(8)}, r"model.norm.weight of shape \[8\], expected \[16\]"),
    ],
)
def test_tensors_other_than_the_configs_or_not_finite_are_refused(change, message, tmp_path):
    plain_folder(tmp_path, fresh(HEADS["llama"]), change=change)
    refused(ValueError, tmp_path, f"^checkpoint .*: got .*{message}")


def test_files_of_the_hub_are_compared_too(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--lm" / "snapshots" / "0"
    state = plain_folder(snapshot, fresh(HEADS["llama"]))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    assert torch.equal(load_model("someone/lm", **SIZE).lm.model.norm.weight, state["model.norm.weight"])
    state["model.norm.weight"][3] = torch.inf
    save_file(state, snapshot / "model.safetensors", metadata={"format": "pt"})
    refused(ValueError, "someone/lm", "^checkpoint someone/lm: got NaN or inf in model.norm.weight, expected finite")


def test_buffers_of_older_versions_are_no_weights(tmp_path):
    def old(state):
        more = {"attn.bias": torch.ones(1, 1, 8, 8), "attn.masked_bias": torch.tensor(-1e4)}
        return state | {f"transformer.h.0.{name}": value for name, value in more.items()}

    plain_folder(tmp_path / "gpt2", fresh(HEADS["gpt2"]), change=old)
    plain_folder(
        tmp_path / "llama",
        fresh(HEADS["llama"]),
        change=lambda s: s | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    )
    for name in ("gpt2", "llama"):
        assert load_model(tmp_path / name, **SIZE).num_thoughts == 2


def test_keys_without_the_base_models_prefix_are_compared_too(tmp_path):
    """As in the published GPT-2."""
    bare = lambda s: {k.removeprefix("transformer."): v for k, v in s.items()}  # noqa: E731
    state = plain_folder(tmp_path, fresh(HEADS["gpt2"]), change=bare)
    model = load_model(tmp_path, **SIZE)
    assert all(torch.equal(model.lm.transformer.state_dict()[k][: len(v)], v) for k, v in state.items())


def test_shards_are_read_and_a_tensor_with_two_values_is_refused(tmp_path):
    state = plain_folder(tmp_path, fresh(HEADS["gpt2"]))
    (tmp_path / "model.safetensors").unlink()
    parts = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name, part in zip(names, parts, strict=True):
        save_file(part, tmp_path / name, metadata={"format": "pt"})
    held = load_model(tmp_path, **SIZE).lm.state_dict()
    assert all(torch.equal(held[key][: len(value)], value) for key, value in state.items())
    save_file(parts[1] | {"transformer.ln_f.bias": state["transformer.ln_f.bias"] + 1}, tmp_path / names[1])
    save_file(parts[0] | {"transformer.ln_f.bias": state["transformer.ln_f.bias"]}, tmp_path / names[0])
    refused(ValueError, tmp_path, "got two values of transformer.ln_f.bias, expected one")


def test_bfloat16_files_become_float32_weights_of_the_same_values(tmp_path):
    config = fresh(HEADS["llama"])
    config.dtype = torch.bfloat16
    state = plain_folder(tmp_path / "a", config, change=lambda s: {k: v.bfloat16() for k, v in s.items()})
    model = load_model(tmp_path / "a", **SIZE)
    assert torch.equal(model.lm.model.norm.weight, state["model.norm.weight"].float())
    expect_saved_equal(model, tmp_path / "b")
    assert {value.dtype for value in load_file(tmp_path / "b" / "model.safetensors").values()} == {torch.float32}


def test_generation_config_is_kept(tmp_path):
    plain_folder(tmp_path / "a", fresh(HEADS["llama"]))
    written = {"eos_token_id": [0, 7], "max_length": 33, "temperature": 0.25, "do_sample": True}
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(written))
    save_model(load_model(tmp_path / "a", **SIZE), tmp_path / "b")
    kept = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert {key: kept[key] for key in written} == written


# -- the row of "<<" ------------------------------------------------------------------------------------------------


def marker_tokenizer(kind):
    pieces = ["<eos>", "<unk>", "▁", "<", "▁<", "a", "=", "<<"]
    if kind in ("sentencepiece", "sentencepiece with a piece twice"):  # "<<" is "▁", "<", "<"
        pieces = [p for p in pieces if p not in ("▁<", "<<")] + ["a"] * kind.endswith("twice")
        core = Tokenizer(models.Unigram([(p, -1.0) for p in pieces], unk_id=1))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "sentencepiece with ▁<":
        core = Tokenizer(models.Unigram([(p, -1.0) for p in pieces if p != "<<"], unk_id=1))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "bytes":  # GPT-2's alphabet: "<" is itself
        core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces[:-1])}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        core = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("word", "<<"),
        ("sentencepiece", "<"),
        ("sentencepiece with ▁<", "▁<"),
        ("sentencepiece with a piece twice", "<"),
        ("bytes", "<"),
    ],
)
def test_latent_rows_start_as_the_first_piece_of_the_marker_with_a_bracket(kind, first, tmp_path):
    plain_folder(tmp_path, GPT2Config(**SMALL_GPT2), tokenizer=marker_tokenizer(kind))
    model = load_model(tmp_path, **SIZE)
    table = model.lm.transformer.wte.weight
    same = [i for i in range(len(table)) if torch.equal(table[i], table[model.start_id])]
    assert same == [model.tokenizer.convert_tokens_to_ids(first), model.start_id, model.latent_id, model.end_id]


@pytest.mark.parametrize(
    ("kind", "target"), [("word", "="), ("sentencepiece", "="), ("sentencepiece with ▁<", "="), ("bytes", "=")]
)
def test_a_thought_is_decoded_to_the_first_piece_that_is_not_blank(kind, target):
    tokenizer = marker_tokenizer(kind)
    problem = Problem("a", "a ?", ("a = =",), "1", "t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curriculum, "step_result", lambda step: step[-1])
        targets = curriculum.result_tokens(tokenizer, [problem], thoughts=2, c_thought=2)
    assert targets.tolist() == [[curriculum.IGNORE, tokenizer.convert_tokens_to_ids(target)]]


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, with a gap in its ids."""

    ids = {"<eos>": 0, "<": 1, "a": 3, "b": 5}  # noqa: RUF012
    vocab_size = 4

    def get_vocab(self):
        return self.ids | self.added_tokens_encoder

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.ids[token]

    def _convert_id_to_token(self, index):
        return {i: token for token, i in self.ids.items()}[index]


def test_a_python_tokenizer_with_gaps_is_refused():
    lm = AutoModelForCausalLM.from_config(GPT2Config(**SMALL_GPT2 | {"vocab_size": 8}))
    with pytest.raises(
        ValueError, match="^tokenizer: got ids with gaps, expected free ids after the last; use one with"
    ):
        loading.add_latent_tokens(lm, Letters(eos_token="<eos>"))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    plain_folder(tmp_path, GPT2Config(**SMALL_GPT2), tokenizer=plain_tokenizer(eos_token=None))
    refused(ValueError, tmp_path, "^tokenizer: got no eos token, expected one, which ends answers; use another, or")


# -- free ids for the latent tokens ---------------------------------------------------------------------------------

GAPS = ("<eos>", "<unk>", *WORDS)


def before(kind):
    """A tokenizer of WORDS whose ids have gaps, or that knows some latent tokens already."""
    if kind == "gaps":  # fewer tokens than the highest id says, as by count
        return plain_tokenizer(vocabulary={text: i + (4 if i > 9 else 0) for i, text in enumerate(GAPS)})
    if kind == "a token at the last row":
        return plain_tokenizer(vocabulary={text: i for i, text in enumerate(GAPS[:-1])} | {GAPS[-1]: 127})
    tokenizer = plain_tokenizer((LATENT, *WORDS) if kind == "a word" else WORDS, pattern=r"<\|[a-z-]+\||\w+|\n|<<|\S")
    if kind == "one special":
        tokenizer.add_special_tokens({"additional_special_tokens": [LATENT]})
    if kind == "two plain, with another between":
        tokenizer.add_tokens([END, "<tool>", START])
    return tokenizer


@pytest.mark.parametrize(
    "kind", ["gaps", "a token at the last row", "a word", "one special", "two plain, with another between"]
)
def test_no_row_in_use_is_overwritten(kind, tmp_path):
    config = GPT2Config(**SMALL_GPT2 | {"vocab_size": 128})
    tokenizer = before(kind)
    old = tokenizer.get_vocab()
    state = plain_folder(tmp_path / "a", config, tokenizer=tokenizer)
    model = load_model(tmp_path / "a", **SIZE)
    table, rows = model.lm.transformer.wte.weight, state["transformer.wte.weight"]
    assert all(torch.equal(table[i], rows[i]) for i in old.values())
    assert {t: model.tokenizer.convert_tokens_to_ids(t) for t in old} == old
    for token in (START, LATENT, END):
        i = model.tokenizer.convert_tokens_to_ids(token)
        assert model.tokenizer.convert_ids_to_tokens(i) == token and i in model.tokenizer.all_special_ids
        assert token in old or (i not in old.values() and torch.equal(table[i], table[old["<<"]]))
        assert model.tokenizer("books" + token)["input_ids"] == [old["books"], i]
    assert len(table) == max(128, 1 + max(model.tokenizer.get_vocab().values()))
    expect_saved_equal(model, tmp_path / "b")


@pytest.mark.parametrize("file", weights.OBJECTS)
@pytest.mark.parametrize("text", ['{"model_type": "gpt2"', "[1]", "", "null", "{'model_type': 'gpt2'}"])
def test_a_damaged_json_file_is_named(saved, file, text):
    (saved / file).write_text(text)
    expected = "expected what transformers writes, a JSON object; restore or delete it"
    refused(ValueError, saved, f"^{saved / file}: got .*, {expected}")


def test_a_config_with_an_infinity_as_transformers_4_writes_it(saved):
    config = json.loads((saved / "config.json").read_text()) | {"time_step_limit": [0.0, float("inf")]}
    (saved / "config.json").write_text(json.dumps(config))
    assert load_model(saved).lm.config.time_step_limit == [0.0, float("inf")]


def test_a_model_saved_without_its_tokenizer(saved):
    for path in saved.glob("tokenizer*"):
        path.unlink()
    refused(FileNotFoundError, saved, "^checkpoint .*: got no tokenizer, expected tokenizer.json")


def test_an_adapter_beside_weights_is_not_left_out(saved):
    (saved / "adapter_config.json").write_text("{}")
    refused(ValueError, saved, "got an adapter, expected model.safetensors; merge it into its base model")


def test_a_single_file_beside_other_shards_is_refused(saved):
    state = load_file(saved / "model.safetensors")
    places = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file(state, saved / "model-00001-of-00001.safetensors")
    assert load_model(saved).num_thoughts == 2  # the same twice
    save_file(state | {"transformer.ln_f.weight": torch.zeros(32)}, saved / "model-00001-of-00001.safetensors")
    refused(ValueError, saved, "got two values of transformer.ln_f.weight, expected one; remove the wrong file")


def test_a_tokenizer_of_another_model(saved):
    word_tokenizer((*WORDS, "further", "words")).save_pretrained(saved)
    refused(ValueError, saved, "^tokenizer: got 87 tokens for 85 embedding rows, expected")


def test_special_tokens_without_a_row_get_one(tmp_path):
    tokenizer = plain_tokenizer()
    config = GPT2Config(**SMALL_GPT2 | {"vocab_size": len(tokenizer)})
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)  # as google/gemma-3-1b-pt
    state = plain_folder(tmp_path / "model", config, tokenizer=tokenizer)
    model = load_model(tmp_path / "model", **SIZE)
    table, marker = model.lm.transformer.wte.weight, model.tokenizer.convert_tokens_to_ids("<<")
    assert torch.equal(table[: config.vocab_size], state["transformer.wte.weight"])
    assert torch.equal(table[config.vocab_size :], table[[marker] * 4])
    save_model(model, tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again").lm.transformer.wte.weight, table)
    tokenizer.add_tokens(["ordinary"])
    tokenizer.save_pretrained(tmp_path / "model")
    refused(ValueError, tmp_path / "model", "^tokenizer: got .* embedding rows, expected")


@pytest.mark.parametrize("added", [{"extra_special_tokens": [START, LATENT, END]}, {"eos_token": "</s>"}])
def test_latent_tokens_and_eos_without_rows_are_refused(added, tmp_path):
    tokenizer = plain_tokenizer()
    config = GPT2Config(**SMALL_GPT2 | {"vocab_size": len(tokenizer)})
    tokenizer.add_special_tokens(added)
    plain_folder(tmp_path, config, tokenizer=tokenizer)
    refused(ValueError, tmp_path, "^tokenizer: got .* embedding rows, expected")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"num_thoughts": "six"}', '{"thoughts": 6}', '{"num_thoughts": -1}', "\xff"]
)
def test_a_damaged_latentlab_json(saved, text):
    (saved / "latentlab.json").write_bytes(text.encode("latin-1"))
    refused(
        ValueError,
        saved,
        r"latentlab\.json: .*expected num_thoughts, max_new_tokens, feedback as `save_model` writes them",
        num_thoughts=1,
    )


def test_no_pickle_is_read(saved, tmp_path):
    """A folder with a pickle beside or instead of the safetensors: it is not touched."""
    payload = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (saved / "pytorch_model.bin").write_bytes(payload)
    load_model(saved)
    (saved / "model.safetensors").unlink()
    refused(ValueError, saved, "got weights as pickles, which are not read, expected model.safetensors; load them with")
    assert not (tmp_path / "ran").exists()


def test_build_needs_no_more_than_words():
    model = build_model(("1", "###"), n_layer=1, n_embd=8, n_head=1, n_positions=16, seed=0, **SIZE)
    assert len(model.tokenizer) == 7


def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path):
    save_model(tiny_gpt2(), tmp_path / "run" / "best")
    (tmp_path / "run" / "config.json").write_text("{}")  # the run's own
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert load_model(tmp_path / "run").num_thoughts == 2
