"""Whole steps, timed here and in other checkouts: GRPO iterations, validation, curriculum steps.

    python -P rows.py SHAPE    JSON on stdout, of the checkout that PYTHONPATH names (against.py)

The tiny rows start from the shipped checkpoint and do what the training loops do, AdamW included,
with other problems at each call. The shape's rows are rollouts and updates of random weights.
A checkout whose functions differ lacks a row: it is listed under "left_out" with the reason. So
only names that the parent commits have may be imported here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from latentlab.bench import engine
from latentlab.config import Arm, arm_settings, load_preset
from latentlab.data.datasets import load
from latentlab.evaluation.accuracy import Evaluation, evaluate
from latentlab.pretrained.loading import load_model, shipped_checkpoint
from latentlab.reward import exact_answer
from latentlab.rollouts import Rollouts, rollout
from latentlab.training import arms
from latentlab.training.curriculum import curriculum_gradient, set_stage
from latentlab.training.steps import batch_indices, update

Run = Callable[[], object]
CALLS = {"tiny": 5, "shape": 1}  # timed calls of a row in one process, after the one that is compared
TINY = replace(load_preset("tiny"), data=replace(load_preset("tiny").data, train_size=4096, validation_size=512))
ROWS = 2, 8  # problems and rollouts of each in a row of the shape


def tiny_rows() -> dict[str, Callable[[], Run]]:
    """By name: makes the run of a row of preset tiny."""
    train, validation = (load(TINY.data, split) for split in ("train", "validation"))
    rows: dict[str, Callable[[], Run]] = {}
    names: tuple[Arm, ...] = ("temperature", "shared")
    for arm in names:
        rows[f"rollout_{arm}"] = partial(_rollout, arm, train)
        rows[f"iteration_{arm}"] = partial(_iteration, arm, train)
    rows["validation"] = partial(_validation, validation)
    stages = range(len(TINY.curriculum.steps))
    return rows | {f"curriculum_stage_{stage}": partial(_curriculum, stage, train, validation) for stage in stages}


def _model_and_optimizer() -> tuple[Any, torch.optim.Optimizer]:
    model = load_model(shipped_checkpoint("tiny"))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5)


def _rollout(arm: Arm, train) -> Run:
    (model, _), g, (mask, temperature) = _model_and_optimizer(), TINY.grpo, arm_settings(TINY.grpo, arm)
    settings: dict[str, Any] = {"masks": mask, "temperature": temperature, "run_seed": 0, "step": 0}
    return partial(rollout, model, train[: g.num_problems], num_generations=g.num_generations, **settings)


def _iteration(arm: Arm, train) -> Run:
    (model, optimizer), steps = _model_and_optimizer(), itertools.count()
    config = replace(TINY, grpo=replace(TINY.grpo, arm=arm))
    limit = (
        config.grpo.steps * config.grpo.num_problems
    )  # problems left: not the last iteration, which scores all groups
    return lambda: arms._iteration(model, None, optimizer, train, config, next(steps), exact_answer, limit)


def _validation(problems) -> Run:
    return partial(evaluate, _model_and_optimizer()[0], problems, batch_size=TINY.evaluate.batch_size)


def _curriculum(stage: int, train, validation) -> Run:
    (model, optimizer), steps, c = _model_and_optimizer(), itertools.count(), TINY.curriculum
    set_stage(model, TINY, stage, validation)

    def run() -> dict:
        step = next(steps)
        batch = [train[i] for i in batch_indices(len(train), c.batch_size, seed=0, step=step)]
        stats = curriculum_gradient(model, batch, stage, TINY, step=step)
        return update(model, optimizer, stats, step=step, max_grad_norm=c.max_grad_norm)

    return run


def shape_rows(shape: str) -> dict[str, Callable[[], Run]]:
    """By name: makes the run of a row at a shape of `engine.SHAPES`."""
    (count, k), model = ROWS, engine.build(shape)
    problems, rows = engine.questions(count), dict[str, Callable[[], Run]]()
    for name, mask in (("masked", engine.SPEC), ("unmasked", None)):
        rows[f"{shape}_rollout_{name}"] = partial(partial, engine.sample, model, problems, k, mask)
        rows[f"{shape}_update_{name}"] = partial(_update, model, problems, k, mask)
    return rows


def _update(model, problems, k: int, mask) -> Run:
    recorded = engine.sample(model, problems, k, mask)

    def run() -> Any:
        engine.update(model, partial(engine.score, model, recorded))
        return model

    return run


def outcome(value: Any) -> dict:
    """What two checkouts should agree on: a hash of tokens and rewards, the norm of a gradient."""
    if isinstance(value, dict):
        hashed = {key: value[key] for key in ("reward", "reward_std", "completions/mean_length") if key in value}
        return {"hash": _hash(hashed), "gradient": value["grad_norm"]}
    if isinstance(value, Rollouts):
        tokens, rewards = value.tokens[value.token_mask], value.rewards(exact_answer)
        return {"hash": _hash([value.token_mask.sum(1).tolist(), tokens.tolist(), rewards.tolist()])}
    if isinstance(value, Evaluation):
        return {"hash": _hash([value.text, value.correct.tolist()])}
    norms = [p.grad.double().norm() for p in value.parameters() if p.grad is not None]
    return {"hash": "", "gradient": torch.stack(norms).norm().item()}


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def main(shape: str) -> None:
    """Run every row once for its outcome, then time it: medians of CPU seconds, as JSON."""
    torch.set_num_threads(1)
    seconds, outcomes, left_out = {}, {}, {}
    for kind, rows in (("tiny", tiny_rows()), ("shape", shape_rows(shape))):
        for name, make in rows.items():
            try:
                run = make()
                outcomes[name] = outcome(run())
            except Exception as error:  # whatever another version of the library makes of this call
                left_out[name] = f"{type(error).__name__}: {error}"
                continue
            seconds[name] = statistics.median(_cpu_seconds(run) for _ in range(CALLS[kind]))
    print(json.dumps({"seconds": seconds, "outcomes": outcomes, "left_out": left_out}))


def _cpu_seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main(sys.argv[1])
