"""A policy small enough to write down: every mask, every answer, their probabilities and scores, in float64.

    π_θ(y|x,m) p(m)     for each of M masks and Y answers: N = M * Y rows m * Y + y
    s_t                 = ∇ log π_θ(y_t | x, m, y_<t), by differentiating `LatentReasoner.score` row by row

An answer cut at the length limit is an outcome like any other, so the probabilities sum to 1.
Letters: M masks, Y answers, N rows, T tokens, P parameters.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentlab.masks import Masks, MaskSpec
from latentlab.model import LatentReasoner
from latentlab.pretrained.scratch import build_model
from latentlab.problems import Problem
from latentlab.rollouts import Rollouts, encode_prompts, rollout

SPEC = MaskSpec(rate=0.3)  # of the worked example: with `tiny_reasoner` 2 sites x 4 features, 256 masks


@dataclass(frozen=True)
class Policy:
    """Of N (mask, answer) rows: probs [N], mask_probs [M], logp [N, T], token_mask [N, T], scores s_t [N, T, P]."""

    probs: torch.Tensor
    mask_probs: torch.Tensor
    logp: torch.Tensor
    token_mask: torch.Tensor
    scores: torch.Tensor

    @property
    def answer_probs(self) -> torch.Tensor:
        """[Y] the mask average π̄(y|x) = Σ_m p(m) π(y|x,m)."""
        return self.probs.view(len(self.mask_probs), -1).sum(0)

    @cached_property
    def products(self) -> torch.Tensor:
        """[N, T, T] s_t · s_u of each row."""
        return torch.einsum("ntp,nup->ntu", self.scores, self.scores)


def tiny_reasoner(*, seed: int = 26, num_thoughts: int = 2) -> LatentReasoner:
    """A float64 GPT-2 of 324 weights, 6 tokens and answers of at most 2 tokens; large weights, so that masks matter.

    The default seed is one of those under which masks change greedy answers, so that every bias is large enough to see.
    """
    model = build_model(
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
    """Every answer, those cut at the limit too: tokens [Y, T], padded with eos, and token_mask [Y, T]."""
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
    count = len(masks.values)
    unused = torch.zeros(count * len(tokens), tokens.shape[1])  # [R, A]: `score` reads no sampled value
    worn = Masks(masks.values.repeat_interleave(len(tokens), 0), masks.spec)
    return Rollouts(
        problems=(problem,), num_generations=count * len(tokens), prompt_ids=prompt_ids, prompt_valid=prompt_valid,
        tokens=tokens.repeat(count, 1), token_mask=token_mask.repeat(count, 1), logp=unused, thoughts=unused[..., None],
        seeds=unused[:, 0].long(), temperature=1.0, text=(), masks=worn,
    )  # fmt: skip


def enumerate_policy(model: LatentReasoner, problem: Problem, spec: MaskSpec, *, bits: int = 8) -> Policy:
    """The policy of `model` on `problem` with every mask and answer; ValueError if probabilities do not sum to 1."""
    masks, mask_probs = mask_space(model, spec, bits=bits)
    rows = enumerated_rollouts(model, problem, masks)
    with torch.no_grad():
        logp = model.score(rows, masks=rows.masks)
    probs = mask_probs.repeat_interleave(len(logp) // len(mask_probs)) * logp.sum(1).exp()
    if not abs(probs.sum().item() - 1) < 1e-12:
        raise ValueError(
            f"probabilities: got a sum of {probs.sum().item()}, expected 1; score or answer_space is wrong"
        )
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
        everywhere = torch.ones(1, len(tokens), dtype=torch.bool)  # vmap wants one shape for all rows
        unused = {name: getattr(self.rows, name)[:1] for name in ("logp", "thoughts", "seeds")}
        row = replace(self.rows, num_generations=1, tokens=tokens[None], token_mask=everywhere, **unused)
        return self.model.score(row, masks=Masks(values[None], self.rows.masks.spec))[0] * token_mask


def one_logit(pass_rate: float) -> Policy:
    """The smallest policy: π(right) = σ(θ) = pass_rate, two answers (right, wrong) of one token, no mask."""
    theta = torch.tensor(pass_rate, dtype=torch.float64).logit()

    def logp(theta):
        return torch.log_softmax(torch.stack([theta, torch.zeros_like(theta)]), 0)

    ones = torch.ones(2, 1, dtype=torch.bool)
    return Policy(
        logp(theta).exp(), torch.ones(1).double(), logp(theta)[:, None], ones, jacrev(logp)(theta).view(2, 1, 1)
    )


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


def greedy_probs(model: LatentReasoner, problem: Problem, spec: MaskSpec, *, bits: int = 8) -> torch.Tensor:
    """Probabilities [N] when each mask answers with its argmax: p(m) at that answer, 0 elsewhere."""
    masks, mask_probs = mask_space(model, spec, bits=bits)
    out = rollout(model, [problem], num_generations=len(mask_probs), masks=masks, temperature=0.0, run_seed=0, step=0)
    return (
        torch.nn.functional.one_hot(answer_index(model, out), len(answer_space(model)[0]))
        .mul(mask_probs[:, None])
        .flatten()
    )


def answer_index(model: LatentReasoner, out: Rollouts) -> torch.Tensor:
    """Which row of `answer_space` each rollout's answer is: [R]."""
    padding = (0, model.max_new_tokens - out.tokens.shape[1])
    tokens = torch.nn.functional.pad(out.tokens, padding, value=model.eos_id)
    return (tokens[:, None] == answer_space(model)[0]).all(2).long().argmax(1)
