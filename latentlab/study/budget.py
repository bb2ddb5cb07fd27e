"""What a time budget buys: a step of each part is timed on the machine at hand, then the time is divided.

The curriculum has its share first, its validations and tests included (`CURRICULUM_SHARE`); a reserve for the arms' own
is kept; the arms share the rest at equal iterations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from latentlab.advantage import is_collapsed
from latentlab.config import Config, arm_settings, to_dict
from latentlab.evaluation.accuracy import evaluate
from latentlab.evaluation.statistics import wilson_interval
from latentlab.grpo import policy_gradient
from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.reward import exact_answer
from latentlab.rollouts import rollout
from latentlab.runtime.environment import commit, peak_memory_gib
from latentlab.runtime.files import read_json, write_atomically
from latentlab.training.checkpoint import expect_same
from latentlab.training.curriculum import curriculum_gradient, set_stage

CURRICULUM_SHARE = 0.5  # of the budget, for the curriculum, its validations and the tests of its two models
START_UP = 5.0  # seconds: a call shorter than this may have been mostly start-up


class Budget:
    """A time budget that survives a restart: what was spent, what was planned and by which commits lie in plan.json.

    start: `time.monotonic()` when this process began. A killed process spent the time until the last file that it wrote
    in `folder`: a training step writes one.
    """

    def __init__(self, folder: Path, config: Config, minutes: float, model: LatentReasoner, start: float):
        self.path, self.minutes, self.start, self.device = folder / "plan.json", minutes, start, model.device.type
        made_for = {
            "config": to_dict(config), "budget_minutes": minutes, "weights": model.provenance.get("sha256", ""),
            "device": self.device,
        }  # fmt: skip
        self.data = {"made_for": made_for, "started": time.time(), "spent": 0.0, "peak_memory_gib": 0.0, "plan": {}}
        if self.path.exists():
            self.data = read_json(self.path, "the plan of this study", *self.data)
            expect_same(self.data["made_for"], made_for, str(self.path))
            last_sign = max(file.stat().st_mtime for file in folder.rglob("*") if file.is_file())
            self.data["spent"] += max(0.0, last_sign - self.path.stat().st_mtime)
        self.before = self.data["spent"]
        self.data["commits"] = list(dict.fromkeys([*self.data.get("commits", []), commit()]))
        self.save()

    def spent(self) -> float:
        """Seconds, those of earlier processes included."""
        return self.before + time.monotonic() - self.start

    def left(self) -> float:
        return 60 * self.minutes - self.spent()

    def save(self) -> None:
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else peak_memory_gib()
        self.data |= {"spent": self.spent(), "peak_memory_gib": max(memory, self.data["peak_memory_gib"])}
        write_atomically(self.path, (json.dumps(self.data, indent=1) + "\n").encode())

    def once(self, key: str, make: Callable[[], object]):
        """The planned value of `key`; made at the first call, then read back, so that a resumed run keeps its plan."""
        if key not in self.data["plan"]:
            self.data["plan"][key] = make()
            self.save()
        return self.data["plan"][key]


def _seconds(model: LatentReasoner, run: Callable[[], object]) -> float:
    """Seconds that a call takes; a short one is made twice, since the first may be mostly start-up."""
    seconds = _timed(model, run)
    return seconds if seconds > START_UP else _timed(model, run)


def _timed(model: LatentReasoner, run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def answer_seconds(model: LatentReasoner, problems: list[Problem], batch_size: int, **options) -> float:
    """Seconds to answer one problem in batches of `batch_size`; where a few take long, batches save nothing."""
    few = problems[: min(8, batch_size)]
    seconds = _seconds(model, lambda: evaluate(model, few, batch_size=len(few), **options))
    if seconds <= START_UP:
        few = problems[:batch_size]
        seconds = _seconds(model, lambda: evaluate(model, few, batch_size=len(few), **options))
    return seconds / len(few)


def plan_curriculum(model, data, config: Config, budget: Budget) -> list[int]:
    """The preset's steps of each stage, times one factor that fills the curriculum's share of the budget.

    An untrained model's answers are as long as allowed, so its answering is timed at its slowest.
    """
    c, last, cost = config.curriculum, config.latent_stages, 0.0
    if not budget.minutes:
        return list(c.steps)
    batch, share = data["train"][: c.batch_size], CURRICULUM_SHARE * 60 * budget.minutes
    left = share
    for stage, steps in enumerate(c.steps):
        set_stage(model, config, stage, data["validation"])
        step = partial(curriculum_gradient, model, batch, stage, config, step=0)
        cost += 1.1 * steps * _seconds(model, step)  # and the optimizer
        model.zero_grad(set_to_none=True)
        answers = len(data["validation"]) + (len(data["test"]) if stage in (0, last) else 0)
        left -= answers * answer_seconds(model, data["validation"], config.evaluate.batch_size)
    factor = max(left, share / 2) / cost
    return [max(1, int(factor * steps)) for steps in c.steps]


def plan_grpo(model, data, config: Config, budget: Budget) -> tuple[int, int]:
    """(seeds, iterations of each arm): what is left after a reserve for the test set and the report.

    All seeds of the preset, if each arm then gets `eval_every` iterations, else fewer; (1, 0) if no time is left.
    """
    g = config.grpo
    if not budget.minutes:
        return len(config.sweep.seeds), g.steps
    if budget.left() <= 0:
        return 1, 0
    problems = data["train"][: g.num_problems]
    mask, temperature = arm_settings(g, "shared")
    rolled = []

    def roll() -> None:
        rolled[:] = [rollout(
            model, problems, num_generations=g.num_generations, masks=mask, temperature=temperature, run_seed=0, step=0
        )]  # fmt: skip

    rolling = _seconds(model, roll)
    (out,), share = rolled, 1.0
    if g.max_candidates:  # only mixed groups are updated on; training mixes more of them, so the upper bound
        mixed = int((~is_collapsed(out.rewards(exact_answer))).sum())
        share = wilson_interval(mixed, len(problems))[1]

    def update() -> None:
        policy_gradient(model, out, torch.ones_like(out.logp[:, 0]), config, reference=model if g.beta else None)
        model.zero_grad(set_to_none=True)

    answer = answer_seconds(model, data["validation"], config.evaluate.batch_size)
    validation = answer * len(data["validation"])
    updates = share * g.num_iterations * _seconds(model, update)
    seconds = 1.1 * (rolling + updates) + validation / g.eval_every
    for seeds in range(len(config.sweep.seeds), 0, -1):
        runs = len(config.sweep.arms) * seeds
        reserve = 1.1 * runs * (answer * len(data["test"]) + 2 * validation)
        reserve += 0.05 * 60 * budget.minutes  # loading, checkpoints, the report
        iterations = int((budget.left() - reserve) / (runs * seconds))
        if iterations >= g.eval_every:
            break
    return seeds, max(0, iterations)


def affordable(budget: Budget, share: float, each: float, most: int) -> int:
    """How many problems fit into `share` of what is left; below 50 the interval says nothing, so none."""
    fit = min(most, int(share * budget.left() / each)) if budget.minutes else most
    return fit if fit >= min(50, most) else 0
