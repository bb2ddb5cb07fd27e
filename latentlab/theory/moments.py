"""Exact expectations and variances of gradient estimators on an enumerated policy (enumeration.py), in float64.

    J(θ)    = Σ_m p(m) Σ_y π_θ(y|x,m) r(y)       ∇J by autograd, from the probabilities themselves
    g       = Σ_k Σ_t a_kt s_t(m_k, y_k)         one group's gradient, a_kt = -∂ grpo_loss / ∂ logp_kt
    E[g]    = Σ_c P(c_1) ... P(c_K) Σ_k Σ_t a_kt E[s_t | c_k]
    E[|g|²] = Σ_c P(c_1) ... P(c_K) { Σ_k a_k' E[s s'|c_k] a_k + Σ_{k≠l} (a_k E[s|c_k]) · (a_l E[s|c_l]) }

The rollouts of a group are independent given the problem, and a_k depends on a rollout through its reward (and, for
some loss types, its length) alone. So a group is enumerated as its 2^K reward patterns c; within a class E[s_t | c] and
the products E[s_t · s_u | c] are enough. Advantages come from `group_advantages`, a_kt from differentiating
`grpo_loss`, s_t from `score`: the functions that training calls. The loss dr_grpo divides by K * T; g is reported times
T (the answer's length limit), which makes it (1/K) Σ_k A_k s_k.

Sources: score function, Williams (1992); leave-one-out, Kool et al. (2019); importance sampling by whole answers is the
unclipped sequence ratio. Letters as in enumeration.py, and C classes, G patterns, K rollouts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from scipy.optimize import brentq

from latentlab import advantage, loss
from latentlab.masks import MaskSpec
from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.rollouts import rollout
from latentlab.theory.enumeration import (
    Policy,
    answer_index,
    enumerate_policy,
    greedy_probs,
    objective,
    one_logit,
    reward_table,
)

FRESH_FORMS = ("detached", "token_ratio", "clipped", "sequence_ratio")


@dataclass(frozen=True)
class Moments:
    """Of a gradient estimator: mean [P] and variance, the trace of its covariance."""

    mean: torch.Tensor
    variance: float


# -- the estimators -------------------------------------------------------------------------------------------------


def row_weights(rewards: torch.Tensor, lengths: torch.Tensor, limit: int, *, baseline: str, scale: str, loss_type: str):
    """a_kt of G groups: rewards [G, K], lengths [G, K] -> [G, K, T], by differentiating `grpo_loss` at ratio 1.

    Each group is a batch of its own; groups with equal denominators share a call.
    """
    advantages = advantage.group_advantages(rewards, baseline=baseline, scale=scale)  # [G, K]
    token_mask = torch.arange(limit) < lengths[..., None]  # [G, K, T]
    denominators = torch.tensor([loss.loss_denominator(mask, loss_type, limit) for mask in token_mask])  # [G]
    a = torch.zeros(token_mask.shape, dtype=torch.float64)
    for denominator in denominators.unique().tolist():
        groups = denominators == denominator
        logp = torch.zeros_like(a[groups]).flatten(0, 1).requires_grad_()  # [rows, T]
        value, _ = loss.grpo_loss(
            logp, logp.detach(), advantages[groups].flatten(), token_mask[groups].flatten(0, 1),
            loss_type=loss_type, denominator=denominator,
        )  # fmt: skip
        a[groups] = -limit * torch.autograd.grad(value, logp)[0].view_as(a[groups])
    return a


def group_moments(
    policy: Policy,
    rewards: torch.Tensor,
    num_generations: int,
    *,
    baseline: str = "mean",
    scale: str = "none",
    loss_type: str = "dr_grpo",
    constant: float = 0.0,
    probs: torch.Tensor | None = None,
    by_length: bool = False,
) -> Moments:
    """Mean and variance of one group's gradient estimate, over all C^K patterns of its rollouts' classes.

    rewards: [Y]; `constant` is subtracted from them (a constant baseline, with baseline="none"); `probs` [N] replaces
    the policy's probabilities (greedy answers); `by_length` tells answers of different length apart, which loss types
    other than dr_grpo need.
    """
    limit = policy.logp.shape[1]
    probs = policy.probs if probs is None else probs
    lengths = policy.token_mask.sum(1) if by_length else torch.full((len(probs),), limit)
    keys = torch.stack([(rewards - constant).repeat(len(policy.mask_probs)), lengths.double()], 1)  # [N, 2]
    classes, index = keys[probs > 0].unique(dim=0, return_inverse=True)  # [C, 2]
    weights = torch.zeros(len(classes), len(probs), dtype=torch.float64)
    weights[index, (probs > 0).nonzero()[:, 0]] = probs[probs > 0]  # [C, N]
    class_probs = weights.sum(1)
    weights = weights / class_probs[:, None]
    first = torch.einsum("cn,ntp->ctp", weights, policy.scores)  # E[s_t | c]
    second = torch.einsum("cn,ntu->ctu", weights, policy.products)  # E[s_t · s_u | c]
    patterns = torch.tensor(list(itertools.product(range(len(classes)), repeat=num_generations)))  # [G, K]
    a = row_weights(*classes[patterns].unbind(-1), limit, baseline=baseline, scale=scale, loss_type=loss_type)
    return _assemble(class_probs[patterns].prod(1), patterns, a, first, second)


def _assemble(prob, patterns, a, first, second) -> Moments:
    """E[g] and the trace of its covariance: pattern probabilities [G], classes [G, K], row weights a [G, K, T]."""
    cross = torch.einsum("ctp,dup->cdtu", first, first)  # E[s_t | c] · E[s_u | d]
    rows = torch.einsum("gkt,gktp->gkp", a, first[patterns])  # [G, K, P]
    mean = torch.einsum("g,gkp->p", prob, rows)
    between = rows.sum(1).square().sum(1) - torch.einsum("gkt,gktu,gku->g", a, cross[patterns, patterns], a)
    within = torch.einsum("gkt,gktu,gku->g", a, second[patterns], a)
    return Moments(mean, (prob @ (within + between) - mean @ mean).item())


def fresh_mask_moments(
    policy: Policy,
    rewards: torch.Tensor,
    num_generations: int,
    *,
    form: str,
    baseline: str = "leave_one_out",
    epsilon: float = 0.2,
) -> Moments:
    """One group's gradient when the update draws a new mask m' instead of replaying the rollout's m.

    form: "detached" (old log-prob is logp.detach()), "token_ratio" (old log-prob as recorded, no clip), "clipped" (the
    same, clipped to 1 ± epsilon), "sequence_ratio" (π(y|m') / π(y|m) of whole answers, no clip: importance sampling).
    """
    if form not in FRESH_FORMS:
        raise ValueError(f"form: got {form!r}, expected one of {', '.join(FRESH_FORMS)}")
    values = rewards.unique()
    class_probs = torch.stack([policy.answer_probs[rewards == r].sum() for r in values])
    patterns = torch.tensor(list(itertools.product(range(len(values)), repeat=num_generations)))  # [G, K]
    prob = class_probs[patterns].prod(1)
    advantages = advantage.group_advantages(values[patterns], baseline=baseline)
    pairs, index = torch.stack([values[patterns], advantages], -1).flatten(0, 1).unique(dim=0, return_inverse=True)
    rows = [_fresh_row(policy, rewards, r, a, form, epsilon) for r, a in pairs.tolist()]
    first = torch.stack([mean for mean, _ in rows])[:, None]  # [C, 1, P]
    second = torch.stack([square for _, square in rows])[:, None, None]  # [C, 1, 1]
    weight = torch.full((*patterns.shape, 1), 1 / num_generations, dtype=torch.float64)
    return _assemble(prob, index.view(patterns.shape), weight, first, second)


def _fresh_row(policy: Policy, rewards: torch.Tensor, r: float, a: float, form: str, epsilon: float):
    """E[g_k] [P] and E[|g_k|²] of one rollout with reward r and advantage a, over (m, y) ~ π and m' ~ p."""
    count = len(policy.mask_probs)
    chosen = (rewards == r).nonzero()[:, 0]  # [Y']
    logp, token_mask, scores, products, probs = (
        x.unflatten(0, (count, -1))[:, chosen]
        for x in (policy.logp, policy.token_mask, policy.scores, policy.products, policy.probs)
    )  # [M, Y', ...]
    probs = probs / probs.sum()
    weighted = torch.zeros_like(logp)
    square = torch.zeros((), dtype=torch.float64)
    drawn = [(logp, probs.sum(0))] if form == "detached" else zip(logp, probs, strict=True)  # over m
    for old_logp, prob in drawn:  # [Y', T] at this m, [Y']
        c = _fresh_coefficients(logp, old_logp.expand_as(logp), a, token_mask, form, epsilon)
        w = policy.mask_probs[:, None] * prob  # [M', Y']
        weighted += w[..., None] * c
        square += (w * torch.einsum("myt,mytu,myu->my", c, products, c)).sum()
    return torch.einsum("myt,mytp->p", weighted, scores), square


def _fresh_coefficients(logp, old_logp, a: float, token_mask, form: str, epsilon: float) -> torch.Tensor:
    """-∂ loss / ∂ logp of rows [M', Y'] with advantage a; whole answers enter `grpo_loss` as one token each."""
    new = logp.flatten(0, 1).requires_grad_()
    old, mask = old_logp.flatten(0, 1), token_mask.flatten(0, 1)
    gain = torch.full((len(new),), a, dtype=torch.float64)
    width = epsilon if form == "clipped" else float("inf")
    if form == "sequence_ratio":
        inputs = (new.sum(1, keepdim=True), old.sum(1, keepdim=True), gain, mask[:, :1])
    else:
        inputs = (new, old, gain, mask)
    value, _ = loss.grpo_loss(*inputs, epsilon=width, denominator=1.0)
    return -torch.autograd.grad(value, new)[0].view_as(logp)


# -- what the notebooks print and plot ------------------------------------------------------------------------------


def baseline_bound(policy: Policy, rewards: torch.Tensor) -> float:
    """2 E[r |s|²] / E[|s|²]: a constant baseline b lowers the variance if and only if 0 < b < this."""
    norms = policy.products.sum((1, 2)) * policy.probs  # p |s|², [N]
    return (2 * (norms @ rewards.repeat(len(policy.mask_probs))) / norms.sum()).item()


def variance_row(policy: Policy, rewards: torch.Tensor, num_generations: int) -> dict[str, float]:
    """Exact variances of estimators of equal expectation ∇J, and what the condition on a constant baseline predicts."""
    k = num_generations
    pass_rate = (policy.answer_probs @ rewards).item()
    none = group_moments(policy, rewards, k, baseline="none").variance
    return {
        "pass_rate": pass_rate,
        "none": none,
        "leave_one_out": group_moments(policy, rewards, k, baseline="leave_one_out").variance,
        "mean_rescaled": group_moments(policy, rewards, k, baseline="mean").variance * (k / (k - 1)) ** 2,
        "constant": group_moments(policy, rewards, k, baseline="none", constant=pass_rate).variance,
        "bound": baseline_bound(policy, rewards),
    }


def pass_rate_cases(policy: Policy | None = None) -> list[tuple[Policy, torch.Tensor]]:
    """(policy, rewards) at pass rates 0.1 ... 0.9: the one-logit policy, or `policy` with tables of that pass rate."""
    rates = [tenth / 10 for tenth in range(1, 10)]
    if policy is not None:
        return [(policy, reward_table(policy, rate)) for rate in rates]
    return [(one_logit(rate), torch.tensor([1.0, 0.0], dtype=torch.float64)) for rate in rates]


def crossover(num_generations: int) -> float:
    """The pass rate of the one-logit policy above which leave-one-out has more variance than none; 0 if it always has.

    It is 2(K - 2) / (3K - 5): 0 at K = 2, towards 2/3 for large K.
    """

    def excess(rate):
        row = variance_row(one_logit(rate), torch.tensor([1.0, 0.0]).double(), num_generations)
        return row["leave_one_out"] - row["none"]

    return 0.0 if excess(0.01) > 0 else brentq(excess, 0.01, 0.99, xtol=1e-6)


def relative_error(estimate: torch.Tensor, target: torch.Tensor) -> float:
    """|estimate - target| / |target|."""
    return ((estimate - target).norm() / target.norm()).item()


def bias_table(
    model: LatentReasoner, problem: Problem, spec: MaskSpec, rewards: torch.Tensor, num_generations: int
) -> list[dict]:
    """One row per estimator: bias |E[g] - ∇J| / |∇J|, the part no rescaling removes, and the variance of a group."""
    policy, k = enumerate_policy(model, problem, spec), num_generations
    _, gradient = objective(model, problem, spec, rewards)
    moments = {
        "no baseline": group_moments(policy, rewards, k, baseline="none"),
        "mean": group_moments(policy, rewards, k, baseline="mean"),
        "leave-one-out": group_moments(policy, rewards, k, baseline="leave_one_out"),
        "mean / std": group_moments(policy, rewards, k, baseline="mean", scale="std"),
        **{f"fresh mask, {form}": fresh_mask_moments(policy, rewards, k, form=form) for form in FRESH_FORMS},
        "greedy answers": group_moments(
            policy, rewards, k, baseline="leave_one_out", probs=greedy_probs(model, problem, spec)
        ),
    }
    return [
        {
            "estimator": name,
            "bias": relative_error(m.mean, gradient),
            "direction_error": direction_error(m.mean, gradient),
            "variance": m.variance,
        }
        for name, m in moments.items()
    ]


def direction_error(estimate: torch.Tensor, target: torch.Tensor) -> float:
    """Sine of the angle between two gradients: the bias that no learning rate undoes; 1 for a zero estimate."""
    if estimate.norm() == 0:
        return 1.0
    e, t = estimate / estimate.norm(), target / target.norm()
    return (e - (e @ t) * t).norm().item()


def monte_carlo(
    model: LatentReasoner,
    problem: Problem,
    spec: MaskSpec,
    rewards: torch.Tensor,
    *,
    num_generations: int,
    groups: int,
    repeats: int,
    run_seed: int,
    baseline: str = "mean",
) -> dict[str, float]:
    """The same expectation by sampling, along the whole path of training: rollout, advantages, score, loss, backward.

    Each of `repeats` batches has `groups` groups. Returns how much of ∇J the estimate holds, g · ∇J / |∇J|² (1 for an
    unbiased estimator), its standard error, and the number of rollouts.
    """
    _, gradient = objective(model, problem, spec, rewards)
    shares = []
    for step in range(repeats):
        out = rollout(
            model, [problem], num_generations=groups * num_generations, masks=spec, temperature=1.0,
            run_seed=run_seed, step=step,
        )  # fmt: skip
        r = rewards[answer_index(model, out)].view(groups, num_generations)
        a = advantage.group_advantages(r, baseline=baseline).flatten()
        logp = model.score(out, masks=out.masks)
        value, _ = loss.grpo_loss(logp, out.logp, a, out.token_mask, max_completion_length=1)
        g = -torch.cat([x.flatten() for x in torch.autograd.grad(value, list(model.parameters()))])
        shares.append(((g @ gradient) / (gradient @ gradient)).item())
    spread = torch.tensor(shares, dtype=torch.float64)
    return {
        "share": spread.mean().item(),
        "standard_error": (spread.std() / repeats**0.5).item(),
        "rollouts": repeats * groups * num_generations,
    }
