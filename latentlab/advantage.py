"""Group-relative advantages and their diagnostics.

    A_k = (r_k - b_k) / c      baseline b: "mean" r̄ | "leave_one_out" (mean of the others) | "none"
                               scale    c: "none" 1 | "std" (the group's standard deviation)

With "mean" the gradient's expectation is (1 - 1/K) of the objective's, with "leave_one_out" and "none" it is the
objective's. A group whose rewards are all equal has advantage exactly 0 under "mean" and "leave_one_out".
Source: GRPO, arXiv 2402.03300; no scaling: Dr. GRPO, arXiv 2503.20783; leave-one-out: RLOO, arXiv 2402.14740.
"""

from __future__ import annotations

import torch

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("none", "std")
STD_EPSILON = 1e-4  # as in TRL


def group_advantages(rewards: torch.Tensor, *, baseline: str = "mean", scale: str = "none") -> torch.Tensor:
    """Advantages of K rollouts for each of B problems: rewards [B, K] -> [B, K]. Raises ValueError for K < 2."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards: got shape {list(rewards.shape)}, expected [B, K] with K >= 2; raise num_generations"
        )
    if baseline not in BASELINES or scale not in SCALES:
        raise ValueError(f"advantage: got baseline={baseline!r}, scale={scale!r}, expected {BASELINES} and {SCALES}")
    if baseline == "none" and scale == "std":
        raise ValueError(
            "advantage: got scale='std' without a baseline, expected one: equal rewards would be divided by 0"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards: got a NaN or infinite value, expected finite numbers; check the reward function")
    k = rewards.shape[1]
    advantages = rewards.clone()
    if baseline != "none":
        advantages = rewards - rewards.mean(1, keepdim=True)
        if baseline == "leave_one_out":
            advantages = advantages * k / (k - 1)
        advantages = advantages.masked_fill(is_collapsed(rewards)[:, None], 0.0)  # not the 1e-8 that rounding leaves
    if scale == "std":
        advantages = advantages / (rewards.std(1, keepdim=True) + STD_EPSILON)
    return advantages


def is_collapsed(rewards: torch.Tensor) -> torch.Tensor:
    """Which groups have equal rewards throughout, so nothing to learn from: [B, K] -> [B] bool."""
    return rewards.amax(1) == rewards.amin(1)


def group_diagnostics(rewards: torch.Tensor) -> dict[str, float]:
    """TRL's group metrics of rewards [B, K]: `reward`, `reward_std`, `frac_reward_zero_std` (per group, always)."""
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(1).mean().item(),
        "frac_reward_zero_std": is_collapsed(rewards).float().mean().item(),
    }
