"""The map: bases of different confidence, and the hypothesis that was written before the runs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from latentlab.runtime.files import read_json
from latentlab.study.noise.plan import Plan
from latentlab.study.noise.rows import Rows, mean_of

CONFIDENT = 0.4  # nats: the hypothesis' border between confident and uncertain bases, set before the runs


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
        row["own_gains"] = {x: mean_of(r["own"] for r in found.of(x, base).values()) - start["own"] for x in gains}
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
    score = {x: mean_of(row["validation_accuracy"] for row in found.of(x, base).values()) for x in plan.map.arms}
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
