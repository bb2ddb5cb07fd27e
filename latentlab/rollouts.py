"""Latent rollouts: K answers for each of B problems, in one batch of R = B * K rows.

Answer token t of a row takes its uniform number from (seed of the row, t) and inverts the cumulative distribution, so
a row's answer does not depend on the rows beside it. What a rollout needs to be replayed is in `Rollouts`: the tokens,
the log-probs as they were sampled, and the masks (or the seeds that they follow from).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from latentlab.masks import Masks, MaskSpec, draw_masks, rollout_seeds, uniforms
from latentlab.model import START, Edit, LatentReasoner, policy
from latentlab.problems import Problem


@dataclass(frozen=True)
class Rollouts:
    """What happened: B problems, K rollouts each, rows b * K + k.

    prompt_ids, prompt_valid: [B, Q] left-padded questions, <start> last; tokens: [R, A] answers, eos included, padded
    with eos; token_mask: [R, A] True for answer tokens; logp: [R, A] as sampled (greedy: at temperature 1), 0 after the
    end; thoughts: [R, L, D]; seeds: [R]; text: R decoded answers; masks: what the rollouts wore; entropy: [R, A] nats,
    of the distribution each token was sampled from, 0 after the end (None: not recorded).
    """

    problems: tuple[Problem, ...]
    num_generations: int
    prompt_ids: torch.Tensor
    prompt_valid: torch.Tensor
    tokens: torch.Tensor
    token_mask: torch.Tensor
    logp: torch.Tensor
    thoughts: torch.Tensor
    seeds: torch.Tensor
    temperature: float
    text: tuple[str, ...]
    masks: Masks | None
    entropy: torch.Tensor | None = None

    def rewards(self, reward) -> torch.Tensor:
        """[B, K] rewards by `reward(text, problem) -> float`."""
        k = self.num_generations
        values = [reward(text, self.problems[row // k]) for row, text in enumerate(self.text)]
        return torch.tensor(values, dtype=torch.float64).view(-1, k)

    def take(self, problems: slice | Sequence[int]) -> Rollouts:
        """The rollouts of some problems, named by a slice or by their places: whole groups, less shared padding."""
        k = self.num_generations
        places = list(range(len(self.problems))[problems]) if isinstance(problems, slice) else list(problems)
        rows = [b * k + i for b in places for i in range(k)]
        first = int(self.prompt_valid[places].any(0).long().argmax())  # what lies before is padding in all of them
        of_rows = ("tokens", "token_mask", "logp", "thoughts", "seeds", "entropy")
        return Rollouts(
            problems=tuple(self.problems[b] for b in places),
            num_generations=k,
            prompt_ids=self.prompt_ids[places, first:],
            prompt_valid=self.prompt_valid[places, first:],
            temperature=self.temperature,
            text=tuple(self.text[row] for row in rows),
            masks=None if self.masks is None else self.masks.take(torch.tensor(rows)),
            **{name: None if getattr(self, name) is None else getattr(self, name)[rows] for name in of_rows},
        )


def encode_prompts(tokenizer, problems: Sequence[Problem], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Questions as left-padded token ids [B, Q], `question + "\\n" + <start>`, and which of them are real [B, Q]."""
    rows = tokenizer([problem.question + "\n" + START for problem in problems], add_special_tokens=False)["input_ids"]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(row)) + row for row in rows], device=device)
    valid = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, valid


@torch.no_grad()
def rollout(
    model: LatentReasoner,
    problems: Sequence[Problem],
    *,
    num_generations: int,
    masks: Masks | MaskSpec | None,
    temperature: float,
    run_seed: int,
    step: int,
    seeds: torch.Tensor | None = None,
    edit: Edit | None = None,
) -> Rollouts:
    """Sample (temperature > 0) or take the argmax (temperature 0) of `num_generations` answers per problem.

    `masks` may be a spec, then the masks are drawn from the rollout seeds; None runs the clean model. `seeds` [R]
    follow from (run_seed, step) by default; a part of a batch brings its own, since a problem drawn twice counts on.
    Raises ValueError for an empty problem list, a temperature below 0 or more positions than the backbone has.
    """
    if not problems:
        raise ValueError("problems: got an empty list, expected at least one; check the data source and its filters")
    if num_generations < 1 or temperature < 0:
        raise ValueError(
            f"rollout: got num_generations={num_generations}, temperature={temperature}, expected >= 1 and >= 0"
        )
    model.eval()
    prompt_ids, prompt_valid = encode_prompts(model.tokenizer, problems, model.device)
    model.check_length(prompt_ids.shape[1], model.max_new_tokens)
    if seeds is None:
        seeds = rollout_seeds(run_seed, step, [p.id for p in problems], num_generations)
    if isinstance(masks, MaskSpec):
        masks = draw_masks(masks, model, seeds)
    with model.cast_once():
        state = model.prefix(prompt_ids, prompt_valid, num_generations=num_generations, masks=masks)
        thoughts = model.think(state, edit=edit)
        tokens, token_mask, logp, entropy = _answer(model, state, seeds.to(model.device), temperature)
    text = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)  # the padding is eos: skipped
    return Rollouts(
        problems=tuple(problems),
        num_generations=num_generations,
        prompt_ids=prompt_ids,
        prompt_valid=prompt_valid,
        tokens=tokens,
        token_mask=token_mask,
        logp=logp,
        thoughts=thoughts,
        seeds=seeds,
        temperature=temperature,
        text=tuple(text),
        masks=masks,
        entropy=entropy,
    )


def _answer(model, state, seeds, temperature) -> tuple[torch.Tensor, ...]:
    """Decode until every row has said eos or the limit is reached: tokens, token_mask, logp, entropy, each [R, A]."""
    rows = torch.arange(len(seeds), device=seeds.device)  # which rows are still speaking
    hidden = model.answer(state, torch.empty(len(rows), 0, dtype=torch.long, device=seeds.device))[:, -1]  # [R, D]
    tokens = torch.full((len(rows), model.max_new_tokens), model.eos_id, device=seeds.device)
    token_mask = torch.zeros_like(tokens, dtype=torch.bool)
    logp = torch.zeros(tokens.shape, dtype=model.head(hidden[:1]).dtype, device=seeds.device)
    entropy = torch.zeros_like(logp)
    for t in range(model.max_new_tokens):
        logits = model.head(hidden)  # [R', V]
        logps = policy(logits, temperature)
        choice = choose(logps, seeds[rows], t) if temperature else logits.argmax(-1)  # [R']
        tokens[rows, t], token_mask[rows, t] = choice, True
        logp[rows, t] = logps.gather(-1, choice[:, None])[:, 0]
        entropy[rows, t] = -torch.linalg.vecdot(logps.exp(), logps)
        speaking = choice != model.eos_id
        if t + 1 == model.max_new_tokens or not speaking.any():
            break
        if not speaking.all():
            keep = speaking.nonzero()[:, 0]
            rows, choice = rows[keep], choice[keep]
            state.keep(keep)
        hidden = model.next_token(state, choice)
    length = int(token_mask.any(0).sum())
    return tuple(x[:, :length] for x in (tokens, token_mask, logp, entropy))


def choose(logps: torch.Tensor, seeds: torch.Tensor, t: int) -> torch.Tensor:
    """A sample of answer token t of each row, [R], from log-probs [R, V]: by inverse CDF from (seed, t)."""
    cdf = logps.exp().cumsum(-1, dtype=torch.float64)
    target = uniforms(seeds, t)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=logps.shape[-1] - 1)


@torch.no_grad()
def replay_gap(logp: torch.Tensor, rollouts: Rollouts) -> float:
    """Largest |re-scored - recorded| log-prob over the answers' tokens, in nats: 0 up to rounding if masks replay."""
    return (logp - rollouts.logp).abs().max().item()
