"""What a time budget buys: a step of each part is timed on this machine, then the time is divided.

The curriculum gets its share first, which pays for its validations and test answers; the arms share
the rest at equal iterations, after a reserve for their own answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentlab.advantage import is_collapsed
from latentlab.config import Config, arm_settings
from latentlab.evaluation.accuracy import evaluate
from latentlab.evaluation.statistics import wilson_interval
from latentlab.grpo import policy_gradient
from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.reward import exact_answer
from latentlab.rollouts import Rollouts, rollout
from latentlab.runtime.environment import commit, peak_memory_gib
from latentlab.runtime.files import read_json, write_atomically
from latentlab.training.checkpoint import expect_same
from latentlab.training.curriculum import curriculum_gradient, set_stage

CURRICULUM_SHARE = 0.5  # of the budget, for the curriculum, its validations and the test answers of its two models
START_UP = 5.0  # seconds: a call shorter than this may have been mostly start-up
WRITTEN = ("table.md", "train.jsonl", "answers", "coconut-s*/best")  # in the folder, after plan.json


class Budget:
    """Time spent, what was planned, and by which commits, in plan.json: they survive a restart.

    made_for: the settings that must be the same when the folder is used again; ValueError if not.
    minutes: 0 or None is no limit. start: `time.monotonic()` when this process began. A killed
    process is charged until it last wrote a file in `folder`: every training step writes one.
    """

    def __init__(self, folder: Path, made_for: dict, minutes: float | None, device: str, start: float):
        self.path, self.minutes, self.start, self.device = folder / "plan.json", minutes, start, device
        self.planned = minutes is not None  # is this a budgeted experiment, if without a limit?
        self.data: dict[str, Any] = {"made_for": made_for, "started": time.time(), "spent": 0.0, "plan": {}}
        self.data |= {"peak_memory_gib": 0.0, "commits": []}
        if self.path.exists():
            self.data = read_json(self.path, "the plan of this experiment", *self.data)
            expect_same(self.data["made_for"], made_for, str(self.path))
            last_sign = max(file.stat().st_mtime for file in folder.rglob("*") if file.is_file())
            self.data["spent"] += max(0.0, last_sign - self.path.stat().st_mtime)
        elif foreign := next((path for name in WRITTEN for path in folder.glob(name)), None):
            raise FileExistsError(
                f"experiment: got {foreign} without plan.json, expected a new folder; use another --out"
            )
        self.before = self.data["spent"]
        self.data["commits"] = list(dict.fromkeys([*self.data["commits"], commit()]))
        self.save()

    def spent(self) -> float:
        """Seconds, those of earlier processes included."""
        return self.before + time.monotonic() - self.start

    def left(self) -> float:
        """Seconds until the limit."""
        return 60 * (self.minutes or 0) - self.spent()

    def save(self) -> None:
        """Write plan.json with the time and the peak memory (GiB) so far."""
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else peak_memory_gib()
        self.data |= {"spent": self.spent(), "peak_memory_gib": max(memory, self.data["peak_memory_gib"])}
        write_atomically(self.path, (json.dumps(self.data, indent=1) + "\n").encode())

    def once(self, key: str, make: Callable[[], object]):
        """The planned value of `key`: made at the first call, then read back."""
        if key not in self.data["plan"]:
            self.data["plan"][key] = make()
            self.save()
        return self.data["plan"][key]

    def affordable(self, share: float, each: Callable[[], float], most: int) -> int:
        """How many problems of `each()` seconds fit into `share` of the time left; 0 below 50."""
        fit = min(most, int(share * self.left() / each())) if self.minutes else most
        return fit if fit >= min(50, most) else 0


def _seconds(model: LatentReasoner, run: Callable[[], object]) -> float:
    """Seconds that a call takes; a short one is repeated: the first may be mostly start-up."""
    seconds = _timed(model, run)
    return seconds if seconds > START_UP else _timed(model, run)


def _timed(model: LatentReasoner, run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def answer_seconds(model: LatentReasoner, problems: list[Problem], batch_size: int, **options) -> float:
    """Seconds to answer one problem in batches of `batch_size`, or of 8 where that is slow."""
    seconds = 0.0
    for size in (min(8, batch_size), batch_size):
        few = problems[:size]
        seconds = _seconds(model, partial(evaluate, model, few, batch_size=len(few), **options))
        if seconds > START_UP:
            break
    return seconds / len(few)


def plan_curriculum(model, data, config: Config, budget: Budget) -> list[int]:
    """The preset's steps of each stage, times a factor that fills the curriculum's share.

    An untrained model's answers are as long as allowed, so answering is timed at its slowest.
    """
    c, last, cost = config.curriculum, config.latent_stages, 0.0
    if not budget.minutes:
        return list(c.steps)
    batch = data["train"][: c.batch_size]
    share = left = CURRICULUM_SHARE * 60 * budget.minutes
    for stage, steps in enumerate(c.steps):
        set_stage(model, config, stage, data["validation"])
        step = partial(curriculum_gradient, model, batch, stage, config, step=0)
        cost += 1.1 * steps * _seconds(model, step)  # 10 % for the optimizer
        model.zero_grad(set_to_none=True)
        answers = len(data["validation"]) + (len(data["test"]) if stage in (0, last) else 0)
        left -= answers * answer_seconds(model, data["validation"], config.evaluate.batch_size)
    factor = max(left, share / 2) / cost
    return [max(1, int(factor * steps)) for steps in c.steps]


def plan_grpo(model, data, config: Config, budget: Budget) -> tuple[int, int]:
    """(seeds, iterations of each arm) after a reserve for the test set and the report.

    All seeds if each arm then gets `eval_every` iterations, else fewer; (1, 0) if no time is left.
    """
    g, sweep = config.grpo, config.sweep
    if not budget.minutes:
        return len(sweep.seeds), g.steps
    if budget.left() <= 0:
        return 1, 0
    answer = answer_seconds(model, data["validation"], config.evaluate.batch_size)
    validation = answer * len(data["validation"])
    seconds = _iteration_seconds(model, data["train"][: g.num_problems], config) + validation / g.eval_every
    for seeds in range(len(sweep.seeds), 0, -1):
        runs = len(sweep.arms) * seeds
        reserve = 1.1 * runs * (answer * len(data["test"]) + 2 * validation)
        reserve += 0.05 * 60 * budget.minutes  # loading, checkpoints, the report
        iterations = int((budget.left() - reserve) / (runs * seconds))
        if iterations >= g.eval_every:
            break
    return seeds, max(0, iterations)


def _iteration_seconds(model: LatentReasoner, problems: list[Problem], config: Config) -> float:
    """Seconds of a GRPO iteration; updates are priced by the share of mixed groups."""
    g, share = config.grpo, 1.0
    mask, temperature = arm_settings(g, "shared")
    sampling: Any = {"num_generations": g.num_generations, "masks": mask, "temperature": temperature}
    rolled: list[Rollouts] = []

    def roll() -> None:
        rolled.append(rollout(model, problems, run_seed=0, step=0, **sampling))

    def update() -> None:
        policy_gradient(model, out, torch.ones_like(out.logp[:, 0]), config, reference=model if g.beta else None)
        model.zero_grad(set_to_none=True)

    rolling = _seconds(model, roll)
    out = rolled[-1]
    if g.max_candidates:  # only mixed groups are updated on; training yields more of them, hence the upper bound
        mixed = int((~is_collapsed(out.rewards(exact_answer))).sum())
        share = wilson_interval(mixed, len(problems))[1]
    return 1.1 * (rolling + share * g.num_iterations * _seconds(model, update))
