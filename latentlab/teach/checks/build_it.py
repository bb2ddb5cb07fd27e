"""The exercises of notebook 06: the seven pieces of Dropout-GRPO, each against naive.py on a small case.

Here are the last three, rewards, replay and loss; the others are in build_it_rollout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentlab.teach import naive
from latentlab.teach.checks.build_it_rollout import (
    FACTORS,
    ONES,
    PROMPT,
    TEMPERATURE,
    W,
    draw_mask,
    equals,
    gradient_of,
    place,
    same,
    sample,
    think,
    with_gradient,
)
from latentlab.teach.exercise import Exercise
from latentlab.teach.naive import END, LIMIT, THOUGHTS

__all__ = ["draw_mask", "dr_grpo", "group_advantages", "place", "sample", "score", "think"]

ANSWER = [7, 3, 11]

# -- 5 rewards and advantages ---------------------------------------------------------------------

TEXTS, EQUAL = ["### 8", "### 6", "8", "### 8 ", "### 18", "### 81"], ["### 5", "### 5"]


def _advantages(f: Callable) -> Tensor | None:
    found = [f(TEXTS, "8"), f(EQUAL, "8")]
    return None if found[0] is None else torch.cat([torch.as_tensor(x).double() for x in found])


def _other(change: Callable[[Tensor], Tensor]) -> Callable[[Any], bool]:
    """Rewards [K] -> what is returned for them."""
    rewards = [torch.tensor([1.0, 0, 0, 1, 0, 0]), torch.zeros(2)]
    return lambda value: same(value, torch.cat([change(r) for r in rewards]))


def _graded(*rewards: float) -> Callable[[Any], bool]:
    """Are the advantages those of these rewards of TEXTS?"""
    r = torch.tensor(rewards).double()
    return lambda value: same(value[: len(r)], r - r.mean())


group_advantages = Exercise(
    "group_advantages",
    _advantages,
    _other(lambda r: r - r.mean()),
    [
        (lambda value: not torch.isfinite(value).all(), "a group of equal rewards gives no finite number: 0 / 0?"),
        (_other(lambda r: r), "no baseline: these are the rewards"),
        (_other(lambda r: r.mean() - r), "the sign is wrong: right answers must get positive advantages"),
        (
            _other(lambda r: (r - r.mean()) / (r.std() + 1e-4)),
            "divided by the standard deviation: that is another loss",
        ),
        (
            _other(lambda r: (r - r.mean()) / (r.std(correction=0) + 1e-4)),
            "divided by the standard deviation: not here",
        ),
        (
            _other(lambda r: (r - r.mean()) * len(r) / (len(r) - 1)),
            "leave-one-out: right too, but larger by K / (K - 1)",
        ),
        (_graded(1, 0, 1, 1, 0, 0), "without the marker ### there is no answer: the third text earns nothing"),
        (_graded(1, 0, 0, 0, 0, 0), "a blank behind the number is no mistake of the model"),
        (_graded(1, 0, 0, 1, 1, 0), "18 ends in 8, but is another number"),
        (_graded(1, 0, 1, 1, 1, 1), "an 8 somewhere in the text is no answer"),
        (_graded(1, 0, 0, 1, 1, 1), "18 and 81 contain an 8, but are other numbers"),
    ],
)

# -- 6 the replay ---------------------------------------------------------------------------------


def _scored(shift: int = 0, *, end: bool = True, cut: bool = False) -> Tensor:
    """`naive.score` with states `shift` positions later than right."""
    x = naive.think(W, PROMPT, FACTORS)
    x = x.detach() if cut else x
    x = torch.cat([x, W["wte.weight"][[END, *ANSWER] if end else ANSWER]])
    first = len(PROMPT) + THOUGHTS + shift
    states = naive.hidden(W, x, FACTORS)[first : first + len(ANSWER)]
    return naive.policy(W, states, TEMPERATURE)[range(len(ANSWER)), ANSWER]


_score = with_gradient(naive.score, W, PROMPT, FACTORS, ANSWER, TEMPERATURE)
_cut = gradient_of(_scored(cut=True))

score = Exercise(
    "score",
    lambda f: with_gradient(f, W, PROMPT, FACTORS, ANSWER, TEMPERATURE),
    lambda value: same(value[0], _score[0]) and same(value[1], _score[1]),
    [
        (
            lambda value: same(value[0], _score[0]) and not value[1].any(),
            "right, but without a gradient: no_grad, item?",
        ),
        (lambda value: same(value[0], _score[0]) and same(value[1], _cut), "the gradient is cut at the thoughts"),
        (equals(_scored(1)), "off by one: a state predicts the token behind it, not its own"),
        (equals(_scored(-1)), "off by one: the first token is read from <end>, not from the last thought"),
        (equals(_scored(-1, end=False)), "<end> is missing between thoughts and answer"),
        (equals(naive.score(W, PROMPT, FACTORS, ANSWER, 1.0)), "scored at temperature 1, but sampled at another"),
        (equals(naive.score(W, PROMPT, ONES, ANSWER, TEMPERATURE)), "the mask is not replayed: pass the factors on"),
        (equals(_score[0].exp()), "these are probabilities, not their logarithms"),
        (equals(_score[0].sum()), "one number for each token, not their sum"),
    ],
)

# -- 7 the loss -----------------------------------------------------------------------------------

GAINS = torch.tensor([0.5, -0.25, 0.5, -0.75], dtype=torch.float64)
OLD = [-torch.rand(length, generator=torch.Generator().manual_seed(length)).double() for length in (3, 4, 3, 2)]
STEPS = [0.5, -0.5, -0.5, 0.1]  # of the log-probs since sampling: gains are clipped in the first two rows


def _losses(f: Callable) -> Any:
    """The loss at ratio 1, its gradient, and the loss at other ratios."""
    logps = [old.clone().requires_grad_() for old in OLD]
    loss, later = f(logps, OLD, GAINS), f([old + step for old, step in zip(OLD, STEPS, strict=True)], OLD, GAINS)
    return None if loss is None else (loss.detach(), gradient_of(loss, logps), later)


def _loss(each: Callable[[Tensor, Tensor, Tensor], Tensor], divisor: int = len(OLD) * LIMIT) -> Callable[[Any], bool]:
    """Is it the loss that sums each(ratio, log-prob, advantage) over rollouts?"""

    def f(logps: Sequence[Tensor], old: Sequence[Tensor], gains: Tensor) -> Tensor:
        rows = zip(logps, old, gains, strict=True)
        return -torch.stack([each((logp - before).exp(), logp, gain) for logp, before, gain in rows]).sum() / divisor

    wrong = _losses(f)
    return lambda value: all(same(a, b) for a, b in zip(value, wrong, strict=True))


def _clipped(ratio: Tensor, _: Any, gain: Tensor) -> Tensor:
    return torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).sum()


_right = _losses(naive.dr_grpo)
_upside_down = _loss(lambda *row: -_clipped(*row))
_unclipped = _loss(lambda ratio, _, gain: (ratio * gain).sum())
_no_ratio = _loss(lambda _, logp, gain: (logp * gain).sum())
_ratio_1 = _loss(lambda ratio, _, gain: _clipped(ratio / ratio.detach(), _, gain))
_by_length = _loss(lambda *row: _clipped(*row) / len(row[0]), len(OLD))

dr_grpo = Exercise(
    "dr_grpo",
    _losses,
    lambda value: all(same(a, b) for a, b in zip(value, _right, strict=True)),
    [
        (_upside_down, "the sign is wrong: descent would make right answers rarer"),
        (_unclipped, "not clipped: nothing holds a ratio near 1"),
        (_no_ratio, "log-probs instead of ratios: the recorded ones have no effect"),
        (_ratio_1, "the recorded log-probs have no effect: every ratio is 1"),
        (_by_length, "divided by each answer's length: short answers weigh more"),
        (_loss(_clipped, sum(map(len, OLD))), "divided by the tokens there are: the divisor must be a constant"),
        (_loss(_clipped, len(OLD)), "divided by K alone: the longest answer, LIMIT, is missing in the divisor"),
        (
            lambda value: same(value[0], _right[0]) and not value[1].any(),
            "right, but without a gradient: detach, item?",
        ),
    ],
)
