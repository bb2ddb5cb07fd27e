"""What the pilot decides, once, for all later stages: strengths, seconds, the number of bases.

Strengths are chosen on validation problems alone; of equal ones the first of the grid, which is the
weaker noise. Test answers of the pilot bases decide the number of bases and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from scipy.stats import t as student

from latentlab.runtime.files import read_json, write_json
from latentlab.study.noise.plan import FAMILY, PLAIN, Plan, Rule, run_name


@dataclass(frozen=True)
class Decision:
    """The contents of pilot.json."""

    chosen: dict[str, float]  # family: strength
    validation_correct: dict[str, int]  # label: right validation answers, over the pilot bases
    iteration_seconds: dict[str, float]  # CPU seconds of the chosen temperature and shared arm
    differences: list[float]  # shared - temperature on each pilot base, points
    bases: int  # that the rule asks for

    def labels(self, given: Sequence[str]) -> list[str]:
        """Labels with the chosen strength in place of "*"."""
        families = [FAMILY.get(label.split()[0], label.split()[0]) for label in given]
        return [x.replace("*", f"{self.chosen.get(family, 0):g}") for x, family in zip(given, families, strict=True)]


def labels(plan: Plan) -> list[str]:
    """Every strength of every grid."""
    return [f"{family} {strength:g}" for family, grid in plan.grids.items() for strength in grid]


def is_finished(plan: Plan, folder: Path) -> bool:
    """Whether every pilot base has the rows of every strength."""
    return all(path.exists() for label in labels(plan) for path in _paths(plan, folder, label))


def decide(plan: Plan, folder: Path) -> Decision:
    """Read pilot.json; written here when the pilot is finished. Raises ValueError, one line, before that."""
    path = folder / "pilot.json"
    if not path.exists():
        if not is_finished(plan, folder):
            got = f"got an unfinished pilot in {folder}"
            raise ValueError(f"sweep: {got}, expected all its rows; run the stage pilot first, of this plan")
        write_json(path, asdict(_decision(plan, folder)))
    return TypeAdapter(Decision).validate_python(read_json(path, "what the pilot decided", "chosen"))


def _paths(plan: Plan, folder: Path, label: str) -> list[Path]:
    return [folder / f"{PLAIN}-s{s}" / "main" / f"{run_name(label)}.json" for s in range(plan.rule.pilot)]


def _decision(plan: Plan, folder: Path) -> Decision:
    rows = {x: [read_json(p, "a row of the study", "label") for p in _paths(plan, folder, x)] for x in labels(plan)}
    size = plan.config.data.validation_size
    right = {x: sum(round(size * row["validation_accuracy"]) for row in found) for x, found in rows.items()}
    chosen: dict[str, float] = {
        family: max(grid, key=lambda x: right[f"{family} {x:g}"]) for family, grid in plan.grids.items()
    }
    arms = {family: rows[f"{family} {chosen[family]:g}"] for family in ("temperature", "shared")}
    seconds = {x: float(np.mean([row["cpu_seconds"] / row["iterations"] for row in arms[x]])) for x in arms}
    shares = {x: np.array([row["correct"] / row["n"] for row in arms[x]]) for x in arms}
    differences = 100 * (shares["shared"] - shares["temperature"])
    return Decision(chosen, right, seconds, differences.round(4).tolist(), bases_needed(differences, plan.rule))


def bases_needed(differences: np.ndarray, rule: Rule) -> int:
    """The smallest number of bases, `least` to `most`, whose 95 % interval is at most +-half_width.

    differences: points, of the pilot bases. Student's interval of a mean, whose standard deviation is
    that of the pilot, itself an estimate. `most`, if even that is not enough.
    """
    spread = float(np.std(differences, ddof=1))
    for n in range(rule.least, rule.most):
        if student.isf(0.025, n - 1) * spread / n**0.5 <= rule.half_width:
            return n
    return rule.most
