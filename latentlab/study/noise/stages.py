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

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from latentlab.study.launch import Launcher, locked, run_jobs, run_processes
from latentlab.study.noise import pilot, readings
from latentlab.study.noise.findings import write_findings
from latentlab.study.noise.plan import PLAIN, STAGES, Plan, arm_changes, load_plan
from latentlab.study.noise.unit import Base, make_probes, make_row, make_start_row

MAIN = ("temperature *", "shared *")  # the arms of the main contrast


@dataclass(frozen=True)
class Unit:
    """A stage on one base: one process. The name changes with what the plan asks for."""

    stage: str
    base: str
    seed: int
    plan: str
    digest: str

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.base}-s{self.seed}-{self.digest}"

    def words(self, folder: Path) -> tuple[str, ...]:
        """The command line of `latentlab` that runs it."""
        unit = f"{self.stage}/{self.base}/{self.seed}"
        return ("sweep", "--plan", self.plan, "--unit", unit, "--out", str(folder))


def run_plan(name: str, folder: Path, stages: Sequence[str], launcher: Launcher) -> list[Path]:
    """Run the stages of a plan in `folder`, in the plan's order, or resume them; returns the result files.

    Raises ValueError (a wrong plan, no pilot yet), RuntimeError that lists failed units, Stopped after
    a signal.
    """
    plan, written = load_plan(name), []
    for stage in [stage for stage in STAGES if stage in (stages or STAGES)]:
        units = [Unit(stage, base, seed, name, plan.digest(stage)) for base, seed in _bases(plan, stage, folder)]
        run_jobs(units, folder, partial(run_processes, launcher=launcher, workers=plan.config.sweep.workers))
        written = write_findings(plan, folder)
    return written


def run_unit(name: str, folder: Path, unit: str) -> dict:
    """Do the work of one unit, "STAGE/BASE/SEED"; returns a summary."""
    plan, (stage, base_name, seed) = load_plan(name), (*unit.split("/"), "", "", "")[:3]
    known = plan.map.bases if stage == "map" else [PLAIN]
    if unit.count("/") != 2 or stage not in STAGES or base_name not in known or not seed.isdecimal():
        raise ValueError(f"unit: got {unit!r}, expected STAGE/BASE/SEED, such as pilot/plain/0; correct it")
    base, arms = Base(plan, base_name, int(seed), folder), _arms(plan, stage, folder)  # before any training
    base.place.mkdir(parents=True, exist_ok=True)
    with open(base.place / "lock", "a") as lock:
        while not locked(lock):  # another stage works on this base
            time.sleep(1)
        start = base.train()
        group = stage if stage in ("map", "long") else "main"
        if group != "long" and stage != "readings":
            make_start_row(base, start, group, plan.map.test_size if stage == "map" else base.config.data.test_size)
        if stage == "map":
            make_probes(base, start)
        for run_seed, label in arms if stage != "readings" else ():
            make_row(base, start, group, label, run_seed, _changes(plan, stage, label, base))
        if stage == "readings":
            readings.make(base, [label for _, label in arms])
    return {"out": str(base.place)}


def _bases(plan: Plan, stage: str, folder: Path) -> list[tuple[str, int]]:
    """(base, seed) of the units of a stage."""
    if stage == "map":
        return [(base, 0) for base in plan.map.bases]
    if stage == "pilot":
        return [(PLAIN, seed) for seed in range(plan.rule.pilot)]
    count = {"others": plan.others.bases, "long": plan.long.bases, "readings": plan.readings.bases}
    return [(PLAIN, seed) for seed in range(count.get(stage, pilot.decide(plan, folder).bases))]


def _arms(plan: Plan, stage: str, folder: Path) -> list[tuple[int, str]]:
    """(run seed, label) of the arms of a stage; of readings, of what they read."""
    if stage == "pilot":
        return [(0, label) for label in pilot.labels(plan)]
    if stage == "map":
        return [(seed, label) for seed in range(plan.map.seeds) for label in plan.map.arms]
    arms = {"main": plan.main.arms, "others": plan.others.arms}.get(stage, MAIN)
    return [(0, label) for label in pilot.decide(plan, folder).labels(arms)]


def _changes(plan: Plan, stage: str, label: str, base: Base) -> dict:
    """What the run of an arm changes in the settings of its base."""
    seconds = pilot.decide(plan, base.folder).iteration_seconds if label.endswith("seconds") else {}
    changes = arm_changes(label, base.config, seconds)
    if stage == "map":
        changes["grpo"] |= {"steps": plan.map.steps}
        changes["data"] = {"test_size": plan.map.test_size}
    if stage == "long":
        g = base.config.grpo
        steps = plan.long.rollouts // (g.num_problems * g.num_generations)
        changes["grpo"] |= {"steps": steps, "eval_every": plan.long.eval_every}
    return changes
