"""What the rows of the study say: contrasts, the map, the long runs, the readings, one sentence.

    reports/tiny/bases.json      the pilot's choices, all contrasts, all rows; outcomes packed in bases_outcomes.npz
    reports/tiny/map.json        bases of different confidence: noise without training, gains of training
    reports/tiny/long.json       two arms, ten times as long
    reports/tiny/readings.json   test time, sites and steps, decoded thoughts

Each is written from the rows that there are, so a study that is not finished has results too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from latentlab.config import to_dict
from latentlab.evaluation.statistics import arm_comparison
from latentlab.runtime.environment import environment
from latentlab.runtime.files import read_json
from latentlab.study import results
from latentlab.study.noise import pilot
from latentlab.study.noise.plan import PLAIN, Plan

CONFIDENT = 0.4  # nats: the hypothesis' border between confident and uncertain bases, set before the runs
QUESTION = "When does a mask help?"


class Rows:
    """The rows of one group of runs, numbered, and their outcomes."""

    def __init__(self, folder: Path, group: str):
        self.found: list[dict] = []
        self.outcomes: dict[str, np.ndarray] = {}
        paths = [*folder.glob(f"*-s*/{group}/start.json"), *folder.glob(f"*-s*/{group}/*-r*.json")]
        rows = [(read_json(path, "a row of the study", "label"), path) for path in paths]
        for number, (row, path) in enumerate(sorted(rows, key=lambda pair: _order(pair[0])), 1):
            self.found.append({"number": number, **row})
            self.outcomes[_name(row)] = results.read_outcomes(path.with_suffix(".npz"))["test"]

    def of(self, label: str, base: str = PLAIN) -> dict[tuple[int, int], dict]:
        """{(seed, run seed): row} of an arm on a kind of base; the start has the same row for every run seed."""
        return {(r["seed"], r["run_seed"]): r for r in self.found if (r["label"], r["base"]) == (label, base)}

    def contrast(self, label: str, other: str, base: str = PLAIN, first: int = 0) -> dict[str, Any] | None:
        """Arm `label` minus arm `other` over all bases from `first` on, and run seeds, that have both; None without.

        Points, with its 95 % interval; accuracies in 0..1; CPU seconds and rollouts of a run.
        """
        ours, theirs = self.of(label, base), self.of(other, base)
        if other == "start":
            theirs = {key: theirs[key[0], 0] for key in ours if (key[0], 0) in theirs}
        keys = sorted(key for key in ours.keys() & theirs.keys() if key[0] >= first)
        if not keys:
            return None
        pairs = [(self.outcomes[_name(ours[key])], self.outcomes[_name(theirs[key])]) for key in keys]
        found: dict[str, Any] = arm_comparison(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))
        found["by_seed"] = [round(row["difference"], 3) for row in found.pop("per_seed")]
        sides = {"arm": [ours[key] for key in keys], "other": [theirs[key] for key in keys]}
        means = {
            f"{side}_{what}": float(np.mean([value(row) for row in rows]))
            for side, rows in sides.items()
            for what, value in _MEANS.items()
        }
        return {"arm": label, "other": other, **found, "bases": [seed for seed, _ in keys], **means}


_MEANS: dict[str, Callable[[dict], float]] = {
    "accuracy": lambda row: row["correct"] / row["n"],
    "rollouts": lambda row: row["rollouts"],
    "cpu_seconds": lambda row: row["cpu_seconds"],
}


def _order(row: dict) -> tuple:
    return (row["base"], row["seed"], row["label"] != "start", row["label"], row["run_seed"])


def _name(row: dict) -> str:
    return f"{row['base']}-s{row['seed']} {row['label']} r{row['run_seed']}"


def write_findings(plan: Plan, folder: Path) -> list[Path]:
    """Write the result files of the rows that there are; returns their paths."""
    written = []
    for name, find in {"bases": bases, "map": confidence_map, "long": long_runs, "readings": readings}.items():
        metrics, headline, outcomes = find(plan, folder)
        if metrics:
            spent = sum(row["cpu_seconds"] for row in metrics.get("rows", []))  # of all runs
            about: dict[str, Any] = {"parameters": to_dict(plan), "environment": environment(device="cpu")}
            about |= {"started": time.time(), "seconds": spent, "question": QUESTION, "headline": headline}
            if outcomes:
                results.write_outcomes(results.result_path(f"{name}_outcomes", plan.preset, ".npz"), outcomes)
            written.append(results.write_result(name, preset=plan.preset, metrics=metrics, **about))
    return written


# ---------------------------------------------------------------- the main contrast
def bases(plan: Plan, folder: Path) -> tuple[dict, str, dict]:
    """(metrics, headline, outcomes) of all arms on the plain bases; nothing before the pilot is finished."""
    if not pilot.is_finished(plan, folder):
        return {}, "", {}
    found, decision = Rows(folder, "main"), pilot.decide(plan, folder)
    temperature, shared = decision.labels(("temperature *", "shared *"))
    longer = f"{temperature} seconds"
    pairs = {"equal_rollouts": (shared, temperature), "equal_seconds": (shared, longer)}
    pairs |= {f"gain_{x.split()[0]}": (x, "start") for x in (shared, temperature)} | {"gain_longer": (longer, "start")}
    for label in decision.labels(plan.others.arms):
        name = label.split()[0] if label[-1].isdigit() else label.replace(" ", "_")
        pairs |= {f"{name}_shared": (label, shared), f"{name}_temperature": (label, temperature)}
    contrasts = {key: row for key, pair in pairs.items() if (row := found.contrast(*pair))}
    for key in ("equal_rollouts", "equal_seconds"):  # of bases that chose nothing
        if fresh := found.contrast(*pairs[key], first=plan.rule.pilot):
            contrasts[f"{key}_fresh"] = fresh
    main, validated = contrasts["equal_rollouts"], plan.rule.pilot * plan.config.data.validation_size
    metrics = {
        "sentence": sentence(contrasts),
        "tuning": {
            label: {
                "validation_accuracy": right / validated,
                "chosen": label in decision.labels([f"{family} *" for family in plan.grids]),
                "against_temperature": found.contrast(label, temperature) if label != temperature else None,
            }
            for label, right in decision.validation_correct.items()
        },
        "pilot": asdict(decision),
        "half_width": (main["high"] - main["low"]) / 2,
        "contrasts": contrasts,
        "replay_gap": _replay_gaps(found.found),
        "rows": found.found,
    }
    return metrics, _headline(contrasts), found.outcomes


def _replay_gaps(rows: list[dict]) -> dict[str, float]:
    """The largest replay gap of each arm, over all its runs and steps, nats."""
    gaps: dict[str, float] = {}
    for row in rows:
        if "replay_gap" in row:
            arm = row["label"].split()[0]
            gaps[arm] = max(gaps.get(arm, 0.0), row["replay_gap"])
    return gaps


def sentence(contrasts: dict[str, dict]) -> str:
    """What may be quoted of the main contrast, with its conditions, from `contrasts` of `bases`."""
    main, equal = contrasts["equal_rollouts"], contrasts.get("equal_seconds")
    parts = [
        f"Over {main['seeds']} small Coconut bases, {main['n']:,} test problems each, GRPO with one mask",
        f"per rollout ({main['arm']}) {verb(main)} answers sampled without a mask ({main['other']}) at equal rollouts:",
        f"{main['difference']:+.2f} points {interval(main)}.",
    ]
    if equal:
        more = f"{equal['other_rollouts'] / equal['arm_rollouts']:.1f} times the rollouts without a mask"
        parts += [
            f"At equal CPU seconds ({equal['arm_cpu_seconds']:.0f} and {equal['other_cpu_seconds']:.0f}), which is",
            f"{more}, whose K equal thoughts are made once, the mask {verb(equal)} sampling:",
            f"{equal['difference']:+.2f} points {interval(equal)} over {equal['seeds']} bases.",
        ]
    parts += ["Strengths were tuned on validation; the bases were stopped early and the problems are synthetic."]
    return " ".join(parts)


def _headline(contrasts: dict[str, dict]) -> str:
    """The main contrast in one line."""
    main, equal = contrasts["equal_rollouts"], contrasts.get("equal_seconds")
    said = f"One mask per rollout against answers sampled without: {main['difference']:+.2f} points {interval(main)}"
    said += f" at equal rollouts, {main['seeds']} bases"
    return said + (f"; {equal['difference']:+.2f} {interval(equal)} at equal compute" if equal else "")


def verb(found: dict) -> str:
    """What an interval says of an arm against another: beats, loses to, or neither."""
    return "beats" if found["low"] > 0 else "loses to" if found["high"] < 0 else "is not shown to differ from"


def interval(found: dict) -> str:
    """The 95 % interval of a contrast, in points."""
    return f"[{found['low']:+.2f}, {found['high']:+.2f}]"


# ---------------------------------------------------------------- the map
def confidence_map(plan: Plan, folder: Path) -> tuple[dict, str, dict]:
    """(metrics, headline, outcomes) of bases of different confidence, the most uncertain first."""
    found, places = Rows(folder, "map"), []
    for base in plan.map.bases:
        probes = folder / f"{base}-s0" / "map" / "probes.json"
        if any(len(found.of(label, base)) < plan.map.seeds for label in plan.map.arms) or not probes.exists():
            continue  # not finished
        start = found.of("start", base)[0, 0]
        gains: dict[str, Any] = {label: found.contrast(label, "start", base) for label in plan.map.arms}
        names = ("entropy", "wrong_entropy", "own_entropy", "own")
        row: dict[str, Any] = {"base": base, **{name: start[name] for name in names}, "gains": gains}
        row["accuracy"] = start["correct"] / start["n"]
        row["own_gains"] = {x: _mean(r["own"] for r in found.of(x, base).values()) - start["own"] for x in gains}
        row["untuned"] = found.contrast("shared 0.1", "temperature 1", base)
        mask, temperature = _best(plan, found, base)
        row["tuned"] = found.contrast(mask, temperature, base)
        row["probes"] = read_json(probes, "the probes of a base", "found")["found"]
        row["mixed_at_equal_mean"] = {side: at_equal_mean(row["probes"], side) for side in ("fresh", "own")}
        places.append(row)
    if not places:
        return {}, "", {}
    places.sort(key=lambda row: -row["entropy"])
    claims = judged(places)
    headline = "; ".join(f"{claim}: {word}" for claim, word in claims.items())
    return {"claims": claims, "bases": places, "rows": found.found}, headline, found.outcomes


def _best(plan: Plan, found: Rows, base: str) -> list[str]:
    """The shared mask and the temperature with the highest validation accuracy, over all training seeds."""
    score = {x: _mean(row["validation_accuracy"] for row in found.of(x, base).values()) for x in plan.map.arms}
    return [max((x for x in score if x.split()[0] == arm), key=lambda x: score[x]) for arm in ("shared", "temperature")]


def at_equal_mean(probes: list[dict], side: str) -> list[dict]:
    """Each noise but temperature: its share of mixed groups, and that of the temperature of equal mean accuracy.

    Temperatures are interpolated linearly between neighbours, from the hottest on; None where no two
    neighbours have the mean between them.
    """
    heat = {row["label"]: float(row["label"].split()[1]) for row in probes if row["label"].startswith("temperature")}
    curve = [
        row[side] for row in sorted((row for row in probes if row["label"] in heat), key=lambda r: -heat[r["label"]])
    ]
    rows = []
    for row in probes:
        if row["label"] not in heat:
            mean, other = row[side]["mean"], None
            for hot, cold in pairwise(curve):
                if other is None and hot["mean"] <= mean <= cold["mean"]:
                    other = float(np.interp(mean, [hot["mean"], cold["mean"]], [hot["mixed"], cold["mixed"]]))
            rows.append({"label": row["label"], "mean": mean, "mixed": row[side]["mixed"], "temperature_mixed": other})
    return rows


def judged(places: list[dict]) -> dict[str, str]:
    """The hypothesis of the plan, claim by claim, against the bases of the map."""
    confident = [row for row in places if row["entropy"] < CONFIDENT]
    uncertain = [row for row in places if row["entropy"] >= CONFIDENT]
    return {
        f"a shared mask beats temperature 1 on bases below {CONFIDENT} nats": _judge(
            [row["untuned"] for row in confident], 1
        ),
        f"temperature 1 beats a shared mask on bases above {CONFIDENT} nats": _judge(
            [row["untuned"] for row in uncertain], -1
        ),
        "no tuned shared mask beats a tuned temperature": _never([row["tuned"] for row in places]),
    }


def _judge(found: list[dict], sign: int) -> str:
    """Of contrasts that a claim says are all above 0 (sign 1) or below (-1)."""
    if not found:
        return "not tested: no such base"
    for_it = sum(row["low"] > 0 if sign > 0 else row["high"] < 0 for row in found)
    against = sum(row["high"] < 0 if sign > 0 else row["low"] > 0 for row in found)
    word = "contradicted" if against else "supported" if for_it == len(found) else "not resolved"
    return f"{word} ({for_it} of {len(found)} bases for it, {against} against)"


def _never(found: list[dict]) -> str:
    """Of contrasts none of which, says a claim, is above 0."""
    against = sum(row["low"] > 0 for row in found)
    return f"{'contradicted' if against else 'not contradicted'} ({against} of {len(found)} bases against it)"


# ---------------------------------------------------------------- long runs, readings
def long_runs(plan: Plan, folder: Path) -> tuple[dict, str, dict]:
    """(metrics, headline, outcomes) of the long runs: final contrast, curves averaged over bases."""
    if not pilot.is_finished(plan, folder):
        return {}, "", {}
    found, labels = Rows(folder, "long"), pilot.decide(plan, folder).labels(("shared *", "temperature *"))
    final = found.contrast(labels[0], labels[1])
    if not final:
        return {}, "", {}
    curves = {}
    for label in labels:
        runs = [row["curves"] for row in found.of(label).values()]
        curves[label] = {name: _mean_curve([run[name] for run in runs]) for name in runs[0]}
    rows = [{key: value for key, value in row.items() if key != "curves"} for row in found.found]
    headline = f"after {final['arm_rollouts']:,.0f} rollouts {final['arm']} {verb(final)} {final['other']}: "
    headline += f"{final['difference']:+.2f} points {interval(final)} over {final['seeds']} bases"
    return {"final": final, "curves": curves, "rows": rows}, headline, found.outcomes


def readings(plan: Plan, folder: Path) -> tuple[dict, str, dict]:
    """(metrics, headline, outcomes) of the readings, averaged over bases; samples of the first base."""
    by_label: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*/readings/*.json")):
        row = read_json(path, "a reading of the study", "label")
        by_label.setdefault(row["label"], []).append(row)
    if not by_label:
        return {}, "", {}
    metrics = {
        label: {
            "bases": len(rows),
            "n": rows[0]["n"],
            "clean": _mean(row["clean"] for row in rows),
            "test_time": _averaged([row["test_time"] for row in rows], ("noise", "k", "n")),
            "where": _averaged([row["where"] for row in rows], ("where",)),
            **{kind: _thoughts([row[kind] for row in rows]) for kind in ("repaired", "broken")},
        }
        for label, rows in by_label.items()
    }
    best = max(metrics["start"]["test_time"], key=lambda row: row["majority"])
    headline = (
        f"the base answers {metrics['start']['clean']:.1%} right; the best majority, of {best['k']} answers under "
    )
    return metrics, f"{headline}{best['noise']}, {best['majority']:.1%}", {}


def _averaged(tables: list[list[dict]], kept: tuple[str, ...]) -> list[dict]:
    """Tables with equal rows, number by number; the names `kept` are equal, reliability diagrams are pooled."""
    averaged = []
    for rows in zip(*tables, strict=True):
        pooled = {
            name: rows[0][name] if name in kept else _mean(row[name] for row in rows)
            for name in rows[0]
            if name != "reliability"
        }
        diagrams = [row["reliability"] for row in rows if "reliability" in row]
        averaged.append({**pooled, **({"reliability": _pooled(diagrams)} if diagrams else {})})
    return averaged


def _pooled(diagrams: list[list[dict]]) -> list[dict]:
    """One reliability diagram of the problems of all."""
    found = []
    for bin in sorted({row["bin"] for diagram in diagrams for row in diagram}):
        rows = [row for diagram in diagrams for row in diagram if row["bin"] == bin]
        n = sum(row["n"] for row in rows)
        means = {key: sum(row["n"] * row[key] for row in rows) / n for key in ("agreement", "accuracy")}
        found.append({"bin": bin, "n": n, **means})
    return found


def _thoughts(found: list[dict]) -> dict:
    """Shares of first wrong thoughts, weighted by rollouts; samples of the first base."""
    total = sum(row["rollouts"] for row in found)
    shares = {
        side: {
            place: sum(row["rollouts"] * row[side].get(place, 0.0) for row in found) / max(1, total)
            for place in sorted({place for row in found for place in row[side]})
        }
        for side in ("first_wrong_clean", "first_wrong_masked")
    }
    return {"rollouts": total, **shares, "samples": found[0]["samples"]}


def _mean(values: Iterable[float | None]) -> Any:
    """The mean of those that are there; None without any."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _mean_curve(runs: list[list]) -> list:
    """Point by point; None where a run has none."""
    return [None if None in point else float(np.mean(point)) for point in zip(*runs, strict=True)]
