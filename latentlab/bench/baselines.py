"""What the engine is timed against: other ways to make the same rollouts, and a lower bound.

    official     the official Coconut scheme: one rollout at a time, thoughts cached, the whole
                 sequence passed again for every answer token, logits at all positions
    definition   nothing cached at all (verify/reference.py)
    plain        batched, with the cache and attention of transformers: the question is run for
                 every rollout, logits at all positions
    floor        one dense pass over as many positions as the engine takes, [R, positions / R], head
                 at the answer's positions: thoughts are sequential, so no rollout is that fast
    VARIANTS     the engine without one of its optimizations

Only the variants and the definition apply masks; the cost of masks is measured separately.
Source of the official scheme: facebookresearch/coconut, arXiv 2412.06769.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from transformers import DynamicCache

from latentlab.model import LatentReasoner, State, token_logps
from latentlab.rollouts import choose


@torch.no_grad()
def official(model: LatentReasoner, prompt: torch.Tensor) -> list[int]:
    """One greedy answer of max_new_tokens tokens to prompt [1, Q]; eos does not end it."""
    step = partial(model.lm, use_cache=True, output_hidden_states=True)
    inputs = model.embed(prompt)
    out = step(inputs_embeds=inputs)
    for i in range(model.num_thoughts):
        new = out.hidden_states[-1][:, -1:]  # thought i, the next input
        if i + 1 == model.num_thoughts:
            new = torch.cat([new, model.embed(prompt.new_tensor([[model.end_id]]))], 1)
        inputs = torch.cat([inputs, new], 1)
        out = step(inputs_embeds=new, past_key_values=out.past_key_values)
    answer = [int(out.logits[0, -1].argmax())]
    while len(answer) < model.max_new_tokens:
        inputs = torch.cat([inputs, model.embed(prompt.new_tensor([answer[-1:]]))], 1)
        answer.append(int(model.lm(inputs_embeds=inputs, use_cache=False).logits[0, -1].argmax()))
    return answer


def plain(model: LatentReasoner, prompts: torch.Tensor, seeds: torch.Tensor, tokens: torch.Tensor | None = None):
    """Log-probs [R, A] of sampled answers, or of `tokens` [R, A]; prompts [R, Q] without padding.

    No masks, temperature 1; eos does not end an answer.
    """
    cache = DynamicCache(config=model.lm.config)

    def step(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with model.autocast():
            out = model.lm(inputs_embeds=inputs, past_key_values=cache, use_cache=True, output_hidden_states=True)
        return out.hidden_states[-1][:, -1:], out.logits if out.logits.dtype == torch.float64 else out.logits.float()

    z = step(model.embed(prompts))[0]
    for _ in range(model.num_thoughts):
        z = step(z)[0]
    said = torch.full((len(prompts), 1), model.end_id, device=prompts.device)
    if tokens is not None:
        return token_logps(step(model.embed(torch.cat([said, tokens[:, :-1]], 1)))[1], tokens, 1.0)
    logps = []
    for t in range(model.max_new_tokens):
        policy = torch.log_softmax(step(model.embed(said))[1][:, -1], -1)
        said = choose(policy, seeds, t)[:, None]
        logps.append(policy.gather(-1, said))
    return torch.cat(logps, 1)


def floor(model: LatentReasoner, rows: int, positions: int, answer: int, *, update: bool) -> None:
    """A dense pass of `positions` in all, head at `answer` of each row; backward in an update."""
    ids = torch.full((rows, round(positions / rows)), model.end_id, device=model.device)
    with torch.set_grad_enabled(update), model.autocast():
        logits = model.head(model.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -answer:])
    if update:
        model.zero_grad(set_to_none=True)
        token_logps(logits, ids[:, -answer:], 1.0).sum().backward()


class PrefixRepeated(LatentReasoner):
    """The question is run once per problem; its keys and values are copied for each of its rows."""

    def prefix(self, *args, **kwargs) -> State:
        state = super().prefix(*args, **kwargs)
        cache, k = state.cache, state.cache.width  # 1 where the mask covers the question: nothing is shared
        cache.prefix = [(key.repeat_interleave(k, 0), value.repeat_interleave(k, 0)) for key, value in cache.prefix]
        cache.valid, cache.width = cache.valid.repeat_interleave(k, 0), 1
        cache.problem = torch.arange(len(cache.valid), device=cache.valid.device)
        return state


class CacheGrown(LatentReasoner):
    """The cache is not preallocated: it is copied whenever it grows."""

    def prefix(self, *args, **kwargs) -> State:
        state = super().prefix(*args, **kwargs)
        for keys, values in state.cache.suffix:
            keys.capacity = values.capacity = 0
        return state


class EndApart(LatentReasoner):
    """The last thought has a pass of its own, before <end>."""

    def answer(self, state: State, tokens: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        self.forward_pass(state, state.pending)
        if rows is not None:
            state.keep(rows)
        state.pending = state.pending[:, :0]
        ids = torch.cat([tokens.new_full((len(tokens), 1), self.end_id), tokens], 1)
        return self.forward_pass(state, self.embed(ids))


class EarlyEnd(LatentReasoner):
    """The engine, but every token is eos with probability 1/4, so that rows leave the batch."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().head(hidden)
        logits[..., self.eos_id] = logits.logsumexp(-1) - math.log(3)
        return logits


class WholePrefix(LatentReasoner):
    """Question positions run through all of the last layer, not only for their keys and values."""

    same_passes = True


class HeadEverywhere(WholePrefix):
    """Logits at all positions, not only where they are needed."""

    def forward_pass(self, *args) -> torch.Tensor:
        hidden = super().forward_pass(*args)
        self.head(hidden)
        return hidden


VARIANTS = {"prefix_repeated": PrefixRepeated, "cache_grown": CacheGrown, "whole_prefix": WholePrefix}
VARIANTS |= {"end_apart": EndApart, "head_everywhere": HeadEverywhere}
