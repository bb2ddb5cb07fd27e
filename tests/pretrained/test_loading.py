"""pretrained/: building, loading and storing, and one clear line for every checkpoint that is none."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from latentlab.data.word_problems import WORDS, word_problems
from latentlab.model import END, LATENT, START
from latentlab.pretrained import loading
from latentlab.pretrained.loading import load_model, model_from_config, save_model, weights_hash
from latentlab.pretrained.scratch import build_model, word_tokenizer
from latentlab.reward import exact_answer
from latentlab.rollouts import rollout
from tests.conftest import tiny_gpt2

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


def test_only_safetensors_are_written(saved):
    assert [path.name for path in saved.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")] == []
    assert (saved / "model.safetensors").exists()


def test_storing_and_loading_write_nothing_to_the_screen(tmp_path):
    """In a process of its own: what transformers says, it says once."""
    code = (
        "import sys, latentlab.pretrained.loading as b\n"
        "shape = dict(n_layer=1, n_embd=8, n_head=1, n_positions=16, seed=0, num_thoughts=1, max_new_tokens=2)\n"
        "b.save_model(b.build_model(('1',), **shape), sys.argv[1])\n"
        "b.save_model(b.load_model(sys.argv[1]), sys.argv[1])"
    )
    root = Path(loading.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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
    refused(ValueError, llama_folder, "latentlab.json .*num_thoughts and max_new_tokens; pass them", feedback="thought")
    refused(ValueError, llama_folder, "expected num_thoughts; pass them", max_new_tokens=3)


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
    for change in ({"n_embd": 64}, {"n_layer": 3}):  # another shape; a layer that is not in the file
        (saved / "config.json").write_text(json.dumps(config | change))
        refused(ValueError, saved, "^checkpoint .*model: could not be read")


def test_a_damaged_config(saved):
    (saved / "config.json").write_text('{"model_type": "gpt2"')
    refused(ValueError, saved, "^checkpoint .*model: could not be read")


def test_a_tokenizer_of_another_model(saved):
    word_tokenizer((*WORDS, "further", "words")).save_pretrained(saved)
    refused(ValueError, saved, "^tokenizer: got 87 tokens for 85 embedding rows, expected")


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
    refused(FileNotFoundError, saved, "without config.json and .*safetensors")
    assert not (tmp_path / "ran").exists()


def test_build_needs_no_more_than_words():
    model = build_model(("1", "###"), n_layer=1, n_embd=8, n_head=1, n_positions=16, seed=0, **SIZE)
    assert len(model.tokenizer) == 7


def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path):
    save_model(tiny_gpt2(), tmp_path / "run" / "best")
    (tmp_path / "run" / "config.json").write_text("{}")  # the run's own
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert load_model(tmp_path / "run").num_thoughts == 2
