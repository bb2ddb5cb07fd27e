"""Attention of many rollouts over one question whose keys and values are stored once.

A row (one rollout) attends to its question, the prefix, and to the positions after it, its own
suffix. The keys and values of a prefix are the same for the K rows of a problem. They are stored once
per problem, and the attention of a row is one softmax over the scores of both parts:

    scores = [ q K_prefix^T | q K_suffix^T ]     output = p_prefix V_prefix + p_suffix V_suffix

Products with a prefix are done once per problem, with the queries of its rows stacked (`stack`).
Nothing is repeated K times, neither in the forward pass nor in the backward pass, where the same
products sum the gradient of a prefix over its rows.

For B = 2 problems, K = 3 rollouts and row 4 finished (`keep`):

    row                        0  1  2  3  5
    problem (its prefix)       0  0  0  1  1
    place in [B * width] rows  0  1  2  3  4      width = 3: place 5 is filled with zeros

`transformers` calls it: `attention` is registered as attention function "latentlab", and a
`RolloutCache` is passed as `past_key_values`; `rollout_attention` hands it to the attention function.

Source: attention over a shared prefix in two parts is Hydragen's, arXiv 2402.05099. Deviations:
1. One softmax over concatenated scores instead of two partial ones that are merged; with gradient.
2. Suffix attention is one precision wider than other products (float64 in a float32 model, float32
   under bfloat16). Its sums depend on how many positions are run at once, one when sampling and all
   when scoring; rounded to float32 afterwards they agree, so a float32 replay on a CPU is mostly
   exact to the last bit.

Dimensions: B problems, K rollouts per problem, R rows, H key heads, G query heads per key head,
Q prefix and S suffix positions, T new positions, d head width.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "latentlab"


@dataclass
class Positions:
    """Keys or values [R, H, S, d] that grow along S: in place, unless gradient is enabled.

    capacity: positions to allocate; growing beyond them copies.
    """

    capacity: int
    buffer: Tensor = field(default_factory=lambda: torch.empty(0))
    length: int = 0

    def append(self, new: Float[Tensor, "R H T d"]) -> Float[Tensor, "R H S d"]:
        """Append T positions; returns all S of them."""
        start, self.length = self.length, self.length + new.shape[2]
        if torch.is_grad_enabled():
            self.buffer = new if start == 0 else torch.cat([self.buffer[:, :, :start], new], 2)
            return self.buffer
        if start == 0 or self.length > self.buffer.shape[2]:
            grown = new.new_empty(*new.shape[:2], max(self.length, self.capacity), new.shape[3])
            if start:
                grown[:, :, :start] = self.buffer[:, :, :start]
            self.buffer = grown
        self.buffer[:, :, start : self.length] = new
        return self.buffer[:, :, : self.length]

    def keep(self, rows: Int[Tensor, " N"]) -> Positions:
        """The keys or values of some rows."""
        return Positions(self.capacity, self.buffer[rows], self.length)


class PrefixRun(Exception):
    """The prefix has its keys and values of every layer; nothing reads the rest of its pass."""


class RolloutCache(Cache):
    """Keys and values of B prefixes, and of the suffixes of the rows that are still in the batch.

    valid: False at padding, which is never attended to. capacity: suffix positions to allocate.
    Positions belong to the prefix until `start_rows` is called. last_layer: the layer whose update
    ends the pass over the prefix by raising PrefixRun; None: the pass runs to its end.
    """

    def __init__(self, valid: Bool[Tensor, "B Q"], capacity: int, last_layer: int | None = None):
        super().__init__(layers=[])
        self.valid, self.capacity, self.last_layer, self.in_prefix = valid, capacity, last_layer, True
        self.prefix: list[tuple[Tensor, Tensor]] = []  # per layer: [B, H, Q, d]
        self.suffix: list[tuple[Positions, Positions]] = []  # per layer: [R, H, S, d]
        self.problem = torch.arange(len(valid), device=valid.device)  # [R] prefix of a row
        self.place: Tensor | None = None  # [R] of a row among B * width; None: in order
        self.width = 1  # rows of the largest group

    def start_rows(self, num_generations: int) -> None:
        """End the prefix: from here on each problem has `num_generations` rows, in order."""
        self.in_prefix, self.width = False, num_generations
        self.problem = self.problem.repeat_interleave(num_generations)
        self.prefix = [_wide(*layer) for layer in self.prefix]
        self.suffix = [(Positions(self.capacity), Positions(self.capacity)) for _ in self.prefix]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append the new positions of a layer; returns all keys and values of their part.

        Raises PrefixRun in the prefix of `last_layer`.
        """
        if self.in_prefix:
            self.prefix.append((key_states, value_states))
            if layer_idx == self.last_layer:
                raise PrefixRun
            return key_states, value_states
        new_keys, new_values = _wide(key_states, value_states)
        keys, values = self.suffix[layer_idx]
        return keys.append(new_keys), values.append(new_values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of suffix positions so far."""
        return self.suffix[layer_idx][0].length if self.suffix else 0

    def visible(self, new: int) -> Bool[Tensor, "_ 1 T S"] | None:
        """The causal attention mask of `new` positions over their own part; None: no key is masked.

        In the prefix, [B, 1, T, Q], padding is masked, but sees itself: a softmax over nothing is NaN.
        """
        if not self.in_prefix and new == 1:
            return None
        length = self.get_seq_length() + new
        index = torch.arange(length, device=self.valid.device)
        query = index[length - new :, None]
        causal = (index <= query)[None, None]
        return causal & self.valid[:, None, None, :] | (index == query) if self.in_prefix else causal

    def keep(self, rows: Int[Tensor, " N"]) -> None:
        """Replace the rows by `rows` (ascending, repeats allowed); drop unused prefixes once they are half of all."""
        self.problem = self.problem[rows]
        self.suffix = [(keys.keep(rows), values.keep(rows)) for keys, values in self.suffix]
        sizes = self.problem.bincount(minlength=len(self.valid))  # [B]
        alive = sizes.nonzero()[:, 0]
        if 2 * len(alive) <= len(sizes):
            self.prefix = [(keys[alive], values[alive]) for keys, values in self.prefix]
            self.valid, self.problem, sizes = self.valid[alive], (sizes > 0).cumsum(0)[self.problem] - 1, sizes[alive]
        self.width = int(sizes.max())
        first = sizes.cumsum(0) - sizes
        rank = torch.arange(len(rows), device=rows.device) - first[self.problem]
        self.place = None if len(rows) == len(sizes) * self.width else self.problem * self.width + rank

    def stack(self, x: Float[Tensor, "R H T e"]) -> Float[Tensor, "B H wT e"]:
        """Place the rows of each problem one below the other: [B, H, width * T, e]."""
        count = len(self.valid)
        if self.place is not None:
            x = x.new_zeros(count * self.width, *x.shape[1:]).index_copy(0, self.place, x)
        return x.unflatten(0, (count, self.width)).transpose(1, 2).flatten(2, 3)

    def unstack(self, x: Float[Tensor, "B H wT e"]) -> Float[Tensor, "R H T e"]:
        """The inverse of `stack`."""
        x = x.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.place is None else x[self.place]


def attention(
    module,
    query: Float[Tensor, "R HG T d"],
    key: Float[Tensor, "R H S d"],
    value: Float[Tensor, "R H S d"],
    attention_mask: Bool[Tensor, "_ 1 T S"] | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_,
) -> tuple[Float[Tensor, "R T HG d"], None]:
    """The attention function `transformers` calls; in the prefix, where R is B, plain attention.

    sliding_window: a query sees the keys at most `sliding_window` - 1 positions before it.
    softcap: scores s become softcap * tanh(s / softcap).
    """
    cache = _current.get()
    if cache.in_prefix:
        assert attention_mask is not None  # `visible`
        if sliding_window is not None:
            attention_mask = attention_mask & _near(sliding_window, query.shape[2], key.shape[2], query.device)
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = _capped(query @ keys.transpose(-1, -2) * scaling, softcap).masked_fill(~attention_mask, -torch.inf)
        return (scores.softmax(-1) @ values).transpose(1, 2), None
    prefix_keys, prefix_values = cache.prefix[module.layer_idx]
    with torch.autocast(query.device.type, enabled=False):  # bfloat16 scores: probs off by percents
        query_wide = query.to(key.dtype) * scaling
        out = _suffix_attention(
            query_wide, key, value, attention_mask, cache, prefix_keys, prefix_values, sliding_window, softcap
        )
    return out.to(query.dtype).transpose(1, 2), None


def _suffix_attention(
    query, key, value, attention_mask, cache, prefix_keys, prefix_values, sliding_window, softcap
) -> Tensor:
    """One softmax over the scores of a row's question and of its own suffix: -> [R, H G, T, d]."""
    rows, heads, new, width = query.shape
    shared = heads // key.shape[1]
    query = query.reshape(rows, key.shape[1], shared * new, width)  # G query heads share a key head
    scores = _capped(cache.stack(query) @ prefix_keys.transpose(-1, -2), softcap)  # [B, H, width G T, Q]
    left = cache.unstack(scores.masked_fill(~cache.valid[:, None, None], -torch.inf))  # [R, H, G T, Q]
    right = _capped(query @ key.transpose(-1, -2), softcap)  # [R, H, G T, S]
    if attention_mask is not None:
        right = right.masked_fill(~attention_mask.repeat(1, 1, shared, 1), -torch.inf)
    if sliding_window is not None:  # padding is on the left, so distances are differences of indices
        near = _near(sliding_window, new, left.shape[-1] + right.shape[-1], query.device).repeat(shared, 1)
        far_left, far_right = (~near).split([left.shape[-1], right.shape[-1]], -1)
        left, right = left.masked_fill(far_left, -torch.inf), right.masked_fill(far_right, -torch.inf)
    probs = torch.cat([left, right], -1).softmax(-1)
    left, right = probs.split([left.shape[-1], right.shape[-1]], -1)
    single = right.shape[2] == 1  # vector times small matrix: faster as elementwise product and sum
    right = (right.transpose(-1, -2) * value).sum(2, keepdim=True) if single else right @ value
    out = cache.unstack(cache.stack(left) @ prefix_values) + right
    return out.reshape(rows, heads, new, width)


def _near(window: int, new: int, length: int, device) -> Bool[Tensor, "T S"]:
    """Whether a key is inside the window of a query; the queries are the last `new` positions."""
    index = torch.arange(length, device=device)
    return index[length - new :, None] - index < window


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _wide(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both one precision wider than the values: float32 for half precision, else float64."""
    dtype = torch.float32 if values.dtype in (torch.bfloat16, torch.float16) else torch.float64
    # contiguous: with strided keys BLAS may round the rows of a group differently
    strides = torch.contiguous_format
    return keys.to(dtype, memory_format=strides), values.to(dtype, memory_format=strides)


_current: ContextVar[RolloutCache] = ContextVar("rollout_cache")  # not all families pass keywords on


@contextmanager
def rollout_attention(config, cache: RolloutCache):
    """Inside, models of this `config` call `attention` with `cache`; calls outside are not affected."""
    before = config._attn_implementation
    token = _current.set(cache)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _current.reset(token)


AttentionInterface.register(NAME, attention)
