"""The GRPO loss on recorded rollouts.

    ratio_t = exp(logp_t - old_logp_t); importance_sampling_level "sequence": one ratio per answer,
              exp of the mean of logp - old_logp over its tokens
    loss    = - sum_t min(ratio_t A, clip(ratio_t, 1 - eps_low, 1 + eps_high) A) / denominator
              + beta * k3 KL(policy || reference), under the same denominator
    cispo   = - sum_t min(ratio_t, eps_high) A logp_t / denominator + the same KL, the ratio detached

    loss_type  denominator of the sum over tokens                        objective
    dr_grpo    R * max_completion_length, a constant                     expected reward
    grpo       answer length per row, then R                             weights short answers up
    dapo       answer tokens in all micro-batches and ranks              a ratio of sums
    cispo      as dapo                                                   a ratio of sums

Source: PPO clipping, arXiv 1707.06347; GRPO, 2402.03300; Dr. GRPO, 2503.20783; DAPO, 2503.14476;
CISPO, 2506.13585; sequence level: GSPO, 2507.18071; k3: J. Schulman, "Approximating KL divergence"
(2020). Names follow TRL. Deviations from TRL:
1. `old_logp` is always the recorded one, never `logp.detach()`: an inexact replay is a ratio != 1.
2. No bnpo: a mean over the tokens of each micro-batch depends on how the batch is split.
3. cispo needs epsilon_high: TRL's default, epsilon = 0.2, would multiply every gradient by 0.2.
As in TRL the KL term has the denominator of the policy loss: beta means the same at every length.
Under dynamic sampling dr_grpo's R is smaller in steps that find too few groups to learn from.

Dimensions: R rollouts (rows), A answer tokens.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOSS_TYPES = ("dr_grpo", "grpo", "dapo", "cispo")
LEVELS = ("token", "sequence")
BNPO = "TRL's bnpo depends on how the batch is split; use dapo, the mean over all tokens of the batch"
CISPO_NEEDS = "epsilon_high: got None with loss_type cispo, expected the largest ratio itself; use 5.0, as TRL advises"


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
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    denominator: float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Clipped policy-gradient loss of R rollouts: (loss, stats).

    logp, old_logp, ref_logp: log-probs of the answer tokens in nats; token_mask: True for answer
    tokens, eos included. max_completion_length: dr_grpo's constant (default A). denominator: that of
    the whole batch (`loss_denominator`) if this is a part of it; the losses of the parts add up.
    Stats: kl, ratio_max_deviation, and TRL's clip_ratio/low_mean and clip_ratio/high_mean, or
    cispo_clip_ratio: means over tokens, or over rows where a row has one ratio.
    """
    _expect_settings(loss_type, importance_sampling_level, epsilon, epsilon_high, beta)
    if beta and ref_logp is None:
        raise ValueError(
            f"beta: got {beta} without ref_logp, expected the reference log-probs; pass them or set beta=0"
        )
    shapes = [list(x.shape) for x in (logp, old_logp, token_mask, logp if ref_logp is None else ref_logp)]
    if shapes != [shapes[0]] * 4 or list(advantages.shape) != shapes[0][:1]:
        got = f"got {shapes} and advantages {list(advantages.shape)}"
        raise ValueError(f"shapes: {got}, expected [R, A] for each and [R]; pass tensors of the same rollouts")
    mask = token_mask.to(logp.dtype)
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    log_ratio = (logp - old_logp) * mask
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # [R, 1]
    by_row = importance_sampling_level == "sequence"
    ratio = torch.exp(log_ratio.sum(1, keepdim=True) / lengths if by_row else log_ratio)  # [R, A] or [R, 1]
    gain = advantages[:, None]
    if loss_type == "cispo":
        loss = -ratio.detach().clamp(max=epsilon_high) * gain * logp
        clipped = {"cispo_clip_ratio": (ratio > epsilon_high) & (gain > 0)}
    else:
        loss = -torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon_high) * gain)
        clipped = {
            "clip_ratio/low_mean": (ratio < 1 - epsilon) & (gain < 0),
            "clip_ratio/high_mean": (ratio > 1 + epsilon_high) & (gain > 0),
        }
    kl = k3_kl(logp, ref_logp) if beta and ref_logp is not None else torch.zeros_like(logp)
    loss = (loss + beta * kl) * mask
    if loss_type == "grpo":
        loss = loss / lengths
    if denominator is None:
        denominator = loss_denominator(token_mask, loss_type, max_completion_length)
    with torch.no_grad():
        tokens = mask.sum().clamp(min=1)
        stats = {
            "kl": ((kl * mask).sum() / tokens).item(),
            **{k: (x.to(mask).mean() if by_row else (x * mask).sum() / tokens).item() for k, x in clipped.items()},
            "ratio_max_deviation": ((ratio - 1).abs() * mask).max().item(),
        }
    return loss.sum() / denominator, stats


def _expect_settings(loss_type: str, level: str, epsilon: float, epsilon_high: float | None, beta: float) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type: got {loss_type!r}, expected one of {', '.join(LOSS_TYPES)}; {BNPO}")
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level: got {level!r}, expected token or sequence")
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError(CISPO_NEEDS)
    if not (epsilon > 0 and (epsilon_high is None or epsilon_high > 0) and 0 <= beta < math.inf):  # inf clips nothing
        got = f"got epsilon={epsilon}, epsilon_high={epsilon_high}, beta={beta}"
        raise ValueError(f"loss: {got}, expected positive epsilons and a finite beta >= 0")


def loss_denominator(
    token_mask: Bool[Tensor, "R A"], loss_type: str, max_completion_length: int | None = None
) -> float:
    """The divisor of the summed loss; `token_mask` is that of the whole batch."""
    if max_completion_length is not None and max_completion_length < 1:
        raise ValueError(f"max_completion_length: got {max_completion_length}, expected at least 1 token")
    if loss_type == "dr_grpo":
        return float(len(token_mask) * (max_completion_length or token_mask.shape[1]))
    if loss_type == "grpo":
        return float(len(token_mask))
    return float(token_mask.sum().clamp(min=1))
