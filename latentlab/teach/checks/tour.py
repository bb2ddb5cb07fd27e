"""Exercises of 00_tour: decode thoughts, count mask values, find a mask that repairs an answer."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from latentlab.data.word_problems import word_problems
from latentlab.evaluation.thoughts import decode
from latentlab.masks import MaskSpec, draw_masks, rollout_seeds
from latentlab.pretrained.loading import load_model
from latentlab.reward import exact_answer
from latentlab.rollouts import rollout
from latentlab.teach.exercise import Exercise


@cache
def _case() -> tuple[Any, Any, Any]:
    """The shipped model, eight problems, and their clean rollouts."""
    model, problems = load_model("tiny"), word_problems("validation", 8, seed=0)
    return model, problems, rollout(model, problems, num_generations=1, masks=None, temperature=0.0, run_seed=0, step=0)


def _decoded(answer) -> list[list[str]]:
    model, _, out = _case()
    with torch.no_grad():
        rows = [answer(model, thoughts) for thoughts in out.thoughts]  # [L, D] each
    return None if rows[0] is None else [[str(z).strip() for z in row] for row in rows]  # type: ignore[return-value]


def _ids(rows: list[list[str]]) -> list[list[str]]:
    tokens = _case()[0].tokenizer.convert_tokens_to_ids
    return [[str(tokens(z)) for z in row] for row in rows]


decode_thoughts = Exercise(
    "decode_thoughts",
    _decoded,
    lambda rows: rows == [list(row) for row in decode(_case()[0], _case()[2])],
    (
        (
            lambda rows: rows == _ids([list(row) for row in decode(_case()[0], _case()[2])]),
            "token ids are not text yet",
        ),
        (lambda rows: {len(row) for row in rows} != {4}, "there are four thoughts a problem, so four tokens"),
        (
            lambda rows: len({tuple(row) for row in rows}) == 1,
            "all problems decode alike: take the argmax over the vocabulary",
        ),
    ),
    "not yet: the head turns a thought [D] into logits [V]; the most probable token is its argmax",
)


def _counts(answer) -> list[int]:
    model = _case()[0]
    specs = (MaskSpec(), MaskSpec(sites=("mlp",)), MaskSpec("per_step"), MaskSpec("per_step", scope="all"))
    counts = [answer(model, spec) for spec in specs]
    return None if counts[0] is None else counts  # type: ignore[return-value]


def _right_counts() -> list[int]:
    model = _case()[0]
    slots = {"shared": 1, "per_step": 1 + model.num_thoughts, "all": 1 + model.num_thoughts + model.max_new_tokens}
    return [2 * model.width, model.width, 2 * model.width * slots["per_step"], 2 * model.width * slots["all"]]


mask_values = Exercise(
    "mask_values",
    _counts,
    lambda counts: counts == _right_counts(),
    (
        (lambda counts: counts[2] == counts[0], "per_step: a fresh mask for the start and for each thought, not one"),
        (lambda counts: counts[2] == 4 * counts[0], "per_step: <start> has a slot too, beside the thoughts"),
        (lambda counts: counts[0] == counts[1], "one site instead of two: half as many values"),
        (lambda counts: counts[3] == counts[2], 'scope "all": each answer token has a slot too'),
    ),
    "not yet: sites × features, times the slots of a per-step mask",
)


def _repaired(answer) -> list[str]:
    """ "repaired", "clean is right" or "still wrong" for the pair (problem, seed) that was found."""
    model = _case()[0]
    found = answer(model, word_problems("validation", 40, seed=0))
    if found is None:
        return None  # type: ignore[return-value]
    problem, seed = found
    clean = rollout(model, [problem], num_generations=1, masks=None, temperature=0.0, run_seed=0, step=0)
    masks = draw_masks(MaskSpec(rate=0.1), model, rollout_seeds(int(seed), 0, [problem.id], 1))
    masked = rollout(model, [problem], num_generations=1, masks=masks, temperature=0.0, run_seed=int(seed), step=0)
    right = [out.rewards(exact_answer).item() == 1 for out in (clean, masked)]
    return ["clean is right" if right[0] else "repaired" if right[1] else "still wrong"]


repairing_mask = Exercise(
    "repairing_mask",
    _repaired,
    lambda said: said == ["repaired"],
    (
        (lambda said: said == ["clean is right"], "the clean model answers this problem right: nothing to repair"),
        (
            lambda said: said == ["still wrong"],
            "the first rollout of this seed is still wrong: try other seeds and problems",
        ),
    ),
)
