"""reproduce.py: the budgeted study from end to end on a toy, interrupted and resumed; parts.py: weights in parts."""

import json

import numpy as np
import pytest

from latentlab import cli, parts, reproduce, sources
from latentlab.model import LatentReasoner
from latentlab.word_problems import word_problems

ARMS = {"seeds": [0, 1], "arms": ["temperature", "shared"], "controls": []}


@pytest.fixture
def toy(config, monkeypatch, tmp_path):
    """A config whose parts take a second, and benchmarks that are word problems (one of them out of reach)."""

    def benchmark(name):
        if name == "gsm_hard":
            raise FileNotFoundError("no folder")
        return word_problems("test", 5, seed=1, steps=2)

    def seconds(model, run):  # a clock that no other process can slow down
        run()
        return 0.01

    monkeypatch.setattr(reproduce, "_seconds", seconds)
    monkeypatch.setattr(reproduce.Budget, "left", lambda budget: 60 * budget.minutes)
    monkeypatch.setattr(sources, "benchmark", benchmark)
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path / "reports"))
    return config(sweep=ARMS, curriculum={"steps": [2, 1, 1]}, grpo={"eval_every": 1}, evaluate={"num_generations": 2})


def test_the_rehearsal_runs_from_inputs_to_report_and_resumes(toy, tmp_path, monkeypatch):
    out = tmp_path / "run"
    killed = iter([False, False, False, True])
    original = reproduce._answer

    def answer(*args, **options):
        if next(killed, False):
            raise KeyboardInterrupt
        original(*args, **options)

    monkeypatch.setattr(reproduce, "_answer", answer)
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(toy, out=str(out), budget_minutes=0.01, device="cpu")
    before = {path.name: path.read_bytes() for path in (out / "answers").iterdir()}
    planned = json.loads((out / "plan.json").read_text())["plan"]
    path = reproduce.reproduce(toy, out=str(out), budget_minutes=0.01, device="cpu")
    assert path == tmp_path / "reports" / "tiny-cpu" / "reproduce.json"
    assert all((out / "answers" / name).read_bytes() == content for name, content in before.items())
    result = json.loads(path.read_text())
    assert all(result["metrics"]["plan"][key] == value for key, value in planned.items())
    seeds, iterations = result["metrics"]["plan"]["seeds_and_iterations"]
    assert seeds == 2 and iterations >= 1
    names = [(arm["name"], arm["seed"]) for arm in result["arms"]]
    assert names == [("coconut", 0)] + [(arm, seed) for seed in range(seeds) for arm in ARMS["arms"]]
    assert all(arm["n"] == 6 and arm["evaluated_at"] for arm in result["arms"])
    assert len({arm["rollouts"] for arm in result["arms"][1:]}) == 1
    assert "not run on a GPU" in result["metrics"]["verdict"] and "rehearsal" in result["headline"]
    assert result["metrics"]["transfer"]["gsm_hard"]["skipped"] == "no folder"
    packed = np.load(path.with_name("reproduce_outcomes.npz"))
    for arm in result["arms"]:
        right = np.unpackbits(packed[f"{arm['name']}-s{arm['seed']}"])[:6]
        assert right.sum() == arm["correct"]
    again = reproduce.reproduce(toy, out=str(out), budget_minutes=0.01, device="cpu")  # finished: nothing is done twice
    assert json.loads(again.read_text())["arms"] == result["arms"]


def test_a_spent_budget_still_ends_in_a_report(toy, tmp_path):
    path = reproduce.reproduce(toy, out=str(tmp_path / "run"), budget_minutes=1e-4, device="cpu")
    metrics = json.loads(path.read_text())["metrics"]
    assert "no time was left" in metrics["gain"]["skipped"] == metrics["verdict"]


def test_another_plan_in_the_folder_is_refused(toy, tmp_path):
    reproduce.reproduce(toy, out=str(tmp_path / "run"), budget_minutes=1e-4, device="cpu")
    with pytest.raises(ValueError, match="budget_minutes=1, expected 0.0001"):
        reproduce.reproduce(toy, out=str(tmp_path / "run"), budget_minutes=1, device="cpu")


def test_wrong_use_is_one_line_before_any_compute(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LATENTLAB_DATA", raising=False)
    monkeypatch.setattr(sources, "hub_answers", lambda: False)
    for words, said in (
        (["--preset", "smol"], "LATENTLAB_DATA"),
        (["--preset", "tiny", "--budget-minutes", "0"], "expected more than 0"),
        (["--preset", "tiny", "--set", "grpo.nothing=3"], "expected a field of the preset"),
        (["--preset", "tiny", "--set", "grpo.steps=many"], "expected int"),
        (["--preset", "tiny", "--weights", str(tmp_path / "none")], "which is no folder"),
    ):
        assert reproduce.main([*words, "--out", str(tmp_path / "run")]) == 2
        captured = capsys.readouterr().err
        assert said in captured and captured.count("\n") == 1, captured
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_weights_in_parts_come_back_verified(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path / "model")
    parts.split(tmp_path / "model", tmp_path / "parts", limit=10_000)
    assert max(path.stat().st_size for path in (tmp_path / "parts").iterdir()) <= 10_000
    joined = parts.join(tmp_path / "parts", tmp_path / "joined")
    assert {p.name: p.read_bytes() for p in joined.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()
    }
    assert parts.join(tmp_path / "parts", tmp_path / "joined") == joined  # there already
    assert LatentReasoner.from_pretrained(joined).num_thoughts == 2
    part = tmp_path / "parts" / "model.safetensors.part001"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match="sha256 .* of model.safetensors"):
        parts.join(tmp_path / "parts", tmp_path / "other")
    part.unlink()
    with pytest.raises(FileNotFoundError, match="part001, expected all"):
        parts.join(tmp_path / "parts", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    listed = json.loads((tmp_path / "parts" / "parts.json").read_text())
    (tmp_path / "parts" / "parts.json").write_text(json.dumps({"../escape": listed["model.safetensors"]}))
    with pytest.raises(ValueError, match="could not read"):
        parts.join(tmp_path / "parts", tmp_path / "other")


def test_both_command_lines_start_the_same_study(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(reproduce, "reproduce", lambda config, **options: seen.append((config, options)) or "there")
    assert reproduce.main(["--preset", "smol", "--budget-minutes", "3", "--set", "grpo.steps=7"]) == 0
    assert cli.main("sweep reproduce --preset smol --budget-minutes 3 --grpo.steps 7".split()) == 0
    assert seen[0] == seen[1] and seen[0][0].grpo.steps == 7 and seen[0][1]["out"] == "runs/smol/reproduce"
    assert capsys.readouterr().out == "wrote there\n" * 2
