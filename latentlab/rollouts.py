"""Latent rollouts: K answers for each of B problems, in one batch of R = B * K rows.

    token_t ~ softmax(logits_t / temperature)    by inverse CDF of a uniform from (seed of the row, t)

No random generator is shared between rows, so an answer does not depend on the other rows of its
batch. `Rollouts` records what a replay needs: tokens, log-probs as sampled, and the masks. Without
masks the K rollouts of a problem are one row until their answers differ.

Source: Dropout-GRPO, arXiv 2606.10184: one mask per rollout. Deviation: answers are sampled where the
theory needs it; greedy answers under masks (temperature 0) are an arm of their own.

Dimensions: B problems, K rollouts per problem, R rows, Q prompt tokens, L thoughts, A answer tokens,
D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from latentlab.masks import Masks, MaskSpec, draw_masks, rollout_seeds, uniforms, whole_number
from latentlab.model import END, LATENT, START, Edit, LatentReasoner, State, policy
from latentlab.problems import Problem


@dataclass(frozen=True)
class Rollouts:
    """A record of K rollouts for each of B problems, in rows b * K + k."""

    problems: tuple[Problem, ...]
    num_generations: int  # K
    prompt_ids: Int[Tensor, "B Q"]  # left-padded questions; the last token is <start>
    prompt_valid: Bool[Tensor, "B Q"]  # False at padding
    tokens: Int[Tensor, "R A"]  # answers, eos included, padded with eos
    token_mask: Bool[Tensor, "R A"]  # True for answer tokens, eos included
    logp: Float[Tensor, "R A"]  # nats, as sampled (greedy: at temperature 1); 0 after the end
    thoughts: Float[Tensor, "R L D"]
    seeds: Int[Tensor, " R"]
    temperature: float
    text: tuple[str, ...]  # R decoded answers
    masks: Masks | None
    entropy: Float[Tensor, "R A"] | None = None  # nats, when sampling; 0 after the end

    def rewards(self, reward: Callable[[str, Problem], float]) -> Float[Tensor, "B K"]:
        """The reward of each rollout, float64. Raises ValueError at the first that is no finite number."""
        values: list[float] = []
        for row, text in enumerate(self.text):
            problem = self.problems[row // self.num_generations]
            value = reward(text, problem)
            try:
                values.append(math.nan if isinstance(value, str) else float(value))
            except (TypeError, ValueError, RuntimeError):  # such as None, text in bytes, a tensor of several elements
                values.append(math.nan)
            if not math.isfinite(values[-1]):
                got = f"reward of problem {problem.id}: got {value!r:.80}"
                raise ValueError(f"{got}, expected a finite number for every answer; correct the reward function")
        return torch.tensor(values, dtype=torch.float64).view(-1, self.num_generations)

    def take(self, problems: slice | Sequence[int]) -> Rollouts:
        """The rollouts of some problems (a slice or indices); padding common to all is cut."""
        k = self.num_generations
        places = list(range(len(self.problems))[problems]) if isinstance(problems, slice) else list(problems)
        rows = [b * k + i for b in places for i in range(k)]
        first = int(self.prompt_valid[places].any(0).long().argmax())  # first column with a token
        per_row = ("tokens", "token_mask", "logp", "thoughts", "seeds", "entropy")
        parts: dict[str, Any] = {name: None if (x := getattr(self, name)) is None else x[rows] for name in per_row}
        return replace(
            self,
            problems=tuple(self.problems[b] for b in places),
            prompt_ids=self.prompt_ids[places, first:],
            prompt_valid=self.prompt_valid[places, first:],
            text=tuple(self.text[row] for row in rows),
            masks=None if self.masks is None else self.masks.take(torch.tensor(rows)),
            **parts,
        )


def control_tokens(tokenizer) -> set[int]:
    """Ids of the latent and the special tokens; without that for unknown words, unless it is eos."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added.union(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return special | {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids([START, LATENT, END])}


def encode_texts(tokenizer, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    """Token ids of plain texts, with what the tokenizer adds around them if asked.

    Raises ValueError, one line, for a text with a control token in it, such as "</s>".
    """
    options = {"add_special_tokens": add_special_tokens, "return_special_tokens_mask": True}
    encoded, control = tokenizer(list(texts), **options), control_tokens(tokenizer)
    for text, ids, added in zip(texts, encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        if found := [i for i, by_tokenizer in zip(ids, added, strict=True) if i in control and not by_tokenizer]:
            got = f"got the control token {tokenizer.convert_ids_to_tokens(found[0])} in {text[:80]!r}"
            raise ValueError(f"text: {got}, which a model reads as a command, expected plain text; drop this problem")
    return encoded["input_ids"]


def first_tokens(tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """The first token of each text that is not blank; SentencePiece may put "▁" alone before it."""
    if not (different := sorted(set(texts))):
        return {}
    rows = dict(zip(different, tokenizer(different, add_special_tokens=False)["input_ids"], strict=True))
    blank = {token for token in set().union(*rows.values()) if not tokenizer.decode([token]).strip()}
    for text, row in rows.items():
        if blank.issuperset(row):
            raise ValueError(f"tokenizer: got no token for {text!r}, expected that of a causal LM; use another")
    return {text: next(token for token in row if token not in blank) for text, row in rows.items()}


def prompt_rows(tokenizer, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of `question + "\\n"`, with BOS where the tokenizer adds it, then of <start>.

    Source: the data set code of the official Coconut, which encodes questions with special tokens.
    """
    rows = encode_texts(tokenizer, [question + "\n" for question in questions], add_special_tokens=True)
    return [[*ids, tokenizer.convert_tokens_to_ids(START)] for ids in rows]


def encode_prompts(
    tokenizer, problems: Sequence[Problem], device: torch.device | str
) -> tuple[Int[Tensor, "B Q"], Bool[Tensor, "B Q"]]:
    """The `prompt_rows` of the problems, left-padded, and which of their tokens are not padding."""
    rows = prompt_rows(tokenizer, [problem.question for problem in problems])
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(row)) + row for row in rows], device=device)
    valid = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, valid


@torch.no_grad()
def rollout(
    model: LatentReasoner,
    problems: Sequence[Problem],
    *,
    num_generations: SupportsIndex,
    masks: Masks | MaskSpec | None,
    temperature: float,
    run_seed: SupportsIndex,
    step: SupportsIndex,
    seeds: Int[Tensor, " R"] | None = None,
    edit: Edit | None = None,
) -> Rollouts:
    """Sample `num_generations` answers per problem; temperature 0 takes the argmax.

    masks: a `MaskSpec` (drawn from the rollout seeds), drawn `Masks`, or None for the model itself.
    seeds: default `rollout_seeds(run_seed, step, ...)`; a part of a larger batch passes its own.
    edit: replaces thoughts, see `LatentReasoner.think`.
    Raises ValueError, before the model runs, for no problems, numbers out of range, seeds of another
    shape, or more positions than the context holds.
    """
    if not problems:
        raise ValueError("problems: got an empty list, expected at least one; check the data source and its filters")
    num_generations = whole_number("num_generations", num_generations, 1)
    if not isinstance(temperature, Real) or isinstance(temperature, bool) or not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature: got {temperature!r}, expected a finite number >= 0; 0 takes the likeliest token"
        )
    if not (masks is None or isinstance(masks, Masks | MaskSpec)):
        raise ValueError(f"masks: got {masks!r:.80}, expected None, Masks or MaskSpec; such as MaskSpec(rate=0.1)")
    if strange := [problem for problem in problems if not isinstance(problem, Problem)]:
        raise ValueError(f"problems: got {strange[0]!r:.80}, expected Problem objects; see latentlab.Problem")
    rows = len(problems) * num_generations
    if seeds is None:
        seeds = rollout_seeds(run_seed, step, [p.id for p in problems], num_generations)
    if seeds.dtype != torch.int64 or seeds.shape != (rows,):
        got = f"got {seeds.dtype} of shape {list(seeds.shape)}"
        raise ValueError(f"seeds: {got}, expected torch.int64 of shape [{rows}]; see rollout_seeds")
    model.eval()
    prompt_ids, prompt_valid = encode_prompts(model.tokenizer, problems, model.device)
    model.check_length(prompt_ids.shape[1], model.max_new_tokens)
    if isinstance(masks, MaskSpec):
        masks = draw_masks(masks, model, seeds, num_generations=num_generations)
    together = 1 if masks is not None or edit is not None else num_generations  # rollouts per row of thoughts
    with model.cast_once():
        state = model.prefix(prompt_ids, prompt_valid, num_generations=num_generations // together, masks=masks)
        thoughts = model.think(state, edit=edit).repeat_interleave(together, 0)
        answers = _answer(model, state, seeds.to(model.device), temperature)
    return Rollouts(
        problems=tuple(problems),
        num_generations=num_generations,
        prompt_ids=prompt_ids,
        prompt_valid=prompt_valid,
        thoughts=thoughts,
        seeds=seeds,
        temperature=float(temperature),
        text=tuple(model.tokenizer.batch_decode(answers["tokens"], skip_special_tokens=True)),
        masks=masks,
        **answers,
    )


def _answer(model: LatentReasoner, state: State, seeds: Int[Tensor, " R"], temperature: float) -> dict[str, Any]:
    """Decode until eos or the limit in all rows: the fields of `Rollouts` with shape [R, A].

    Rollouts whose thoughts and tokens so far are equal share a row of `state`.
    """
    going = torch.arange(len(seeds), device=seeds.device)  # the N rollouts that have not ended
    count = len(state.pending)  # R' rows
    row = going // (len(going) // count)  # [N] of each rollout
    hidden = model.answer(state, going.new_empty(count, 0))[:, -1]  # [R', D]
    tokens = torch.full((len(going), model.max_new_tokens), model.eos_id, device=seeds.device)
    token_mask = torch.zeros_like(tokens, dtype=torch.bool)
    logp = torch.zeros(tokens.shape, dtype=model.head(hidden[:1]).dtype, device=seeds.device)
    entropy = torch.zeros_like(logp)
    for t in range(model.max_new_tokens):
        logits = model.head(hidden)  # [R', V]
        logps = policy(logits, temperature)
        choice = choose(logps[row], seeds[going], t) if temperature else logits.argmax(-1)[row]  # [N]
        tokens[going, t], token_mask[going, t] = choice, True
        logp[going, t] = logps[row, choice]
        entropy[going, t] = -torch.linalg.vecdot(logps.exp(), logps)[row]
        on = choice != model.eos_id
        if t + 1 == model.max_new_tokens or not on.any():
            break
        going, vocabulary = going[on], logits.shape[-1]
        branches, row = (row[on] * vocabulary + choice[on]).unique(return_inverse=True)  # ascending
        rows, choice = branches // vocabulary, branches % vocabulary
        if not torch.equal(rows, torch.arange(count, device=rows.device)):
            state.keep(rows)
        count = len(rows)
        hidden = model.next_token(state, choice)
    length = int(token_mask.any(0).sum())
    fields = {"tokens": tokens, "token_mask": token_mask, "logp": logp, "entropy": entropy}
    return {name: x[:, :length] for name, x in fields.items()}


def choose(logps: Float[Tensor, "R V"], seeds: Int[Tensor, " R"], t: int) -> Int[Tensor, " R"]:
    """Sample answer token t of each row by inverse CDF of a uniform number from (seed, t).

    On a CPU a few rows at a time, whose sums fit a cache (docs/bench.md).
    """
    rows = len(logps) if logps.is_cuda else max(1, 2**18 // logps.shape[-1])
    chosen = []
    for part, uniform in zip(logps.split(rows), uniforms(seeds, t)[:, None].split(rows), strict=True):
        cdf = part.exp().cumsum(-1, dtype=torch.float64)
        chosen.append(torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)[:, 0])
    return torch.cat(chosen).clamp(max=logps.shape[-1] - 1)


@torch.no_grad()
def replay_gap(logp: Float[Tensor, "R A"], rollouts: Rollouts) -> float:
    """Largest difference between re-scored and recorded log-probs, in nats."""
    return (logp - rollouts.logp).abs().max().item()
