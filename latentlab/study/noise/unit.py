"""What one process of the study does: train a base, then its arms, each a row that is never made twice.

    runs/tiny/noise/plain-s3/base/best                     the base
    runs/tiny/noise/plain-s3/main/shared_0.05-r0/          the run of an arm, as `latentlab grpo` makes it
    runs/tiny/noise/plain-s3/main/shared_0.05-r0.json      its row
    runs/tiny/noise/plain-s3/main/shared_0.05-r0.npz       right or wrong for every test problem

Rows are written last, so an interrupted process resumes the run that it was in.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from latentlab.runtime.files import read_json, write_atomically
from latentlab.study import results
from latentlab.study.launch import Job, without_places, write_done
from latentlab.study.noise.plan import EPOCHS, MEMORISE, Plan, arm_changes
from latentlab.training.arms import fit_grpo
from latentlab.training.curriculum import fit_curriculum, set_stage
from latentlab.training.run import read_metrics, seconds_spent

WINDOW = 100  # iterations that the figures of a run's end are averaged over


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

    @property
    def memorised(self) -> int:
        """How many problems the base has memorised; 0: none."""
        return self.plan.map.bases.get(self.name, {}).get("memorise", 0)

    @property
    def own(self) -> list[Problem]:
        """Problems of its last stage: all that it memorised, or some of its training set."""
        return self.data["train"][: self.memorised or self.plan.map.test_size]

    @cached_property
    def data(self) -> dict[str, list[Problem]]:
        return {split: datasets.load(self.config.data, split) for split in ("train", "validation", "test")}

    def train(self) -> Path:
        """Train the base, or what is left of it; returns the folder of its weights."""
        run, begun = self.place / "base", time.time()
        if not (run / "done.json").exists():
            model, (train, validation, _) = model_from_config(self.config), self.data.values()
            job = Job("base", "curriculum", self.config)
            if self.memorised:
                job = self._memorise(model, run)
            else:
                fit_curriculum(model, train, validation, self.config, out=run, resume=True)
            words = ("latentlab", *job.words(self.place))
            accuracy = evaluate(model, validation, batch_size=self.config.evaluate.batch_size).accuracy
            write_done(run, {"validation_accuracy": accuracy}, words, begun, commit())
        return run / "best"

    def _memorise(self, model: LatentReasoner, run: Path) -> Job:
        """All stages but the last, then the last one on few problems, until they are known by heart.

        Returns the job of that last part; it validates on the problems that it learns.
        """
        train, validation, _ = self.data.values()
        last = self.config.latent_stages
        fit_curriculum(
            model, train, validation, self.config, out=self.place / "stages", resume=True, last_stage=last - 1
        )
        set_stage(model, self.config, last, validation)
        epochs = self.plan.map.bases[self.name].get("epochs", EPOCHS)
        steps = epochs * self.memorised // (MEMORISE["num_problems"] * MEMORISE["num_generations"])
        changes = {"grpo": {**MEMORISE, "arm": "supervised", "steps": steps}, "data": {"train_size": self.memorised}}
        config = changed(self.config, changes)
        fit_grpo(model, self.own, self.own, config, out=run, resume=True)  # its best weights know most of them
        return Job("base", "grpo", config, str(self.place / "stages"))


def make_row(base: Base, start: Path, group: str, label: str, run_seed: int, changes: dict) -> None:
    """Train one arm from `start` and write its row, unless there is one.

    group: main, map or long. changes: of the settings, those of the label and of the group.
    """
    config = changed(base.config, {**changes, "seed": base.seed + 1000 * run_seed})
    job = Job(f"{label.replace(' ', '_')}-r{run_seed}", "grpo", config, str(start))
    run, begun = base.place / group / job.name, time.monotonic()
    target, command = run.with_name(f"{job.name}.json"), " ".join(("latentlab", *job.words(base.place / group)))
    if target.exists():
        made = read_json(target, "a row of the study", "command")["command"]
        if without_places(made) != without_places(command):
            got = f"{target} was made by `{made}`, expected `{command}`"
            raise ValueError(f"sweep: {got}; delete it, or use another --out for a changed plan")
        return
    train, validation, _ = base.data.values()
    test, made_by = base.data["test"][: config.data.test_size], commit()
    model, size = load_model(start), config.evaluate.batch_size
    summary = fit_grpo(model, train[: config.data.train_size], validation, config, out=run, resume=True)
    lines = read_metrics(run)[1:]
    outcomes = evaluate(model, test, batch_size=size).correct[:, 0]
    row = {"base": base.name, "seed": base.seed, "label": label, "run_seed": run_seed, **summary}
    row |= {"iterations": len(lines), "learning_rate": config.grpo.learning_rate, **_right(outcomes)}
    row |= {"cpu_seconds": round(seconds_spent(run, "cpu_seconds"), 1), "commit": made_by}
    row |= {"command": command, **_end_of(lines)}
    if group == "map":
        row["own"] = evaluate(model, base.own, batch_size=size).accuracy
    if group == "long":
        row["curves"] = _curves(run)
    write_outcomes(target.with_suffix(".npz"), outcomes)
    write_json(target, row)
    (run / "state.pt").unlink()  # of a run that is never resumed
    if group == "map":
        shutil.rmtree(run)
    print(
        f"{base.place.name} {group} {label} r{run_seed}: {row['correct'] / row['n']:.4f}, {row['cpu_seconds']} CPU s, "
        f"{time.monotonic() - begun:.0f} s",
        flush=True,
    )


def make_start_row(base: Base, start: Path, group: str, test_size: int) -> None:
    """The row of a base itself: what its answers are before any arm."""
    target = base.place / group / "start.json"
    if target.exists():
        return
    model, size = load_model(start), base.config.evaluate.batch_size
    outcomes = evaluate(model, base.data["test"][:test_size], batch_size=size).correct[:, 0]
    row = {"base": base.name, "seed": base.seed, "label": "start", "run_seed": 0, **_right(outcomes)}
    row |= {"rollouts": 0, "cpu_seconds": 0.0, "commit": commit()}
    row["command"] = read_json(start.parent / "done.json", "the record of a finished run", "command")["command"]
    row["entropy"] = confidence(model, base.data["test"][:test_size], size)
    if group == "map":
        row["own"] = evaluate(model, base.own, batch_size=size).accuracy
        row["own_entropy"] = confidence(model, base.own, size)
    write_outcomes(target.with_suffix(".npz"), outcomes)
    write_json(target, row)


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


def probe(
    model: LatentReasoner, problems: Sequence[Problem], config: Config, mask: MaskSpec | None, temperature
) -> dict:
    """K answers to each problem under one kind of noise: how its groups are mixed, without training."""
    k, begun = config.grpo.num_generations, time.process_time()
    size = max(1, 4 * config.evaluate.batch_size // k)
    options: dict[str, Any] = {"num_generations": k, "mask": mask, "temperature": temperature}
    found = evaluate(model, problems, batch_size=size, **options)
    right = found.correct.sum(1)  # [n]
    return {
        "n": len(problems),
        "mean": found.accuracy,
        "mixed": float(np.mean((right > 0) & (right < k))),
        "solved": float(np.mean(right == k)),
        "failed": float(np.mean(right == 0)),
        "pass@k": float(np.mean(right > 0)),
        "distinct": found.distinct_answers(),
        "cpu_seconds": round(time.process_time() - begun, 2),
    }


def make_probes(base: Base, start: Path) -> None:
    """Probe a base with every kind of noise that the map names, on fresh and on its own problems."""
    target, m = base.place / "map" / "probes.json", base.plan.map
    if target.exists():
        return
    model, found = load_model(start), []
    sets = {"fresh": base.data["test"][: m.probe_size], "own": base.own[: m.probe_size]}
    for label in m.probes:
        config = changed(base.config, arm_changes(label, base.config, {}))
        settings = arm_settings(config.grpo, config.grpo.arm)
        rows = {name: probe(model, problems, config, *settings) for name, problems in sets.items()}
        found.append({"base": base.name, "seed": base.seed, "label": label, **rows})
    write_json(target, found)


def _right(outcomes: np.ndarray) -> dict:
    n, correct = len(outcomes), int(outcomes.sum())
    return {"n": n, "correct": correct, "interval": list(wilson_interval(correct, n))}


def _end_of(lines: list[dict]) -> dict:
    """The largest replay gap of a run, and its metrics averaged over its last iterations."""
    last = lines[-WINDOW:]
    names = ("reward", "frac_reward_zero_std", "pass@k", "entropy")
    end = {name: float(np.mean([line[name] for line in last])) for name in names if name in last[-1]}
    gaps = {"replay_gap": max(line["replay_gap"] for line in lines)} if "replay_gap" in last[-1] else {}
    return {**gaps, **({"end": end} if end else {})}


def _curves(run: Path) -> dict:
    """Means of the metrics of a long run between its validations, against rollouts and CPU seconds."""
    lines, clock, before, last = read_metrics(run), {}, 0.0, 0.0
    for line in read_metrics(run, "timing.jsonl"):  # every process counts from 0
        before += last if line["cpu_seconds"] < last else 0.0
        last = line["cpu_seconds"]
        clock[line["step"]] = before + last
    names = ("reward", "entropy", "frac_reward_zero_std", "pass@k")
    points: dict[str, list] = {name: [] for name in ("rollouts", "cpu_seconds", "validation_accuracy", *names)}
    part: list[dict] = []
    for line in lines:
        part += [line] if "reward" in line else []
        if "validation_accuracy" in line:
            points["rollouts"].append(line.get("rollouts", 0))
            points["cpu_seconds"].append(clock[line["step"]])
            points["validation_accuracy"].append(line["validation_accuracy"])
            for name in names:
                points[name].append(float(np.mean([row[name] for row in part])) if part else None)
            part = []
    return points


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def write_outcomes(path: Path, outcomes: np.ndarray) -> None:
    results.write_outcomes(path, {"test": outcomes})
