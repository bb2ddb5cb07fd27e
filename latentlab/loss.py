"""The GRPO loss on recorded rollouts.

    ratio_t = exp(logp_t - old_logp_t)
    loss    = - sum_t min(ratio_t A, clip(ratio_t, 1 - eps_low, 1 + eps_high) A) / denominator   (+ beta * k3 KL)

`old_logp` is what was recorded at sampling, never `logp.detach()`: a replay that is not exact then shows as a ratio
that is not 1. Policy loss and KL share one normalisation, so beta means the same at every answer length.

    loss_type  normalisation of the sum over tokens                              what it optimises
    dr_grpo    R * max_completion_length (constant; under dynamic sampling R      the expected reward
               falls where too few groups are mixed)
    grpo       |y| per row, then the mean over rows                              weighs short answers up
    bnpo       the tokens in this batch                                          a ratio of sums
    dapo       the same sum over all micro-batches and ranks (`denominator`)     a ratio of sums

Source: PPO clip arXiv 1707.06347; GRPO 2402.03300; Dr. GRPO 2503.20783; DAPO 2503.14476; k3: J. Schulman,
"Approximating KL divergence" (2020). Names follow TRL.
"""

from __future__ import annotations

import torch

LOSS_TYPES = ("dr_grpo", "grpo", "bnpo", "dapo")


def k3_kl(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy || reference), per token, never negative: same shape as `logp`."""
    log_ratio = ref_logp - logp
    return torch.expm1(log_ratio) - log_ratio


def grpo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    token_mask: torch.Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logp: torch.Tensor | None = None,
    loss_type: str = "dr_grpo",
    max_completion_length: int | None = None,
    denominator: float | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Clipped policy-gradient loss of R rollouts; returns (loss, stats).

    logp, old_logp, ref_logp: [R, A] log-probs of the answer tokens (nats); advantages: [R]; token_mask: [R, A], True
    for answer tokens, eos included. `max_completion_length` is dr_grpo's constant (default A). Micro-batches and ranks
    pass the whole batch's `denominator` (see `loss_denominator`), and their losses add up to the unsplit one.
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
    kl = k3_kl(logp, ref_logp) if beta else torch.zeros_like(logp)
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


def loss_denominator(token_mask: torch.Tensor, loss_type: str, max_completion_length: int | None = None) -> float:
    """What the summed loss of the whole batch is divided by; `token_mask` is the whole batch's [R, A]."""
    if loss_type == "dr_grpo":
        return float(len(token_mask) * (max_completion_length or token_mask.shape[1]))
    if loss_type == "grpo":
        return float(len(token_mask))
    return float(token_mask.sum().clamp(min=1))
