"""Checks of notebook 02: a mask from a seed, a broken replay, leave-one-out, a repair, where an error enters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentlab.advantage import group_advantages
from latentlab.masks import Masks, MaskSpec, whole_number
from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem, extract_answer
from latentlab.rollouts import replay_gap, rollout
from latentlab.teach.checks.collapse import same
from latentlab.teach.exercise import Exercise
from latentlab.theory.enumeration import tiny_problem, tiny_reasoner

RATE, LARGE = 0.3, (2, 4096)  # of the masks that are looked at


def _drawn(mine) -> dict[str, Any] | None:
    """What masks [S, D] of the reader are like: three large ones, and those of a replay in a tiny model."""
    first, again, other = (mine(seed, LARGE, RATE) for seed in (0, 0, 1))
    if first is None:
        return None
    model = tiny_reasoner()
    sites = (model.num_sites(("attention", "mlp")), model.width)
    rollout_masks, update_masks = (
        Masks(torch.stack([mine(seed, sites, RATE) for seed in range(8)]).to(model.dtype), MaskSpec(rate=RATE))
        for _ in range(2)
    )
    sampling: dict[str, Any] = {"num_generations": 8, "temperature": 1.0, "run_seed": 0, "step": 0}
    out = rollout(model, [tiny_problem()], masks=rollout_masks, **sampling)
    with torch.no_grad():
        gap = replay_gap(model.score(out, masks=update_masks), out)
    return {
        "gap": gap,
        "again": torch.equal(first, again),
        "fixed": torch.equal(first, other),
        "sites equal": torch.equal(first[0], first[1]),
        "dropped": (first == 0).double().mean().item(),
        "kept": first[first != 0].double().unique(),
    }


def _scaled(seen: dict[str, Any]) -> bool:
    return same(torch.tensor([1 / (1 - RATE)]))(seen["kept"])


mask = Exercise(
    "mask",
    _drawn,
    lambda seen: (
        seen["gap"] < 1e-6
        and seen["again"]
        and not (seen["fixed"] or seen["sites equal"])
        and abs(seen["dropped"] - RATE) < 0.03
        and _scaled(seen)
    ),
    (
        (
            lambda seen: not seen["again"],
            "a second call with the same seed gives another mask: the update cannot replay it",
        ),
        (lambda seen: seen["fixed"], "every seed gives the same mask: all rollouts would think alike"),
        (lambda seen: seen["sites equal"], "all sites have one mask; draw a value for each site and feature"),
        (
            lambda seen: abs(seen["dropped"] - 1 + RATE) < 0.03,
            "the share of zeros is 1 - p; p is the rate of dropped features",
        ),
        (lambda seen: seen["dropped"] == 0, "no feature is dropped: a mask has zeros"),
        (
            lambda seen: not _scaled(seen),
            "kept features have another size than 1 / (1 - p): the mean of the branch changes",
        ),
    ),
)

PROBS, RIGHT, VALUES = torch.tensor(
    [[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], [[0.75, 0.5, 0.5], [0.9, 0.4, 0.6]], [[2.0, 0.0, 0.0], [1.5, 0.5, 1.0]]],
    dtype=torch.float64,
)  # two cases of three masks: p(m), π(right | m), m; the first is the one by hand
replayed = (PROBS * RIGHT * VALUES * (1 - RIGHT)).sum(1)
fresh = (PROBS * RIGHT).sum(1) * (PROBS * VALUES * (1 - RIGHT)).sum(1)


def _biases(mine) -> Tensor | None:
    found = [mine(*case) for case in zip(PROBS, RIGHT, VALUES, strict=True)]
    return None if None in found else torch.stack([torch.as_tensor(value) for value in found]).double()


bias = Exercise(
    "bias",
    _biases,
    same(fresh - replayed),
    (
        (
            same(torch.zeros(2).double()),
            "zero: the score still uses the mask that made the answer; average it over m' apart",
        ),
        (same(fresh), "this is E[r s(y | m')] itself; subtract the gradient that replay gives"),
        (same(replayed - fresh), "the sign is turned round: the bias is the estimate minus the gradient"),
        (same(fresh / replayed - 1), "this is divided by the gradient; the difference itself is asked for"),
    ),
)

REWARDS = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.float64)
total = REWARDS.sum(1, keepdim=True)
others = (total - REWARDS) / (REWARDS.shape[1] - 1)
leave_one_out = Exercise(
    "leave_one_out",
    lambda mine: mine(REWARDS.clone()),
    same(group_advantages(REWARDS, baseline="leave_one_out")),
    (
        (same(group_advantages(REWARDS)), "this baseline holds the rollout's own reward: it is the mean of the group"),
        (same(REWARDS - (total - REWARDS) / REWARDS.shape[1]), "K - 1 others are summed, and divided by K"),
        (same(others), "this is the baseline alone; the advantage is the reward minus it"),
        (same(others - REWARDS), "the sign is turned round: a right answer would be made less likely"),
    ),
)

WRONG_PROBLEM = Problem(
    "wrong",
    "Tom has 17 stamps. He buys 3 more stamps. He splits 4 ways evenly. He finds 5 more stamps. "
    "He loses 4 stamps today. How many stamps remain?",
    ("<<17+3=20>>", "<<20/4=5>>", "<<5+5=10>>", "<<10-4=6>>"),
    "6",
    "teach",
)  # the clean model answers 7


def answer_under(seed: int, rate: float = 0.1) -> str:
    """The shipped model's greedy answer to WRONG_PROBLEM under the mask that a rollout seed draws."""
    seeds = torch.tensor([whole_number("seed", seed)])
    sampling: dict[str, Any] = {"num_generations": 1, "temperature": 0.0, "run_seed": 0, "step": 0}
    out = rollout(load_model("tiny"), [WRONG_PROBLEM], masks=MaskSpec(rate=rate), seeds=seeds, **sampling)
    return extract_answer(out.text[0]) or ""


repair = Exercise(
    "repair",
    answer_under,
    lambda answer: answer == WRONG_PROBLEM.answer,
    ((lambda answer: answer == answer_under(0, rate=0.0), "the answer is the one without a mask; try other seeds"),),
    "this mask changes the answer, but to another wrong one; try other seeds",
)

CHAINS = (
    (("9", "5", "15", "13"), 0),
    (("9", "7", "15", "11"), 2),
    (("8", "5", "15", "13"), 1),
    (("9", "5", "12", "10"), 3),
    (("9", "5", "15", "19"), 4),
)  # decoded thoughts, and the step at which the first error enters


def _first_errors(mine) -> list | None:
    found = [mine(chain, CHAINS[0][0]) for chain, _ in CHAINS]
    return None if set(found) == {None} else found


first_error = Exercise(
    "first_error",
    _first_errors,
    lambda found: found == [step for _, step in CHAINS],
    (
        (lambda found: found[0] is None, "None where no thought is wrong; return 0"),
        (lambda found: found[1:] == [step - 1 for _, step in CHAINS[1:]], "steps are counted from 0; the first is 1"),
        (lambda found: found[1:] == [4, 1, 4, 4], "this is the last wrong thought; look for the first"),
        (lambda found: found[1:] == [2, 1, 2, 1], "this is the number of wrong thoughts; return a step"),
    ),
)
