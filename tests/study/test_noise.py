"""study/noise: labels, the rule, units that are never made twice, and what the rows say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from latentlab.cli import main
from latentlab.config import from_dict, read_toml, to_dict
from latentlab.evaluation.statistics import arm_comparison
from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem
from latentlab.study import launch, results
from latentlab.study.noise import confidence, findings, pilot
from latentlab.study.noise.findings import write_findings
from latentlab.study.noise.plan import PLANS, STAGES, Plan, Rule, arm_changes, load_plan
from latentlab.study.noise.rows import Rows
from latentlab.study.noise.stages import run_plan, run_unit
from latentlab.study.noise.unit import is_made

MINI = str(Path(__file__).with_name("noise_mini.toml"))
UNITS = ("pilot/plain/0", "pilot/plain/1", "main/plain/0", "main/plain/1", "map/plain/0", "map/memorised_8/0")
UNITS += ("long/plain/0", "others/plain/0", "readings/plain/0")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a whole small study, each unit in this process."""
    folder = tmp_path_factory.mktemp("study") / "runs"
    for unit in UNITS:
        run_unit(MINI, folder, unit)
    return folder


@pytest.fixture
def found(study, tmp_path, monkeypatch):
    """The results of the small study, by name."""
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path))
    paths = write_findings(load_plan(MINI), study)
    return {path.stem: json.loads(path.read_text()) for path in paths}


# -- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan_of_the_study_keeps_what_was_promised():
    plan = load_plan("noise")
    assert plan.config.data.test_size == 20000 and plan.rule.least >= 18 and plan.rule.most <= 30
    assert plan.grids["temperature"] == (0.7, 1.0, 1.3, 2.0) and plan.grids["shared"] == (0.025, 0.05, 0.1)
    assert len(plan.map.bases) >= 5 and len(plan.map.arms) >= 7 and plan.map.seeds >= 3
    assert plan.long.rollouts >= 2_000_000 and plan.long.bases >= 3


def test_a_label_names_an_arm_and_its_strength():
    config, seconds = load_plan("noise").config, {"temperature": 0.05, "shared": 0.16}
    g = config.grpo
    changes = {
        "temperature 1.3": {"grpo": {"arm": "temperature", "temperature": 1.3}},
        "shared 0.05": {"grpo": {"arm": "shared", "mask": {"rate": 0.05}}},
        "gaussian 0.2": {"grpo": {"arm": "gaussian", "mask": {"rate": 0.2}}},
        "temperature 1 seconds": {"grpo": {"arm": "temperature", "temperature": 1.0, "steps": 1280}},
        "supervised once": {"grpo": {"arm": "supervised", "num_problems": 16, "num_generations": 2}},
        "supervised passes": {"grpo": {"arm": "supervised"}, "data": {"train_size": g.steps * g.num_problems}},
    }
    for label, expected in changes.items():
        assert arm_changes(label, config, seconds) == expected
    for label in (
        "shared",
        "shared x",
        "none 1",
        "shared 0.1 seconds",
        "temperature 1 2",
        "dropout 0.1",
        "supervised 3",
    ):
        with pytest.raises(ValueError, match=f"^plan: got the label '{label}', expected an arm and its strength"):
            arm_changes(label, config, seconds)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grids": {"shared": [0.1]}}, "^plan: got grids without 'temperature'"),
        ({"main": {"arms": ["shared *"]}}, "^plan: got main.arms without 'temperature \\*'"),
        ({"map": {"arms": ["shared 0.1"]}}, "^plan: got map.arms without 'temperature 1'"),
        (
            {"others": {"arms": ["gaussian *"]}, "grids": {"shared": [0.1], "temperature": [1.0]}},
            "as no pilot tunes it",
        ),
        ({"map": {"probes": ["temperature 1", "shared *"]}}, "as no pilot tunes it"),
        ({"map": {"probes": ["temperature 1", "shared 2"]}}, "mask rate: got 2.0"),
        (
            {"others": {"arms": ["antithetic 0.1"]}, "settings": {"grpo": {"num_generations": 3}}},
            "got 3 with arm antithetic",
        ),
        ({"map": {"bases": {"a/b": {}}}}, "map.bases: got the name 'a/b'"),
        ({"map": {"bases": {"a": {"memorise": 3.5}}}}, "memorise: got 3.5"),
        ({"rule": {"pilot": 1}}, "^rule: got pilot 1, least 3, most 3"),
        ({"settings": {"grpo": {"stepz": 3}}}, "stepz: got 3, expected no such field"),
        ({"rule": {"pilot": 0}}, "pilot: got 0, expected at least 1"),
        ({"map": {"bases": {"odd": {"curriculum": {"stop_accuracy": "x"}}}}}, "stop_accuracy: got 'x'"),
        ({"others": {"arms": ["masks 0.1"]}}, "got the label 'masks 0.1'"),
    ],
)
def test_a_wrong_plan_is_one_line(changes, message):
    values = read_toml(Path(MINI))
    for section, fields in changes.items():
        values[section] = fields if section == "grids" else {**values[section], **fields}
    with pytest.raises(ValueError, match=message) as error:
        from_dict(values, Plan)
    assert "\n" not in str(error.value)


def test_wrong_use_of_a_plan_is_one_line_before_any_compute(tmp_path, capfd):
    for words, message in (
        (["--plan", "nothing"], "plan: got 'nothing', expected noise, or a TOML file like"),
        (["--unit", "pilot/plain/0"], "sweep: got --unit or --stages without --plan"),
        (["--plan", "noise", "--grpo.steps", "3"], "sweep: got a preset or a field with --plan"),
        (["--plan", MINI, "--unit", "main/plain/0", "--out", str(tmp_path / "new")], "got an unfinished pilot"),
        (["--plan", MINI, "--unit", "dance"], "unit: got 'dance', expected STAGE/BASE/SEED"),
        (["--plan", MINI, "--unit", "pilot/plain/0/x"], "unit: got 'pilot/plain/0/x', expected"),
        (["--plan", MINI, "--stages", "long", "--out", str(tmp_path / "new")], "got an unfinished pilot"),
        (["--plan", MINI, "--unit", "map/plane/0"], "unit: got 'map/plane/0', expected"),
    ):
        code, (_, error) = main(["sweep", *words]), capfd.readouterr()
        assert (code, message in error, error.count("\n")) == (2, True, 1), error
    assert not list(tmp_path.rglob("config.json"))


def test_the_number_of_bases_follows_from_the_spread_of_the_pilot():
    rule = Rule(pilot=6, least=18, most=30, half_width=0.35)
    spread = np.array([-1.0, 1, -1, 1, -1, 1]) / 1.0954451150103321  # standard deviation 1
    assert np.std(spread, ddof=1) == pytest.approx(1)
    # Student's interval of n = 18, 25, 30 at standard deviation s: t s / sqrt(n) with t 2.110, 2.064, 2.045
    for s, bases in ((0.1, 18), (0.70, 18), (0.84, 25), (0.93, 30), (5.0, 30)):
        assert pilot.bases_needed(s * spread, rule) == bases
    assert pilot.bases_needed(0.84 * spread + 3, rule) == 25


# -- units ----------------------------------------------------------------------------------------------------------


def test_every_arm_has_a_row_with_command_interval_rollouts_and_cpu_seconds(study):
    plan = load_plan(MINI)
    rows = Rows(study, "main").found
    labels = {row["label"] for row in rows if row["seed"] == 0}
    others = pilot.decide(plan, study).labels([*plan.main.arms, *plan.others.arms])
    assert labels == {"start", *pilot.labels(plan), *others}
    assert [row["number"] for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        low, high = row["interval"]
        assert low <= row["correct"] / row["n"] <= high and row["n"] == 24
        assert row["command"].startswith(
            f"latentlab {'curriculum' if row['label'] == 'start' else 'grpo'} --preset smoke"
        )
        assert (row["rollouts"] > 0) is (row["cpu_seconds"] > 0) is (row["label"] != "start")
        assert row.get("replay_gap", 0.0) < 1e-5
    by_label = {row["label"]: row for row in rows if row["seed"] == 0}
    assert by_label["supervised once"]["rollouts"] == 3 * 4 and by_label["supervised passes"]["rollouts"] == 3 * 16


def test_a_finished_unit_does_nothing_and_an_interrupted_one_makes_what_is_missing(study, monkeypatch):
    before = {path: path.read_bytes() for path in study.glob("*/*/*.json")}
    target = next(path for path in before if path.name.startswith("temperature") and path.parent.name == "main")
    run_unit(MINI, study, "pilot/plain/0")
    assert {path: path.read_bytes() for path in before} == before
    target.unlink()
    shutil.rmtree(target.with_suffix(""))
    run_unit(MINI, study, f"pilot/plain/{target.parent.parent.name[-1]}")
    same = [json.loads(text) for text in (target.read_bytes(), before[target])]
    for row in same:
        del row["cpu_seconds"]
    assert same[0] == same[1]


def test_a_row_of_another_plan_is_refused(study, tmp_path):
    text = Path(MINI).read_text().replace("learning_rate = 1.0e-4", "learning_rate = 2.0e-4")
    (tmp_path / "other.toml").write_text(text)
    with pytest.raises(
        ValueError, match=r"^sweep: got .*json made for 'latentlab.*', expected '.*--grpo.learning-rate 0.0002"
    ):
        run_unit(str(tmp_path / "other.toml"), study, "pilot/plain/0")


def test_a_base_memorises_its_own_problems(study):
    row = json.loads((study / "memorised_8-s0/map/start.json").read_text())
    assert row["own"] >= row["correct"] / row["n"]
    steps = 200 * 8 // 128
    config = json.loads((study / "memorised_8-s0/base/config.json").read_text())
    assert config["grpo"]["arm"] == "supervised" and config["grpo"]["steps"] == steps
    best = json.loads((study / "memorised_8-s0/base/best/validation.json").read_text())
    assert best["step"] in (-1, steps - 1)  # the last weights, unless they know less than the first


def test_a_stage_is_one_process_per_base(study, tmp_path, processes, monkeypatch):
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path / "reports"))
    written = run_plan(MINI, study, ("pilot", "map"), launch.Launcher())
    units = [words[words.index("--unit") + 1] for _, words in processes.commands]
    assert sorted(units) == ["map/memorised_8/0", "map/plain/0", "pilot/plain/0", "pilot/plain/1"]
    assert all(words[:3] == ["sweep", "--plan", MINI] for _, words in processes.commands)
    assert {path.stem for path in written} == {"bases", "map", "long", "readings"}
    run_plan(MINI, study, ("pilot",), launch.Launcher())
    assert len(processes.commands) == 4  # finished units are not run again
    for path in study.glob("*/done.json"):
        shutil.rmtree(path.parent)


# -- findings -------------------------------------------------------------------------------------------------------


def test_contrasts_are_those_of_the_outcomes(study, found):
    metrics = found["bases"]["metrics"]
    equal = metrics["contrasts"]["equal_rollouts"]
    outcomes = Rows(study, "main").outcomes
    arms = [[outcomes[f"plain-s{s} {equal[side]} r0"] for s in (0, 1)] for side in ("arm", "other")]
    expected = arm_comparison(*map(np.array, arms))
    for key in ("difference", "low", "high", "discordance", "n", "seeds"):
        assert equal[key] == expected[key]
    assert equal["arm"].startswith("shared") and equal["other"].startswith("temperature")
    assert metrics["contrasts"]["equal_seconds"]["other"] == f"{equal['other']} seconds"
    assert metrics["pilot"]["bases"] == 3 and max(metrics["replay_gap"].values()) < 1e-5
    best = max(("shared 0.05", "shared 0.1"), key=lambda x: metrics["tuning"][x]["validation_accuracy"])
    assert f"shared {metrics['pilot']['chosen']['shared']:g}" == best and metrics["tuning"][best]["chosen"]
    assert metrics["sentence"] == findings.sentence(metrics["contrasts"])
    assert found["bases"]["headline"].startswith(
        f"One mask per rollout against answers sampled without: {equal['difference']:+.2f}"
    )


CONTRAST = {"seeds": 18, "n": 20000, "arm": "shared 0.05", "other": "temperature 1", "difference": 0.5}
CONTRAST |= {"arm_rollouts": 100, "other_rollouts": 350, "arm_cpu_seconds": 56.0, "other_cpu_seconds": 55.0}


def test_the_sentence_says_what_the_intervals_say():
    for (low, high), words in (
        ((0.2, 0.8), "beats answers"),
        ((-0.2, 0.8), "is not shown to differ from answers"),
        ((-0.8, -0.1), "loses to answers"),
    ):
        main = {**CONTRAST, "low": low, "high": high}
        text = findings.sentence({"equal_rollouts": main, "equal_seconds": {**main, "low": -3.0, "high": -1.0}})
        assert words in text and f"[{low:+.2f}, {high:+.2f}]" in text and "Over 18 small Coconut bases" in text
        assert "3.5 times the rollouts without a mask, whose" in text
        assert "the mask loses to sampling: +0.50 points [-3.00, -1.00] over 18 bases" in text
    assert "CPU seconds" not in findings.sentence({"equal_rollouts": main})


def test_the_hypothesis_is_judged_claim_by_claim():
    def place(entropy, untuned, tuned):
        return {
            "entropy": entropy,
            "untuned": dict(zip(("low", "high"), untuned, strict=True)),
            "tuned": dict(zip(("low", "high"), tuned, strict=True)),
        }

    says = list(confidence.judged([place(2.0, (-2, -1), (-2, 1)), place(0.3, (1, 2), (-1, 1))]).values())
    assert [word.split(" (")[0] for word in says] == ["supported", "supported", "not contradicted"]
    says = list(confidence.judged([place(2.0, (1, 2), (1, 2)), place(0.3, (-1, 2), (-1, 1))]).values())
    assert [word.split(" (")[0] for word in says] == ["not resolved", "contradicted", "contradicted"]
    assert list(confidence.judged([place(2.0, (1, 2), (1, 2))]).values())[0].startswith("not tested")


def test_noise_is_compared_at_the_temperature_of_equal_mean_accuracy():
    def row(label, mean, mixed):
        return {"label": label, "fresh": {"mean": mean, "mixed": mixed}}

    probes = [row("temperature 1", 0.6, 0.4), row("temperature 0.5", 0.58, 0.1), row("temperature 2", 0.4, 0.8)]
    rows = confidence.at_equal_mean([*probes, row("shared 0.1", 0.55, 0.3), row("gaussian 0.1", 0.7, 0.2)], "fresh")
    assert rows[0]["temperature_mixed"] == pytest.approx(0.5)  # between 2 and 1, neighbours, not between 2 and 0.5
    assert rows[1]["temperature_mixed"] is None


def test_the_map_has_gains_probes_and_the_claims(found):
    metrics = found["map"]["metrics"]
    assert [row["entropy"] for row in metrics["bases"]] == sorted(
        (row["entropy"] for row in metrics["bases"]), reverse=True
    )
    for row in metrics["bases"]:
        assert set(row["gains"]) == set(row["own_gains"]) == {"temperature 1", "shared 0.1"}
        for side in ("fresh", "own"):
            for probe in row["probes"]:
                assert probe[side]["mixed"] + probe[side]["solved"] + probe[side]["failed"] == pytest.approx(1)
    assert len(metrics["claims"]) == 3


def test_long_runs_have_curves_on_two_axes(found):
    curves = found["long"]["metrics"]["curves"]
    assert len(curves) == 2
    for curve in curves.values():
        assert curve["rollouts"] == [0, 32, 64] and curve["cpu_seconds"] == sorted(curve["cpu_seconds"])
        assert curve["reward"][0] is None and len(curve["validation_accuracy"]) == 3
    assert all("curves" not in row for row in found["long"]["metrics"]["rows"])


def test_readings_have_test_time_places_and_thoughts(found):
    readings = found["readings"]["metrics"]
    assert "start" in readings and len(readings) == 3
    start = readings["start"]
    assert {(row["noise"], row["k"]) for row in start["test_time"]} == {
        (noise, k) for noise in ("masks", "samples", "both") for k in (1, 2, 4, 8, 16)
    }
    names = [row["where"] for row in start["where"]]
    assert names == [
        "attention and mlp, all steps",
        "attention, layer 1",
        "mlp, layer 1",
        "inputs of the steps",
        "step 0 (<start>)",
        *(f"step {i} (input thought {i})" for i in range(1, 5)),
    ]


def test_masks_on_one_site_leave_the_others_alone(gpt2, problems, monkeypatch):
    from latentlab.masks import MaskSpec
    from latentlab.study.noise import readings

    seen, original = [], readings.rollout
    monkeypatch.setattr(readings, "rollout", lambda *a, **kw: (seen.append(kw["masks"]), original(*a, **kw))[1])
    for name, spec, index in readings._places(gpt2, MaskSpec(rate=0.4)):
        readings._answers(gpt2, problems[:2], 2, 8, spec, index)
        values = seen[-1].values
        touched = (values != 1).flatten(2).any(2) if values.dim() == 3 else (values != 1).flatten(2).any(2)
        if index is not None:
            assert touched.any(0).nonzero().flatten().tolist() == list(index), name
    assert len(seen) == 2 + 2 * 2 + 1 + gpt2.num_thoughts


def test_the_first_wrong_thought_is_counted():
    from latentlab.study.noise.readings import _first_wrong

    problem = Problem("p", "?", ("<<1+0=1>>", "<<1+1=2>>"), "2", "t")
    rows = [("1", "2"), ("1", "9"), ("9", "2"), ("1", "2")]
    assert _first_wrong(load_model("tiny"), [(problem, z) for z in rows]) == {"1": 0.25, "2": 0.25, "none": 0.5}


def test_a_file_made_for_something_else_is_refused(tmp_path):
    path = tmp_path / "x.json"
    assert not is_made(path, 3)
    path.write_text('{"made_for": 3}')
    assert is_made(path, 3)
    with pytest.raises(ValueError, match="made for 3, expected 4; delete it, or use another --out"):
        is_made(path, 4)


def test_a_unit_of_a_changed_plan_runs_again(study, tmp_path):
    plan = load_plan(MINI)
    values = to_dict(plan)
    values["others"]["arms"].append("shared 0.2")
    changed = from_dict(values, Plan)
    assert changed.digest("others") != plan.digest("others") and changed.digest("map") == plan.digest("map")
    values["settings"]["grpo"]["steps"] = 9
    assert all(from_dict(values, Plan).digest(stage) != plan.digest(stage) for stage in STAGES)


def test_the_published_plan_is_the_one_of_the_results():
    for name in ("bases", "map", "long", "readings"):
        path = results.published_folder() / "tiny" / f"{name}.json"
        if not path.exists():
            pytest.skip(f"{name}.json is not published yet")
        assert json.loads(path.read_text())["parameters"] == to_dict(load_plan(str(PLANS / "noise.toml")))
