"""What the rows of the study say: contrasts, the map, the long runs, the readings, one sentence.

    reports/tiny/bases.json      the pilot's choices, all contrasts, all rows; outcomes packed in bases_outcomes.npz
    reports/tiny/map.json        bases of different confidence: noise without training, gains of training
    reports/tiny/long.json       two arms, ten times as long
    reports/tiny/readings.json   test time, sites and steps, decoded thoughts

Each is written from the rows that there are, so a study that is not finished has results too.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from latentlab.config import to_dict
from latentlab.runtime.environment import environment
from latentlab.runtime.files import read_json
from latentlab.study import results
from latentlab.study.noise import pilot
from latentlab.study.noise.confidence import confidence_map
from latentlab.study.noise.plan import Plan
from latentlab.study.noise.rows import Rows, interval, mean_of, verb

QUESTION = "When does a mask help?"


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
            "clean": mean_of(row["clean"] for row in rows),
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
            name: rows[0][name] if name in kept else mean_of(row[name] for row in rows)
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


def _mean_curve(runs: list[list]) -> list:
    """Point by point; None where a run has none."""
    return [None if None in point else float(np.mean(point)) for point in zip(*runs, strict=True)]
