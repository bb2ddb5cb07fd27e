"""arms_report.py, answers.py: the report of a finished experiment, made here of runs of one or two steps."""

import dataclasses
import itertools
import json
import re
from functools import partial

import numpy as np
import pytest
import torch

from latentlab.cli import parse
from latentlab.config import SweepConfig, to_dict
from latentlab.data import datasets
from latentlab.data.word_problems import word_problems
from latentlab.evaluation.accuracy import evaluate
from latentlab.evaluation.thoughts import swap_thoughts
from latentlab.model import LatentReasoner
from latentlab.pretrained.loading import load_model
from latentlab.rollouts import rollout
from latentlab.study import answers, arms_report, experiment, results, tables
from latentlab.study.answers import graded_answers, greedy_score
from latentlab.study.experiment import run_experiment
from latentlab.study.launch import IN_PROCESS
from latentlab.study.results import read_outcomes, write_outcomes
from latentlab.training.arms import fit_grpo
from latentlab.training.run import read_metrics
from tests.conftest import sharpen, tiny_gpt2

ARMS = SweepConfig().arms
RUNS = ["coconut", "pause", "direct", *ARMS]

# -- swapping thoughts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions():
    return word_problems("test", 12, seed=0, steps=2)


@pytest.fixture(scope="module")
def thinker():
    """A random model whose thoughts reach its answers: twelve questions, several different answers."""
    return sharpen(tiny_gpt2(seed=2), 10.0)


def test_swapped_thoughts_are_those_of_the_next_problem(thinker, questions):
    """The shares by hand, with the donor's thoughts recorded first and then fed in by index."""
    own = {}
    greedy = {"num_generations": 1, "masks": None, "temperature": 0.0, "run_seed": 0, "step": 0}
    clean = rollout(thinker, questions, **greedy, edit=lambda i, z: own.setdefault(i, z)).text
    order = [*range(1, 12), 0]
    swapped = rollout(thinker, questions, **greedy, edit=lambda i, z: own[i][order]).text
    shares = swap_thoughts(thinker, questions)
    assert shares == {
        "n": 12,
        "changed": sum(a != b for a, b in zip(clean, swapped, strict=True)) / 12,
        "follows_donor": sum(swapped[i] == clean[order[i]] for i in range(12)) / 12,
        "same_by_chance": sum(clean[i] == clean[order[i]] for i in range(12)) / 12,
    }
    assert shares["changed"] > 0 and shares["same_by_chance"] < 1


@pytest.mark.parametrize("feedback", ["none", "pause"])
def test_where_no_thought_is_fed_back_swapping_changes_nothing(thinker, questions, feedback):
    model = LatentReasoner(thinker.lm, thinker.tokenizer, num_thoughts=2, max_new_tokens=5, feedback=feedback)
    shares = swap_thoughts(model, questions)
    assert shares["changed"] == 0.0 and shares["follows_donor"] == shares["same_by_chance"] < 1


# -- a whole sweep --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(config, folder, result, outcomes) of an experiment in this process: two seeds, all arms.

    Every third answer earns the reward; a sixth of the outcomes are turned, or all would be 0.
    """
    settings = {
        "data.train-size": 24,
        "data.validation-size": 6,
        "data.test-size": 40,
        "data.steps": 2,
        "backbone.n-embd": 16,
        "backbone.n-head": 2,
        "curriculum.steps": "1 1 1",
        "curriculum.batch-size": 4,
        "grpo.steps": 2,
        "grpo.num-problems": 2,
        "grpo.num-generations": 4,
        "grpo.learning-rate": 0.05,
        "grpo.eval-every": 1,
        "evaluate.num-generations": 4,
        "sweep.seeds": "0 1",
        "sweep.tune-steps": 1,
        "sweep.rates": "0.1 0.2",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", *str(value).split())]
    _, config = parse(["grpo", "--preset", "smoke", *words])
    folder, reports = tmp_path_factory.mktemp("sweep"), tmp_path_factory.mktemp("reports")
    original, seeds = answers.graded_answers, itertools.count()

    def turned(model, problems, **options):
        found = original(model, problems, **options)
        if "num_generations" not in options:
            noise = np.random.default_rng(next(seeds)).random(len(problems)) < 1 / 6
            found["correct"] = np.abs(np.array(found["correct"]) - noise[:, None]).tolist()
        return found

    def reward(text, problem):
        return float(sum(map(ord, text)) % 3 == 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLAB_REPORTS", str(reports))
        patch.setattr(experiment, "commit", lambda: "toy")
        patch.setattr(experiment, "fit_grpo", partial(fit_grpo, reward=reward))
        patch.setattr(answers, "graded_answers", turned)
        path = run_experiment(config, out=str(folder), launcher=IN_PROCESS)
    assert path == reports / "smoke" / "arms.json"
    result = results.read_result("arms", "smoke", reports)
    return config, folder, result, read_outcomes(reports / "smoke" / "arms_outcomes.npz")


def test_every_run_is_a_row_with_its_numbers(written):
    config, folder, result, outcomes = written
    assert [(row["name"], row["seed"]) for row in result["arms"]] == [(name, seed) for seed in (0, 1) for name in RUNS]
    assert result["parameters"] == to_dict(config) and result["preset"] == "smoke"
    for row in result["arms"]:
        run = f"{row['name']}-s{row['seed']}"
        done = json.loads((folder / run / "done.json").read_text())
        assert row["n"] == 40 and row["correct"] == outcomes[run].sum() and row["seconds"] == done["seconds"]
        assert row["interval"][0] <= row["correct"] / 40 <= row["interval"][1]
        assert row["validation_accuracy"] == done["validation_accuracy"] and row["commit"] == "toy"
        assert row["rollouts"] == (0 if row["name"] in RUNS[:3] else 2 * 2 * 4)  # equal rollouts
        gaps = [line["replay_gap"] for line in read_metrics(folder / run) if "replay_gap" in line]
        assert row.get("replay_gap") == (max(gaps) if gaps else None)
        assert bool(gaps) is (row["name"] in ARMS and row["name"] != "supervised")
        assert not gaps or 0 <= row["replay_gap"] < 1e-5


def test_differences_are_paired_with_the_baseline_of_the_same_seed(written):
    _, _, result, outcomes = written
    for row in result["arms"]:
        mine, base = (outcomes[f"{name}-s{row['seed']}"].astype(int) for name in (row["name"], "coconut"))
        if row["name"] == "coconut":
            assert "difference" not in row
            continue
        difference = row["difference"]
        assert difference["points"] == pytest.approx(100 * (mine - base).mean())
        assert (difference["only_a"], difference["only_b"]) == ((mine > base).sum(), (mine < base).sum())
        assert difference["low"] <= difference["points"] <= difference["high"] and 0 <= difference["p_value"] <= 1
    assert len({row["difference"]["points"] for row in result["arms"] if "difference" in row}) > 3


def test_the_main_contrast_is_shared_minus_temperature(written):
    _, _, result, outcomes = written
    contrast = result["metrics"]["main_contrast"]
    gaps = [100 * (outcomes[f"shared-s{s}"].astype(int) - outcomes[f"temperature-s{s}"]).mean() for s in (0, 1)]
    assert contrast["difference"] == pytest.approx(sum(gaps) / 2) and contrast["seeds"] == 2
    assert [contrast["by_seed"][s]["difference"] for s in ("0", "1")] == pytest.approx(gaps)
    interval = f"[{contrast['low']:+.2f}, {contrast['high']:+.2f}]"
    text = f"{contrast['difference']:+.2f} points {interval} over 2 seeds"
    assert result["headline"] == f"shared - temperature: {text}"


def test_the_metrics_hold_what_the_notebooks_read(written):
    config, _, result, outcomes = written
    metrics, every = result["metrics"], [f"{name}-s{seed}" for seed in (0, 1) for name in RUNS]
    assert set(metrics["chosen_on_validation"]) == {"temperature", "shared", "supervised"}
    assert metrics["chosen_on_validation"]["shared"]["mask.rate"] in (0.1, 0.2)
    assert [trial["arm"] for trial in metrics["tuning"]] == ["shared", "shared"]
    assert set(metrics["curriculum"]) == {f"{name}-s{seed}" for seed in (0, 1) for name in RUNS[:3]}
    assert set(metrics["curriculum"]["pause-s1"]["stages"]) == {"0", "1", "2"}
    assert list(metrics["curves"]) == every
    assert metrics["curves"]["shared-s0"]["validation_accuracy"]["step"] == [-1, 0, 1]
    assert metrics["curves"]["shared-s0"]["reward"]["step"] == [0, 1]
    assert {name: entry["n"] for name, entry in metrics["swapped_thoughts"].items()} == {
        "coconut-s0": 40,
        "coconut-s1": 40,
    }
    assert all(
        set(entry) == {"n", "changed", "follows_donor", "same_by_chance"}
        for entry in metrics["swapped_thoughts"].values()
    )
    assert {name.split("-")[0] for name in metrics["deployments"]} == {"coconut", "temperature", "shared"}
    assert len(metrics["deployments"]) == 6
    shown = metrics["deployments"]["shared-s1"]
    assert shown["n"] == 40 and shown["greedy"]["correct"] == outcomes["shared-s1"].sum()
    assert shown["sampled"]["mask_rate"] == metrics["chosen_on_validation"]["shared"]["mask.rate"]
    assert set(shown["sampled"]["pass@k"]) == {"1", "2", "3", "4"}
    assert metrics["gain"]["arms"] == "shared - coconut" and "rule's word" in metrics["verdict"]
    assert "cot" not in metrics and "transfer" not in metrics and metrics["cost"]["budget_minutes"] is None


def test_sampled_answers_are_summed_up_as_evaluate_does(written):
    config, folder, result, _ = written
    model = load_model(folder / "temperature-s0" / "best")
    test = datasets.load(config.data, "test")
    found = evaluate(model, test, batch_size=7, num_generations=4, temperature=1.0, run_seed=config.seed)
    sampled = result["metrics"]["deployments"]["temperature-s0"]["sampled"]
    assert sampled["mean"] == pytest.approx(found.accuracy) and sampled["mask_rate"] == 0.0
    assert sampled["majority"] == pytest.approx(found.majority().mean())
    assert list(sampled["pass@k"].values()) == pytest.approx([found.pass_at(k) for k in (1, 2, 3, 4)])


def test_arm_none_left_every_weight_alone_and_an_altered_weight_shows(written, tmp_path):
    _, folder, result, _ = written
    assert result["metrics"]["weights_unchanged"] == {"none-s0": True, "none-s1": True}
    for arm in ("coconut", "none"):
        (tmp_path / f"{arm}-s0").symlink_to(folder / f"{arm}-s0")
    assert arms_report._same_weights(tmp_path, "coconut-s0", "none-s0") is True
    state = torch.load(folder / "none-s0" / "state.pt", weights_only=True)
    state["model"]["transformer.h.0.mlp.c_fc.weight"][0, 0] += 1e-6
    (tmp_path / "none-s0").unlink()
    (tmp_path / "none-s0").mkdir()
    torch.save(state, tmp_path / "none-s0" / "state.pt")
    assert arms_report._same_weights(tmp_path, "coconut-s0", "none-s0") is False
    (tmp_path / "none-s0" / "state.pt").unlink()
    (tmp_path / "none-s0" / "state.pt").symlink_to(folder / "shared-s0" / "state.pt")
    assert arms_report._same_weights(tmp_path, "coconut-s0", "none-s0") is False  # an arm that learnt


def test_answers_are_those_of_the_clean_greedy_model(written, questions):
    _, folder, _, _ = written
    model = load_model(folder / "shared-s0" / "best")
    text = evaluate(model, questions, batch_size=5).text
    number = [re.fullmatch(r"### (\d+)", answer) for answer in text]
    solved = [dataclasses.replace(p, answer=m[1] if m else "-1") for p, m in zip(questions, number, strict=True)]
    found = graded_answers(model, solved, batch_size=4)
    assert found["correct"] == [[int(bool(m))] for m in number]
    assert found["text"] == text and found["ids"] == [p.id for p in questions]
    score = greedy_score(found)
    assert (score["n"], score["correct"]) == (12, sum(map(bool, number))) == (12, score["correct_string_rule"])


def test_the_result_is_found_with_its_outcomes_and_samples(written, monkeypatch, tmp_path):
    _, folder, result, outcomes = written
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path))
    assert arms_report.read_arms("nowhere") is None
    results.write_result(
        **{key: result[key] for key in ("name", "metrics", "parameters", "arms", "started", "seconds")}, preset="smoke"
    )
    write_outcomes(tmp_path / "smoke" / "arms_outcomes.npz", outcomes)
    found = arms_report.read_arms("nowhere", "smoke")
    assert found["samples"] == [] and found["outcomes"].keys() == outcomes.keys()


def test_outcomes_survive_packing_at_any_length(written, tmp_path):
    """n is no multiple of 8: the padding bits must not come back as problems."""
    _, _, _, outcomes = written
    assert set(outcomes) == {f"{name}-s{seed}" for seed in (0, 1) for name in RUNS}
    assert all(values.shape == (40,) and set(np.unique(values)) <= {0, 1} for values in outcomes.values())
    values = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1])
    write_outcomes(tmp_path / "o.npz", {"run": values})
    assert read_outcomes(tmp_path / "o.npz")["run"].tolist() == values.tolist()


def test_one_seed_needs_no_pooling(written):
    _, _, _, outcomes = written
    contrast = arms_report.contrast(outcomes, "shared", "temperature", (1,))
    assert contrast["difference"] == contrast["by_seed"]["1"]["difference"]
    assert arms_report.in_words(contrast).endswith("over 1 seed")


def test_error_rates_stand_beside_the_verdict(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path))
    found = arms_report.read_arms("smol-cpu")
    assert "verdict_rates" not in found["metrics"]  # no discordant problem
    found["metrics"]["verdict_rates"] = {"0": {"reproduced": 0.0251, "not resolved": 0.9749}}
    verdict, rates = arms_report.overview(found).splitlines()[-2:]
    assert verdict.startswith("verdict on the published gain: not run on a GPU")
    assert rates.endswith("if the true difference is 0 points: reproduced 2.5%, not resolved 97.5%")
    text = tables.render("report.md", results=[found], unknown=[])
    assert "(points) is | reproduced | not resolved |" in text and "| 0 | 2.5% | 97.5% |" in text


def test_the_published_comparisons_follow_from_their_outcomes():
    for preset in ("tiny", "smol-cpu"):
        found = results.read_result("arms", preset, results.published_folder())
        outcomes = read_outcomes(found["folder"] / "arms_outcomes.npz")
        seeds = [arm["seed"] for arm in found["arms"] if arm["name"] == "shared"]
        gain = arms_report.contrast(outcomes, "shared", "coconut", seeds)
        assert found["metrics"]["gain"] == gain
        assert found["metrics"]["main_contrast"] == arms_report.contrast(outcomes, "shared", "temperature", seeds)
        assert found["metrics"].get("verdict_rates", {}) == arms_report.verdict_rates(gain)
        assert found["metrics"]["verdict"] == arms_report.verdict_of(gain, "cpu", found["metrics"]["data"])
