"""Exact expectations and variances on a policy small enough to enumerate: every mask, every answer, float64.

    J(θ)    = Σ_m p(m) Σ_y π_θ(y|x,m) r(y)           ∇J by autograd, from the probabilities themselves
    s_t     = ∇ log π_θ(y_t | x, m, y_<t)            from `LatentReasoner.score`, for each (m, y); s = Σ_t s_t
    g       = Σ_k Σ_t a_kt s_t(m_k, y_k)             one group's gradient, a_kt = -∂ grpo_loss / ∂ logp_kt
    E[g]    = Σ_c P(c_1) ... P(c_K) Σ_k Σ_t a_kt E[s_t | c_k]
    E[|g|²] = Σ_c P(c_1) ... P(c_K) { Σ_k a_k' E[s s' | c_k] a_k  +  Σ_{k≠l} (a_k E[s | c_k]) · (a_l E[s | c_l]) }

The rollouts of a group are independent given the problem and a_k depends on a rollout through its reward (and, for some
loss types, its length) alone. So a group is enumerated as its 2^K reward patterns c; within a class only E[s_t | c] and
the products E[s_t · s_u | c] matter. Advantages come from `group_advantages`, a_kt from differentiating `grpo_loss`, s_t
from `score`: the functions that training calls. The loss dr_grpo divides by K * T; g is reported times T (T: the answer's
length limit), which makes it (1/K) Σ_k A_k s_k.

Source: method.md's statements follow Williams (1992) for the score function and Kool et al. (2019) for leave-one-out.
Letters: M masks, Y answers, N = M * Y rows m * Y + y, T tokens, P parameters, C classes, G patterns, K rollouts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentlab import advantage, loss
from latentlab.backbone import build
from latentlab.masks import Masks, MaskSpec
from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.rollout import Rollouts, encode_prompts, rollout

SPEC = MaskSpec(rate=0.3)  # of the worked example: with `tiny_reasoner` 2 sites x 4 features, 256 masks
FRESH_FORMS = ("detached", "token_ratio", "clipped", "sequence_ratio")


@dataclass(frozen=True)
class Policy:
    """An enumerated policy: probs [N] of (mask, answer), mask_probs [M], logp [N, T], token_mask [N, T], scores [N, T, P]."""

    probs: torch.Tensor
    mask_probs: torch.Tensor
    logp: torch.Tensor
    token_mask: torch.Tensor
    scores: torch.Tensor

    @property
    def answer_probs(self) -> torch.Tensor:
        """[Y] the mask average π̄(y|x) = Σ_m p(m) π(y|x,m)."""
        return self.probs.view(len(self.mask_probs), -1).sum(0)

    @property
    def products(self) -> torch.Tensor:
        """[N, T, T] s_t · s_u of each row."""
        return torch.einsum("ntp,nup->ntu", self.scores, self.scores)


@dataclass(frozen=True)
class Moments:
    """Of a gradient estimator: mean [P] and variance, the trace of its covariance."""

    mean: torch.Tensor
    variance: float


# -- the policies ---------------------------------------------------------------------------------------------------


def tiny_reasoner(*, seed: int = 26, num_thoughts: int = 2) -> LatentReasoner:
    """A float64 GPT-2 of 324 weights, 6 tokens and answers of at most 2 tokens; large weights, so that masks matter.

    The default seed is one of those under which masks change greedy answers, so that every bias is large enough to see.
    """
    model = build(
        ("1",), n_layer=1, n_embd=4, n_head=2, n_positions=12, num_thoughts=num_thoughts, max_new_tokens=2, seed=seed
    ).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(25)  # GPT-2's 0.02 becomes 0.5
    return model


def tiny_problem(ones: int = 1) -> Problem:
    """A question of `ones` times the token "1"."""
    return Problem(f"ones-{ones}", " ".join("1" * ones), (), "1", "theory")


def mask_space(model: LatentReasoner, spec: MaskSpec, *, bits: int = 8) -> tuple[Masks, torch.Tensor]:
    """All 2^bits masks over equal blocks of features and their probabilities: Masks [M, S, D], p [M].

    With bits = S * D (8 in `tiny_reasoner`) this is the whole distribution that `draw_masks` draws from.
    """
    shape = (model.num_sites(spec.sites), model.width)
    block, rest = divmod(shape[0] * shape[1], bits)
    if rest:
        raise ValueError(f"bits: got {bits}, expected a divisor of {shape[0]} sites x {shape[1]} features")
    keep = torch.tensor(list(itertools.product((0.0, 1.0), repeat=bits)), dtype=torch.float64)  # [M, bits]
    probs = (keep * (1 - spec.rate) + (1 - keep) * spec.rate).prod(1)
    values = keep.repeat_interleave(block, 1).view(-1, *shape) / (1 - spec.rate)
    return Masks(values.to(model.dtype), spec), probs


def answer_space(model: LatentReasoner) -> tuple[torch.Tensor, torch.Tensor]:
    """Every answer: those that end in eos, and those cut at the limit. Tokens [Y, T] padded with eos, token_mask [Y, T]."""
    others = [i for i in range(len(model.tokenizer)) if i != model.eos_id]
    limit, rows = model.max_new_tokens, []
    for length in range(1, limit + 1):
        last = [model.eos_id] if length < limit else [model.eos_id, *others]
        rows += [list(row) for row in itertools.product(*[others] * (length - 1), last)]
    tokens = torch.tensor([row + [model.eos_id] * (limit - len(row)) for row in rows])
    return tokens, torch.tensor([[t < len(row) for t in range(limit)] for row in rows])


def enumerated_rollouts(model: LatentReasoner, problem: Problem, masks: Masks) -> Rollouts:
    """Every answer under every mask as one group of N rollouts, for `score`."""
    tokens, token_mask = answer_space(model)
    prompt_ids, prompt_valid = encode_prompts(model.tokenizer, [problem], model.device)
    count, nothing = len(masks.values), torch.empty(0)
    return Rollouts(
        problems=(problem,), num_generations=count * len(tokens), prompt_ids=prompt_ids, prompt_valid=prompt_valid,
        tokens=tokens.repeat(count, 1), token_mask=token_mask.repeat(count, 1), logp=nothing, thoughts=nothing,
        seeds=nothing, temperature=1.0, text=(), masks=Masks(masks.values.repeat_interleave(len(tokens), 0), masks.spec),
    )  # fmt: skip


def enumerate_policy(model: LatentReasoner, problem: Problem, spec: MaskSpec, *, bits: int = 8) -> Policy:
    """The policy of `model` on `problem` with every mask and answer; ValueError if probabilities do not sum to 1."""
    masks, mask_probs = mask_space(model, spec, bits=bits)
    rows = enumerated_rollouts(model, problem, masks)
    with torch.no_grad():
        logp = model.score(rows, masks=rows.masks)
    probs = mask_probs.repeat_interleave(len(logp) // len(mask_probs)) * logp.sum(1).exp()
    if not abs(probs.sum().item() - 1) < 1e-12:
        raise ValueError(f"probabilities: got a sum of {probs.sum().item()}, expected 1; score or answer_space is wrong")
    return Policy(probs, mask_probs, logp, rows.token_mask, row_scores(model, rows))


def row_scores(model: LatentReasoner, rows: Rollouts) -> torch.Tensor:
    """s_t of each row by differentiating `model.score`: [N, T, P]."""
    weights = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    scorer = _RowScorer(model, rows)

    def jacobian(weights, tokens, token_mask, values):
        return functional_call(scorer, weights, (tokens, token_mask, values))

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no rule for vmap
        parts = vmap(jacrev(jacobian), in_dims=(None, 0, 0, 0), chunk_size=2048)(
            weights, rows.tokens, rows.token_mask, rows.masks.values
        )
    return torch.cat([part.flatten(2) for part in parts.values()], 2)


class _RowScorer(torch.nn.Module):
    """`model.score` of a single row, as a module that `functional_call` can give other weights."""

    def __init__(self, model: LatentReasoner, rows: Rollouts):
        super().__init__()
        self.model, self.rows = model, rows

    def forward(self, tokens, token_mask, values):
        row = Rollouts(**{**vars(self.rows), "num_generations": 1, "tokens": tokens[None], "token_mask": token_mask[None]})
        return self.model.score(row, masks=Masks(values[None], self.rows.masks.spec))[0]


def one_logit(pass_rate: float) -> Policy:
    """The smallest policy: π(right) = σ(θ) = pass_rate, two answers (right, wrong) of one token, no mask."""
    theta = torch.tensor(pass_rate, dtype=torch.float64).logit()

    def logp(theta):
        return torch.log_softmax(torch.stack([theta, torch.zeros_like(theta)]), 0)

    ones = torch.ones(2, 1, dtype=torch.bool)
    return Policy(logp(theta).exp(), torch.ones(1).double(), logp(theta)[:, None], ones, jacrev(logp)(theta).view(2, 1, 1))


def reward_table(policy: Policy, pass_rate: float) -> torch.Tensor:
    """0/1 rewards [Y] whose right answers have about `pass_rate` probability.

    Taken while they fit: the likeliest answer, the third, the fifth, ..., then the second, the fourth, ...
    """
    rewards = torch.zeros(len(policy.answer_probs), dtype=torch.float64)
    left, order = pass_rate, policy.answer_probs.argsort(descending=True).tolist()
    for y in order[::2] + order[1::2]:
        if policy.answer_probs[y] <= left + 1e-9:
            rewards[y], left = 1.0, left - policy.answer_probs[y].item()
    return rewards


def objective(model: LatentReasoner, problem: Problem, spec: MaskSpec, rewards: torch.Tensor, *, bits: int = 8):
    """J (a float) and ∇J [P]: probabilities, not log-probs, are differentiated. rewards: [Y]."""
    masks, mask_probs = mask_space(model, spec, bits=bits)
    rows = enumerated_rollouts(model, problem, masks)
    answer_probs = model.score(rows, masks=rows.masks).sum(1).exp().view(len(mask_probs), -1)  # [M, Y]
    value = mask_probs @ (answer_probs @ rewards)
    return value.item(), torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


# -- the estimators -------------------------------------------------------------------------------------------------


def row_weights(rewards: torch.Tensor, lengths: torch.Tensor, limit: int, *, baseline: str, scale: str, loss_type: str):
    """a_kt of G groups: rewards [G, K], lengths [G, K] -> [G, K, T], by differentiating `grpo_loss` at ratio 1."""
    advantages = advantage.group_advantages(rewards, baseline=baseline, scale=scale)
    token_mask = torch.arange(limit) < lengths[..., None]  # [G, K, T]
    logp = torch.zeros(token_mask.shape, dtype=torch.float64, requires_grad=True)
    total = sum(
        loss.grpo_loss(lp, lp.detach(), a, mask, loss_type=loss_type, max_completion_length=limit)[0]
        for lp, a, mask in zip(logp, advantages, token_mask, strict=True)
    )
    return -limit * torch.autograd.grad(total, logp)[0]


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

    rewards: [Y]; `constant` is subtracted from them (a constant baseline, with baseline="none"); `probs` [N] replaces the
    policy's probabilities (greedy answers); `by_length` tells answers of different length apart, which loss types other
    than dr_grpo need.
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
    """E[g] and the trace of its covariance from pattern probabilities [G], classes [G, K] and row weights a [G, K, T]."""
    cross = torch.einsum("ctp,dup->cdtu", first, first)  # E[s_t | c] · E[s_u | d]
    rows = torch.einsum("gkt,gktp->gkp", a, first[patterns])  # [G, K, P]
    mean = torch.einsum("g,gkp->p", prob, rows)
    between = rows.sum(1).square().sum(1) - torch.einsum("gkt,gktu,gku->g", a, cross[patterns, patterns], a)
    within = torch.einsum("gkt,gktu,gku->g", a, second[patterns], a)
    return Moments(mean, (prob @ (within + between) - mean @ mean).item())


def greedy_probs(model: LatentReasoner, problem: Problem, spec: MaskSpec, *, bits: int = 8) -> torch.Tensor:
    """Probabilities [N] when each mask answers with its argmax: p(m) at that answer, 0 elsewhere."""
    masks, mask_probs = mask_space(model, spec, bits=bits)
    out = rollout(model, [problem], num_generations=len(mask_probs), masks=masks, temperature=0.0, run_seed=0, step=0)
    return torch.nn.functional.one_hot(answer_index(model, out), len(answer_space(model)[0])).mul(mask_probs[:, None]).flatten()


def answer_index(model: LatentReasoner, out: Rollouts) -> torch.Tensor:
    """Which row of `answer_space` each rollout's answer is: [R]."""
    padding = (0, model.max_new_tokens - out.tokens.shape[1])
    tokens = torch.nn.functional.pad(out.tokens, padding, value=model.eos_id)
    return (tokens[:, None] == answer_space(model)[0]).all(2).long().argmax(1)


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
    count, limit = len(policy.mask_probs), policy.logp.shape[1]
    chosen = (rewards == r).nonzero()[:, 0]  # [Y']
    logp, token_mask, scores, products, probs = (
        x.unflatten(0, (count, -1))[:, chosen]
        for x in (policy.logp, policy.token_mask, policy.scores, policy.products, policy.probs)
    )  # [M, Y', ...]
    probs = probs / probs.sum()
    weighted = torch.zeros_like(logp)
    square = torch.zeros((), dtype=torch.float64)
    for m in range(count):
        c = _fresh_coefficients(logp, logp if form == "detached" else logp[m].expand_as(logp), a, token_mask, form, epsilon)
        w = policy.mask_probs[:, None] * probs[m]  # [M', Y']
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


def crossover(num_generations: int) -> float:
    """The pass rate of the one-logit policy above which leave-one-out has more variance than no baseline; 0 if always."""

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
    """One row per estimator: bias |E[g] - ∇J| / |∇J|, the same after the best rescaling, and the variance of a group."""
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
        value, _ = loss.grpo_loss(model.score(out, masks=out.masks), out.logp, a, out.token_mask, max_completion_length=1)
        g = -torch.cat([x.flatten() for x in torch.autograd.grad(value, list(model.parameters()))])
        shares.append(((g @ gradient) / (gradient @ gradient)).item())
    spread = torch.tensor(shares, dtype=torch.float64)
    return {
        "share": spread.mean().item(),
        "standard_error": (spread.std() / repeats**0.5).item(),
        "rollouts": repeats * groups * num_generations,
    }
