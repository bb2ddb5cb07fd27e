"""A policy small enough to enumerate: all masks, all answers, probabilities and scores.

    π_θ(y|x,m) p(m)     for each of M masks and Y answers: N = M * Y rows, row m * Y + y
    s_t                 = ∇ log π_θ(y_t | x, m, y_<t), by differentiating `LatentReasoner.score`
    J(θ)                = Σ_m p(m) Σ_y π_θ(y|x,m) r(y)

An answer cut at the length limit is an outcome like any other, so the probabilities sum to 1.
Source: the masked policy and its objective J are those of arXiv 2606.10184.
Letters: M masks, Y answers, N rows, T tokens, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot, pad

from latentlab.masks import Masks, MaskSpec, draw_masks, rollout_seeds
from latentlab.model import LatentReasoner
from latentlab.pretrained.scratch import build_model
from latentlab.problems import Problem
from latentlab.rollouts import Rollouts, encode_prompts, rollout

SPEC = MaskSpec(rate=0.3)  # of the worked example: 2 sites x 4 features, 256 masks
LARGEST = 12  # mask features S * D that can be enumerated: 4,096 masks


@dataclass(frozen=True)
class Policy:
    """N rows: probs [N], logp, token_mask [N, T], scores s_t [N, T, P]; mask_probs [M]."""

    probs: Tensor
    mask_probs: Tensor
    logp: Tensor
    token_mask: Tensor
    scores: Tensor

    @property
    def answer_probs(self) -> Tensor:
        """The mask average π̄(y|x) = Σ_m p(m) π(y|x,m): [Y]."""
        return self.probs.view(len(self.mask_probs), -1).sum(0)

    @cached_property
    def score_products(self) -> Tensor:
        """s_t · s_u of each row: [N, T, T]."""
        return torch.einsum("ntp,nup->ntu", self.scores, self.scores)


@dataclass(frozen=True)
class Example:
    """A model, and per problem a policy, rewards [Y] of pass rate 0.5 or 0.05, and ∇J [P]."""

    model: LatentReasoner
    problems: tuple[Problem, ...]
    policies: tuple[Policy, ...]
    rewards: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def example() -> Example:
    """The worked example of all proofs: `tiny_reasoner`, two problems, masks of SPEC."""
    model, problems = tiny_reasoner(), (tiny_problem(1), tiny_problem(2))
    policies = tuple(enumerate_policy(model, problem, SPEC) for problem in problems)
    rewards = tuple(reward_table(p, rate) for p, rate in zip(policies, (0.5, 0.05), strict=True))
    gradients = tuple(true_gradient(model, p, SPEC, r) for p, r in zip(problems, rewards, strict=True))
    return Example(model, problems, policies, rewards, gradients)


def tiny_reasoner(*, seed: int = 26, num_thoughts: int = 2) -> LatentReasoner:
    """A float64 GPT-2 of 324 large weights, 6 tokens and answers of at most 2 tokens.

    Under the default seed masks change greedy answers, so that every bias is large enough to see.
    """
    model = build_model(
        ("1",), n_layer=1, n_embd=4, n_head=2, n_positions=12, num_thoughts=num_thoughts, max_new_tokens=2, seed=seed
    )
    return sharpen(model.double(), 25)  # GPT-2's standard deviation of 0.02 becomes 0.5


@torch.no_grad()
def sharpen(model: LatentReasoner, factor: float) -> LatentReasoner:
    """Larger weights than at initialisation, so that masks and thoughts change answers."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(factor)
    return model


def tiny_problem(ones: int = 1) -> Problem:
    """A question of `ones` times the token "1"."""
    return Problem(f"ones-{ones}", " ".join("1" * ones), (), "1", "theory")


def mask_space(model: LatentReasoner, spec: MaskSpec) -> tuple[Masks, Tensor]:
    """All masks that `draw_masks` can draw, and their probabilities: Masks [M, S, D], p [M].

    Raises ValueError for a model with too many mask features.
    """
    sites, width = model.num_sites(spec.sites), model.width
    if sites * width > LARGEST:
        raise ValueError(f"masks: got {sites} sites x {width} features, expected at most {LARGEST}; use tiny_reasoner")
    keep = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * (sites * width))  # [M, S * D]
    probs = (keep * (1 - spec.rate) + (1 - keep) * spec.rate).prod(1)
    return Masks((keep.view(-1, sites, width) / (1 - spec.rate)).to(model.dtype), spec), probs


def answer_space(model: LatentReasoner) -> tuple[Tensor, Tensor]:
    """Every answer, cut ones included: tokens [Y, T], padded with eos, and token_mask [Y, T]."""
    limit = model.max_new_tokens
    tokens = torch.cartesian_prod(*[torch.arange(len(model.tokenizer))] * limit).view(-1, limit)
    eos = tokens == model.eos_id
    token_mask = eos.cumsum(1) - eos.long() == 0  # no earlier token is eos
    padded = (token_mask | eos).all(1)  # only eos behind the first eos
    return tokens[padded], token_mask[padded]


def given_rollouts(
    model: LatentReasoner, problem: Problem, tokens: Tensor, token_mask: Tensor, masks: Masks
) -> Rollouts:
    """Answers [R, T] under masks of R rows, as one group of R rollouts for `score`."""
    prompt_ids, prompt_valid = encode_prompts(model.tokenizer, [problem], model.device)
    given = ((problem,), len(tokens), prompt_ids, prompt_valid, tokens, token_mask)
    unused = torch.zeros(tokens.shape)  # `score` reads no sampled value
    return Rollouts(*given, unused, unused[..., None], unused[:, 0].long(), temperature=1.0, text=(), masks=masks)


def enumerated_rollouts(model: LatentReasoner, problem: Problem, masks: Masks) -> Rollouts:
    """Every answer under every mask as one group of N rollouts, for `score`."""
    tokens, token_mask = answer_space(model)
    count, repeated = len(masks.values), Masks(masks.values.repeat_interleave(len(tokens), 0), masks.spec)
    return given_rollouts(model, problem, tokens.repeat(count, 1), token_mask.repeat(count, 1), repeated)


def noise_set(model: LatentReasoner, spec: MaskSpec, size: int) -> tuple[Masks, Tensor]:
    """`size` draws of any noise, each as probable as the others: Masks of M rows, p [M].

    A noise that takes infinitely many values is enumerated on such a set: what is proved for every
    distribution of the noise holds for this one too.
    """
    seeds = rollout_seeds(0, 0, ["noise"], size)
    masks = draw_masks(spec, model, seeds, num_generations=size)
    if masks is None:
        raise ValueError("noise: got scheme none, expected a noise that draws values; use another scheme")
    return masks, torch.full((size,), 1 / size, dtype=torch.float64)


def enumerate_policy(
    model: LatentReasoner, problem: Problem, spec: MaskSpec, space: tuple[Masks, Tensor] | None = None
) -> Policy:
    """The policy of `model` on `problem` with every mask, or those of `space`, and every answer.

    Raises ValueError if the probabilities do not sum to 1 within 1e-12.
    """
    masks, mask_probs = space or mask_space(model, spec)
    rows = enumerated_rollouts(model, problem, masks)
    with torch.no_grad():
        logp = model.score(rows, masks=rows.masks)
    probs = mask_probs.repeat_interleave(len(logp) // len(mask_probs)) * logp.sum(1).exp()
    if not abs(probs.sum().item() - 1) < 1e-12:
        raise ValueError(f"probabilities: got a sum of {probs.sum().item()}, expected 1; check score and answer_space")
    return Policy(probs, mask_probs, logp, rows.token_mask, _row_scores(model, rows))


def _row_scores(model: LatentReasoner, rows: Rollouts) -> Tensor:
    """s_t of each row by differentiating `model.score`: [N, T, P]."""
    assert rows.masks is not None
    scorer = _RowScorer(model, rows.problems[0], rows.masks.spec)
    weights = {name: weight.detach() for name, weight in scorer.named_parameters()}
    jacobian = jacrev(lambda weights, *row: functional_call(scorer, weights, row))
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no rule for vmap
        mapped = vmap(jacobian, in_dims=(None, 0, 0, 0), chunk_size=2048)
        parts = mapped(weights, rows.tokens, rows.token_mask, rows.masks.values)
    return torch.cat([part.flatten(2) for part in parts.values()], 2)


class _RowScorer(torch.nn.Module):
    """`model.score` of a single row, as a module whose weights `functional_call` can replace."""

    def __init__(self, model: LatentReasoner, problem: Problem, spec: MaskSpec):
        super().__init__()
        self.model, self.problem, self.spec = model, problem, spec

    def forward(self, tokens, token_mask, values):
        everywhere = torch.ones(1, len(tokens), dtype=torch.bool)  # vmap wants one shape for all rows
        row = given_rollouts(self.model, self.problem, tokens[None], everywhere, Masks(values[None], self.spec))
        return self.model.score(row, masks=row.masks)[0] * token_mask


def one_logit(pass_rate: float) -> Policy:
    """The smallest policy: π(right) = σ(θ) = pass_rate, two answers of one token, no mask."""
    probs = torch.tensor([pass_rate, 1 - pass_rate], dtype=torch.float64)
    scores = torch.tensor([1 - pass_rate, -pass_rate], dtype=torch.float64).view(2, 1, 1)  # ∇ log σ, ∇ log (1 - σ)
    return Policy(probs, torch.ones(1).double(), probs.log()[:, None], torch.ones(2, 1, dtype=torch.bool), scores)


def two_masks() -> Policy:
    """Two masks and two answers, for a calculation by hand: π(right|m) = σ(m θ), θ = ln(3) / 2.

    Dropout of rate 1/2 on one feature: m = 2 (kept) or 0 (dropped). Rows: right, wrong under 2, then under 0.
    """
    right = torch.tensor([3 / 4, 1 / 2], dtype=torch.float64)  # σ(2 θ), σ(0)
    given = torch.stack([right, 1 - right], 1)  # π(y | m), [M, Y]
    scores = torch.tensor([2.0, 0.0]).double()[:, None] * torch.stack([1 - right, -right], 1)  # m (1 - π), -m π
    one = torch.ones(4, 1, dtype=torch.bool)
    return Policy(given.flatten() / 2, torch.ones(2).double() / 2, given.log().view(4, 1), one, scores.view(4, 1, 1))


def reward_table(policy: Policy, pass_rate: float) -> Tensor:
    """0/1 rewards [Y] whose right answers have about `pass_rate` probability.

    Answers are added while they fit: the likeliest, third, fifth, ..., then the second, fourth, ...
    """
    rewards = torch.zeros(len(policy.answer_probs), dtype=torch.float64)
    left, order = pass_rate, policy.answer_probs.argsort(descending=True).tolist()
    for y in order[::2] + order[1::2]:
        if policy.answer_probs[y] <= left + 1e-9:
            rewards[y], left = 1.0, left - policy.answer_probs[y].item()
    return rewards


def true_gradient(
    model: LatentReasoner,
    problem: Problem,
    spec: MaskSpec,
    rewards: Tensor,
    space: tuple[Masks, Tensor] | None = None,
) -> Tensor:
    """∇J [P] over all masks, or those of `space`, by differentiating probabilities, not log-probs. rewards: [Y]."""
    masks, mask_probs = space or mask_space(model, spec)
    rows = enumerated_rollouts(model, problem, masks)
    answer_probs = model.score(rows, masks=rows.masks).sum(1).exp().view(len(mask_probs), -1)  # [M, Y]
    gradient = torch.autograd.grad(mask_probs @ (answer_probs @ rewards), list(model.parameters()))
    return torch.cat([g.flatten() for g in gradient])


def greedy_policy(model: LatentReasoner, problem: Problem, spec: MaskSpec, policy: Policy) -> Policy:
    """`policy` if every mask's answer is the argmax: probability p(m) at that answer, 0 elsewhere."""
    masks, mask_probs = mask_space(model, spec)
    out = rollout(model, [problem], num_generations=len(mask_probs), masks=masks, temperature=0.0, run_seed=0, step=0)
    chosen = one_hot(answer_index(model, out), len(answer_space(model)[0]))  # [M, Y]
    return replace(policy, probs=(chosen * mask_probs[:, None]).flatten())


def answer_index(model: LatentReasoner, out: Rollouts) -> Tensor:
    """The row of `answer_space` that equals each rollout's answer: [R]."""
    tokens = pad(out.tokens, (0, model.max_new_tokens - out.tokens.shape[1]), value=model.eos_id)
    return (tokens[:, None] == answer_space(model)[0]).all(2).long().argmax(1)
