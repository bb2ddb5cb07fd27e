"""What the pilot decides: the strength of each kind of noise, by validation, and the number of bases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from latentlab.runtime.files import read_json
from latentlab.study.noise.plan import FAMILY, PLAIN, Plan, Rule


def labels(plan: Plan) -> list[str]:
    """Every strength of every grid."""
    return [f"{family} {strength:g}" for family, grid in plan.grids.items() for strength in grid]


def row_path(folder: Path, seed: int, label: str) -> Path:
    """The row of an arm on the base of this seed."""
    return folder / f"{PLAIN}-s{seed}" / "main" / f"{label.replace(' ', '_')}-r0.json"


def is_finished(plan: Plan, folder: Path) -> bool:
    """Whether every pilot base has the rows of every strength."""
    return all(row_path(folder, s, label).exists() for s in range(plan.rule.pilot) for label in labels(plan))


def rows(plan: Plan, folder: Path) -> dict[str, list[dict]]:
    """{label: rows, one per pilot base}. Raises ValueError if the pilot is not finished."""
    if not is_finished(plan, folder):
        raise ValueError(
            f"sweep: got an unfinished pilot in {folder}, expected all its rows; run the stage pilot first"
        )
    seeds = range(plan.rule.pilot)
    return {x: [read_json(row_path(folder, s, x), "a row of the study", "label") for s in seeds] for x in labels(plan)}


def tuning(plan: Plan, folder: Path) -> dict[str, float]:
    """{label: validation accuracy, averaged over the pilot bases}."""
    found = rows(plan, folder).items()
    return {label: float(np.mean([row["validation_accuracy"] for row in arm])) for label, arm in found}


def chosen(plan: Plan, folder: Path) -> dict[str, float]:
    """The strength of each family whose validation accuracy, averaged over the pilot bases, is highest."""
    scores = tuning(plan, folder)
    return {
        family: max(grid, key=lambda strength: scores[f"{family} {strength:g}"]) for family, grid in plan.grids.items()
    }


def chosen_labels(plan: Plan, folder: Path, given: Sequence[str]) -> list[str]:
    """Labels with the chosen strength in place of "*"."""
    strengths = chosen(plan, folder)
    family = {label: FAMILY.get(label.split()[0], label.split()[0]) for label in given}
    return [label.replace("*", f"{strengths[family[label]]:g}") if "*" in label else label for label in given]


def iteration_seconds(plan: Plan, folder: Path) -> dict[str, float]:
    """CPU seconds of an iteration of the chosen temperature and shared arm, over the pilot bases."""
    found = rows(plan, folder)
    arms = chosen_labels(plan, folder, ("temperature *", "shared *"))
    return {
        label.split()[0]: float(np.mean([row["cpu_seconds"] / row["iterations"] for row in found[label]]))
        for label in arms
    }


def number_of_bases(plan: Plan, folder: Path) -> int:
    """What the rule asks for, from the differences shared - temperature of the pilot bases."""
    found, arms = rows(plan, folder), chosen_labels(plan, folder, ("shared *", "temperature *"))
    ours, theirs = (np.array([row["correct"] / row["n"] for row in found[label]]) for label in arms)
    return bases_needed(100 * (ours - theirs), plan.rule)


def bases_needed(differences: np.ndarray, rule: Rule) -> int:
    """The smallest number of bases, `least` to `most`, whose 95 % interval is at most +-half_width.

    differences: points, of the pilot bases. Student's interval of a mean, whose standard deviation
    is that of the pilot. `most`, if even that is not enough.
    """
    spread = float(np.std(differences, ddof=1))
    for n in range(rule.least, rule.most):
        if student.isf(0.025, n - 1) * spread / n**0.5 <= rule.half_width:
            return n
    return rule.most
