"""The stages of the study, each a list of units.

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

import torch

from latentlab.study.launch import Launcher, run_jobs, run_processes
from latentlab.study.noise import pilot, readings
from latentlab.study.noise.findings import write_findings
from latentlab.study.noise.plan import PLAIN, STAGES, Plan, arm_changes, load_plan
from latentlab.study.noise.unit import Base, make_probes, make_row, make_start_row


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
    plan, (stage, base_name, seed) = load_plan(name), (*unit.split("/"), "", "")[:3]
    known = plan.map.bases if stage == "map" else [PLAIN]
    if stage not in STAGES or base_name not in known or not seed.isdecimal():
        raise ValueError(f"unit: got {unit!r}, expected STAGE/BASE/SEED, such as pilot/plain/0; correct it")
    base = Base(plan, base_name, int(seed), folder)
    start = base.train()
    if stage == "readings":
        readings.make(base, pilot.chosen_labels(plan, folder, plan.main.arms[:2]))
        return {"out": str(base.place)}
    group = stage if stage in ("map", "long") else "main"
    if stage != "long":
        make_start_row(base, start, group, plan.map.test_size if stage == "map" else base.config.data.test_size)
    if stage == "map":
        make_probes(base, start)
    for run_seed, label in _arms(plan, stage, folder):
        seconds = {} if "seconds" not in label else pilot.iteration_seconds(plan, folder)
        make_row(base, start, group, label, run_seed, _changes(plan, stage, label, base, seconds))
    return {"out": str(base.place)}


def _bases(plan: Plan, stage: str, folder: Path) -> list[tuple[str, int]]:
    """(base, seed) of the units of a stage."""
    if stage == "map":
        return [(base, 0) for base in plan.map.bases]
    count = {"pilot": plan.rule.pilot, "others": plan.others.bases, "long": plan.long.bases}
    count |= {"readings": plan.readings.bases}
    return [(PLAIN, seed) for seed in range(count[stage] if stage in count else pilot.number_of_bases(plan, folder))]


def _arms(plan: Plan, stage: str, folder: Path) -> list[tuple[int, str]]:
    """(run seed, label) of the arms of a stage."""
    if stage == "pilot":
        return [(0, label) for label in pilot.labels(plan)]
    if stage == "map":
        return [(seed, label) for seed in range(plan.map.seeds) for label in plan.map.arms]
    arms = {"main": plan.main.arms, "others": plan.others.arms, "long": plan.long.arms}[stage]
    return [(0, label) for label in pilot.chosen_labels(plan, folder, arms)]


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
