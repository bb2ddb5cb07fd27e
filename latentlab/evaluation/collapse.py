"""How much the K rollouts of a group differ: the collapse of plain GRPO, in four numbers per arm.

    max_thought_difference   max |z_k - z_1| over rollouts k, latent steps, features; 0.0: bit-equal
    distinct_answers         mean number of different answers in a group
    frac_reward_zero_std     share of groups with equal rewards
    grad_norm                norm of the GRPO gradient, backward pass run and read from `.grad`

`spread_by_step` and `principal_plane` describe the thoughts: spread at each step, main directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from latentlab.advantage import STD_EPSILON, group_advantages, is_collapsed
from latentlab.config import Config
from latentlab.grpo import policy_gradient
from latentlab.masks import MaskSpec
from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.reward import exact_answer
from latentlab.rollouts import rollout


def measure_groups(
    model: LatentReasoner,
    problems: Sequence[Problem],
    config: Config,
    *,
    mask: MaskSpec | None,
    batch_size: int,
    gradient_problems: int | None = None,
    reward=exact_answer,
    **sampling: Any,
) -> dict[str, float]:
    """The four numbers above, plus `reward`, `replay_gap` (nats) and the sizes used.

    The gradient is that of one GRPO step on all problems, or, where the backward pass is expensive,
    on the first `gradient_problems`, rounded up to whole batches: batches are summed, each weighted
    by its share. Gradients are cleared before and after.
    sampling: `num_generations` (K), `temperature` and `run_seed` of `rollout`.
    Raises ValueError for an empty problem list.
    """
    if not problems:
        raise ValueError("problems: got an empty list, expected at least one; check the data source and its filters")
    model.zero_grad(set_to_none=True)
    wanted = len(problems) if gradient_problems is None else gradient_problems
    counted = min(len(problems), -(-wanted // batch_size) * batch_size)  # whole batches
    scale = config.grpo.scale_rewards
    by_batch = scale == "batch"  # one factor of the gradient, known at the end
    rewards, spreads, distinct, gap = [], [], [], 0.0
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        out = rollout(model, batch, masks=mask, step=0, **sampling)
        values = out.rewards(reward)  # [B, K]
        advantages = group_advantages(values, baseline=config.grpo.baseline, scale="none" if by_batch else scale)
        if start < counted:
            weighted = advantages.flatten().to(out.logp) * (len(batch) / counted)
            gap = max(gap, policy_gradient(model, out, weighted, config, whole=True)["replay_gap"])
        rewards.append(values)
        k = out.num_generations
        grouped = out.thoughts.unflatten(0, (-1, k))  # [B, K, L, D]; L = 0 in the control "direct"
        spreads.append((grouped - grouped[:, :1]).abs().max().item() if grouped.numel() else 0.0)
        distinct += [len(set(out.text[i : i + k])) for i in range(0, len(out.text), k)]
    table = torch.cat(rewards)  # [n, K]
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    if by_batch:
        norm /= table[:counted].std().item() + STD_EPSILON
    model.zero_grad(set_to_none=True)
    return {
        "frac_reward_zero_std": is_collapsed(table).double().mean().item(),
        "max_thought_difference": max(spreads),
        "distinct_answers": sum(distinct) / len(distinct),
        "grad_norm": norm,
        "reward": table.mean().item(),
        "replay_gap": gap,
        "problems": len(problems),
        "gradient_problems": counted,
        "num_generations": table.shape[1],
    }


def spread_by_step(thoughts: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Variance across the K rollouts of a group, relative to |z|^2: thoughts [R, L, D] -> [L].

    Summed over features, averaged over groups; 0 means that all K thoughts are equal.
    """
    grouped = thoughts.double().unflatten(0, (-1, num_generations))  # [B, K, L, D]
    return (grouped.var(1).sum(-1) / grouped.square().sum(-1).mean(1)).mean(0)


def principal_plane(thoughts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Thoughts [R, L, D] in their two main directions: ([R, L, 2], shares of variance [2])."""
    points = thoughts.double().flatten(0, 1)  # [R * L, D]
    centred = points - points.mean(0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions * torch.sign(directions[:, directions.abs().argmax(1)].diagonal())[:, None]  # a fixed sign
    plane = (centred @ directions[:2].T).unflatten(0, thoughts.shape[:2])
    return plane, singular[:2].square() / singular.square().sum()
