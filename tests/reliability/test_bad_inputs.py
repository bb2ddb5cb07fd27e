"""Bad inputs by class: every one ends in one line with a remedy, runs nothing and leaves what was there as it was.

`make reliability` writes how many of each class were tried into reports/reliability.json (misuse.py).
"""

import ast
import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import mistune
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from yaml import SafeLoader

from latentlab import config
from latentlab.cli import main
from latentlab.config import changed_words, from_dict, load_preset, to_dict
from latentlab.data.jsonl import write_jsonl
from latentlab.data.word_problems import word_problems
from latentlab.evaluation import accuracy
from latentlab.pretrained.loading import save_model
from latentlab.problems import Problem
from latentlab.study import budget, notebooks, results, tables
from latentlab.training import arms, preflight
from latentlab.training.curriculum import fit_curriculum
from tests.conftest import sharpen, tiny_gpt2

PACKAGE = Path(preflight.__file__).parents[1]
SMALL = ["--preset", "smoke", "--data.train-size", "8", "--data.validation-size", "4", "--data.test-size", "4",
         "--data.steps", "2"]  # fmt: skip
few = settings(
    derandomize=True, deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
many = settings(few, max_examples=150)


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def misuse(capfd, record_property, tmp_path, monkeypatch, request):
    """misuse(kind, *words): the one line of a command that must be refused; what happened is recorded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path / "reports"))
    counts, rows, computed = Counter(), [], []
    record_property("inputs", counts)
    record_property("misuse", rows)
    for module, name in ((accuracy, "rollout"), (arms, "rollout"), (arms, "curriculum_gradient"), (budget, "rollout")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: (computed.append(1), real(*a, **k))[1])
    case = request.node.name.removeprefix("test_").replace("_", " ")

    def call(kind, *words, may_pass=False):
        before = snapshot(tmp_path)
        computed.clear()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        counts.update({
            kind: 1, "refused": code != 0, "more_than_one_line": err.count("\n") > 1,
            "payloads_run": (tmp_path / "payload").exists(), "folders_changed": snapshot(tmp_path) != before,
        })  # fmt: skip
        assert not (tmp_path / "payload").exists()
        if may_pass and code == 0:
            return ""
        assert code == 2, (code, words)
        assert err.startswith("latentlab: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert len(err) < 700 and ("expected" in err.lower() or ";" in err or "--help" in err), err
        assert out == "" and "Traceback" not in err
        assert snapshot(tmp_path) == before and not computed
        if not may_pass:
            rows.append({"kind": kind, "input": case, "words": said(words), "exit_code": code, "line": said([err])})
        return err

    def said(words):
        text = " ".join(map(str, words))
        for folder in (tmp_path, tmp_path.parent, PACKAGE):
            text = text.replace(str(folder), "")
        return text.strip()[:300]

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(sharpen(tiny_gpt2(n_positions=128)), folder)
    return folder


@pytest.fixture
def model_folder(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


class Payload:
    """Unpickled, it leaves a file `payload`."""

    def __reduce__(self):
        return (open, ("payload", "w"))


# -- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("curriculum --seed 1 --seed 2", "--seed: got it twice, expected it once"),
        ("grpo --grpo.learning-rate 1e-4 --grpo.learning_rate=1e-5", "--grpo.learning-rate: got it twice"),
        ("data --preset tiny --preset smoke", "--preset: got it twice"),
        ("curriculum --resume --resume", "--resume: got it twice"),
        ("data --data.name=", "got an empty value"),
        ("grpo --grpo.learning-rate 1e400", "grpo.learning_rate: got inf, expected"),
        ("grpo --grpo.max-grad-norm inf", "grpo.max_grad_norm: got inf, expected a finite number"),
        ("grpo --grpo.beta nan", "grpo.beta: got nan"),
        ("grpo --grpo.learning-rate -0", "grpo.learning_rate: got -0.0, expected"),
        ("curriculum --seed 99999999999999999999999", "seed: got 9999"),
        ("curriculum --seed -1", "seed: got -1, expected at least 0"),
        ("curriculum --seed 0x10", "invalid literal"),
        ("data --data.seed 4294967296", "data.seed: got 4294967296, expected a number less than 2147483648"),
        ("data --n 999999999999", "n: got 999999999999, expected at most"),
        ("curriculum --data.train-size 100000000", "data.train_size: got 100000000, expected at most"),
        ("grpo --grpo.num-problems 1000000 --grpo.num-generations 1000000", "got 1000000000000 rollouts"),
        ("evaluate --threads 100000", "threads: got 100000, expected at most 1024"),
        ("curriculum --max-minutes nan", "max_minutes: got nan"),
        ("curriculum --device tpu", "device: got 'tpu', expected auto, cpu"),
        ("verify --device cuda:99", "device: got cuda:99, but torch sees"),
        ("bench --device moon", "device: got 'moon', expected"),
        ("sweep --sweep.controls coconut pause", "invalid choice 'coconut' for argument '--sweep.controls'"),
        ("sweep --retries -1", "retries: got -1"),
        ("sweep --executor cloud", "invalid choice 'cloud'"),
        ("reproduce --budget-minutes -3", "budget_minutes: got -3"),
        ("study --only 99", "--only 99: expected the beginning of one of 00_tour"),
        ("curriculum --seed 1.0", "--seed: invalid literal for int()"),
        ("grpo --seed True", "--seed: invalid literal for int()"),
        ("grpo --seed 1e3", "--seed: invalid literal for int()"),
        ("grpo --grpo.temperature nan", "grpo.temperature: got nan, expected"),
        ("grpo --grpo.temperature inf", "grpo.temperature: got inf, expected"),
        ("data --grpo.loss-type sum", "invalid choice 'sum'"),
        ("data --grpo.loss-type sapo", "invalid choice 'sapo'"),
        ("data --grpo.scale-rewards whiten", "invalid choice 'whiten'"),
        ("data --grpo.loss-type bnpo", "invalid choice 'bnpo'"),
        ("data --grpo.scale-rewards std", "invalid choice 'std'"),
        ("curiculum --preset tiny", "got the verb 'curiculum', expected one of curriculum, grpo"),
        ("Evaluate", "got the verb 'Evaluate', expected one of"),
        ("evaluate a b", "evaluate: Unrecognized options: b"),
        ("study --preset smoke --only", "Missing value for argument '--only'"),
        ("study --preset smol --only 02", "the others need smoke or tiny"),
        ("evaluate --limit 1.5", "--limit: invalid literal"),
        ("sweep --sweep.seeds 0 0", "sweep.seeds: got (0, 0), expected different ones"),
        ("reproduce --budget-minutes inf", "budget_minutes: got inf"),
        ("reproduce --backbone a --init-from b", "got both, expected an untrained or a trained model"),
        ("sweep --slurm partition=gpu", "add --executor slurm"),
        ("curriculum --backbone.n-head 3", "backbone.n_head: got 3, expected a divisor"),
    ],
)
def test_words(misuse, words, said):
    assert said in misuse("command line", *words.split(" "))


def test_an_empty_word(misuse):
    for words in (("curriculum", "--out", ""), ("evaluate", ""), ("grpo", "--init-from", "", "--seed", "1")):
        assert "got an empty value" in misuse("command line", *words)


def leaves(values, where=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*where, key))
        yield (*where, key)


FIELDS = sorted(leaves(to_dict(load_preset("smoke"))))
numbers = st.floats() | st.integers() | st.sampled_from([10**30, -1, 0, -0.0, 2**31, 1e308])
scalars = st.none() | st.booleans() | st.text(max_size=6) | numbers
anything = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(scalars, inner), max_leaves=5)


def test_fields_of_any_type(record_property):
    """A field set to anything is refused in one line that names it, or makes a Config that says the same again."""
    refused = 0

    @many
    @given(st.sampled_from(FIELDS), anything)
    def check(field, value):
        nonlocal refused
        values = value
        for key in reversed(field):
            values = {key: values}
        try:
            config = from_dict(values)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error).replace("\\n", "") and "expected" in str(error)
            assert field[-1] in str(error).replace(" ", "_") or "mask" in field or field == ("grpo",)
        else:
            assert from_dict(to_dict(config)) == config
            json.dumps(to_dict(config), allow_nan=False)

    check()
    assert refused > 100
    record_property("inputs", {"config field": refused})


def test_option_values_of_any_text(misuse):
    names = [".".join(field).replace("_", "-") for field in FIELDS if len(field) > 1 and "mask" != field[-1]]

    @few
    @given(st.sampled_from(names), st.text(st.characters(codec="utf-8"), max_size=8) | numbers.map(str))
    def check(name, value):
        misuse("config option", "data", "--n", "1", "--data.steps", "1", f"--{name}={value}", may_pass=True)

    check()


def test_preset_files(misuse, tmp_path, monkeypatch):
    presets = tmp_path / "presets"
    shutil.copytree(config.PRESETS, presets)
    monkeypatch.setattr(config, "PRESETS", presets)
    text = (presets / "smoke.toml").read_bytes()
    for content in (
        b"\xff\xfe", b"- a", b"seed", b"1 = 2", b"[a] = 1", b"seed = 1\nseed = 2", b"data = {name = 'gsm8k'",
        b"data = {steps = 1, steps = 2}", b"!!python/object/apply:os.system ['touch payload']", b"seed = 0000-99-99",
        b"seed = 1979-05-27", b"preset = 'other'\nsead = 1", b"\x00", text[: len(text) // 2] + b"{",
        b"a = " + b"[" * 5000,
        b"grpo = {learning_rate = '1e-5'}", b"grpo = {learning_rate = nan}", b"seed = true", b"grpo =",
        b"sweep = {seeds = 1}", b"seed = 1e400", b"inherits = 'nothing'", b"inherits = 5", b"inherits = 'odd'",
        b"inherits = '../tiny'", b"inherits = 'smoke'", b"inherits = 'tiny'\nmax_new_tokens = {}", b"[[data]]",
    ):  # fmt: skip
        (presets / "odd.toml").write_bytes(content)
        misuse("preset file", "data", "--preset", "odd")

    @few
    @given(st.binary(max_size=30), st.integers(0, len(text)))
    def check(junk, where):
        (presets / "odd.toml").write_bytes(text[:where] + junk + text[where:])
        misuse("preset file", "data", "--n", "1", "--preset", "odd", may_pass=True)

    check()


# -- problems -------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder; data(lines) fills its SVAMP file."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("LATENTLAB_DATA", str(folder))

    def write(content):
        (folder / "svamp.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / "svamp.jsonl"

    write.folder = folder
    return write


def row(**changes):
    fields = {"id": "a", "question": "How many?", "steps": ["<<1+1=2>>"], "answer": "2", "source": "s"}
    return json.dumps({key: value for key, value in {**fields, **changes}.items() if value is not ...})


GOOD = row() + "\n" + row(id="b") + "\n"
LINES = {
    "zero-length": b"", "empty line": "\n", "truncated": GOOD[:-9], "half a character": GOOD.encode()[:5] + b"\xc3",
    "not UTF-8": GOOD.encode() + b'{"id": "\xff"}', "UTF-16": GOOD.encode("utf-16"), "byte order mark": "\ufeff" + GOOD,
    "missing key": row(answer=...), "unknown key": row(extra=1), "duplicate id": row() + "\n" + row(),
    "NaN": row(answer=float("nan")), "a number": row(answer=7), "1e400": row().replace('"2"', "1e400"),
    "huge": row().replace('"2"', "9" * 5000), "a huge text": row(answer="1e400"), "null": row(question=None),
    "a list": "[1]", "not JSON": "{'id': 1}", "deep": "[" * 100_000, "steps are text": row(steps="<<1+1=2>>"),
    "steps are numbers": row(steps=[1]), "blank": row(question="  "), "half a surrogate": row(question="\ud800"),
    "no number": row(answer="two"), "two numbers": row(answer="1 2"),
    "not canonical": row(answer="02"), "a pickle": pickle.dumps(Payload()),
}  # fmt: skip


LINES |= {
    "answer twice": row()[:-1] + ', "answer": "3"}',
    "id twice": row()[:-1] + ', "id": "b"}',
    "blank first line": "\n" + GOOD,
    "blank line": GOOD + "  \n" + row(id="c"),
    "a JSON array": json.dumps([json.loads(row())]),
    "printed array": "[\n" + GOOD,
    "an HTML page": "<!DOCTYPE html>\n<html><title>404</title>",
    "html": "<html>\n" + GOOD,
    "LFS pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "NUL": row() + "\n\0\0\0\n",
    "Infinity": row(answer=float("inf")),
    "-Infinity": row(answer=-float("inf")),
    "gzip": b"\x1f\x8b\x08\x00" + b"x" * 9,
    "two on a line": row() + row(id="b"),
    "comma": row() + ",\n" + row(id="b"),
    "a long line": "x" * 1_000_000,
    "a text": '"a"',
    "a number alone": "5",
    "indented": json.dumps(json.loads(row()), indent=1),
    "true": row(id=True),
    "UTF-16 BE": GOOD.encode("utf-16-be"),
    "Latin-1": row(question="Wie viele B\xfccher?").encode() + b"\xfc",
    "fraction": row(answer="1/2 or 1/3"),
    "unit": row(answer="5 apples"),
    "empty id": row(id=""),
    "no steps": row(steps=None),
}
LOOKS = {
    "blank first line": "line 1: got a blank line, expected a problem as one JSON object",
    "blank line": "line 3: got a blank line",
    "a JSON array": "got a JSON array",
    "printed array": "got a JSON array",
    "an HTML page": "got an HTML page",
    "LFS pointer": "got a Git LFS pointer",
    "NUL": "line 2: got a NUL byte",
    "UTF-16": "got UTF-16 text",
    "byte order mark": "got a byte order mark",
    "answer twice": "got the key 'answer' twice",
    "Infinity": "got Infinity, which is no JSON number",
    "duplicate id": "line 2: got id 'a' again (first on line 1)",
    "gzip": "got gzip data",
    "a list": "got a JSON array",
    "empty line": "got a blank line",
    "a number alone": "got 5, no object",
}


@pytest.mark.parametrize("name", LINES)
def test_problem_files(misuse, data, name):
    path = data(LINES[name])
    said = misuse("problem file", "evaluate", "--benchmark", "svamp", *SMALL)
    assert str(path) in said and (name in ("zero-length",) or "line" in said) and "Expecting value" not in said
    assert LOOKS.get(name, "") in said


def test_damaged_problem_files(misuse, data):
    """A good file, cut off or with other bytes in it, is refused or still holds good problems."""
    good = data.folder / "gsm8k_test.jsonl"
    rows = word_problems("test", 5, seed=0)
    write_jsonl(rows, good)
    content = good.read_bytes()

    @few
    @given(st.integers(0, len(content)), st.integers(0, 9), st.binary(max_size=6))
    def check(start, length, junk):
        good.write_bytes(content[:start] + junk + content[start + length :])
        misuse("problem file", "data", "--data.name", "gsm8k", "--n", "9", may_pass=True)

    check()


def test_data_folders(misuse, data, tmp_path, monkeypatch):
    words = ("data", "--data.name", "gsm8k", "--split", "train")
    assert "gsm8k_train.jsonl" in misuse("data folder", *words)
    write_jsonl(word_problems("train", 3, seed=0), data.folder / "gsm8k_train.jsonl")
    flags = data.folder / "gsm8k_flags.json"
    for content in (None, b"", b"[]", b"{}", b'{"train": 1}', b'{"train": {"gsm8k_aug_valid_500": [[]]}}', b"\xff"):
        if content is not None:
            flags.write_bytes(content)
        assert "gsm8k_flags.json" in misuse("data folder", *words)
    (data.folder / "svamp.jsonl").mkdir()
    misuse("data folder", "evaluate", "--benchmark", "svamp")
    monkeypatch.setenv("LATENTLAB_DATA", str(data.folder / "gsm8k_train.jsonl"))
    assert "correct LATENTLAB_DATA" in misuse("data folder", *words)


@pytest.mark.parametrize("token", ["<|latent|>", "<eos>"])
def test_control_tokens_in_a_question(misuse, data, token):
    data(row(question=f"a {token} b"))
    said = misuse("problem file", "evaluate", "--benchmark", "svamp", *SMALL)
    assert f"got the control token {token} in 'a {token} b\\n'" in said


# -- model and problems together ------------------------------------------------------------------------------------


def test_problems_that_do_not_fit_are_refused_before_a_run_begins(misuse, model_folder, data):
    long = Problem("a", "How many apples? " * 60, ("<<1+1=2>>",), "2", "s")
    write_jsonl([long], data.folder / "svamp.jsonl")
    assert "length: got" in misuse("fit", "evaluate", model_folder, "--benchmark", "svamp")
    for verb, more in (("curriculum", []), ("grpo", ["--init-from", model_folder])):
        words = [verb, *SMALL, "--data.steps", "30", "--out", "run", *more]
        del words[words.index("--data.steps") : words.index("--data.steps") + 2]
        assert "length: got" in misuse("fit", *words)
    foreign = Problem("a", "Wie viele Bücher liegen unter dem alten Kirschbaum", ("<<1+1=2>>",), "2", "s")
    write_jsonl([foreign], data.folder / "svamp.jsonl")
    assert "unknown words in the questions" in misuse("fit", "evaluate", model_folder, "--benchmark", "svamp")


def test_steps_without_a_result_are_refused_where_thoughts_are_decoded(word_sets, config):
    model = tiny_gpt2(n_positions=128)
    train, _ = word_sets
    odd = [*train, Problem("odd", "How many?", ("no result", "<<1+1=2>>"), "2", "s")]
    with pytest.raises(ValueError, match="got step 'no result', expected"):
        preflight.expect_together(model, odd, config(curriculum={"decode_weight": 1.0}), curriculum=True)
    preflight.expect_together(model, odd, config(curriculum={"decode_weight": 0.0}), curriculum=True)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def evaluate_words(folder):
    return ("evaluate", folder, *SMALL, "--limit", "1", "--evaluate.num-generations", "1")


def test_the_checkpoint_of_these_tests_is_good(checkpoint, capfd):
    assert main([str(word) for word in evaluate_words(checkpoint)]) == 0


WEIGHTS = "model.safetensors"


def damage(folder, name):
    """Make the good checkpoint in `folder` a bad one."""
    path = folder / name.split(":")[0]
    content = path.read_bytes() if path.exists() else b""
    what = name.split(":")[1]
    if what == "empty":
        path.write_bytes(b"")
    elif what == "missing":
        path.unlink()
    elif what == "half":
        path.write_bytes(content[: len(content) // 2])
    elif what == "short":
        path.write_bytes(content[:-1])
    elif what == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif what == "huge header":
        path.write_bytes((2**60).to_bytes(8, "little") + content[8:])
    elif what == "list":
        path.write_bytes(b"[]")
    elif what in ("twice", "HTML", "LFS", "NaN"):
        texts = {"HTML": "<!doctype html>", "LFS": "version https://git-lfs", "NaN": '{"num_thoughts": NaN}'}
        path.write_text(texts.get(what) or '{"num_thoughts": 2, "num_thoughts": 3, "max_new_tokens": 4}')
    elif what == "folder":
        path.unlink()
        path.mkdir()
    else:  # "key=value" of a JSON file
        key, value = what.split("=")
        path.write_text(json.dumps({**json.loads(content), key: json.loads(value)}))


@pytest.mark.parametrize(
    "name",
    [
        *(f"{WEIGHTS}:{how}" for how in ("empty", "missing", "half", "short", "pickle", "huge header", "folder")),
        *(f"config.json:{how}" for how in ("empty", "missing", "half", "list", "pickle", "n_embd=64", "n_layer=3")),
        *(f"config.json:{how}" for how in ('n_embd="a"', "n_head=0", "vocab_size=7", "vocab_size=-1")),
        'config.json:model_type="x"',
        *(f"tokenizer.json:{how}" for how in ("empty", "half", "list", "pickle")),
        *(f"latentlab.json:{how}" for how in ("empty", "missing", "half", "list", "pickle", "num_thoughts=-1")),
        *(f"latentlab.json:{how}" for how in ("max_new_tokens=0", "max_new_tokens=true", "twice", "HTML", "LFS")),
        "latentlab.json:NaN",
        *(f"latentlab.json:{how}" for how in ("num_thoughts=1e400", "num_thoughts=1000000000", 'feedback="x"', "x=1")),
    ],
)  # fmt: skip
def test_checkpoints(misuse, model_folder, name):
    if name == "latentlab.json:num_thoughts=1e400":
        (model_folder / "latentlab.json").write_text('{"num_thoughts": 1e400, "max_new_tokens": 4}')
    else:
        damage(model_folder, name)
    misuse("checkpoint", *evaluate_words(model_folder))


def spoil_weights(folder, what):
    tensors = load_file(folder / WEIGHTS)
    name = "transformer.h.1.ln_1.weight"
    if what in ("nan", "inf", "-inf"):
        tensors[name][3] = float(what)
    elif what == "nan in the embedding":
        tensors["transformer.wte.weight"][7, 3] = float("nan")
    elif what == "a third layer":
        tensors |= {key.replace(".h.1.", ".h.2."): value.clone() for key, value in tensors.items() if ".h.1." in key}
    elif what == "a bias more":
        tensors["transformer.wte.bias"] = torch.zeros(3)
    elif what == "a tensor less":
        del tensors[name]
    else:
        tensors[name] = torch.ones(5)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("verb", ["evaluate", "grpo", "curriculum"])
@pytest.mark.parametrize(
    "what",
    [
        "nan",
        "inf",
        "-inf",
        "nan in the embedding",
        "a third layer",
        "a bias more",
        *("a tensor less", "another shape"),
    ],
)
def test_weights_that_are_not_the_models(misuse, model_folder, verb, what):
    spoil_weights(model_folder, what)
    train = (
        verb,
        *SMALL,
        "--init-from",
        model_folder,
        "--out",
        "run",
        "--grpo.steps",
        "1",
        "--curriculum.steps",
        "1",
        "1",
    )
    said = misuse("A weights", *(evaluate_words(model_folder) if verb == "evaluate" else train))
    assert "finite" in said if "n" in what[:3] and what[0] in "ni-" else "checkpoint" in said


@pytest.mark.parametrize("token", ["<eos>", "<|end-latent|>"])
def test_a_control_token_of_the_tokenizer_in_a_question(misuse, model_folder, data, token):
    write = [Problem("a", f"How many {token} ?", ("<<1+1=2>>",), "2", "s")]
    text = "".join(json.dumps(dataclasses.asdict(problem)) + "\n" for problem in write)
    (data.folder / "svamp.jsonl").write_text(text)
    assert token in misuse("C control token", "evaluate", model_folder, "--benchmark", "svamp")


def test_a_checkpoint_with_the_tokenizer_of_another_vocabulary(misuse, model_folder, tmp_path, llama_folder):
    from latentlab.data.word_problems import WORDS
    from latentlab.pretrained.scratch import word_tokenizer

    word_tokenizer((*WORDS, *(f"word{i}" for i in range(50)))).save_pretrained(model_folder)
    assert "expected the tokenizer of these weights" in misuse("checkpoint", *evaluate_words(model_folder))


def test_code_beside_a_checkpoint_never_runs(misuse, model_folder):
    """A folder that asks for its own classes, as `trust_remote_code` would load them."""
    (model_folder / "evil.py").write_text("open('payload', 'w')\nclass Config: pass\nModel = Tokenizer = Config\n")
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    misuse("payload", *evaluate_words(model_folder))
    named = json.loads((model_folder / "tokenizer_config.json").read_text())
    named |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"}
    (model_folder / "tokenizer_config.json").write_text(json.dumps(named))
    misuse("payload", *evaluate_words(model_folder))


@pytest.mark.filterwarnings("error:Detected pickle")  # it would be a second line
def test_pickles_with_a_payload_never_run(misuse, model_folder, tmp_path):
    torch.save({"base_causallm.x": Payload()}, tmp_path / "checkpoint_1")
    misuse("payload", *evaluate_words(tmp_path / "checkpoint_1"))
    (tmp_path / "raw").write_bytes(pickle.dumps(Payload()))
    misuse("payload", *evaluate_words(tmp_path / "raw"))
    (model_folder / WEIGHTS).unlink()
    torch.save({"transformer.wte.weight": Payload()}, model_folder / "pytorch_model.bin")
    misuse("payload", *evaluate_words(model_folder))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(model_folder / "pytorch_model.bin", weights_only=True)
    os.chdir(tmp_path)
    torch.load(model_folder / "pytorch_model.bin", weights_only=False)  # it is one
    assert (tmp_path / "payload").exists()
    (tmp_path / "payload").unlink()


def test_a_run_with_a_bad_checkpoint_is_left_alone(misuse, checkpoint, capfd, tmp_path):
    grpo = ["grpo", *SMALL, "--init-from", checkpoint, "--out", "run", "--grpo.steps", "1", "--grpo.num-problems", "2",
            "--grpo.num-generations", "2"]  # fmt: skip
    assert main([str(word) for word in grpo]) == 0
    capfd.readouterr()
    misuse("checkpoint of a run", *grpo)
    state = tmp_path / "run" / "state.pt"
    whole = state.read_bytes()
    for content in (b"", b"PK\x03\x04", whole[:-100], {"identity": Payload()}, Payload(), torch.zeros(3), [], {}):
        state.write_bytes(content) if isinstance(content, bytes) else torch.save(content, state)
        assert "state.pt" in misuse("checkpoint of a run", *grpo, "--resume")
    for damaged in (b"", b"\xff", b"[]", b'{"seed": 5}'):
        (tmp_path / "run" / "config.json").write_bytes(damaged)
        misuse("checkpoint of a run", *grpo, "--resume")


def test_damaged_json_of_a_checkpoint(misuse, checkpoint, tmp_path):
    """Bytes changed anywhere in its small files: refused in one line, or still a model."""
    names = ["config.json", "latentlab.json", "tokenizer_config.json", "generation_config.json"]
    folder = tmp_path / "model"

    @settings(few, max_examples=10)
    @given(
        st.sampled_from(names), st.floats(0, 1), st.integers(0, 20), st.sampled_from([b"", b"}", b"9", b'"', b"\xff"])
    )
    def check(name, place, length, junk):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint, folder)
        content = (folder / name).read_bytes()
        start = int(place * len(content))
        (folder / name).write_bytes(content[:start] + junk + content[start + length :])
        misuse("checkpoint", *evaluate_words(folder), may_pass=True)

    check()


# -- folders and disks ----------------------------------------------------------------------------------------------

WRITERS = {
    "curriculum": ["curriculum", *SMALL, "--out", "{}"],
    "grpo": ["grpo", *SMALL, "--out", "{}"],
    "sweep": ["sweep", *SMALL, "--out", "{}"],
    "evaluate": ["evaluate", *SMALL, "--json", "{}/result.json"],
    "verify": ["verify", "--json", "{}/table.json"],
    "data": ["data", "--out", "{}/rows.jsonl"],
}
REPORTERS = {"study": ["study", "--preset", "smoke"], "report": ["report"], "bench": ["bench", "--shape", "tiny"]}


def commands(folder, monkeypatch):
    """Every command that writes, its output in `folder`."""
    for words in WRITERS.values():
        yield [word.format(folder) for word in words]
    monkeypatch.setenv("LATENTLAB_REPORTS", str(folder))
    yield from REPORTERS.values()


def test_a_file_where_a_folder_is_expected(misuse, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    for words in [*commands(tmp_path / "file", monkeypatch), ["data", "--out", "file/below/rows.jsonl"]]:
        assert "a file stands where a folder is expected" in misuse("output folder", *words)
    (tmp_path / "folder").mkdir()
    for words in (
        ["data", "--out", "folder"],
        ["evaluate", *SMALL, "--json", "folder"],
        ["verify", "--json", "folder"],
    ):
        assert "a folder stands where a file is expected" in misuse("output folder", *words)
    (tmp_path / "nowhere").symlink_to(tmp_path / "not" / "there")
    misuse("output folder", "data", "--out", "nowhere/rows.jsonl")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "name a place that can be written"),
        (errno.EACCES, "allow writing"),
        (errno.ENOSPC, "free some disk"),
    ],
)
def test_a_folder_that_cannot_be_written(misuse, tmp_path, monkeypatch, number, said):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for words in commands(tmp_path / "out", monkeypatch):
        assert said in misuse("read-only folder", *words)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(misuse, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o555)
    for words in commands(tmp_path / "out", monkeypatch):
        assert "allow writing" in misuse("read-only folder", *words)


def test_a_full_disk(misuse, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 0))
    for words in commands(tmp_path / "out", monkeypatch):
        assert "0 MiB free, expected" in misuse("full disk", *words)


def test_a_disk_that_fills_up_while_a_result_is_written(tmp_path, monkeypatch, capfd, checkpoint):
    """The measured numbers are printed, and no part of a file is left."""
    path = tmp_path / "result.json"

    def refuse(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    words = [*map(str, evaluate_words(checkpoint)), "--json", str(path)]
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert json.loads(out)["n"] == 1 and err.count("\n") == 1
    assert str(path) in err and "free some disk space" in err and list(tmp_path.iterdir()) == []


def test_a_sweep_without_room_for_its_runs(processes, tmp_path, monkeypatch):
    from latentlab.study.launch import Job, Launcher, run_jobs, run_processes

    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_bytes(b"x" * 10_000)
    jobs = [Job(name, "curriculum", load_preset("smoke")) for name in "abc"]
    execute = partial(run_processes, launcher=Launcher(), workers=1)
    run_jobs(jobs[:2], tmp_path, execute)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10_000))
    with pytest.raises(OSError, match="free, expected"):
        run_jobs(jobs, tmp_path, execute)
    assert processes.names == ["a", "b"]


# -- files of the user's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a file", "an empty file", "a link", "a link to nothing"])
@pytest.mark.parametrize("words", ["data --out", "evaluate --json", "verify --json", "bench --shape tiny --json"])
def test_an_output_file_that_exists(misuse, tmp_path, words, what):
    path = tmp_path / "mine"
    if "link" in what:
        (tmp_path / "target").write_text("kept")
        path.symlink_to(tmp_path / ("nowhere" if "nothing" in what else "target"))
    else:
        path.write_text("kept" * (what == "a file"))
    assert "which exists, expected a new file; name another" in misuse("F output file", *words.split(), path)


@pytest.mark.parametrize("name", ["/dev/null", "/dev/stdout"])
def test_an_output_file_that_is_a_device(misuse, name):
    assert "expected a new file" in misuse("F output file", "data", "--out", name)


@pytest.mark.parametrize("flag", [[], ["--resume"]])
@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "best", "best.old", "state.pt", "config.json"])
@pytest.mark.parametrize("verb", ["curriculum", "grpo"])
def test_a_run_folder_of_someone_else(misuse, tmp_path, checkpoint, verb, name, flag):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    if name.startswith("best"):
        shutil.copytree(checkpoint, tmp_path / "out" / name)
    else:
        (tmp_path / "out" / name).write_text('{"mine": 1}')
    start = ["--init-from", checkpoint] if verb == "grpo" else []
    misuse("F run folder", verb, *SMALL, *start, "--out", "out", *flag)


@pytest.mark.parametrize("flag", [[], ["--resume"]])
@pytest.mark.parametrize("verb", ["curriculum", "grpo"])
def test_a_checkpoint_as_a_run_folder(misuse, model_folder, verb, flag):
    misuse("F run folder", verb, *SMALL, "--init-from", model_folder, "--out", model_folder, *flag)


LOOPS = ("data --out loop", "evaluate --json loop", "sweep --out loop", "curriculum --out loop/run",
         "grpo --out loop", "data --out loop/rows.jsonl")  # fmt: skip


@pytest.mark.parametrize("words", LOOPS)
def test_a_link_to_itself(misuse, tmp_path, words):
    (tmp_path / "loop").symlink_to("loop")
    misuse("I link", *words.split())


@pytest.mark.parametrize("what", ["missing", "empty", "of other files"])
@pytest.mark.parametrize("verb", ["curriculum", "grpo"])
def test_resume_of_nothing(misuse, tmp_path, verb, what):
    if what != "missing":
        (tmp_path / "out").mkdir()
    if what == "of other files":
        (tmp_path / "out" / "notes.txt").write_text("mine")
    said = misuse("F run folder", verb, *SMALL, "--out", "out", "--resume")
    assert "resume: got out, expected the folder of a run; correct --out, or drop --resume" in said


@pytest.fixture(scope="session")
def finished(checkpoint, tmp_path_factory):
    """A finished run, and the words that made it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = ["grpo", *SMALL, "--init-from", str(checkpoint), "--grpo.steps", "1", "--grpo.num-problems", "2",
             "--grpo.num-generations", "2"]  # fmt: skip
    assert main([*words, "--out", str(folder)]) == 0
    return folder, words


def other_best(run):
    shutil.rmtree(run / "best")
    save_model(tiny_gpt2(n_positions=128, seed=1), run / "best")


def rewrite(name, change):
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))


SPOILED = {
    "no config.json": lambda run: (run / "config.json").unlink(),
    "metrics.jsonl of the same size": rewrite("metrics.jsonl", lambda text: text.replace(b"step", b"pets", 1)),
    "metrics.jsonl missing": lambda run: (run / "metrics.jsonl").unlink(),
    "metrics.jsonl cut": rewrite("metrics.jsonl", lambda text: text[:-5]),
    "state.pt missing": lambda run: (run / "state.pt").unlink(),
    "state.pt a folder": lambda run: ((run / "state.pt").unlink(), (run / "state.pt").mkdir()),
    "best of another run": other_best,
    "best missing": lambda run: shutil.rmtree(run / "best"),
    "best cut": rewrite("best/model.safetensors", lambda text: text[: len(text) // 2]),
    "best longer": rewrite("best/model.safetensors", lambda text: text + b"x"),
    "best with a changed bit": rewrite("best/model.safetensors", lambda text: text[:-1] + bytes([text[-1] ^ 1])),
    "best without latentlab.json": lambda run: (run / "best" / "latentlab.json").unlink(),
    "best with other settings": rewrite("best/latentlab.json", lambda text: text.replace(b"2", b"3", 1)),
    "timing.jsonl of text": rewrite("timing.jsonl", lambda _: b"a\n"),
    "timing.jsonl of lists": rewrite("timing.jsonl", lambda _: b"[1]\n"),
    "timing.jsonl of NULs": rewrite("timing.jsonl", lambda text: b"\0" * len(text) + b"\n"),
    "config.json with a key twice": rewrite("config.json", lambda text: b'{"seed": 0, ' + text.lstrip()[1:]),
    "config.json a page": rewrite("config.json", lambda _: b"<html></html>"),
    "config.json of another seed": rewrite("config.json", lambda text: text.replace(b'"seed": 0', b'"seed": 7', 1)),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_run_that_is_resumed_with_other_files(misuse, finished, tmp_path, what):
    folder, words = finished
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    SPOILED[what](run)
    assert "resume: " in misuse("F resumed run", *words, "--out", "run", "--resume")
    if what != "no config.json":
        return
    assert "already, expected a new folder; pass --resume" in misuse("F resumed run", *words, "--out", "run")


@pytest.mark.parametrize("name", ["table.md", "train.jsonl", "answers", "coconut-s0/best"])
@pytest.mark.parametrize("verb", ["sweep", "reproduce"])
def test_an_experiment_folder_of_someone_else(misuse, tmp_path, verb, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    write_jsonl(word_problems("train", 3, seed=0), path) if "jsonl" in name else path.mkdir()
    said = misuse("F experiment folder", verb, *SMALL, "--out", "out")
    assert "without plan.json, expected a new folder; use another --out" in said


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"[]", b"<html>", b'{"plan": 1, "plan": 2}', b'{"spent": NaN}', b"{}", b"\xff"]
)
def test_a_damaged_plan(misuse, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_bytes(content)
    assert "plan.json: got " in misuse("E JSON of an experiment", "sweep", *SMALL, "--out", "out")


# -- the library's border -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [arms.fit_grpo, fit_curriculum])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_problem_id_twice(tmp_path, word_sets, config, fit, where):
    train, validation = word_sets
    twice = [*train, train[0]] if where == "training" else [*validation, validation[0]]
    sets = (twice, validation) if where == "training" else (train, twice)
    with pytest.raises(ValueError, match=f"^data: got the problem id '.*' twice in {where}, expected different ones; "):
        fit(tiny_gpt2(), *sets, config(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- results --------------------------------------------------------------------------------------------------------


def test_results_of_any_shape_are_reported_or_listed(tmp_path, record_property):
    """Whatever lies in the result folder, the report is made; what is no result is listed."""
    arm = st.fixed_dictionaries(
        {"name": st.text(max_size=4)},
        optional={key: scalars for key in ("seed", "n", "correct", "accuracy", "rollouts", "commit")}
        | {"interval": anything, "difference": anything},
    )
    result = st.fixed_dictionaries(
        {"schema_version": st.just(1), "name": st.just("arms") | st.text(max_size=4), "preset": st.just("tiny"),
         "parameters": anything, "metrics": anything, "arms": st.lists(arm, max_size=3) | anything,
         "environment": anything},
        optional={name: scalars for name in ("seconds", "headline", "question", "started", "commit")},
    )  # fmt: skip
    folder = tmp_path / "reports" / "tiny"
    folder.mkdir(parents=True)
    tried = 0

    @settings(few, max_examples=50)
    @given(st.builds(lambda values: json.dumps(values).encode(), result | anything) | st.binary(max_size=20))
    def check(content):
        nonlocal tried
        tried += 1
        (folder / "arms.json").write_bytes(content)
        (folder / "arms.png").unlink(missing_ok=True)
        text = tables.build_report(tmp_path / "reports").read_text()
        assert "## tiny · arms" in text or "arms.json: not a result" in text

    check()
    record_property("inputs", {"result file": tried})


HOSTILE = [
    "<script>alert(1)</script>", "a | b | c", "\\| c", "[x](javascript:alert(1))", "![x](javascript:alert(1))",
    "`<b>`", "`` ` ``", "[y]: javascript:alert(1)", "[x][y]", "<img src=x onerror=alert(1)>", "<!-- results:end -->",
    "line\n\n# heading\n| a |\n", "&lt;script&gt;", "<javascript:alert(1)>", "</td></tr></table><h1>", "x\\",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_models_and_data_is_text_in_tables(text, tmp_path, monkeypatch, record_property):
    """Rendered as Markdown: no element, link or column comes out of it, and every letter is still there."""
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path / "own"))
    monkeypatch.setattr(tables.environment, "repository_root", lambda: tmp_path)
    (tmp_path / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\nkept\n")
    results.write_result(
        "arms", preset="tiny", parameters={"x": text}, metrics={"a": text, text: 1, "b": {"skipped": text}},
        arms=[{"name": text, "seed": 0, "n": 4, "correct": 2, "note": text}], started=0.0, seconds=1.0,
        question=text, headline=text, environment={"device": text},
    )  # fmt: skip
    source = tables.publish().read_text()
    page = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])(source)
    plain = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])(source.replace(text, ""))
    for piece in ("<script", "<img", "<b>", 'href="javascript', 'src="javascript', "onerror=alert(1)>", "<h1>heading"):
        assert piece not in page, piece
    assert page.count("<h1") == plain.count("<h1") == 1
    for table in page.split("<table>")[1:]:
        widths = [len(re.findall("<t[hd][ >]", line)) for line in table.partition("</table>")[0].split("<tr>")[1:]]
        assert len(set(widths)) == 1 and len(widths) > 1
    assert (tmp_path / "README.md").read_text().endswith("<!-- results:end -->\nkept\n")
    record_property("inputs", {"text in reports": 1})


# -- as processes ---------------------------------------------------------------------------------------------------


PROCESSES = {
    "fly": "got the verb 'fly'",
    "data --data.name gsm8k": "gsm8k_test.jsonl",
    "curriculum --seed 1e400": "invalid literal",
    "data --out /dev/null/x.jsonl": "a file stands where a folder is expected",
    "data --out mine": "which exists, expected a new file",
    "evaluate --benchmark svamp": "line 2: got the key 'answer' twice",
    "curriculum --preset smoke --out run --resume": "expected the folder of a run",
    "grpo --grpo.lerning-rate 1": "Perhaps you meant: --grpo.learning-rate",
    "evaluate nothing/there/model": "expected a checkpoint folder or a Hub id",
}


@pytest.mark.parametrize("words", PROCESSES)
def test_as_a_process(tmp_path, words, record_property):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "LATENTLAB_DATA": str(tmp_path)}
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "svamp.jsonl").write_text(row() + "\n" + LINES["answer twice"])
    before, command = snapshot(tmp_path), [sys.executable, "-m", "latentlab.cli", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("latentlab: ") and PROCESSES[words] in done.stderr
    assert snapshot(tmp_path) == before
    if words == "fly":
        done = subprocess.run([*command, "--debug"], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 1 and "Traceback" in done.stderr and "got the verb 'fly'" in done.stderr
    record_property("inputs", {"as a process": 1})
    line = done.stderr.replace(str(tmp_path), "").splitlines()[-1]
    case = {"kind": "as a process", "input": "as a process", "words": words, "exit_code": 2, "line": line}
    record_property("misuse", [case])


def test_a_closed_pipe_is_no_error(record_property):
    """`latentlab data | head -1`: exit code 0, nothing on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = f"set -o pipefail; {sys.executable} -m latentlab data --n 5000 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    case = {"kind": "as a process", "input": "a closed pipe is no error", "words": "data --n 5000 | head -1"}
    record_property("misuse", [{**case, "exit_code": 0, "line": ""}])


# -- the code itself ------------------------------------------------------------------------------------------------


def calls():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield (
                    path.name,
                    ast.unparse(node.func),
                    {word.arg: ast.unparse(word.value) for word in node.keywords},
                    node,
                )


def test_nothing_is_evaluated_unpickled_or_given_to_a_shell():
    forbidden = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.unsafe_load"}
    for where, name, options, node in calls():
        assert name not in forbidden, (where, name)
        assert "shell" not in options and options.get("allow_pickle", "False") == "False", (where, name)
        if name == "torch.load":
            assert options.get("weights_only") == "True", where
        if name.startswith("subprocess.") and node.args:
            assert isinstance(node.args[0], (ast.List, ast.Name)), (where, ast.unparse(node))
        if name.endswith(("AutoTokenizer.from_pretrained", "AutoModelForCausalLM.from_pretrained")):
            assert options.get("trust_remote_code") == "False", where
        if name == "yaml.load":
            assert issubclass(getattr(notebooks, ast.unparse(node.args[1])), SafeLoader)


def test_names_in_the_settings_of_a_sweep_are_words_of_a_list():
    """A hostile name goes to a run as one word, never through a shell."""
    values = to_dict(load_preset("smoke"))
    values["backbone"]["name_or_path"] = "x; touch payload $(touch payload)"
    words = changed_words(to_dict(from_dict(values)), but=("sweep.",))
    assert words == ["--backbone.name-or-path", "x; touch payload $(touch payload)"]
