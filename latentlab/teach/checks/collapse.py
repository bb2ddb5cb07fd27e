"""Checks of notebook 01: advantages, collapsed groups, differences of thoughts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentlab.advantage import group_advantages, is_collapsed
from latentlab.teach.exercise import Exercise

REWARDS = torch.tensor(
    [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.float64
)
THOUGHTS = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))  # [R, L, D], K = 3
THOUGHTS[3:, 1, 0] = torch.tensor([5.0, -5.0, 7.0])  # the largest difference: below 0, and not in the last thought


def same(target: Tensor) -> Callable[[Any], bool]:
    """Does a value equal `target`, up to rounding?"""
    return lambda value: torch.allclose(torch.as_tensor(value, dtype=target.dtype), target, rtol=0, atol=1e-5)


mean = REWARDS.mean(1, keepdim=True)
advantages = Exercise(
    "advantages",
    lambda mine: mine(REWARDS.clone()),
    same(group_advantages(REWARDS)),
    (
        (same(mean - REWARDS), "the sign is turned round: a right answer would be made less likely"),
        (same(REWARDS - REWARDS.mean()), "the mean is over all groups; each problem, a row, has its own"),
        (same(REWARDS - REWARDS.mean(0)), "the mean is over the problems (dim 0); take it over the rollouts (dim 1)"),
        (lambda a: a.isnan().any(), "0 / 0 where all rewards of a group are equal; do not divide by their deviation"),
        (
            lambda a: same(torch.sign(REWARDS - mean))(torch.sign(a)),
            "the signs are right and the lengths are not: the formula has no division by the standard deviation",
        ),
        (lambda a: a.shape != REWARDS.shape, "the shape differs: one advantage per reward, [B, K]"),
    ),
)

share = is_collapsed(REWARDS).double().mean()
collapsed = Exercise(
    "collapsed",
    lambda mine: mine(REWARDS.clone()),
    same(share),
    (
        (same(1 - share), "this is the share of mixed groups, which do teach"),
        (same((REWARDS == 0).all(1).double().mean()), "this misses groups in which every answer is right"),
        (same((REWARDS == 1).all(1).double().mean()), "this misses groups in which every answer is wrong"),
        (same(share * len(REWARDS)), "this is a number of groups; the share is between 0 and 1"),
        (lambda value: torch.as_tensor(value).numel() > 1, "one number is asked for, got one per group; average them"),
    ),
)

grouped = THOUGHTS.unflatten(0, (-1, 3))
gaps = (grouped - grouped[:, :1]).abs()
difference = Exercise(
    "difference",
    lambda mine: mine(THOUGHTS.clone(), 3),
    same(gaps.max()),
    (
        (
            same((THOUGHTS - THOUGHTS[:1]).abs().max()),
            "this compares different problems too; group the rows by K first",
        ),
        (same((grouped - grouped[:, :1]).max()), "without the absolute value a difference below 0 does not count"),
        (same(gaps[:, :, -1].max()), "this looks at the last thought only; take all latent steps"),
        (same(gaps.mean()), "this is the mean difference; a mean can hide one thought that differs"),
        (
            same((grouped.amax(1) - grouped.amin(1)).max()),
            "this compares every pair; the formula compares with rollout 1",
        ),
    ),
)
