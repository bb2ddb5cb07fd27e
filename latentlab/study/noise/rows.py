"""The rows of the study, their outcomes, and what two arms say against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from latentlab.evaluation.statistics import arm_comparison
from latentlab.runtime.files import read_json
from latentlab.study.noise.plan import PLAIN
from latentlab.study.results import read_outcomes


class Rows:
    """The rows of one group of runs, numbered, and their outcomes."""

    def __init__(self, folder: Path, group: str):
        self.found: list[dict] = []
        self.outcomes: dict[str, np.ndarray] = {}
        paths = [*folder.glob(f"*-s*/{group}/start.json"), *folder.glob(f"*-s*/{group}/*-r*.json")]
        rows = [(read_json(path, "a row of the study", "label"), path) for path in paths]
        for number, (row, path) in enumerate(sorted(rows, key=lambda pair: _order(pair[0])), 1):
            self.found.append({"number": number, **row})
            self.outcomes[_name(row)] = read_outcomes(path.with_suffix(".npz"))["test"]

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


def verb(found: dict) -> str:
    """What an interval says of an arm against another: beats, loses to, or neither."""
    return "beats" if found["low"] > 0 else "loses to" if found["high"] < 0 else "is not shown to differ from"


def interval(found: dict) -> str:
    """The 95 % interval of a contrast, in points."""
    return f"[{found['low']:+.2f}, {found['high']:+.2f}]"


def mean_of(values: Iterable[float | None]) -> Any:
    """The mean of those that are there; None without any."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
