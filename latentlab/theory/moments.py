"""Exact expectations and variances of gradient estimators on an enumerated policy, in float64.

    g       = Σ_k Σ_t a_kt s_t(m_k, y_k)      gradient of one group, a_kt = -∂ grpo_loss / ∂ logp_kt
    E[g]    = Σ_c P(c_1) ... P(c_K) Σ_k Σ_t a_kt E[s_t | c_k]
    E[|g|²] = Σ_c P(c_1) ... P(c_K) { Σ_k a_k' E[s s'|c_k] a_k
              + Σ_{k≠l} (a_k E[s|c_k]) · (a_l E[s|c_l]) }

The rollouts of a group are independent given the problem, and a_k depends on a rollout only through
its class: its reward and, for some loss types, its length. So a group is one of C^K patterns c.
Advantages, a_kt and s_t come from the functions that training calls: `group_advantages`, `grpo_loss`
and `score`. dr_grpo divides by K * T; g is given times T, the length limit of answers, which makes
it (1/K) Σ_k A_k s_k.

Sources: score function, Williams (1992); leave-one-out, Kool et al. (2019); the unclipped sequence
ratio is importance sampling of whole answers.
Letters: those of enumeration.py, and C classes, G patterns, K rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import Tensor

from latentlab import advantage, loss
from latentlab.masks import MaskSpec
from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.rollouts import rollout
from latentlab.theory.enumeration import (
    Policy,
    answer_index,
    enumerate_policy,
    greedy_policy,
    mask_space,
    one_logit,
    true_gradient,
)

FRESH_FORMS = ("detached", "token_ratio", "clipped", "sequence_ratio")
ONE_LOGIT_REWARDS = torch.tensor([1.0, 0.0], dtype=torch.float64)  # right, wrong


@dataclass(frozen=True)
class Moments:
    """Of a gradient estimator: mean [P] and variance, the trace of its covariance."""

    mean: Tensor
    variance: float


def group_moments(
    policy: Policy, rewards: Tensor, k: int, *, baseline="mean", scale="none", loss_type="dr_grpo", by_length=False
) -> Moments:
    """Mean and variance of the gradient estimate of a group of k rollouts, rewards [Y].

    `by_length` puts answers of different length into different classes, which loss types other than
    dr_grpo need.
    """
    limit, probs = policy.logp.shape[1], policy.probs
    lengths = policy.token_mask.sum(1) if by_length else torch.full((len(probs),), limit)
    keys = torch.stack([rewards.repeat(len(policy.mask_probs)), lengths.double()], 1)  # [N, 2]
    possible = probs > 0
    classes, index = keys[possible].unique(dim=0, return_inverse=True)  # [C, 2]
    weights = torch.zeros(len(classes), len(probs), dtype=torch.float64)
    weights[index, possible.nonzero()[:, 0]] = probs[possible]  # [C, N]
    class_probs = weights.sum(1)
    weights = weights / class_probs[:, None]
    first = torch.einsum("cn,ntp->ctp", weights, policy.scores)  # E[s_t | c]
    second = torch.einsum("cn,ntu->ctu", weights, policy.score_products)  # E[s_t · s_u | c]
    patterns = torch.cartesian_prod(*[torch.arange(len(classes))] * k)  # [G, K]
    r, lengths = classes[patterns].unbind(-1)  # [G, K] each
    advantages = advantage.group_advantages(r, baseline=baseline, scale=scale)
    a = _token_weights(advantages, torch.arange(limit) < lengths[..., None], loss_type)
    return _moments(class_probs[patterns].prod(1), patterns, a, first, second)


def _token_weights(advantages: Tensor, token_mask: Tensor, loss_type: str) -> Tensor:
    """a_kt at ratio 1, [G, K, T], for advantages [G, K]; each group is a batch of its own."""
    limit, mask = token_mask.shape[2], token_mask.flatten(0, 1)
    denominators = torch.tensor([loss.loss_denominator(group, loss_type, limit) for group in token_mask])  # [G]
    logp = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
    value, _ = loss.grpo_loss(logp, logp.detach(), advantages.flatten(), mask, loss_type=loss_type, denominator=1.0)
    return -limit * torch.autograd.grad(value, logp)[0].view(token_mask.shape) / denominators[:, None, None]


def _moments(prob, patterns, a, first, second) -> Moments:
    """E[g] and tr Cov[g]: pattern probabilities [G], classes [G, K], token weights a [G, K, T]."""
    cross = torch.einsum("ctp,dup->cdtu", first, first)  # E[s_t | c] · E[s_u | d]
    rows = torch.einsum("gkt,gktp->gkp", a, first[patterns])  # [G, K, P]
    mean = torch.einsum("g,gkp->p", prob, rows)
    between = rows.sum(1).square().sum(1) - torch.einsum("gkt,gktu,gku->g", a, cross[patterns, patterns], a)
    within = torch.einsum("gkt,gktu,gku->g", a, second[patterns], a)
    return Moments(mean, (prob @ (within + between) - mean @ mean).item())


def antithetic_probs(model: LatentReasoner, spec: MaskSpec) -> Tensor:
    """P(m, m') of a pair of masks from u and 1 - u, over `mask_space`: [M, M].

    A feature is dropped in the first (u < p), in the second (u >= 1 - p), in none, or for p > 1/2 in both.
    """
    masks, _ = mask_space(model, spec)
    keep, p = (masks.values > 0).flatten(1), spec.rate  # [M, S * D]
    table = torch.tensor([[max(2 * p - 1, 0), min(p, 1 - p)], [min(p, 1 - p), max(1 - 2 * p, 0)]], dtype=torch.float64)
    pairs = torch.ones(len(keep), len(keep), dtype=torch.float64)
    for kept in keep.long().T:  # features are independent
        pairs *= table[kept[:, None], kept]
    return pairs


def pair_moments(policy: Policy, rewards: Tensor, pair_probs: Tensor) -> Moments:
    """Mean and variance of the gradient estimate of a group of two rollouts whose masks have P(m, m').

    Advantages have the mean baseline; rewards [Y], pair_probs [M, M]. Given their masks the two
    answers are independent. The joint distribution of the masks leaves the mean at (1 - 1/K) ∇J,
    K = 2: the score of a sampled answer has mean 0 under every mask, so only r_k s_k counts.
    """
    values = rewards.unique()
    given = (policy.probs.unflatten(0, (len(policy.mask_probs), -1)).T / policy.mask_probs).T  # π(y | m), [M, Y]
    scores = policy.scores.sum(1).unflatten(0, given.shape)  # [M, Y, P]
    norms = policy.score_products.sum((1, 2)).view_as(given)
    classes = torch.stack([(rewards == value).double() for value in values])  # [C, Y]
    prob = torch.einsum("my,cy->mc", given, classes)
    first = torch.einsum("my,cy,myp->mcp", given, classes, scores)  # E[s; c | m]
    second = torch.einsum("my,cy,my->mc", given, classes, norms)  # E[|s|²; c | m]
    patterns = torch.cartesian_prod(*[torch.arange(len(values))] * 2)  # [G, 2]
    mean, square = torch.zeros(first.shape[2], dtype=torch.float64), 0.0
    for (c, d), (a, b) in zip(patterns.tolist(), advantage.group_advantages(values[patterns]).tolist(), strict=True):
        left, right = pair_probs @ prob[:, d], pair_probs.T @ prob[:, c]  # [M] each
        mean += (a * left @ first[:, c] + b * right @ first[:, d]) / 2
        square += (a * a * (left @ second[:, c]) + b * b * (right @ second[:, d])) / 4
        square += a * b * ((pair_probs @ first[:, d]) * first[:, c]).sum() / 2
    return Moments(mean, float(square - mean @ mean))


def fresh_mask_moments(policy: Policy, rewards: Tensor, k: int, *, form: str) -> Moments:
    """Those of `group_moments` when the update draws a new mask m', with leave-one-out.

    form: "detached" (old log-prob is logp.detach()), "token_ratio" (old log-prob as recorded, no
    clip), "clipped" (the same, clipped to 1 ± 0.2), "sequence_ratio" (π(y|m') / π(y|m) of whole
    answers, no clip: importance sampling). Raises ValueError for another form.
    """
    if form not in FRESH_FORMS:
        raise ValueError(f"form: got {form!r}, expected one of {', '.join(FRESH_FORMS)}")
    values = rewards.unique()
    class_probs = torch.stack([policy.answer_probs[rewards == r].sum() for r in values])
    patterns = torch.cartesian_prod(*[torch.arange(len(values))] * k)  # [G, K]
    advantages = advantage.group_advantages(values[patterns], baseline="leave_one_out")
    pairs, index = torch.stack([values[patterns], advantages], -1).flatten(0, 1).unique(dim=0, return_inverse=True)
    rows = [_fresh_rollout(policy, rewards, r, a, form) for r, a in pairs.tolist()]
    first = torch.stack([mean for mean, _ in rows])[:, None]  # [C, 1, P]
    second = torch.stack([square for _, square in rows])[:, None, None]  # [C, 1, 1]
    weight = torch.full((*patterns.shape, 1), 1 / k, dtype=torch.float64)
    return _moments(class_probs[patterns].prod(1), index.view(patterns.shape), weight, first, second)


def _fresh_rollout(policy: Policy, rewards: Tensor, r: float, a: float, form: str) -> tuple[Tensor, Tensor]:
    """E[g_k] [P] and E[|g_k|²] of a rollout of reward r, advantage a, over (m, y) ~ π, m' ~ p."""
    chosen = (rewards == r).nonzero()[:, 0]  # [Y']
    logp, token_mask, scores, products, probs = (
        x.unflatten(0, (len(policy.mask_probs), -1))[:, chosen]
        for x in (policy.logp, policy.token_mask, policy.scores, policy.score_products, policy.probs)
    )  # [M, Y', ...]
    probs, mask = probs / probs.sum(), token_mask.flatten(0, 1)
    weighted, square = torch.zeros_like(logp), torch.zeros((), dtype=torch.float64)
    gain, epsilon = torch.full((len(mask),), a, dtype=torch.float64), 0.2 if form == "clipped" else float("inf")
    drawn = [(logp, probs.sum(0))] if form == "detached" else zip(logp, probs, strict=True)  # over m
    for old_logp, prob in drawn:  # [Y', T] at this m, [Y']
        new, old = logp.flatten(0, 1).requires_grad_(), old_logp.expand_as(logp).flatten(0, 1)  # [M' * Y', T]
        rows = (new, old, gain, mask)
        if form == "sequence_ratio":  # the ratio of a single token
            rows = (new.sum(1, keepdim=True), old.sum(1, keepdim=True), gain, mask[:, :1])
        value, _ = loss.grpo_loss(*rows, epsilon=epsilon, denominator=1.0)
        c = -torch.autograd.grad(value, new)[0].view_as(logp)  # token weights
        w = policy.mask_probs[:, None] * prob  # [M', Y']
        weighted += w[..., None] * c
        square += (w * torch.einsum("myt,mytu,myu->my", c, products, c)).sum()
    return torch.einsum("myt,mytp->p", weighted, scores), square


def relative_error(estimate: Tensor, target: Tensor) -> float:
    """|estimate - target| / |target|."""
    return ((estimate - target).norm() / target.norm()).item()


def direction_error(estimate: Tensor, target: Tensor) -> float:
    """Sine of the angle between two gradients: no rescaling removes it; 1 for a zero estimate."""
    if estimate.norm() == 0:
        return 1.0
    e, t = estimate / estimate.norm(), target / target.norm()
    return (e - (e @ t) * t).norm().item()


def variance_row(policy: Policy, rewards: Tensor, k: int) -> dict[str, float]:
    """Variances of estimators of expectation ∇J, the pass rate, and the bound on a constant.

    A constant baseline b lowers the variance iff 0 < b < bound = 2 E[r |s|²] / E[|s|²].
    """
    pass_rate = (policy.answer_probs @ rewards).item()
    norms = policy.score_products.sum((1, 2)) * policy.probs  # p |s|², [N]
    return {
        "pass_rate": pass_rate,
        "none": group_moments(policy, rewards, k, baseline="none").variance,
        "leave_one_out": group_moments(policy, rewards, k, baseline="leave_one_out").variance,
        "mean_rescaled": group_moments(policy, rewards, k, baseline="mean").variance * (k / (k - 1)) ** 2,
        "constant": group_moments(policy, rewards - pass_rate, k, baseline="none").variance,
        "bound": (2 * (norms @ rewards.repeat(len(policy.mask_probs))) / norms.sum()).item(),
    }


def crossover(k: int) -> float:
    """The pass rate of `one_logit` above which leave-one-out has more variance than no baseline.

    It is 2(K - 2) / (3K - 5): 0 at K = 2 (always more), towards 2/3 for large K.
    """

    def excess(rate):
        row = variance_row(one_logit(rate), ONE_LOGIT_REWARDS, k)
        return row["leave_one_out"] - row["none"]

    return 0.0 if excess(0.01) > 0 else brentq(excess, 0.01, 0.99, xtol=1e-6)


def bias_table(model: LatentReasoner, problem: Problem, spec: MaskSpec, rewards: Tensor, k: int) -> list[dict]:
    """One row per estimator: bias |E[g] - ∇J| / |∇J|, direction error, variance of a group."""
    policy, gradient = enumerate_policy(model, problem, spec), true_gradient(model, problem, spec, rewards)
    greedy = greedy_policy(model, problem, spec, policy)
    moments = {
        "no baseline": group_moments(policy, rewards, k, baseline="none"),
        "mean": group_moments(policy, rewards, k, baseline="mean"),
        "leave-one-out": group_moments(policy, rewards, k, baseline="leave_one_out"),
        "mean / std": group_moments(policy, rewards, k, baseline="mean", scale="group"),
        **{f"fresh mask, {form}": fresh_mask_moments(policy, rewards, k, form=form) for form in FRESH_FORMS},
        "greedy answers": group_moments(greedy, rewards, k, baseline="leave_one_out"),
    }
    return [
        {"estimator": name, "bias": relative_error(m.mean, gradient)}
        | {"direction_error": direction_error(m.mean, gradient), "variance": m.variance}
        for name, m in moments.items()
    ]


def monte_carlo(
    model: LatentReasoner,
    problem: Problem,
    spec: MaskSpec,
    rewards: Tensor,
    *,
    num_generations: int,
    groups: int,
    repeats: int,
    run_seed: int,
    baseline: str,
) -> dict[str, float]:
    """E[g] by sampling, as training does: rollout, advantages, score, loss, backward.

    Each of `repeats` batches has `groups` groups. Returns the share of ∇J in the estimate,
    g · ∇J / |∇J|² (1 for an unbiased estimator), its standard error, and the number of rollouts.
    """
    gradient = true_gradient(model, problem, spec, rewards)
    count, shares = groups * num_generations, torch.empty(repeats, dtype=torch.float64)
    for step in range(repeats):
        out = rollout(
            model, [problem], num_generations=count, masks=spec, temperature=1.0, run_seed=run_seed, step=step
        )
        r = rewards[answer_index(model, out)].view(groups, num_generations)
        a = advantage.group_advantages(r, baseline=baseline).flatten()
        logp = model.score(out, masks=out.masks)
        value, _ = loss.grpo_loss(logp, out.logp, a, out.token_mask, max_completion_length=1)
        g = -torch.cat([x.flatten() for x in torch.autograd.grad(value, list(model.parameters()))])
        shares[step] = (g @ gradient) / (gradient @ gradient)
    error = shares.std() / repeats**0.5
    return {"share": shares.mean().item(), "standard_error": error.item(), "rollouts": repeats * count}
