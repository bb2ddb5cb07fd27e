"""experiment.py: which runs are started, in which order, with which settings. No process is started here."""

import math
from itertools import product

import pytest

from latentlab import config
from latentlab.cli import parse
from latentlab.config import ARMS, changed_words, from_dict, load_preset, to_dict
from latentlab.study import experiment
from latentlab.study.answers import TrainedModels
from latentlab.study.experiment import FAMILY, run_experiment
from latentlab.study.launch import IN_PROCESS, Launcher


def small(**fields):
    """A sweep configuration of one worker, so that jobs run in order."""
    values = to_dict(load_preset("smoke"))
    values["sweep"] |= {"workers": 1, **fields}
    return from_dict(values)


# -- changed fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["curriculum", "grpo"])
@pytest.mark.parametrize("preset", ["smoke", "tiny"])
def test_changed_fields_reach_every_run_as_they_are(verb, preset):
    """Tuples, None to a number and back, text, whole and small numbers: the words parse to the same Config."""
    values = to_dict(load_preset(preset))
    values |= {"seed": 7, "max_new_tokens": 9}
    values["data"] |= {"name": "gsm8k", "train_size": 0}
    values["curriculum"] |= {"steps": [1, 2, 3], "betas": [0.8, 0.95], "learning_rate": 1.0e-5}
    values["curriculum"]["mask"] |= {"sites": ["mlp"], "scope": "prompt+latent"}
    values["grpo"] |= {"epsilon_high": 0.28, "arm": "per_step", "loss_type": "dapo"}
    values["grpo"]["mask"] |= {"sites": ["embedding", "attention"], "rate": 0.25}
    changed = from_dict(values)
    words = changed_words(to_dict(changed), but=("sweep.",))
    assert parse([verb, "--preset", preset, *words])[1] == changed
    assert not any(word.startswith(("--backbone", "--evaluate", "--preset")) for word in words)  # not changed
    assert changed_words(to_dict(load_preset(preset)), but=("sweep.",)) == []


def test_none_and_booleans_are_words_that_parse_back(monkeypatch):
    """A preset that sets epsilon_high, and a sweep that takes it back."""
    values = to_dict(load_preset("smoke"))
    values["grpo"]["epsilon_high"] = 0.3
    monkeypatch.setattr(config, "load_preset", lambda name: from_dict(values))
    words = changed_words(to_dict(load_preset("smoke")), but=("sweep.",))
    assert words == ["--grpo.epsilon-high", "None"]
    assert parse(["grpo", "--preset", "smoke", *words])[1].grpo.epsilon_high is None
    verb, _ = parse(["grpo", "--preset", "smoke", "--out", "x", "--threads", "1", "--resume"])
    assert verb.resume is True and verb.threads == 1


def test_fields_of_the_sweep_itself_are_not_passed_on():
    assert changed_words(to_dict(small(seeds=[3, 4], rates=[0.2])), but=("sweep.",)) == []


# -- the whole plan -------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(processes, tmp_path, monkeypatch):
    """plan(config): run the experiment without answers and report; (chosen settings, trials)."""
    for stage in ("store", "store_sampled", "store_swapped"):
        monkeypatch.setattr(TrainedModels, stage, lambda *_, **__: None)
    monkeypatch.setattr(experiment, "write_report", lambda *_, tuning, **__: tuple(tuning.values()))
    folder = tmp_path / "sweep"

    def call(config):
        trials = [f"tune-{family}-{i}" for family, i in product(("temperature", "shared", "supervised"), range(4))]
        names = ("coconut", *config.sweep.controls, *config.sweep.arms)
        for run in (*trials, *(f"{name}-s{seed}" for name, seed in product(names, config.sweep.seeds))):
            (folder / run).mkdir(parents=True, exist_ok=True)
        return run_experiment(config, out=str(folder), launcher=Launcher())

    return call


GRID = {
    "arms": list(ARMS),
    "seeds": [5, 6],
    "learning_rates": [1e-4, 1e-3],
    "rates": [0.1, 0.2],
    "temperatures": [0.7, 1.3],
}


def test_tuning_picks_the_best_validation_accuracy_and_the_arms_get_it(plan, processes):
    processes.scores = {"tune-temperature-1": 0.9, "tune-shared-2": 0.8, "tune-supervised-1": 0.7}
    chosen, trials = plan(small(**GRID))
    assert chosen == {
        "temperature": {"learning_rate": 1e-4, "temperature": 1.3},
        "shared": {"learning_rate": 1e-3, "mask.rate": 0.1},
        "supervised": {"learning_rate": 1e-3},
    }
    assert len(trials) == 10
    for arm, best in (("temperature", 0.9), ("shared", 0.8), ("supervised", 0.7)):
        found = max((t for t in trials if t["arm"] == arm), key=lambda t: t["validation_accuracy"])
        assert found == {"arm": arm, **chosen[arm], "validation_accuracy": best}
    grpo = {arm: parse(processes.words(f"{arm}-s6"))[1].grpo for arm in ARMS}
    assert {arm: g.arm for arm, g in grpo.items()} == {arm: arm for arm in ARMS}
    for arm in ("shared", "per_step", "shared_greedy", "antithetic"):
        assert (grpo[arm].learning_rate, grpo[arm].mask.rate, grpo[arm].temperature) == (1e-3, 0.1, 1.0)
    for arm in ("none", "temperature"):
        assert (grpo[arm].learning_rate, grpo[arm].temperature) == (1e-4, 1.3)
    assert (grpo["supervised"].learning_rate, grpo["supervised"].temperature) == (1e-3, 1.0)


def test_the_order_is_baselines_then_trials_then_controls_and_arms(plan, processes):
    plan(small(**GRID))
    names = processes.names
    assert names[:2] == ["coconut-s5", "coconut-s6"]
    assert len(names) == len(set(names)) and all(name.startswith("tune-") for name in names[2:12])
    assert names[12:16] == ["pause-s5", "direct-s5", "pause-s6", "direct-s6"]
    assert names[16:] == [f"{arm}-s{seed}" for seed in (5, 6) for arm in ARMS]


def test_every_word_parses_and_arms_start_from_the_baseline_of_their_seed(plan, processes, tmp_path):
    config = small(**GRID)
    plan(config)
    for name, words in processes.commands:
        if name.endswith("-s5"):  # their words are those of -s6 but for the seed
            continue
        verb, got = parse(words)
        assert verb.out == str(tmp_path / "sweep" / name) and verb.resume is False
        seed = 5 if name.startswith("tune") else int(name[-1])
        assert got.seed == seed and got.data == config.data and got.preset == "smoke"
        if words[0] == "grpo":
            assert verb.init_from == str(tmp_path / "sweep" / f"coconut-s{seed}" / "best")
            steps = config.sweep.tune_steps if name.startswith("tune") else config.grpo.steps
            assert got.grpo.steps == steps
        else:
            assert got.curriculum.control == name.split("-")[0]


def test_a_grid_of_one_candidate_needs_no_trial(plan, processes):
    chosen, trials = plan(small(rates=[0.1, 0.3]))
    assert [name for name in processes.names if name.startswith("tune")] == ["tune-shared-0", "tune-shared-1"]
    assert chosen["temperature"] == {"learning_rate": 3e-5, "temperature": 1.0} and len(trials) == 2


@pytest.mark.parametrize(("steps", "short"), [(400, 10), (4, 4)])
def test_none_is_short(plan, processes, steps, short):
    values = to_dict(small())
    values["grpo"]["steps"] = steps
    plan(from_dict(values))
    assert parse(processes.words("none-s0"))[1].grpo.steps == short
    assert parse(processes.words("shared-s0"))[1].grpo.steps == steps


def test_families_of_arms():
    assert {arm: FAMILY.get(arm, "temperature") for arm in ARMS} == {
        "none": "temperature",
        "temperature": "temperature",
        "shared": "shared",
        "per_step": "shared",
        "shared_greedy": "shared",
        "antithetic": "shared",
        "gaussian": "gaussian",
        "supervised": "supervised",
    }


def test_a_folder_of_other_settings_is_refused_before_any_run(plan, processes):
    """Its finished runs would be taken for this sweep's; more seeds or arms only add runs."""
    plan(small())
    count = len(processes.commands)
    values = to_dict(small())
    values["grpo"]["steps"] = 9
    for other, key in (
        (from_dict(values), "grpo.steps"),
        (small(tune_steps=3), "sweep.tune_steps"),
        (small(seeds=[1]), "sweep.seeds"),
    ):
        with pytest.raises(ValueError, match=f"^resume: got {key}.* expected .*use another --out") as error:
            plan(other)
        assert "\n" not in str(error.value)
    assert len(processes.commands) == count
    plan(small(seeds=[0, 1], workers=2))
    assert {name[-1] for name in processes.names[count:]} == {"1"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": ["none", "shared"]}, "^sweep.arms: got no temperature, expected"),
        ({"seeds": [1, 1]}, r"^sweep.seeds: got \(1, 1\), expected different"),
    ],
)
def test_a_plan_whose_table_could_not_be_written_starts_nothing(plan, processes, fields, message):
    with pytest.raises(ValueError, match=message):
        plan(small(**fields))
    assert not processes.commands


@pytest.mark.parametrize(
    ("launcher", "minutes"), [(IN_PROCESS, -1), (IN_PROCESS, math.nan), (IN_PROCESS, math.inf), (Launcher(), 0)]
)
def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_written(processes, tmp_path, launcher, minutes):
    with pytest.raises(ValueError, match=f"^budget: got {minutes} minutes .*, expected at least 0") as error:
        run_experiment(small(), out=str(tmp_path / "run"), launcher=launcher, budget_minutes=minutes)
    assert "\n" not in str(error.value) and not processes.commands and not (tmp_path / "run").exists()


def test_more_test_problems_need_no_other_folder(plan, processes):
    """Answers know what was asked: a larger test set asks again, and trains nothing."""
    plan(small(learning_rates=[0.1]))
    started = len(processes.commands)
    values = to_dict(small(learning_rates=[0.1]))
    values["data"]["test_size"] += 1
    values["evaluate"]["num_generations"] += 1
    plan(from_dict(values))
    assert len(processes.commands) == started
