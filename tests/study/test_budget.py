"""budget.py, and experiments inside a time budget: from end to end on a toy, interrupted and resumed."""

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentlab import cli
from latentlab.data import datasets
from latentlab.data.word_problems import word_problems
from latentlab.evaluation import statistics
from latentlab.evaluation.statistics import wilson_interval
from latentlab.pretrained.loading import model_from_config
from latentlab.runtime import environment
from latentlab.study import answers, arms_report, budget, experiment, tables
from latentlab.study.answers import stored
from latentlab.study.experiment import run_experiment
from tests.conftest import tiny_gpt2

ARMS = {"seeds": [0, 1], "arms": ["temperature", "shared"], "controls": []}


@pytest.fixture
def toy(config, monkeypatch, tmp_path):
    """A config whose parts take a second, and benchmarks of word problems: one too long, one out of reach."""

    def benchmark(name):
        if name == "gsm_hard":
            raise FileNotFoundError("no folder")
        problems = word_problems("test", 5, seed=1, steps=2)
        return [replace(p, question=100 * p.question) for p in problems] if name == "svamp" else problems

    def seconds(model, run):  # a clock that no other process can slow down
        run()
        return 0.01

    monkeypatch.setattr(budget, "_seconds", seconds)
    monkeypatch.setattr(budget.Budget, "left", lambda self: 60 * self.minutes)
    monkeypatch.setattr(datasets, "benchmark", benchmark)
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path / "reports"))
    return config(sweep=ARMS, curriculum={"steps": [2, 1, 1]}, grpo={"eval_every": 1}, evaluate={"num_generations": 2})


def test_the_rehearsal_runs_from_inputs_to_report_and_resumes(toy, tmp_path, monkeypatch):
    out = tmp_path / "run"
    killed = iter([False, False, False, True])
    original = answers.graded_answers

    def answer(*args, **options):
        if next(killed, False):
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(answers, "graded_answers", answer)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(toy, out=str(out), budget_minutes=0.01, device="cpu")
    before = {path.name: path.read_bytes() for path in (out / "answers").iterdir()}
    plan = json.loads((out / "plan.json").read_text())
    planned = plan["plan"]
    monkeypatch.setattr(
        datasets, "load", lambda data, split, load=datasets.load: None if split == "train" else load(data, split)
    )
    path = run_experiment(toy, out=str(out), budget_minutes=0.01, device="cpu")
    assert path == tmp_path / "reports" / "tiny-cpu" / "arms.json"
    assert all((out / "answers" / name).read_bytes() == content for name, content in before.items())
    result = json.loads(path.read_text())
    assert all(result["metrics"]["plan"][key] == value for key, value in planned.items())
    seeds, iterations = result["metrics"]["plan"]["seeds_and_iterations"]
    assert seeds == 2 and iterations >= 1
    names = [(arm["name"], arm["seed"]) for arm in result["arms"]]
    assert names == [("coconut", 0)] + [(arm, seed) for seed in range(seeds) for arm in ARMS["arms"]]
    assert all(arm["n"] == 6 and arm["evaluated_at"] for arm in result["arms"])
    assert result["metrics"]["commits"] == [environment.commit()]
    asked = cli.parse(tables.command(result).split()[1:])[1]  # the command that RESULTS.md prints makes this run again
    planned_by_budget = {"steps": toy.curriculum.steps, "warmup_steps": toy.curriculum.warmup_steps}
    assert replace(asked, curriculum=replace(asked.curriculum, **planned_by_budget)) == toy
    assert len({arm["rollouts"] for arm in result["arms"][1:]}) == 1
    assert "not run on a GPU" in result["metrics"]["verdict"] and "rehearsal" in result["headline"]
    assert result["metrics"]["transfer"]["gsm_hard"]["skipped"] == "no folder"
    assert "expected at most" in result["metrics"]["transfer"]["svamp"]["skipped"]
    assert result["metrics"]["weights"] == model_from_config(toy).provenance  # where the study began
    assert result["started"] == datetime.fromtimestamp(plan["started"], UTC).isoformat(timespec="seconds")
    assert result["metrics"]["cost"]["peak_memory_gib"] >= round(plan["peak_memory_gib"], 2)
    packed = np.load(path.with_name("arms_outcomes.npz"))
    for arm in result["arms"]:
        right = np.unpackbits(packed[f"{arm['name']}-s{arm['seed']}"])[:6]
        assert right.sum() == arm["correct"]
    recorded = json.loads((out / "answers" / "shared-s0.test.json").read_text())
    pair = ("coconut-s0", "shared-s0")
    found = stored(out, pair, "test")
    for name, right in zip(pair, (np.zeros((6, 1)), np.eye(6)[:, 2:3]), strict=True):
        found[name]["correct"] = right.tolist()  # as if the third problem had flipped
    test = datasets.load(toy.data, "test")
    (sample,) = arms_report._samples(toy, out, pair, found, test, "cpu")
    assert sample["id"] == test[2].id == recorded["ids"][2] and sample["change"] == "became right"
    assert sample["shared-s0"]["text"] == recorded["text"][2]
    assert [len(top) for top in sample["shared-s0"]["thoughts"]] == [5] * toy.num_thoughts
    again = run_experiment(toy, out=str(out), budget_minutes=0.01, device="cpu")  # finished: nothing is done twice
    assert json.loads(again.read_text())["arms"] == result["arms"]


def test_seeds_in_any_order_share_the_baseline_of_the_first(toy, tmp_path):
    toy = replace(toy, sweep=replace(toy.sweep, seeds=(1, 0)))
    path = run_experiment(toy, out=str(tmp_path / "run"), budget_minutes=0.01, device="cpu")
    rows = json.loads(path.read_text())["arms"]
    assert [(row["name"], row["seed"]) for row in rows] == [
        ("coconut", 1),
        *[(a, s) for s in (1, 0) for a in ARMS["arms"]],
    ]
    assert "difference" not in rows[0] and all("difference" in row for row in rows[1:])


def test_answers_follow_their_run_and_a_moved_experiment_resumes(toy, tmp_path):
    """A deleted run is trained and answered again; nothing else is, wherever the folder lies."""
    out, moved = tmp_path / "run", tmp_path / "elsewhere" / "run"
    run_experiment(toy, out=str(out), budget_minutes=0.01, device="cpu")
    stale = out / "answers" / "shared-s0.test.json"
    found = json.loads(stale.read_text())
    stale.write_text(json.dumps({**found, "correct": [[1] for _ in found["correct"]]}))
    shutil.rmtree(out / "shared-s0")
    kept = {path.name: path.read_bytes() for path in (out / "answers").iterdir() if "shared-s0" not in path.name}
    moved.parent.mkdir()
    out.rename(moved)
    path = run_experiment(toy, out=str(moved), budget_minutes=0.01, device="cpu")
    assert json.loads((moved / "answers" / stale.name).read_text())["correct"] == found["correct"]
    assert {name: (moved / "answers" / name).read_bytes() for name in kept} == kept
    (row,) = [arm for arm in json.loads(path.read_text())["arms"] if (arm["name"], arm["seed"]) == ("shared", 0)]
    assert row["correct"] == sum(c[0] for c in found["correct"])


def test_a_baseline_trained_again_answers_by_chain_of_thought_again(toy, tmp_path):
    out = tmp_path / "run"
    run_experiment(toy, out=str(out), budget_minutes=0.01, device="cpu")
    cot = out / "answers" / "cot-s0.test.json"
    found = json.loads(cot.read_text())
    cot.write_text(json.dumps({**found, "text": ["stale" for _ in found["text"]]}))
    shutil.rmtree(out / "coconut-s0")
    run_experiment(toy, out=str(out), budget_minutes=0.01, device="cpu")
    assert json.loads(cot.read_text())["text"] == found["text"]


def test_under_a_budget_every_arm_of_the_first_seed_is_sampled(toy, tmp_path):
    config = replace(toy, sweep=replace(toy.sweep, seeds=(0,), arms=("temperature", "shared", "per_step")))
    path = run_experiment(config, out=str(tmp_path / "run"), budget_minutes=0.01, device="cpu")
    runs = {"coconut-s0", "temperature-s0", "shared-s0", "per_step-s0"}
    assert set(json.loads(path.read_text())["metrics"]["deployments"]) == runs


def test_data_sets_without_their_package_are_skipped_benchmarks(toy, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delenv("LATENTLAB_DATA", raising=False)
    monkeypatch.setattr(datasets, "hub_answers", lambda: True)
    with pytest.raises(FileNotFoundError, match="ModuleNotFoundError from the Hub for .*set LATENTLAB_DATA"):
        datasets.benchmark("gsm8k")


def test_a_spent_budget_still_ends_in_a_report(toy, tmp_path):
    path = run_experiment(toy, out=str(tmp_path / "run"), budget_minutes=1e-4, device="cpu")
    metrics = json.loads(path.read_text())["metrics"]
    assert "no time was left" in metrics["gain"]["skipped"]
    assert metrics["verdict"] == f"not run on a GPU; {metrics['gain']['skipped']}"


def test_the_time_of_a_killed_process_is_spent(tmp_path):

    def opened():
        return budget.Budget(tmp_path, {}, 10, "cpu", time.monotonic())

    assert opened().spent() < 60
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "timing.jsonl").touch()
    killed = time.time() - 8 * 3600
    os.utime(tmp_path / "plan.json", (killed - 120, killed - 120))
    os.utime(tmp_path / "run" / "timing.jsonl", (killed, killed))
    assert 120 <= opened().spent() < 180
    assert 120 <= opened().spent() < 180  # counted once


def test_a_model_that_cannot_hold_the_problems_is_refused_before_any_step(toy, tmp_path):
    config = replace(toy, backbone=replace(toy.backbone, n_positions=8))
    with pytest.raises(ValueError, match="expected at most 8"):
        run_experiment(config, out=str(tmp_path / "run"), budget_minutes=0.01, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_gpu_without_enough_memory_is_one_line(monkeypatch):
    model = SimpleNamespace(device=torch.device("cuda"), parameters=lambda: [torch.empty(10**8, device="meta")])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**28)
    for free, enough in ((4 * 2**30, True), (3 * 2**30, False)):  # 16 bytes a weight and 2 GiB: 3.5 GiB
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**34))
        if enough:
            experiment._expect_memory(model, 16)
        else:
            with pytest.raises(OSError, match=r"^GPU: got 3.0 GiB free, expected 3.5 .*; free some") as error:
                experiment._expect_memory(model, 16)
            assert "\n" not in str(error.value)


def test_the_curriculum_pays_for_its_own_answers(toy, monkeypatch):
    """Half of 60 s, less 6 answers after each of 3 stages and 6 test answers of two models at 0.5 s: 15 s."""
    monkeypatch.setattr(budget, "_seconds", lambda model, run: 0.1)
    monkeypatch.setattr(budget, "answer_seconds", lambda model, problems, batch_size: 0.5)
    spending = SimpleNamespace(minutes=1)
    data = {split: datasets.load(toy.data, split) for split in ("train", "validation", "test")}
    assert [len(data[split]) for split in ("validation", "test")] == [6, 6]
    steps = budget.plan_curriculum(model_from_config(toy), data, toy, spending)
    left = 30 - 0.5 * (3 * 6 + 2 * 6)
    assert steps == [int(left / (1.1 * 0.1 * 4) * share) for share in toy.curriculum.steps]
    spending.minutes = 0
    assert budget.plan_curriculum(None, data, toy, spending) == list(toy.curriculum.steps)


@pytest.mark.parametrize("max_candidates", [0, 8])
def test_an_iteration_is_priced_by_its_rollouts_and_the_updates_it_makes(toy, monkeypatch, max_candidates):
    """A roll of 3 s and two updates of 1 s with a reference model, on mixed groups alone under dynamic sampling."""
    grpo = replace(toy.grpo, beta=0.1, num_iterations=2, num_problems=4, max_candidates=max_candidates, eval_every=1)
    calls = []

    def seconds(model, run):
        run()
        calls.append(run.__name__)
        return {"roll": 3.0, "update": 1.0}[run.__name__]

    def rewards(self, reward):
        return torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])  # one of four groups is mixed

    monkeypatch.setattr(budget, "_seconds", seconds)
    monkeypatch.setattr(budget, "answer_seconds", lambda model, problems, batch_size: 0.0)
    monkeypatch.setattr("latentlab.rollouts.Rollouts.rewards", rewards)
    data = {split: datasets.load(toy.data, split) for split in ("train", "validation", "test")}
    spending = SimpleNamespace(minutes=10, left=lambda: 1000.0)
    planned = budget.plan_grpo(model_from_config(toy), data, replace(toy, grpo=grpo), spending)
    share = wilson_interval(1, 4)[1] if max_candidates else 1.0
    assert planned == (2, int((1000 - 0.05 * 600) / (4 * 1.1 * (3 + share * 2 * 1)))) and calls == ["roll", "update"]


def test_a_time_is_measured_without_start_up(monkeypatch):
    times, model = iter([0.4, 0.1, 7.0]), SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(budget, "_timed", lambda model, run: next(times))
    assert [budget._seconds(model, None), budget._seconds(model, None)] == [0.1, 7.0]


def test_what_a_verdict_does_not_cover_is_said():
    """One seed cannot show the variance between seeds, and the verdict says so; beside it stand its error rates."""
    rng = np.random.default_rng(0)
    outcomes = {"coconut-s0": (rng.random(400) < 0.3).astype(float)}
    for seed in range(3):
        outcomes[f"shared-s{seed}"] = np.maximum(outcomes["coconut-s0"], rng.random(400) < 0.1 + 0.01 * seed)
    for seeds, word in (
        (1, "reproduced, over problems alone, with 1 seed"),
        (2, "not resolved"),  # one degree of freedom
        (3, "reproduced"),
    ):
        gain = arms_report.contrast(outcomes, "shared", "coconut", range(seeds))
        assert arms_report.verdict_of(gain, "cuda") == word
        assert arms_report.verdict_of(gain, "cuda", "word_problems").startswith("no GSM8K (the rule's word")
        assert arms_report.verdict_of(gain, "cpu").startswith("not run on a GPU (the rule's word")
        rates = arms_report.verdict_rates(gain)
        assert list(rates) == ["0", "1.72"] and all(sum(row.values()) == pytest.approx(1) for row in rates.values())
        study = {"n": 400, "discordance": gain["discordance"], "seeds": seeds}
        spread = {key: gain[key] for key in ("seed_effect_sd", "shared")} if seeds > 1 else {}
        assert rates["1.72"] == statistics.verdict_rates(1.72, **study, **spread)
        by_seed = [row["difference"] for row in gain["by_seed"].values()]
        assert len(by_seed) == seeds and np.mean(by_seed) == pytest.approx(gain["difference"])
        assert all(0 < row["detectable_points"] < 10 for row in gain["by_seed"].values())
    same = {"coconut-s0": outcomes["coconut-s0"], "shared-s0": outcomes["coconut-s0"]}
    unchanged = arms_report.contrast(same, "shared", "coconut", [0])
    assert unchanged["low"] < 0 < unchanged["high"] and arms_report.verdict_rates(unchanged) == {}
    assert arms_report.verdict_of(unchanged, "cuda") == "not resolved, over problems alone, with 1 seed"
    few = {name: values[:20] for name, values in outcomes.items()}
    few["shared-s0"] = few["coconut-s0"].copy()
    few["shared-s0"][0] = 1 - few["shared-s0"][0]  # one discordant problem of twenty: nothing can be detected
    assert "detectable_points" not in arms_report.contrast(few, "shared", "coconut", [0])["by_seed"]["0"]


def test_another_plan_in_the_folder_is_refused(toy, tmp_path):
    run_experiment(toy, out=str(tmp_path / "run"), budget_minutes=1e-4, device="cpu")
    with pytest.raises(ValueError, match="budget_minutes=1, expected 0.0001"):
        run_experiment(toy, out=str(tmp_path / "run"), budget_minutes=1, device="cpu")


def test_wrong_use_is_one_line_before_any_compute(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LATENTLAB_DATA", raising=False)
    monkeypatch.setattr(datasets, "hub_answers", lambda: False)
    for words, said in (
        (["--preset", "smol"], "LATENTLAB_DATA"),
        (["--preset", "tiny", "--budget-minutes", "-1"], "expected at least 0"),
        (["--preset", "tiny", "--grpo.nothing", "3"], "--grpo.nothing"),
        (["--preset", "tiny", "--grpo.steps", "many"], "--grpo.steps"),
        (["--preset", "tiny", "--sweep.arms", "shared"], "sweep.arms: got no temperature"),
        (["--preset", "tiny", "--backbone", str(tmp_path / "none")], "which is no folder"),
        (["--preset", "tiny", "--backbone", "a", "--init-from", "b"], "got both, expected an untrained or a trained"),
    ):
        assert cli.main(["reproduce", *words, "--out", str(tmp_path / "run")]) == 2
        captured = capsys.readouterr().err
        assert said in captured and captured.count("\n") == 1, captured
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.fixture
def paper_folder(tmp_path):
    """A tiny random GPT-2 with a tokenizer that knows no latent token, as openai-community/gpt2 would come."""
    model = tiny_gpt2(n_positions=128, num_thoughts=0)
    folder = tmp_path / "gpt2"
    model.lm.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def test_preset_paper_runs_offline_on_rows_in_gsm8k_augs_format(paper_folder, monkeypatch, tmp_path):
    """The one command of preset paper: real loading code, a folder for the Hub's model and rows for its data."""

    def rows(address, split):
        if address != ("whynlp/gsm8k-aug",):  # the other benchmarks are out of reach
            raise FileNotFoundError("no Hub")
        count = {"train": 8, "validation": 3, "test": 3}[split]
        return [
            {
                "question": f"Leo has {i} pens.",
                "steps": [f"<<{i}+2={i + 2}>>", f"<<{i + 2}*2={2 * i + 4}>>"],
                "answer": str(2 * i + 4),
            }
            for i in range(1, count + 1)
        ]

    monkeypatch.setattr(datasets, "_load_from_hub", rows)
    monkeypatch.delenv("LATENTLAB_DATA", raising=False)
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path / "reports"))
    monkeypatch.chdir(tmp_path)
    fields = (
        "--grpo.steps 2 --grpo.num-problems 2 --grpo.num-generations 2 --grpo.max-candidates 2 --grpo.eval-every 1 "
        "--curriculum.steps 1 1 1 1 --curriculum.batch-size 2 --curriculum.eval-every 1 --evaluate.num-generations 2 "
        "--max-new-tokens 8 --sweep.seeds 0"
    )
    command = f"reproduce --preset paper --budget-minutes 0 --device cpu --backbone {paper_folder} {fields}"
    assert cli.main(command.split()) == 0
    result = json.loads((tmp_path / "reports" / "paper-cpu" / "arms.json").read_text())
    assert [arm["name"] for arm in result["arms"]] == ["coconut", "temperature", "shared"]
    assert result["metrics"]["plan"]["curriculum_steps"] == [1, 1, 1, 1] and result["arms"][1]["rollouts"] == 8
    assert result["parameters"]["precision"] == "bfloat16" and result["parameters"]["grpo"]["beta"] == 0.02
    trained = tmp_path / "runs" / "paper" / "reproduce" / "coconut-s0" / "best"
    command = f"reproduce --preset paper --budget-minutes 0 --device cpu --out again --init-from {trained} {fields}"
    assert cli.main(command.split()) == 0  # a published checkpoint goes the same way: straight into the arms
    again = json.loads((tmp_path / "reports" / "paper-cpu" / "arms.json").read_text())
    assert "trained elsewhere" in again["metrics"]["cot"]["skipped"]
    assert again["arms"][0]["correct"] == result["arms"][0]["correct"]
    assert [arm["correct"] for arm in again["arms"]] == [arm["correct"] for arm in result["arms"]]
