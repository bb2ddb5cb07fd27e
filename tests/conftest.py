"""Fixtures: models of a few thousand weights and a handful of problems; everything offline, one thread, no bars."""

import json
import os
import subprocess
from types import SimpleNamespace

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported

import jaxtyping
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# In tests, beartype checks the annotated shapes and types of the method's functions at every call.
CHECKED = ("attention", "masks", "model", "rollouts", "advantage", "loss", "grpo")
jaxtyping.install_import_hook([f"latentlab.{name}" for name in CHECKED], "beartype.beartype")

from latentlab.config import from_dict, load_preset, to_dict
from latentlab.data.word_problems import WORDS, word_problems
from latentlab.pretrained.loading import load_model
from latentlab.pretrained.scratch import build_model
from latentlab.study import launch

torch.set_num_threads(1)
BACKBONES = ("gpt2", "llama")


@pytest.fixture
def unchecked(monkeypatch):
    """No type checks: for calls that pass wrong types on purpose, whose own error is tested."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True, scope="session")
def own_results(tmp_path_factory):
    """No test reads or writes the results of the user who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLAB_REPORTS", str(tmp_path_factory.mktemp("reports")))
        yield


def sharpen(model, factor=4.0):
    """Larger weights: fresh ones give almost uniform answers, on which no mistake would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def tiny_gpt2(**changes):
    """A two-layer GPT-2 of width 32 with two thoughts."""
    shape = {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 4,
        "n_positions": 64,
        "num_thoughts": 2,
        "max_new_tokens": 5,
        "seed": 0,
    }
    return build_model(WORDS, **{**shape, **changes})


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A foreign checkpoint: Llama with grouped-query attention and a tokenizer that knows no latent token."""
    folder = tmp_path_factory.mktemp("llama")
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(("<eos>", "<unk>", *WORDS))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\n|<<|>>|###|\d+|[A-Za-z]+|[^\sA-Za-z\d]"), "removed", invert=True
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_model(llama_folder):
    """make_model("gpt2" | "llama"): a fresh model with sharpened weights."""

    def make(name):
        if name == "gpt2":
            return sharpen(tiny_gpt2())
        return sharpen(load_model(llama_folder, num_thoughts=2, max_new_tokens=5))

    return make


@pytest.fixture(params=BACKBONES)
def model(request, make_model):
    """Both backbone families in turn."""
    return make_model(request.param)


@pytest.fixture
def gpt2(make_model):
    return make_model("gpt2")


@pytest.fixture(scope="session")
def problems():
    """Four problems whose questions differ in length, so that a batch of them is padded."""
    return [word_problems("train", 1, seed=0, steps=steps)[0] for steps in (2, 1, 3, 4)]


@pytest.fixture(scope="session")
def word_sets():
    """Training and validation problems of two steps."""
    return word_problems("train", 24, seed=0, steps=2), word_problems("validation", 6, seed=0, steps=2)


def merged(values, changes):
    """Nested dicts, `changes` over `values`."""
    both = {k: merged(values[k], v) if isinstance(v, dict) and k in values else v for k, v in changes.items()}
    return {**values, **both}


SMALL = {
    "data": {"train_size": 24, "validation_size": 6, "test_size": 6, "steps": 2},
    "backbone": {"n_layer": 1, "n_embd": 32, "n_positions": 64},
    "curriculum": {"steps": [3, 2, 4], "batch_size": 6, "eval_every": 2, "stop_accuracy": 1.0, "warmup_steps": 2},
    "grpo": {"steps": 4, "num_problems": 3, "num_generations": 4, "eval_every": 2},
    "evaluate": {"batch_size": 4, "num_generations": 4},
}


def small_config(**changes):
    """small_config(grpo={"arm": "none"}): the tiny preset, shrunk to a run of a second, with changes."""
    return from_dict(merged(merged(to_dict(load_preset("tiny")), SMALL), changes))


@pytest.fixture
def config():
    return small_config


class Processes:
    """Stands in for subprocess.Popen: records command lines, makes the run folder; a run ends with the next of its
    `codes`, else with 0, and its summary has its `scores`."""

    def __init__(self):
        self.commands, self.codes, self.scores, self.environments = [], {}, {}, []

    def __call__(self, command, *, stdout, stderr, text, env):
        words = command[3:]
        name = words[words.index("--out") + 1].split("/")[-1]
        self.commands.append((name, words))
        self.environments.append(env)
        code = next(self.codes.get(name, iter([])), 0)
        summary = json.dumps({"out": name, "validation_accuracy": self.scores.get(name, 0.5), "rollouts": 8})
        if code:
            stderr.write(f"{name} went wrong\n")
            stderr.flush()
        said = "" if code else f"a line before\n{summary}\n"
        return SimpleNamespace(returncode=code, communicate=lambda: (said, None), terminate=lambda: None)

    @property
    def names(self):
        return [name for name, _ in self.commands]

    def words(self, name):
        return next(words for got, words in self.commands if got == name)


@pytest.fixture
def processes(monkeypatch):
    """No process is started: the runs of a sweep are recorded."""
    fake = Processes()
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=fake, PIPE=subprocess.PIPE))
    monkeypatch.setattr(launch, "commit", lambda: "0123")
    return fake
