"""The GRPO loss on recorded rollouts.

    ratio_t = exp(logp_t - old_logp_t)
    loss    = - sum_t min(ratio_t A, clip(ratio_t, 1 - eps_low, 1 + eps_high) A) / denominator
              + beta * k3 KL(policy || reference), under the same denominator

    loss_type  denominator of the sum over tokens                        objective
    dr_grpo    R * max_completion_length, a constant                     expected reward
    grpo       answer length per row, then R                             weights short answers up
    bnpo       answer tokens in this batch                               a ratio of sums
    dapo       answer tokens in all micro-batches and ranks              a ratio of sums

Source: PPO clipping, arXiv 1707.06347; GRPO, 2402.03300; Dr. GRPO, 2503.20783; DAPO, 2503.14476; k3:
J. Schulman, "Approximating KL divergence" (2020). Names follow TRL. Deviations from TRL:
1. `old_logp` is always the recorded one, never `logp.detach()`: an inexact replay is a ratio != 1.
2. The KL term shares the denominator of the policy loss, so beta means the same at every length.
Under dynamic sampling dr_grpo's R is smaller in steps that find too few groups to learn from.

Dimensions: R rollouts (rows), A answer tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOSS_TYPES = ("dr_grpo", "grpo", "bnpo", "dapo")


def k3_kl(logp: Float[Tensor, "*n"], ref_logp: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Schulman's k3 estimate of KL(policy || reference) in nats, per token; never negative."""
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio


def grpo_loss(
    logp: Float[Tensor, "R A"],
    old_logp: Float[Tensor, "R A"],
    advantages: Float[Tensor, " R"],
    token_mask: Bool[Tensor, "R A"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logp: Float[Tensor, "R A"] | None = None,
    loss_type: str = "dr_grpo",
    max_completion_length: int | None = None,
    denominator: float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Clipped policy-gradient loss of R rollouts: (loss, stats).

    logp, old_logp, ref_logp: log-probs of the answer tokens in nats; token_mask: True for answer
    tokens, eos included. max_completion_length: dr_grpo's constant (default A). denominator: that of
    the whole batch (`loss_denominator`) if this is a part of it; the losses of the parts add up.
    Stats: kl, clip_ratio/low_mean, clip_ratio/high_mean, ratio_max_deviation.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type: got {loss_type!r}, expected one of {', '.join(LOSS_TYPES)}")
    if beta and ref_logp is None:
        raise ValueError(
            f"beta: got {beta} without ref_logp, expected the reference log-probs; pass them or set beta=0"
        )
    mask = token_mask.to(logp.dtype)
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    ratio = torch.exp((logp - old_logp) * mask)  # [R, A]
    gain = advantages[:, None]
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon_high) * gain)
    kl = k3_kl(logp, ref_logp) if beta and ref_logp is not None else torch.zeros_like(logp)
    loss = (loss + beta * kl) * mask
    if loss_type == "grpo":
        loss = loss / mask.sum(1, keepdim=True).clamp(min=1)
    if denominator is None:
        denominator = loss_denominator(token_mask, loss_type, max_completion_length)
    with torch.no_grad():
        tokens = mask.sum().clamp(min=1)
        stats = {
            "kl": ((kl * mask).sum() / tokens).item(),
            "clip_ratio/low_mean": (((ratio < 1 - epsilon) & (gain < 0)) * mask).sum().div(tokens).item(),
            "clip_ratio/high_mean": (((ratio > 1 + epsilon_high) & (gain > 0)) * mask).sum().div(tokens).item(),
            "ratio_max_deviation": ((ratio - 1).abs() * mask).max().item(),
        }
    return loss.sum() / denominator, stats


def loss_denominator(
    token_mask: Bool[Tensor, "R A"], loss_type: str, max_completion_length: int | None = None
) -> float:
    """The divisor of the summed loss; `token_mask` is that of the whole batch."""
    if loss_type == "dr_grpo":
        return float(len(token_mask) * (max_completion_length or token_mask.shape[1]))
    if loss_type == "grpo":
        return float(len(token_mask))
    return float(token_mask.sum().clamp(min=1))
