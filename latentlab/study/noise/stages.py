"""The stages of the study, each a list of units; what the pilot chose, and how many bases it asks for.

    pilot      arms of every strength on the first bases: strengths by validation, number of bases
    main       the main contrast on all bases, at equal rollouts and at equal CPU seconds
    map        bases of different confidence: every noise without training, some with
    long       the two arms of the main contrast, ten times as long
    others     the other arms on some bases
    readings   no training: test time, sites and steps, decoded thoughts

`latentlab sweep --plan noise` runs a unit per base and stage as a process of one thread
(`--unit STAGE/BASE/SEED`), and resumes what is unfinished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from latentlab.runtime.files import read_json
from latentlab.study.launch import Launcher, run_jobs, run_processes
from latentlab.study.noise import readings
from latentlab.study.noise.findings import write_findings
from latentlab.study.noise.plan import FAMILY, STAGES, Plan, Rule, arm_changes, load_plan
from latentlab.study.noise.unit import Base, make_probes, make_row, make_start_row

PLAIN = "plain"  # the base of all stages but map


@dataclass(frozen=True)
class Unit:
    """A stage on one base: one process."""

    stage: str
    base: str
    seed: int
    plan: str

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.base}-s{self.seed}"

    def words(self, folder: Path) -> tuple[str, ...]:
        """The command line of `latentlab` that runs it."""
        unit = f"{self.stage}/{self.base}/{self.seed}"
        return ("sweep", "--plan", self.plan, "--unit", unit, "--out", str(folder))


def run_plan(name: str, folder: Path, stages: Sequence[str], launcher: Launcher, workers: int) -> list[Path]:
    """Run the stages of a plan in `folder`, in the plan's order, or resume them; returns the result files.

    Raises ValueError (a wrong plan), RuntimeError that lists failed units, Stopped after a signal.
    """
    plan, written = load_plan(name), []
    for stage in STAGES:
        if stage in (stages or STAGES):
            units = [Unit(stage, base, seed, name) for base, seed in _bases(plan, stage, folder)]
            run_jobs(units, folder, partial(run_processes, launcher=launcher, workers=workers))
            written = write_findings(plan, folder)
    return written


def run_unit(name: str, folder: Path, unit: str) -> dict:
    """Do the work of one unit, "STAGE/BASE/SEED"; returns a summary."""
    torch.set_num_threads(1)
    plan, (stage, name, seed) = load_plan(name), unit.split("/")
    base = Base(plan, name, int(seed), folder)
    start = base.train()
    if stage == "readings":
        readings.make(base, chosen_labels(plan, folder, plan.main.arms[:2]))
        return {"out": str(base.place)}
    group = stage if stage in ("map", "long") else "main"
    if stage != "long":
        make_start_row(base, start, group, plan.map.test_size if stage == "map" else base.config.data.test_size)
    if stage == "map":
        make_probes(base, start)
    for run_seed, label in _arms(plan, stage, folder):
        seconds = {} if "seconds" not in label else iteration_seconds(plan, folder)
        make_row(base, start, group, label, run_seed, _changes(plan, stage, label, base, seconds))
    return {"out": str(base.place)}


def _bases(plan: Plan, stage: str, folder: Path) -> list[tuple[str, int]]:
    """(base, seed) of the units of a stage."""
    if stage == "map":
        return [(base, 0) for base in plan.map.bases]
    count = {"pilot": plan.rule.pilot, "others": plan.others.bases, "long": plan.long.bases}
    count |= {"readings": plan.readings.bases}
    return [(PLAIN, seed) for seed in range(count[stage] if stage in count else number_of_bases(plan, folder))]


def _arms(plan: Plan, stage: str, folder: Path) -> list[tuple[int, str]]:
    """(run seed, label) of the arms of a stage."""
    if stage == "pilot":
        return [(0, f"{family} {strength:g}") for family, grid in plan.grids.items() for strength in grid]
    if stage == "map":
        return [(seed, label) for seed in range(plan.map.seeds) for label in plan.map.arms]
    arms = {"main": plan.main.arms, "others": plan.others.arms, "long": plan.long.arms}[stage]
    return [(0, label) for label in chosen_labels(plan, folder, arms)]


def _changes(plan: Plan, stage: str, label: str, base: Base, seconds: dict) -> dict:
    """What the run of an arm changes in the settings of its base."""
    changes = arm_changes(label, base.config, seconds)
    if stage == "map":
        changes["grpo"] |= {"steps": plan.map.steps}
        changes["data"] = {"test_size": plan.map.test_size}
    if stage == "long":
        g = base.config.grpo
        steps = plan.long.rollouts // (g.num_problems * g.num_generations)
        changes["grpo"] |= {"steps": steps, "eval_every": plan.long.eval_every}
    return changes


# ---------------------------------------------------------------- what the pilot decides
def pilot_rows(plan: Plan, folder: Path) -> dict[str, list[dict]]:
    """{label: rows, one per pilot base}. Raises ValueError if the pilot is not finished."""
    found = {}
    for _, label in _arms(plan, "pilot", folder):
        paths = [
            folder / f"{PLAIN}-s{s}" / "main" / f"{label.replace(' ', '_')}-r0.json" for s in range(plan.rule.pilot)
        ]
        if missing := next((path for path in paths if not path.exists()), None):
            raise ValueError(f"sweep: got no {missing}, expected the rows of the pilot; run the stage pilot first")
        found[label] = [read_json(path, "a row of the study", "label") for path in paths]
    return found


def chosen(plan: Plan, folder: Path) -> dict[str, float]:
    """The strength of each family whose validation accuracy, averaged over the pilot bases, is highest."""
    scores = {
        label: np.mean([row["validation_accuracy"] for row in rows]) for label, rows in pilot_rows(plan, folder).items()
    }
    return {
        family: max(grid, key=lambda strength: scores[f"{family} {strength:g}"]) for family, grid in plan.grids.items()
    }


def chosen_labels(plan: Plan, folder: Path, labels: Sequence[str]) -> list[str]:
    """Labels with the chosen strength in place of "*"."""
    strengths = chosen(plan, folder)
    family = {label: FAMILY.get(label.split()[0], label.split()[0]) for label in labels}
    return [label.replace("*", f"{strengths[family[label]]:g}") if "*" in label else label for label in labels]


def iteration_seconds(plan: Plan, folder: Path) -> dict[str, float]:
    """CPU seconds of an iteration of the chosen temperature and shared arm, over the pilot bases."""
    rows = pilot_rows(plan, folder)
    labels = chosen_labels(plan, folder, ("temperature *", "shared *"))
    return {
        label.split()[0]: float(np.mean([row["cpu_seconds"] / row["iterations"] for row in rows[label]]))
        for label in labels
    }


def number_of_bases(plan: Plan, folder: Path) -> int:
    """What the rule asks for, from the differences shared - temperature of the pilot bases."""
    rows, labels = pilot_rows(plan, folder), chosen_labels(plan, folder, ("shared *", "temperature *"))
    ours, theirs = (np.array([row["correct"] / row["n"] for row in rows[label]]) for label in labels)
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
