"""Attention of many rollouts over one question, which is kept once.

A row (one rollout) attends to its question, the prefix, and to what came after it, its own suffix. The keys and values
of a prefix are equal for the K rows of a problem, so they are stored once per problem; a row's attention is one softmax
over the scores of both parts:

    scores = [ q K_prefix^T | q K_suffix^T ]     output = p_prefix V_prefix + p_suffix V_suffix

The products with the prefix are one per problem, the queries of its rows stacked. Nothing is repeated K times, neither
forward nor backward, where the same products sum a prefix's gradient over its rows.

Suffix attention is computed one precision wider than the model's other products (float64 in a float32 model, float32
under bfloat16): its sums depend on how many positions are passed at once, one when sampling, all when scoring, and
rounded to float32 afterwards they agree. So on a CPU a float32 replay is mostly exact to the last bit.

transformers runs it: `attention` is registered as the attention function "latentlab", and a `RolloutCache` is passed
as `past_key_values` and, for the attention function to see it, as the keyword `rollout_cache`.

Letters: B problems, K rollouts each, R rows, H heads (G query heads share one of keys), Q prefix and S suffix
positions, T new ones, d head width.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "latentlab"


class RolloutCache(Cache):
    """Keys and values of B prefixes, and of the suffixes of the rows that are still in the batch.

    valid: [B, Q] bool, False at padding, which is never seen. capacity: suffix positions to set aside; a longer suffix
    is copied to grow. Until `start_rows` the positions that are passed belong to the prefix.
    """

    def __init__(self, valid: torch.Tensor, capacity: int):
        super().__init__(layers=[])
        self.valid, self.capacity = valid, capacity
        self.prefix: list[tuple[torch.Tensor, torch.Tensor]] = []  # by layer: [B, H, Q, d] each
        self.suffix: list[tuple[Positions, Positions]] = []
        self.problem: torch.Tensor | None = None  # [R] which prefix a row attends to; None: still in the prefix
        self.place: torch.Tensor | None = (
            None  # [R] where a row is stacked among B * width; None: rows fill it in order
        )
        self.width = 0  # rows of the largest group

    def start_rows(self, num_generations: int) -> None:
        """From here on each problem has `num_generations` rows, in order."""
        count = len(self.valid)
        self.problem = torch.arange(count, device=self.valid.device).repeat_interleave(num_generations)
        self.width, self.place = num_generations, None
        # contiguous: on strided keys BLAS may round the rows of a group differently, which then are not bit-equal
        self.prefix = [tuple(part.contiguous() for part in _wide(*layer)) for layer in self.prefix]
        self.suffix = [(Positions(self.capacity), Positions(self.capacity)) for _ in self.prefix]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Add the new positions of a layer; returns all keys and values of the part they belong to."""
        if self.problem is None:
            self.prefix.append((keys, values))
            return keys, values
        new = _wide(keys, values)
        return tuple(part.append(x) for part, x in zip(self.suffix[layer_idx], new, strict=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Suffix positions so far."""
        return self.suffix[layer_idx][0].length if self.suffix else 0

    def visible(self, new: int) -> torch.Tensor | None:
        """Which keys of their own part `new` positions may see: bool [B or 1, 1, T, Q or S]; None: all of them.

        Causal. A position of padding sees itself, so that it is no softmax over nothing.
        """
        if self.problem is not None and new == 1:
            return None
        length = self.get_seq_length() + new
        index = torch.arange(length, device=self.valid.device)
        query = index[length - new :, None]
        causal = (index <= query)[None, None]
        if self.problem is not None:
            return causal
        return causal & self.valid[:, None, None, :] | (index == query)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but `rows` [R'], in ascending order; prefixes go when half of them have lost all rows."""
        self.problem = self.problem[rows]
        self.suffix = [tuple(part.keep(rows) for part in layer) for layer in self.suffix]
        sizes = self.problem.bincount(minlength=len(self.valid))  # [B]
        alive = sizes.nonzero()[:, 0]
        if 2 * len(alive) <= len(sizes):
            self.prefix = [(keys[alive], values[alive]) for keys, values in self.prefix]
            self.valid, self.problem, sizes = self.valid[alive], (sizes > 0).cumsum(0)[self.problem] - 1, sizes[alive]
        self.width = int(sizes.max())
        first = sizes.cumsum(0) - sizes
        rank = torch.arange(len(rows), device=rows.device) - first[self.problem]
        self.place = None if len(rows) == len(sizes) * self.width else self.problem * self.width + rank

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        """[R, H, T, e] -> [B, H, width * T, e]: the rows of a problem one under the other."""
        count = len(self.valid)
        if self.place is not None:
            x = x.new_zeros(count * self.width, *x.shape[1:]).index_copy(0, self.place, x)
        return x.unflatten(0, (count, self.width)).transpose(1, 2).flatten(2, 3)

    def unstack(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `stack`."""
        x = x.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.place is None else x[self.place]


class Positions:
    """Keys or values [R, H, S, d] that grow by positions: in place, unless a gradient is to flow through them."""

    def __init__(self, capacity: int, buffer: torch.Tensor | None = None, length: int = 0):
        self.capacity, self.buffer, self.length = capacity, buffer, length

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Add new [R, H, T, d] behind the others; returns all of them."""
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

    def keep(self, rows: torch.Tensor) -> Positions:
        """Those of some rows."""
        return Positions(self.capacity, self.buffer[rows], self.length)


def attention(module, query, key, value, attention_mask, *, scaling: float, rollout_cache: RolloutCache, **_):
    """Attention as transformers calls it: query [R, H G, T, d], key and value [R, H, S, d] -> [R, T, H G, d], None.

    Within the prefix (R is B) this is ordinary attention; in the suffix key and value are the suffix's, and
    attention_mask [1, 1, T, S] hides what comes later.
    """
    cache = rollout_cache
    if cache.problem is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    prefix = cache.prefix[module.layer_idx]
    with torch.autocast(query.device.type, enabled=False):  # scores rounded to bfloat16 would move probs by percents
        out = _suffix_attention(query.to(key.dtype) * scaling, key, value, attention_mask, cache, *prefix)
    return out.to(query.dtype).transpose(1, 2), None


def _suffix_attention(query, key, value, attention_mask, cache, prefix_keys, prefix_values) -> torch.Tensor:
    """[R, H G, T, d]: one softmax over the scores of a row's question and of its own suffix."""
    rows, heads, new, width = query.shape
    shared = heads // key.shape[1]
    query = query.reshape(rows, key.shape[1], shared * new, width)  # a head of keys serves G of queries
    scores = cache.stack(query) @ prefix_keys.transpose(-1, -2)  # [B, H, width G T, Q]
    left = cache.unstack(scores.masked_fill(~cache.valid[:, None, None], -torch.inf))  # [R, H, G T, Q]
    right = query @ key.transpose(-1, -2)  # [R, H, G T, S]
    if attention_mask is not None:
        right = right.masked_fill(~attention_mask.repeat(1, 1, shared, 1), -torch.inf)
    probs = torch.cat([left, right], -1).softmax(-1)
    left, right = probs.split([left.shape[-1], right.shape[-1]], -1)
    single = right.shape[2] == 1  # one row times a small matrix: faster as elementwise product and sum
    right = (right.transpose(-1, -2) * value).sum(2, keepdim=True) if single else right @ value
    out = cache.unstack(cache.stack(left) @ prefix_values) + right
    return out.reshape(rows, heads, new, width)


def _wide(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both one precision wider than the values' products: float32 for half precision, else float64."""
    dtype = torch.float32 if values.dtype in (torch.bfloat16, torch.float16) else torch.float64
    return keys.to(dtype), values.to(dtype)


@contextmanager
def rollout_attention(config):
    """While inside, models of `config` call `attention`; plain calls of the same model are left as they are."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(NAME, attention)
