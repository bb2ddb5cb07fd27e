"""What one process of the study does: train a base, then its arms, each a row that is never made twice.

    runs/tiny/noise/plain-s3/base/best                     the base
    runs/tiny/noise/plain-s3/main/shared_0.05-r0/          the run of an arm, as `latentlab grpo` makes it
    runs/tiny/noise/plain-s3/main/shared_0.05-r0.json      its row
    runs/tiny/noise/plain-s3/main/shared_0.05-r0.npz       right or wrong for every test problem

A row is written last, so an interrupted process resumes the run that it was in.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentlab.config import Config, arm_settings, changed
from latentlab.data import datasets
from latentlab.evaluation.accuracy import evaluate
from latentlab.evaluation.statistics import wilson_interval
from latentlab.masks import MaskSpec
from latentlab.model import LatentReasoner
from latentlab.pretrained.loading import load_model, model_from_config
from latentlab.problems import Problem
from latentlab.rollouts import rollout
from latentlab.runtime.environment import commit
from latentlab.runtime.files import read_json, write_json
from latentlab.study.launch import Job, without_places
from latentlab.study.noise.plan import Plan, arm_changes, run_name
from latentlab.study.results import write_outcomes
from latentlab.training.arms import fit_grpo
from latentlab.training.curriculum import fit_curriculum, set_stage
from latentlab.training.run import read_metrics, seconds_spent

MEMORISE = {"arm": "supervised", "num_problems": 16, "num_generations": 8, "learning_rate": 1.0e-3}  # 128 a step
WINDOW = 100  # iterations that the metrics of a run's end are averaged over


@dataclass(frozen=True)
class Base:
    """One base of the study, in its folder."""

    plan: Plan
    name: str
    seed: int
    folder: Path  # of the whole study

    @cached_property
    def config(self) -> Config:
        return self.plan.base_config(self.name, self.seed)

    @property
    def place(self) -> Path:
        return self.folder / f"{self.name}-s{self.seed}"

    @cached_property
    def data(self) -> dict[str, list[Problem]]:
        return {split: datasets.load(self.config.data, split) for split in ("train", "validation", "test")}

    @property
    def own(self) -> list[Problem]:
        """Problems of its last stage: all that it memorised, or some of its training set."""
        return self.data["train"][: self.plan.base(self.name).memorise or self.plan.map.test_size]

    def train(self) -> Path:
        """Train the base, or what is left of it; returns the folder of its weights."""
        run, record = self.place / "base", self.place / "base.json"
        made_for = asdict(self.plan.base(self.name))
        if not is_made(record, made_for):
            model, (train, validation, _) = model_from_config(self.config), self.data.values()
            if made_for["memorise"]:
                self._memorise(model, run)
            else:
                fit_curriculum(model, train, validation, self.config, out=run, resume=True)
            accuracy = evaluate(model, validation, batch_size=self.config.evaluate.batch_size).accuracy
            found = {"validation_accuracy": accuracy, "seconds": round(seconds_spent(run), 1), "commit": commit()}
            command = " ".join(("latentlab", *Job("base", "curriculum", self.config).words(self.place)))
            write_json(record, {"made_for": made_for, "command": command, **found})
        return run / "best"

    def _memorise(self, model: LatentReasoner, run: Path) -> None:
        """All stages but the last, then the last one on few problems, for all of its epochs."""
        (train, validation, _), last = self.data.values(), self.config.latent_stages
        stages = self.place / "stages"
        fit_curriculum(model, train, validation, self.config, out=stages, resume=True, last_stage=last - 1)
        set_stage(model, self.config, last, validation)
        batch = MEMORISE["num_problems"] * MEMORISE["num_generations"]  # type: ignore[operator]  # numbers
        steps = max(1, self.plan.base(self.name).epochs * len(self.own) // batch)
        config = changed(self.config, {"grpo": {**MEMORISE, "steps": steps, "eval_every": steps}})  # best: the last
        fit_grpo(model, self.own, self.own, config, out=run, resume=True)


def make_row(base: Base, start: Path, group: str, label: str, run_seed: int, changes: dict) -> None:
    """Train one arm from `start` and write its row, unless there is one.

    group: main, map or long. changes: of the settings, those of the label and of the group.
    """
    config = changed(base.config, {**changes, "seed": base.seed + 1000 * run_seed})
    job = Job(run_name(label, run_seed), "grpo", config, str(start))
    run, begun = base.place / group / job.name, time.monotonic()
    command = " ".join(("latentlab", *job.words(run.parent)))
    target = run.with_name(f"{job.name}.json")
    if is_made(target, without_places(command), lambda row: without_places(row["command"])):
        return
    (train, validation, test), made_by = base.data.values(), commit()
    model = load_model(start)
    summary = fit_grpo(model, train[: config.data.train_size], validation, config, out=run, resume=True)
    lines = read_metrics(run)[1:]
    row = {"label": label, "run_seed": run_seed, **summary, "iterations": len(lines)}
    row |= {"cpu_seconds": round(seconds_spent(run, "cpu_seconds"), 1), "commit": made_by, "command": command}
    row |= _end_of(lines) | ({"curves": _curves(run)} if group == "long" else {})
    _write_row(base, group, target, model, test[: config.data.test_size], row)
    (run / "state.pt").unlink()  # of a run that is never resumed
    if group == "map":
        shutil.rmtree(run)
    print(f"{base.place.name} {group} {label} r{run_seed}: {time.monotonic() - begun:.0f} s", flush=True)


def make_start_row(base: Base, start: Path, group: str, test_size: int) -> None:
    """The row of a base itself: what its answers are before any arm."""
    target = base.place / group / "start.json"
    if not is_made(target, test_size, lambda row: row["n"]):
        model, test, size = load_model(start), base.data["test"][:test_size], base.config.evaluate.batch_size
        made = read_json(base.place / "base.json", "the record of a base", "command")
        row: dict[str, Any] = {"label": "start", "run_seed": 0, "rollouts": 0, "cpu_seconds": 0.0}
        row |= {key: made[key] for key in ("commit", "command")} | {"entropy": confidence(model, test, size)}
        if group == "map":
            wrong = [p for p, right in zip(test, _greedy(base, model, test), strict=True) if not right]
            row["wrong_entropy"] = confidence(model, wrong, size) if wrong else None
            row["own_entropy"] = confidence(model, base.own, size)
        _write_row(base, group, target, model, test, row)


def _write_row(base: Base, group: str, target: Path, model: LatentReasoner, test: list[Problem], row: dict) -> None:
    """Answer the test problems, and write outcomes and row; on the map, the base's own problems too."""
    outcomes = _greedy(base, model, test)
    n, correct = len(outcomes), int(outcomes.sum())
    row |= {"n": n, "correct": correct, "interval": list(wilson_interval(correct, n))}
    if group == "map":
        row["own"] = float(_greedy(base, model, base.own).mean())
    write_outcomes(target.with_suffix(".npz"), {"test": outcomes})
    write_json(target, {"base": base.name, "seed": base.seed, **row})


def _greedy(base: Base, model: LatentReasoner, problems: list[Problem]) -> np.ndarray:
    return evaluate(model, problems, batch_size=base.config.evaluate.batch_size).correct[:, 0]


@torch.no_grad()
def confidence(model: LatentReasoner, problems: Sequence[Problem], batch_size: int) -> float:
    """Mean entropy of an answer of the clean model at temperature 1, nats, summed over its tokens."""
    total = 0.0
    for at in range(0, len(problems), batch_size):
        batch = problems[at : at + batch_size]
        out = rollout(model, batch, num_generations=1, masks=None, temperature=1.0, run_seed=0, step=0)
        assert out.entropy is not None
        total += out.entropy.sum().item()
    return total / len(problems)


def make_probes(base: Base, start: Path) -> None:
    """Probe a base with every kind of noise that the map names, on fresh and on its own problems."""
    target, m = base.place / "map" / "probes.json", base.plan.map
    made_for = {"probes": list(m.probes), "n": m.probe_size}
    if not is_made(target, made_for):
        model, sets = load_model(start), {"fresh": base.data["test"][: m.probe_size], "own": base.own[: m.probe_size]}
        found = []
        for label in m.probes:
            config = changed(base.config, arm_changes(label, base.config, {}))
            settings = arm_settings(config.grpo, config.grpo.arm)
            rows = {name: probe(model, problems, config, *settings) for name, problems in sets.items()}
            found.append({"label": label, **rows})
        write_json(target, {"made_for": made_for, "found": found})


def probe(
    model: LatentReasoner, problems: Sequence[Problem], config: Config, mask: MaskSpec | None, temperature
) -> dict:
    """K answers to each problem under one kind of noise: how its groups are mixed, without training."""
    k = config.grpo.num_generations
    options: dict[str, Any] = {"num_generations": k, "mask": mask, "temperature": temperature}
    found = evaluate(model, problems, batch_size=max(1, 4 * config.evaluate.batch_size // k), **options)
    right = found.correct.sum(1)  # [n]
    shares = {"mixed": (right > 0) & (right < k), "solved": right == k, "failed": right == 0}
    return {"mean": found.accuracy, **{name: float(np.mean(x)) for name, x in shares.items()}}


def is_made(path: Path, made_for: Any, of=lambda record: record["made_for"]) -> bool:
    """Is a file there, and made for this? ValueError if it was made for something else."""
    if not path.exists():
        return False
    found = of(read_json(path, "a file of this study"))
    if found != made_for:
        got = f"got {path} made for {found!r}, expected {made_for!r}"
        raise ValueError(f"sweep: {got}; delete it, or use another --out for a changed plan")
    return True


def _end_of(lines: list[dict]) -> dict:
    """The largest replay gap of a run, and its metrics averaged over its last iterations."""
    last = lines[-WINDOW:]
    names = ("reward", "frac_reward_zero_std", "pass@k", "entropy")
    end = {name: float(np.mean([line[name] for line in last])) for name in names if name in last[-1]}
    gaps = {"replay_gap": max(line["replay_gap"] for line in lines)} if "replay_gap" in last[-1] else {}
    return {**gaps, **({"end": end} if end else {})}


def _curves(run: Path) -> dict[str, list]:
    """Means of the metrics of a long run between its validations, against rollouts and CPU seconds."""
    clock: dict[int, float] = {}
    before = last = 0.0
    for line in read_metrics(run, "timing.jsonl"):  # every process counts from 0
        before += last if line["cpu_seconds"] < last else 0.0
        last = line["cpu_seconds"]
        clock.setdefault(line["step"], before + last)
    names = ("reward", "entropy", "frac_reward_zero_std", "pass@k")
    points: dict[str, list] = {name: [] for name in ("rollouts", "cpu_seconds", "validation_accuracy", *names)}
    part: list[dict] = []
    for line in read_metrics(run):
        part += [line] if "reward" in line else []
        if "validation_accuracy" in line:
            found = {"rollouts": line.get("rollouts", 0), "cpu_seconds": clock[line["step"]]}
            found["validation_accuracy"] = line["validation_accuracy"]
            means = {name: float(np.mean([row[name] for row in part])) if part else None for name in names}
            for name, value in {**found, **means}.items():
                points[name].append(value)
            part = []
    return points
