"""Group-relative advantages and their diagnostics.

    A_k = (r_k - b_k) / c      baseline b: "mean", "leave_one_out" (mean of the other K - 1) or "none" (0)
                               scale    c: "none" (1) or "group" (the group's standard deviation)
                                        or "batch" (that of all rewards)

Under "mean" the expected gradient is (1 - 1/K) times that of the expected reward, under
"leave_one_out" and "none" it is equal to it. A group whose rewards are all equal ("collapsed") has
advantage exactly 0 under "mean" and "leave_one_out".

Source: GRPO, arXiv 2402.03300; no scaling: Dr. GRPO, arXiv 2503.20783; leave-one-out: RLOO, arXiv
2402.14740. Deviation from GRPO: no division by the standard deviation by default, as it reweights
problems.

Dimensions: B problems, K rollouts per problem.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("none", "group", "batch")  # TRL's words
STD = "the former std is TRL's group"
STD_EPSILON = 1e-4  # as in TRL


def group_advantages(
    rewards: Float[Tensor, "B K"], *, baseline: str = "mean", scale: str = "none"
) -> Float[Tensor, "B K"]:
    """Advantages of B groups of K rollouts.

    Under scale "batch" `rewards` must be those of the whole batch, of every process.
    Raises ValueError for K < 2, rewards that are not floating point or not finite, or another word.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards: got shape {list(rewards.shape)}, expected [B, K] with K >= 2; raise num_generations"
        )
    if not rewards.is_floating_point():
        raise ValueError(f"rewards: got {rewards.dtype}, expected floating point; convert them with .double()")
    if baseline not in BASELINES or scale not in SCALES:
        raise ValueError(
            f"advantage: got baseline={baseline!r}, scale={scale!r}, expected {BASELINES} and {SCALES}; {STD}"
        )
    if baseline == "none" and scale != "none":
        raise ValueError(
            f"advantage: got scale={scale!r} without a baseline, expected one: equal rewards would be divided by 0"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards: got a NaN or infinite value, expected finite numbers; check the reward function")
    k = rewards.shape[1]
    advantages = rewards.clone()
    if baseline != "none":
        advantages = rewards - rewards.mean(1, keepdim=True)
        if baseline == "leave_one_out":
            advantages = advantages * k / (k - 1)
        advantages = advantages.masked_fill(is_collapsed(rewards)[:, None], 0.0)  # not 1e-8
    if scale == "group":
        advantages = advantages / (rewards.std(1, keepdim=True) + STD_EPSILON)
    if scale == "batch":
        advantages = advantages / (rewards.std() + STD_EPSILON)
    return advantages


def is_collapsed(rewards: Float[Tensor, "B K"]) -> Bool[Tensor, " B"]:
    """Which groups have equal rewards throughout, hence nothing to learn from."""
    return rewards.amax(1) == rewards.amin(1)


def group_diagnostics(rewards: Float[Tensor, "B K"]) -> dict[str, float]:
    """TRL's `reward`, `reward_std` and `frac_reward_zero_std` (share of collapsed groups), and `pass@k`.

    pass@k: the share of groups with a reward above 0; for rewards of 0 and 1 the collapsed groups
    without one are failed problems, the other collapsed ones are solved.
    """
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(1).mean().item(),
        "frac_reward_zero_std": is_collapsed(rewards).float().mean().item(),
        "pass@k": (rewards > 0).any(1).float().mean().item(),
    }
