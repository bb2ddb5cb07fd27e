"""cli.py: every wrong use is one line and exit code 2; every field can be set; the verbs hang together."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from tqdm import tqdm

from latentlab.cli import VERBS, main, parse
from latentlab.config import PRESETS, load_preset, to_dict
from latentlab.evaluation import accuracy
from latentlab.pretrained.loading import save_model
from latentlab.study import experiment, notebooks, verbs
from latentlab.training import preflight
from latentlab.training.run import read_metrics
from latentlab.verify import table
from tests.conftest import sharpen, tiny_gpt2

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))
TOY = {
    "--data.train-size": "24",
    "--data.validation-size": "6",
    "--data.test-size": "6",
    "--data.steps": "2",
    "--backbone.n-embd": "16",
    "--backbone.n-head": "2",
    "--curriculum.steps": "1 1 1",
    "--curriculum.batch-size": "4",
    "--grpo.steps": "2",
    "--grpo.num-problems": "2",
    "--grpo.num-generations": "2",
    "--evaluate.num-generations": "2",
}
TOY_WORDS = ["--preset", "smoke", *(word for key, value in TOY.items() for word in (key, *value.split()))]


@pytest.fixture
def refused(capfd):
    """refused(words): the one line on stderr of a wrong use that ends with exit code 2 and prints nothing else."""

    def call(*words):
        assert main([str(word) for word in words]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("latentlab: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert not any("─" <= mark <= "╿" or mark == "\x1b" for mark in err)
        return err

    return call


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("foo", "got the verb 'foo', expected one of curriculum, grpo, evaluate, ask, plot, sweep, reproduce"),
        ("curriculum --preset huge", "got 'huge', expected one of paper, smoke, smol, tiny"),
        ("curriculum --preset", "Missing value for argument '--preset'. Expected 1 values."),
        ("curriculum --sead 1", "--sead, 1 Perhaps you meant: --seed INT"),
        ("grpo --grpo.lerning-rate 1e-4", "Perhaps you meant: --grpo.learning-rate FLOAT"),
        ("curriculum --seed x", "--seed: invalid literal for int() with base 10: 'x'"),
        ("grpo --grpo.steps 1.5", "--grpo.steps: invalid literal for int()"),
        ("grpo --grpo.learning-rate fast", "--grpo.learning-rate: could not convert string to float: 'fast'"),
        ("grpo --grpo.steps", "Missing value for argument '--grpo.steps'"),
        ("grpo --grpo.num-generations 1", "grpo.num_generations: got 1, expected at least 2"),
        ("grpo --grpo.mask.rate 1.0", "mask rate: got 1.0, expected a number in [0, 1)"),
        ("grpo --grpo.mask.rate -0.1", "mask rate: got -0.1, expected a number in [0, 1)"),
        ("curriculum --curriculum.mask.sites mlp heart", "expected a list of different names from attention, mlp"),
        (
            "grpo --grpo.arm dropout",
            "invalid choice 'dropout' for argument '--grpo.arm'. Expected one of ('none', 'temperature', 'shared'",
        ),
        ("sweep compare", "sweep: Unrecognized options: compare"),
        ("sweep --sweep.arms shared", "sweep.arms: got no temperature, expected"),
        ("data --split dev", "invalid choice 'dev' for argument '--split'"),
        ("data --n -1", "n: got -1, expected at least 0"),
        ("report now", "Unrecognized options: now"),
        ("curriculum --threads -1", "threads: got -1, expected at least 0"),
        ("evaluate --limit -5", "limit: got -5, expected at least 0"),
        ("study --preset smoke --seed 1", "study: got a changed field, expected an unchanged preset"),
    ],
)
def test_wrong_use_is_one_line_that_names_what_to_do(refused, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(*words.split())


def test_a_terminal_without_unicode_gets_the_same_line(refused):
    words = ["grpo", "--grpo.arm", "dropout"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "latentlab", *words]
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stderr == refused(*words)


@pytest.mark.parametrize("verb", ["evaluate", "grpo"])
def test_a_checkpoint_folder_that_is_none(refused, tmp_path, verb):
    flag = [] if verb == "evaluate" else ["--out", tmp_path / "run", "--init-from"]
    assert "expected a saved model; name a folder written by `latentlab curriculum`" in refused(verb, *flag, tmp_path)
    assert "is no folder, expected a checkpoint folder or a Hub id" in refused(verb, *flag, tmp_path / "nothing")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", ["data", "curriculum --out run", "evaluate"])
def test_no_hub_and_no_data_is_one_line_before_any_compute(refused, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LATENTLAB_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at import
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_model(sharpen(tiny_gpt2()), tmp_path / "model")
    words = words.split() + (["model"] if words == "evaluate" else [])
    said = refused(*words, "--preset", "smoke", "--data.name", "gsm8k")
    assert "openai/gsm8k" in said and "set LATENTLAB_DATA to a folder that holds the data" in said
    assert not (tmp_path / "run").exists()


def test_an_unknown_benchmark_names_the_known_ones(refused, tmp_path):
    save_model(sharpen(tiny_gpt2()), tmp_path)
    assert "got benchmark 'riddles', expected one of gsm8k, " in refused("evaluate", tmp_path, "--benchmark", "riddles")


def test_a_data_folder_that_is_none(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLAB_DATA", str(tmp_path / "nothing"))
    assert "correct LATENTLAB_DATA" in refused("data", "--data.name", "gsm8k")


def test_a_used_run_folder_is_refused_and_left_alone(refused, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_model(sharpen(tiny_gpt2()), tmp_path / "model")
    start = ["--init-from", tmp_path / "model"]
    for verb, words in (("curriculum", []), ("grpo", start)):
        assert (
            "holds config.json already, expected a new folder; pass --resume if that is this run, or another --out"
            in refused(verb, *TOY_WORDS, *words, "--out", tmp_path)
        )
    assert (tmp_path / "config.json").read_text() == "{}"


def test_debug_shows_the_traceback():
    for words in (
        ["--debug", "foo"],
        ["curriculum", "--debug", "--preset", "huge"],
        ["curriculum", "--seed", "x", "--debug"],
    ):
        with pytest.raises(ValueError):
            main(words)
        assert main([word for word in words if word != "--debug"]) == 2


def test_a_failure_while_running_is_exit_code_one(monkeypatch, capfd, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("sweep: 1 runs failed,\nsee log")

    monkeypatch.setattr(experiment, "run_experiment", fail)
    assert main(["sweep"]) == 1
    assert capfd.readouterr().err == "latentlab: sweep: 1 runs failed, see log\n"


# -- fields ---------------------------------------------------------------------------------------------------------


def fields(values, where=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from fields(value, f"{where}{key}.")
        else:
            yield f"{where}{key}".replace("_", "-"), value


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_field(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    listed = set(capsys.readouterr().out.replace("│", " ").replace(",", " ").split())
    wanted = {f"--{name}" for name, _ in fields(to_dict(load_preset("tiny"))) if name != "preset"}
    options = {field.name for field in dataclasses.fields(getattr(verbs, verb.capitalize()))} - {
        "config",
        "checkpoint",
        "question",
        "run",
    }
    wanted |= {f"--{name.replace('_', '-')}" for name in options}
    assert not wanted - listed


@pytest.mark.parametrize("preset", NAMES)
def test_every_field_of_every_preset_can_be_set(preset):
    """Each field is given the value of another preset in turn; all of them at once make that other preset."""
    other = to_dict(load_preset("tiny" if preset != "tiny" else "smol"))
    words = []
    for name, value in fields(other):
        if name != "preset":
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    assert to_dict(parse(["grpo", "--preset", preset, *words])[1]) == {**other, "preset": preset}


def test_without_fields_a_preset_is_taken_as_it_is():
    for name in NAMES:
        assert (
            parse(["curriculum", f"--preset={name}"])[1]
            == parse(["curriculum", "--preset", name])[1]
            == load_preset(name)
        )
    assert parse(["curriculum"])[1].preset == "tiny"


def test_the_checkpoint_to_evaluate_is_a_word_without_a_flag():
    assert parse(["evaluate", "folder", "--limit", "3"])[0].checkpoint == "folder"
    assert parse(["evaluate", "--preset", "smoke", "folder"]) == parse(["evaluate", "folder", "--preset", "smoke"])


@pytest.mark.parametrize("words", ["--help", "data --n 2000"])
def test_a_closed_pipe_is_no_error(words):
    """`latentlab ... | head -1`: the reader ends before all is written."""
    command = [sys.executable, "-m", "latentlab", *words.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and said == b""


def test_no_verb_or_help_prints_the_verbs(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f"\n    {verb} " in text for verb in VERBS)


# -- verbs ----------------------------------------------------------------------------------------------------------


def test_data_prints_json_lines(capsys, tmp_path):
    assert main(["data", "--split", "validation", "--n", "3", "--preset", "smoke", "--data.steps", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(row) for row in rows] == [{"id", "question", "steps", "answer", "source"}] * 3
    assert all(len(row["steps"]) == 2 and row["source"] == "word/validation" for row in rows)
    assert (
        main(["data", "--split", "validation", "--n", "3", "--data.steps", "2", "--out", str(tmp_path / "rows.jsonl")])
        == 0
    )
    assert capsys.readouterr().out == ""
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows


def test_a_long_evaluation_shows_its_progress_on_stderr(tmp_path, capfd, monkeypatch):
    at_once = lambda rows, **options: tqdm(rows, **{**options, "delay": 0, "disable": False})  # noqa: E731
    save_model(sharpen(tiny_gpt2()), tmp_path / "model")
    monkeypatch.setattr(accuracy, "tqdm", at_once)
    assert main(["evaluate", str(tmp_path / "model"), *TOY_WORDS]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["n"] == 6 and "answers:" in err and "/1 " in err


@pytest.mark.parametrize("found, name", [(True, "bfloat16"), (False, "float32")])
def test_an_automatic_precision_is_said(tmp_path, capsys, monkeypatch, found, name):
    monkeypatch.setattr(preflight, "multiplies_bfloat16", lambda device: found)
    save_model(sharpen(tiny_gpt2()), tmp_path / "model")
    assert main(["evaluate", str(tmp_path / "model"), *TOY_WORDS, "--precision", "auto"]) == 0
    said, people = capsys.readouterr().err.splitlines()
    assert said == f"precision auto: {name} products on this cpu"
    assert "of 6 problems right" in people and "by greedy answers; of 2 sampled ones" in people


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_code_of_verify_is_its_verdict(monkeypatch, capsys, ok, tmp_path):
    row = table.Property("replay", 0.25, 0.0, ok, "a row made up for this test")
    monkeypatch.setattr(table, "run_verify", lambda device, dtype: [row])
    assert main(["verify", "--dtype", "float64", "--json", str(tmp_path / "table.json")]) == (0 if ok else 1)
    assert "made up for this test" in capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text())["dtype"] == "float64"


def test_study_gets_its_preset_and_notebook(monkeypatch):
    seen = []
    monkeypatch.setattr(notebooks, "run_study", lambda preset, only: seen.append((preset, only)))
    assert main(["study", "--preset", "smoke", "--only", "02"]) == 0 and main(["study"]) == 0
    assert seen == [("smoke", "02"), ("tiny", None)]


def test_threads_are_set_before_the_verb_runs(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    for words in ([], ["--threads", "3"]):
        assert main(["evaluate", str(tmp_path), *words]) == 2
    assert seen == [3]


def test_curriculum_grpo_evaluate_hang_together(tmp_path, capfd):
    """The three verbs through one folder, all sizes from the command line; resuming a finished run changes nothing."""
    base, grpo = tmp_path / "curriculum", tmp_path / "grpo"

    def run(*words):
        assert main([*map(str, words), *TOY_WORDS]) == 0
        return json.loads(capfd.readouterr().out)

    first = run("curriculum", "--out", base)
    assert first["out"] == str(base) and set(first["stages"]) == {"0", "1", "2"}
    arm = ["grpo", "--init-from", base / "best", "--out", grpo, "--grpo.arm", "per_step", "--grpo.mask.rate", "0.2"]
    second = run(*arm)
    assert second["rollouts"] == 2 * 2 * 2
    lines = read_metrics(grpo)
    assert [line["step"] for line in lines] == [-1, 0, 1] and {line["arm"] for line in lines[1:]} == {"per_step"}
    stored = json.loads((grpo / "config.json").read_text())
    assert stored["grpo"]["mask"]["rate"] == 0.2 and stored["backbone"]["n_embd"] == 16
    again = run(*arm, "--resume")
    for summary in (again, second):
        del summary["peak_memory_gib"]  # of the process, not of the run
    assert again == second and len(read_metrics(grpo)) == 3
    result = run("evaluate", grpo / "best", "--limit", "5", "--json", tmp_path / "result.json")
    assert result["n"] == 5 and result == json.loads((tmp_path / "result.json").read_text())
    assert set(result["sampled"]["pass@k"]) == {"1", "2"} and result["weights"]["kind"] == "folder"
