"""The rows of `latentlab verify` that hold by proof, enumerated on the example of enumeration.py.

    E[(1/K) Σ_k A_k s_k] = c ∇J       c = 1 (no baseline, leave-one-out), 1 - 1/K (mean)

Each function returns one Property. Where a theorem's condition is broken on purpose, the value must
reach the bound (`at_least`): a check that cannot see a bias would check nothing.
Sources: arXiv 2606.10184 (masks), 2402.03300 (GRPO), 2503.20783 (Dr. GRPO), 2402.14740 (RLOO)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from latentlab.masks import draw_masks, rollout_seeds
from latentlab.model import token_logps
from latentlab.theory import enumeration, moments
from latentlab.theory.enumeration import SPEC, Example
from latentlab.theory.moments import direction_error, group_moments, relative_error

EXACT = 1e-10  # relative, for enumerated sums
SIZES = (2, 4, 8)  # K


@dataclass(frozen=True)
class Property:
    """One row of the table: `value` must not exceed `bound`, or must reach it where `at_least`."""

    name: str
    value: float
    bound: float
    ok: bool
    note: str = ""
    at_least: bool = False


def judge(name: str, value: float, bound: float, note: str = "", *, at_least=False, also: bool = True) -> Property:
    """A Property, ok if the value keeps the bound and the condition `also` holds; NaN never is."""
    ok = value >= bound if at_least else value <= bound
    return Property(name, float(value), float(bound), bool(ok and also), note, at_least)


def score_function(x: Example) -> Property:
    """E[r s] = ∇J: no baseline."""
    note = f"E[r s] = ∇J on {len(x.policies[0].probs)} (mask, answer) pairs"
    return judge("score_function", _largest_bias(x, "none", lambda k: 1.0), EXACT, note)


def mean_baseline(x: Example) -> Property:
    """E[(1/K) Σ (r_k - r̄) s_k] = (1 - 1/K) ∇J."""
    error = _largest_bias(x, "mean", lambda k: 1 - 1 / k)
    return judge("mean_baseline", error, EXACT, "E[g] = (1 - 1/K) ∇J, K = 2, 4, 8")


def leave_one_out(x: Example) -> Property:
    """With the mean of the others as baseline the expectation is ∇J."""
    return judge("leave_one_out", _largest_bias(x, "leave_one_out", lambda k: 1.0), EXACT, "E[g] = ∇J, K = 2, 4, 8")


def _largest_bias(x: Example, baseline: str, factor) -> float:
    """Largest relative error of E[g] against factor(K) ∇J."""
    return max(
        relative_error(group_moments(policy, rewards, k, baseline=baseline).mean, factor(k) * gradient)
        for policy, rewards, gradient in zip(x.policies, x.rewards, x.gradients, strict=True)
        for k in SIZES
    )


def std_factor(k: int, pass_rate: float, epsilon: float = 1e-4) -> float:
    """c_K(p), by which dividing by the group's standard deviation scales ∇J; 0/1 rewards.

    c_K(p) = Σ_j C(K-1, j) p^j (1-p)^(K-1-j) [A(1 | j+1 right) - A(0 | j right)],
    A(r | n right) = (r - n/K) / (σ_n + ε), σ_n² = n (K - n) / (K (K - 1)).
    """

    def a(r: int, n: int) -> float:
        return 0.0 if n in (0, k) else (r - n / k) / (math.sqrt(n * (k - n) / (k * (k - 1))) + epsilon)

    p = pass_rate
    return sum(math.comb(k - 1, j) * p**j * (1 - p) ** (k - 1 - j) * (a(1, j + 1) - a(0, j)) for j in range(k))


def std_scaling(x: Example) -> Property:
    """One problem: ∇J times c_K(pass rate). Two problems of different pass rates: the sum turns."""
    k, rows = 8, list(zip(x.policies, x.rewards, x.gradients, strict=True))
    rates = [(policy.answer_probs @ rewards).item() for policy, rewards, _ in rows]
    factors = [std_factor(k, rate) for rate in rates]
    means = torch.stack([group_moments(policy, rewards, k, scale="std").mean for policy, rewards, _ in rows])
    error = max(relative_error(m, c * g) for m, c, (_, _, g) in zip(means, factors, rows, strict=True))
    turn = direction_error(means.sum(0), torch.stack(x.gradients).sum(0))
    note = (
        f"E[g] = c ∇J, c = {factors[0]:.3f}, {factors[1]:.3f} at pass rates {rates[0]:.2f}, {rates[1]:.2f}; "
        f"the sum of both problems turns by {math.degrees(math.asin(min(1.0, turn))):.1f}°"
    )
    return judge("std_scaling", error, EXACT, note, also=turn > 1e-3)


def fresh_mask(x: Example) -> Property:
    """A new mask in the update: only the sequence ratio is unbiased, and it has more variance."""
    policy, rewards, gradient = x.policies[0], x.rewards[0], x.gradients[0]
    found = {form: moments.fresh_mask_moments(policy, rewards, 2, form=form) for form in moments.FRESH_FORMS}
    replay = group_moments(policy, rewards, 2, baseline="leave_one_out").variance
    bias = {form: relative_error(m.mean, gradient) for form, m in found.items()}
    biased = all(bias[form] > 1e-3 for form in moments.FRESH_FORMS[:3])
    costly = found["sequence_ratio"].variance > replay
    note = "sequence ratio; bias (variance / replay): " + ", ".join(
        f"{form} {bias[form]:.2g} ({found[form].variance / replay:.2f})" for form in moments.FRESH_FORMS
    )
    return judge("fresh_mask", bias["sequence_ratio"], EXACT, note, also=biased and costly)


def greedy(x: Example) -> Property:
    """Greedy answers under masks: log π of an argmax is no score function; a bias must show."""
    probs = enumeration.greedy_probs(x.model, x.problems[0], SPEC)
    m = group_moments(x.policies[0], x.rewards[0], 8, baseline="leave_one_out", probs=probs)
    turn = direction_error(m.mean, x.gradients[0])
    note = f"bias |E[g] - ∇J| / |∇J| of argmax answers (a heuristic); sine of the angle to ∇J {turn:.2f}"
    return judge("greedy", relative_error(m.mean, x.gradients[0]), 1e-3, note, at_least=True)


def loss_types(x: Example) -> Property:
    """dr_grpo has the direction of ∇J; grpo, bnpo and dapo have another one."""
    means = {
        name: group_moments(
            x.policies[0], x.rewards[0], 4, baseline="leave_one_out", loss_type=name, by_length=True
        ).mean
        for name in ("dr_grpo", "grpo", "bnpo", "dapo")
    }
    turns = {name: direction_error(mean, x.gradients[0]) for name, mean in means.items()}
    note = "dr_grpo; sine of the angle to ∇J: " + ", ".join(f"{name} {turn:.2g}" for name, turn in turns.items())
    biased = min(turns[name] for name in ("grpo", "bnpo", "dapo")) > 1e-3
    error = relative_error(means["dr_grpo"], x.gradients[0])
    return judge("loss_types", error, EXACT, note + " (one batch: dapo is bnpo)", also=biased)


def latent_gradient(x: Example) -> Property:
    """∇ log π through all thoughts equals central differences; every thought contributes."""
    model = enumeration.tiny_reasoner(num_thoughts=3)
    masks = draw_masks(SPEC, model, rollout_seeds(0, 0, [x.problems[0].id], 8))
    assert masks is not None
    rows = enumeration.enumerated_rollouts(model, x.problems[0], masks)
    weights = list(model.parameters())
    full = torch.autograd.grad(model.score(rows, masks=rows.masks).sum(), weights)
    errors = [_difference_error(model, rows, w, g, n) for n, (w, g) in enumerate(zip(weights, full, strict=True))]
    cut = [_change_when_detached(model, rows, full, thought) for thought in range(1, model.num_thoughts + 1)]
    note = "against central differences; cutting thought 1, 2, 3 changes it by " + ", ".join(f"{c:.2g}" for c in cut)
    return judge("latent_gradient", max(errors), 1e-6, note, also=min(cut) > 1e-6)


def _difference_error(model, rows, weight, gradient, n: int, h: float = 1e-5) -> float:
    """Relative error of the derivative along a random direction of one weight tensor."""
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(n), dtype=weight.dtype)
    values = []
    with torch.no_grad():
        for shift in (h, -2 * h, h):
            weight.add_(shift * direction)
            values.append(model.score(rows, masks=rows.masks).sum().item())
    slope = (values[0] - values[1]) / (2 * h)
    return abs(slope - (gradient * direction).sum().item()) / max(1.0, abs(slope))


def _change_when_detached(model, rows, full, thought: int) -> float:
    """Relative change of the gradient when thought `thought` is fed back without gradient."""
    state = model.prefix(rows.prompt_ids, rows.prompt_valid, num_generations=rows.num_generations, masks=rows.masks)
    model.think(state, edit=lambda i, z: z.detach() if i == thought else z)
    logp = token_logps(model.head(model.answer(state, rows.tokens[:, :-1])), rows.tokens, 1.0) * rows.token_mask
    cut = torch.autograd.grad(logp.sum(), list(model.parameters()))
    return relative_error(*(torch.cat([g.flatten() for g in gradients]) for gradients in (cut, full)))


def baseline_variance(x: Example) -> Property:
    """0 < b < 2 E[r|s|²] / E[|s|²] predicts whether a constant baseline b lowers the variance."""
    k, wrong, rows, rates = 8, 0, [], [tenth / 10 for tenth in range(1, 10)]
    cases = [(enumeration.one_logit(rate), moments.ONE_LOGIT_REWARDS) for rate in rates]
    cases += [(x.policies[0], enumeration.reward_table(x.policies[0], rate)) for rate in rates]
    for policy, rewards in cases:
        row = moments.variance_row(policy, rewards, k)
        rows.append(row)
        variances = {row["pass_rate"]: row["constant"]}
        for b in (0.95 * row["bound"], 1.05 * row["bound"]):
            variances[b] = group_moments(policy, rewards - b, k, baseline="none").variance
        wrong += sum((b < row["bound"]) != (variance < row["none"]) for b, variance in variances.items())
        wrong += not math.isclose(row["leave_one_out"], row["mean_rescaled"], rel_tol=1e-9)
    ratio = [row["leave_one_out"] / row["none"] for row in rows]  # the first nine: one logit
    closed, measured = 2 * (k - 2) / (3 * k - 5), moments.crossover(k)
    note = (
        f"wrong signs in {len(rows)} rows; one logit, K = 8: leave-one-out / none {ratio[2]:.2f} at pass rate 0.3, "
        f"{ratio[6]:.2f} at 0.7, 1 at {measured:.4f} = 2(K-2)/(3K-5)"
    )
    return judge("baseline_variance", wrong, 0, note, also=abs(closed - measured) < 1e-5)


PROOFS = {f.__name__: f for f in (score_function, mean_baseline, leave_one_out, std_scaling, fresh_mask)}
PROOFS |= {f.__name__: f for f in (greedy, loss_types, latent_gradient, baseline_variance)}
