"""The rows of `latentlab verify` that hold by proof, enumerated on the example of enumeration.py.

    E[(1/K) Σ_k A_k s_k] = c ∇J       c = 1 (no baseline, leave-one-out), 1 - 1/K (mean)

Each function returns one Property. Where a theorem's condition is broken on purpose, the value must
reach the bound (`at_least`): a check that cannot see a bias would check nothing. Maxima and minima
are NumPy's, which keep a NaN.
Sources: arXiv 2606.10184 (masks), 2402.03300 (GRPO), 2503.20783 (Dr. GRPO), 2402.14740 (RLOO)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from latentlab.advantage import STD_EPSILON
from latentlab.masks import MaskSpec, draw_masks, rollout_seeds
from latentlab.model import token_logps
from latentlab.theory import enumeration, moments
from latentlab.theory.enumeration import SPEC, Example
from latentlab.theory.moments import direction_error, group_moments, relative_error

EXACT = 1e-10  # relative, for enumerated sums


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


EXPECTATIONS: dict[str, tuple[str, Callable[[int], float], str]] = {  # baseline, c(K), note
    "score_function": ("none", lambda k: 1, "E[r s] = ∇J on {pairs} (mask, answer) pairs"),
    "mean_baseline": ("mean", lambda k: 1 - 1 / k, "E[g] = (1 - 1/K) ∇J, K = 2, 4, 8"),
    "leave_one_out": ("leave_one_out", lambda k: 1, "E[g] = ∇J, K = 2, 4, 8"),
}


def expectation(name: str, x: Example) -> Property:
    """E[g] = c(K) ∇J for one row of EXPECTATIONS, on both problems, K = 2, 4, 8."""
    baseline, c, note = EXPECTATIONS[name]
    errors = [
        relative_error(group_moments(policy, rewards, k, baseline=baseline).mean, c(k) * gradient)
        for policy, rewards, gradient in zip(x.policies, x.rewards, x.gradients, strict=True)
        for k in (2, 4, 8)
    ]
    return judge(name, np.max(errors), EXACT, note.format(pairs=len(x.policies[0].probs)))


def std_factor(k: int, p: float) -> float:
    """c_K(p), by which dividing by the group's standard deviation scales ∇J; 0/1 rewards, pass rate p.

    c_K(p) = Σ_j C(K-1, j) p^j (1-p)^(K-1-j) [A(1 | j+1 right) - A(0 | j right)],
    A(r | n right) = (r - n/K) / (σ_n + ε), σ_n² = n (K - n) / (K (K - 1)).
    """

    def a(r: int, n: int) -> float:
        return 0.0 if n in (0, k) else (r - n / k) / (math.sqrt(n * (k - n) / (k * (k - 1))) + STD_EPSILON)

    return sum(math.comb(k - 1, j) * p**j * (1 - p) ** (k - 1 - j) * (a(1, j + 1) - a(0, j)) for j in range(k))


def std_scaling(x: Example) -> Property:
    """One problem: ∇J times c_K(pass rate). Two problems of different pass rates: the sum turns."""
    k, pairs = 8, list(zip(x.policies, x.rewards, strict=True))
    rates = [(policy.answer_probs @ rewards).item() for policy, rewards in pairs]
    factors = [std_factor(k, rate) for rate in rates]
    means = [group_moments(policy, rewards, k, scale="group").mean for policy, rewards in pairs]
    error = np.max([relative_error(m, c * g) for m, c, g in zip(means, factors, x.gradients, strict=True)])
    turn = direction_error(torch.stack(means).sum(0), torch.stack(x.gradients).sum(0))
    note = (
        f"E[g] = c ∇J, c = {factors[0]:.3f}, {factors[1]:.3f} at pass rates {rates[0]:.2f}, {rates[1]:.2f}; "
        f"the sum of both problems turns by {math.degrees(math.asin(min(1.0, turn))):.1f}°"
    )
    return judge("std_scaling", error, EXACT, note, also=turn > 1e-3)


def fresh_mask(x: Example) -> Property:
    """A new mask in the update: only the sequence ratio is unbiased, and it has more variance."""
    policy, rewards = x.policies[0], x.rewards[0]
    found = {form: moments.fresh_mask_moments(policy, rewards, 2, form=form) for form in moments.FRESH_FORMS}
    replay = group_moments(policy, rewards, 2, baseline="leave_one_out").variance
    bias = {form: relative_error(m.mean, x.gradients[0]) for form, m in found.items()}
    also = np.min([bias[form] for form in moments.FRESH_FORMS[:3]]) > 1e-3 and found["sequence_ratio"].variance > replay
    note = "sequence ratio; bias (variance / replay): " + ", ".join(
        f"{form} {bias[form]:.2g} ({m.variance / replay:.2f})" for form, m in found.items()
    )
    return judge("fresh_mask", bias["sequence_ratio"], EXACT, note, also=also)


def greedy(x: Example) -> Property:
    """Greedy answers under masks: log π of an argmax is no score function; a bias must show."""
    policy = enumeration.greedy_policy(x.model, x.problems[0], SPEC, x.policies[0])
    mean = group_moments(policy, x.rewards[0], 8, baseline="leave_one_out").mean
    turn = direction_error(mean, x.gradients[0])
    note = f"bias |E[g] - ∇J| / |∇J| of argmax answers (a heuristic); sine of the angle to ∇J {turn:.2f}"
    return judge("greedy", relative_error(mean, x.gradients[0]), 1e-3, note, at_least=True)


def loss_types(x: Example) -> Property:
    """dr_grpo has the direction of ∇J; grpo and dapo have another one (cispo here has that of dapo)."""
    policy, rewards, gradient = x.policies[0], x.rewards[0], x.gradients[0]
    settings = {"baseline": "leave_one_out", "by_length": True}
    means = {
        name: group_moments(policy, rewards, 4, loss_type=name, **settings).mean for name in ("dr_grpo", "grpo", "dapo")
    }
    turns = {name: direction_error(mean, gradient) for name, mean in means.items()}
    note = "dr_grpo; sine of the angle to ∇J: " + ", ".join(f"{name} {turn:.2g}" for name, turn in turns.items())
    biased = np.min([turn for name, turn in turns.items() if name != "dr_grpo"]) > 1e-3
    error = relative_error(means["dr_grpo"], gradient)
    return judge("loss_types", error, EXACT, note, also=biased)


def latent_gradient(x: Example) -> Property:
    """∇ log π through all thoughts equals central differences; every thought contributes."""
    model = enumeration.tiny_reasoner(num_thoughts=3)
    masks = draw_masks(SPEC, model, rollout_seeds(0, 0, [x.problems[0].id], 8))
    assert masks is not None
    rows = enumeration.enumerated_rollouts(model, x.problems[0], masks)
    full = torch.autograd.grad(model.score(rows, masks=rows.masks).sum(), list(model.parameters()))
    errors = [_difference_error(model, rows, n, gradient) for n, gradient in enumerate(full)]
    cut = [_change_when_detached(model, rows, full, thought) for thought in range(1, model.num_thoughts + 1)]
    note = "against central differences; cutting thought 1, 2, 3 changes it by " + ", ".join(f"{c:.2g}" for c in cut)
    return judge("latent_gradient", np.max(errors), 1e-6, note, also=np.min(cut) > 1e-6)


@torch.no_grad()
def _difference_error(model, rows, n: int, gradient: torch.Tensor) -> float:
    """Relative error of the derivative along a random direction of the n-th weight tensor."""
    weight, h, values = list(model.parameters())[n], 1e-5, []
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(n), dtype=weight.dtype)
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
    k, rates = 8, [tenth / 10 for tenth in range(1, 10)]
    cases = [(enumeration.one_logit(rate), moments.ONE_LOGIT_REWARDS) for rate in rates]
    cases += [(x.policies[0], enumeration.reward_table(x.policies[0], rate)) for rate in rates]
    wrong, ratio = 0, []
    for policy, rewards in cases:
        row = moments.variance_row(policy, rewards, k)
        ratio.append(row["leave_one_out"] / row["none"])  # the first nine: one logit
        variances = {row["pass_rate"]: row["constant"]}
        for b in (0.95 * row["bound"], 1.05 * row["bound"]):
            variances[b] = group_moments(policy, rewards - b, k, baseline="none").variance
        wrong += sum((b < row["bound"]) != (variance < row["none"]) for b, variance in variances.items())
        wrong += not math.isclose(row["leave_one_out"], row["mean_rescaled"], rel_tol=1e-9)
    measured = moments.crossover(k)
    note = (
        f"wrong signs in {len(cases)} rows; one logit, K = 8: leave-one-out / none {ratio[2]:.2f} at pass rate 0.3, "
        f"{ratio[6]:.2f} at 0.7, 1 at {measured:.4f} = 2(K-2)/(3K-5)"
    )
    return judge("baseline_variance", wrong, 0, note, also=abs(2 * (k - 2) / (3 * k - 5) - measured) < 1e-5)


NOISES = {
    "gaussian": MaskSpec(rate=0.5, sites=("embedding",), noise="gaussian"),
    "per_step": MaskSpec("per_step", 0.3),
    "per_step gaussian": MaskSpec("per_step", 0.5, ("embedding",), noise="gaussian"),
}


def other_noise(x: Example) -> Property:
    """Noise that cannot be enumerated, on a finite set of its draws: E[r s] = ∇J, leave-one-out included."""
    errors, rewards = {}, x.rewards[0]
    for name, spec in NOISES.items():
        space = enumeration.noise_set(x.model, spec, 64)
        policy = enumeration.enumerate_policy(x.model, x.problems[0], spec, space)
        gradient = enumeration.true_gradient(x.model, x.problems[0], spec, rewards, space)
        found = [
            group_moments(policy, rewards, k, baseline=baseline).mean
            for k, baseline in ((2, "none"), (4, "leave_one_out"))
        ]
        errors[name] = np.max([relative_error(mean, gradient) for mean in found])
    return judge(
        "other_noise", np.max(list(errors.values())), EXACT, f"E[g] = ∇J on 64 draws each of {', '.join(errors)}"
    )


def antithetic(x: Example) -> Property:
    """Antithetic pairs of masks: (1 - 1/K) ∇J like independent ones, K = 2, and another variance."""
    errors, ratios = [], []
    for policy, rewards, gradient in zip(x.policies, x.rewards, x.gradients, strict=True):
        pairs = {"independent": torch.outer(policy.mask_probs, policy.mask_probs)}
        pairs["antithetic"] = moments.antithetic_probs(x.model, SPEC)
        found = {name: moments.pair_moments(policy, rewards, probs) for name, probs in pairs.items()}
        errors += [relative_error(m.mean, gradient / 2) for m in found.values()]
        known = group_moments(policy, rewards, 2)
        errors.append(abs(found["independent"].variance / known.variance - 1))
        ratios.append(found["antithetic"].variance / found["independent"].variance)
    note = f"E[g] = ∇J / 2; variance, antithetic / independent: {', '.join(f'{r:.4f}' for r in ratios)}"
    return judge("antithetic", np.max(errors), EXACT, note)


PROOFS: dict[str, Callable[[Example], Property]] = {name: partial(expectation, name) for name in EXPECTATIONS}
PROOFS |= {f.__name__: f for f in (std_scaling, fresh_mask, greedy, loss_types, latent_gradient)}
PROOFS |= {f.__name__: f for f in (baseline_variance, other_noise, antithetic)}
