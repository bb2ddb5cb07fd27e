"""compare.py: the table of a finished sweep, made here of eight runs of one or two steps."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentlab.cli import parse
from latentlab.config import ARMS, to_dict
from latentlab.data import datasets
from latentlab.data.word_problems import word_problems
from latentlab.evaluation.accuracy import evaluate
from latentlab.evaluation.thoughts import swap_thoughts
from latentlab.model import LatentReasoner
from latentlab.pretrained.loading import load_model, model_from_config
from latentlab.rollouts import rollout
from latentlab.study import compare, launch, results, sweep
from latentlab.study.compare import write_compare
from latentlab.study.results import read_outcomes, write_outcomes
from latentlab.training.arms import fit_grpo
from latentlab.training.curriculum import fit_curriculum
from latentlab.training.run import read_metrics
from tests.conftest import sharpen, tiny_gpt2

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
def toy(tmp_path_factory):
    """(config, folder) of a finished sweep: two seeds, all arms; the processes are replaced by calls in this one."""
    settings = {
        "data.train-size": 24, "data.validation-size": 6, "data.test-size": 40, "data.steps": 2,
        "backbone.n-embd": 16, "backbone.n-head": 2, "curriculum.steps": "1 1 1", "curriculum.batch-size": 4,
        "grpo.steps": 2, "grpo.num-problems": 2, "grpo.num-generations": 4, "grpo.learning-rate": 0.05,
        "grpo.eval-every": 1, "evaluate.num-generations": 4, "sweep.seeds": "0 1", "sweep.tune-steps": 1,
        "sweep.workers": 1,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", *str(value).split())]
    _, config = parse(["sweep", "compare", "--preset", "smoke", *words])
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "commit", lambda: "toy")
        patch.setattr(launch, "subprocess", SimpleNamespace(Popen=_in_process, PIPE=None))
        patch.setattr(sweep, "write_compare", lambda *arguments: arguments)
        found, runs, chosen, _ = sweep.run_sweep("compare", config, out=str(folder))
    assert found == config and runs == folder
    return config, folder, chosen


def _in_process(command, **_):
    """What `python -m latentlab.cli WORDS` does, without a process; every third answer earns the reward."""
    verb, config = parse(command[command.index("latentlab.cli") + 1 :])
    train, validation = (datasets.load(config.data, split) for split in ("train", "validation"))
    if command[3] == "curriculum":
        summary = fit_curriculum(model_from_config(config), train, validation, config, out=verb.out)
    else:
        model = load_model(verb.init_from)
        reward = lambda text, problem: float(sum(map(ord, text)) % 3 == 0)  # noqa: E731
        summary = fit_grpo(model, train, validation, config, out=verb.out, reward=reward)
    said = "a line before\n" + json.dumps(summary) + "\n"
    return SimpleNamespace(returncode=0, communicate=lambda: (said, None))


@pytest.fixture(scope="module")
def written(toy, tmp_path_factory):
    """(result, outcomes, reports folder) of that sweep; a sixth of the outcomes are turned, or all would be 0."""
    reports = tmp_path_factory.mktemp("reports")
    original = compare._outcomes

    def turned(run, test, config):
        noise = np.random.default_rng(sum(run.name.encode())).random(len(test)) < 1 / 6
        return np.abs(original(run, test, config) - noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLAB_REPORTS", str(reports))
        patch.setattr(compare, "_outcomes", turned)
        config, folder, chosen = toy
        path = write_compare(config, folder, chosen, started=0.0)
    assert path == reports / "smoke" / "compare.json"
    result = results.read_result("compare", "smoke", reports)
    return result, read_outcomes(reports / "smoke" / "compare_outcomes.npz"), reports


def test_every_run_is_a_row_with_its_numbers(toy, written):
    (config, folder, _), (result, outcomes, _) = toy, written
    assert [(row["name"], row["seed"]) for row in result["arms"]] == [(name, seed) for seed in (0, 1) for name in RUNS]
    assert result["parameters"] == to_dict(config) and result["preset"] == "smoke"
    for row in result["arms"]:
        run = f"{row['name']}-s{row['seed']}"
        done = json.loads((folder / run / "done.json").read_text())
        assert row["n"] == 40 and row["correct"] == outcomes[run].sum() and row["seconds"] == done["seconds"]
        assert row["interval"][0] <= row["correct"] / 40 <= row["interval"][1]
        assert row["validation_accuracy"] == done["validation_accuracy"]
        assert row["rollouts"] == (0 if row["name"] in RUNS[:3] else 2 * 2 * 4)  # equal rollouts
        gaps = [line["replay_gap"] for line in read_metrics(folder / run) if "replay_gap" in line]
        assert row.get("replay_gap") == (max(gaps) if gaps else None)
        assert bool(gaps) is (row["name"] in ARMS and row["name"] != "supervised")
        assert not gaps or 0 <= row["replay_gap"] < 1e-5


def test_differences_are_paired_with_the_baseline_of_the_same_seed(written):
    result, outcomes, _ = written
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
    result, outcomes, _ = written
    contrast = result["metrics"]["main_contrast"]
    gaps = [100 * (outcomes[f"shared-s{s}"].astype(int) - outcomes[f"temperature-s{s}"]).mean() for s in (0, 1)]
    assert contrast["seed_differences"] == pytest.approx(gaps) and contrast["difference"] == pytest.approx(
        sum(gaps) / 2
    )
    assert [contrast["by_seed"][s]["difference"] for s in ("0", "1")] == pytest.approx(gaps)
    interval = f"[{contrast['wide_low']:+.2f}, {contrast['wide_high']:+.2f}]"
    text = f"{contrast['difference']:+.2f} points {interval} over 2 seeds"
    assert result["headline"] == f"shared - temperature: {text}"


def test_the_metrics_hold_what_the_notebooks_read(toy, written):
    (_, folder, chosen), (result, _, _) = toy, written
    metrics = result["metrics"]
    assert metrics["chosen_on_validation"] == chosen and set(chosen) == {"temperature", "shared", "supervised"}
    assert metrics["tuning"] == json.loads((folder / "tuning.json").read_text())["trials"]
    assert set(metrics["curriculum"]) == {f"{name}-s{seed}" for seed in (0, 1) for name in RUNS[:3]}
    assert set(metrics["curriculum"]["pause-s1"]["stages"]) == {"0", "1", "2"}
    assert set(metrics["curves"]) == {f"{arm}-s{seed}" for seed in (0, 1) for arm in ARMS}
    assert metrics["curves"]["shared-s0"]["validation_step"] == [-1, 0, 1]
    assert len(metrics["curves"]["shared-s0"]["reward"]) == 1  # iteration 0, then every tenth
    assert {name: entry["n"] for name, entry in metrics["swapped_thoughts"].items()} == {
        "coconut-s0": 40,
        "coconut-s1": 40,
    }
    assert {name.split("-")[0] for name in metrics["deployments"]} == {"coconut", "temperature", "shared"}


def test_arm_none_left_every_weight_alone_and_an_altered_weight_shows(toy, written, tmp_path):
    (_, folder, _), (result, _, _) = toy, written
    assert result["metrics"]["weights_unchanged"] == {"none-s0": True, "none-s1": True}
    for arm in ("coconut", "none"):
        (tmp_path / f"{arm}-s0").symlink_to(folder / f"{arm}-s0")
    assert compare._same_weights(tmp_path, 0) is True
    state = torch.load(folder / "none-s0" / "state.pt", weights_only=True)
    state["model"]["transformer.h.0.mlp.c_fc.weight"][0, 0] += 1e-6
    (tmp_path / "none-s0").unlink()
    (tmp_path / "none-s0").mkdir()
    torch.save(state, tmp_path / "none-s0" / "state.pt")
    assert compare._same_weights(tmp_path, 0) is False
    (tmp_path / "none-s0" / "state.pt").unlink()
    (tmp_path / "none-s0" / "state.pt").symlink_to(folder / "shared-s0" / "state.pt")
    assert compare._same_weights(tmp_path, 0) is False  # an arm that learnt


def test_outcomes_are_those_of_the_clean_greedy_model(toy, questions):
    config, folder, _ = toy
    model = load_model(folder / "shared-s0" / "best")
    model.eval()
    answers = evaluate(model, questions, batch_size=5).text
    number = [re.fullmatch(r"### (\d+)", text) for text in answers]
    solved = [dataclasses.replace(p, answer=m[1] if m else "-1") for p, m in zip(questions, number, strict=True)]
    expected = [float(bool(m)) for m in number]
    assert compare._outcomes(folder / "shared-s0", solved, config).tolist() == expected


def test_outcomes_survive_packing_at_any_length(written, tmp_path):
    """n is no multiple of 8: the padding bits must not come back as problems."""
    _, outcomes, _ = written
    assert set(outcomes) == {f"{name}-s{seed}" for seed in (0, 1) for name in RUNS}
    assert all(values.shape == (40,) and set(np.unique(values)) <= {0, 1} for values in outcomes.values())
    values = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1])
    write_outcomes(tmp_path / "o.npz", {"run": values})
    assert read_outcomes(tmp_path / "o.npz")["run"].tolist() == values.tolist()


def test_one_seed_needs_no_pooling(written):
    _, outcomes, _ = written
    contrast = compare.contrast(outcomes, "shared", "temperature", (1,))
    assert contrast["difference"] == contrast["by_seed"]["1"]["difference"]
    assert compare.in_words(contrast).endswith("over 1 seed")
