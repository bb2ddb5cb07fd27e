"""Dropout masks as values: one Bernoulli mask per rollout, a pure function of an integer seed.

    m_k ~ Bernoulli(1 - p) per (site, feature), scaled by 1 / (1 - p)

`rollout_seeds` names each rollout by (run seed, step, problem id, k); `draw_masks` turns seeds into mask values with a
counter-based hash (splitmix64), so the same four numbers give the same bits on every device, in any batch and in any
process. No generator is shared between rows and none has to be saved.

Source: the method is arXiv 2606.10184; the variational reading is Gal & Ghahramani, arXiv 1512.05287; the hash is the
finaliser of Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MASK_STREAM, SAMPLE_STREAM = 1, 2  # independent streams of one rollout seed
SCHEMES = ("shared", "per_step", "none")
SITES = ("attention", "mlp", "embedding")
SCOPES = ("latent", "prompt+latent", "all")


@dataclass(frozen=True)
class MaskSpec:
    """Which dropout mask a rollout wears.

    scheme: "shared" (one mask for all latent steps: the method), "per_step" (a fresh one per slot) or "none".
    rate:   p in [0, 1), the share of features set to zero.
    sites:  "attention" / "mlp" (the output of that branch in every layer), "embedding" (the input vectors).
    scope:  "latent" (`<|start-latent|>` to the last thought), "prompt+latent" or "all" (the answer too).
    """

    scheme: str = "shared"
    rate: float = 0.1
    sites: tuple[str, ...] = ("attention", "mlp")
    scope: str = "latent"

    def __post_init__(self):
        for name, allowed in (("scheme", SCHEMES), ("scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"mask {name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if not isinstance(self.rate, (int, float)) or not 0 <= self.rate < 1:
            raise ValueError(f"mask rate: got {self.rate!r}, expected a number in [0, 1); 0.1 drops one feature in ten")
        sites = self.sites
        if isinstance(sites, str) or not sites or set(sites) - set(SITES) or len(set(sites)) < len(sites):
            raise ValueError(f"mask sites: got {sites!r}, expected a list of different names from {', '.join(SITES)}")
        object.__setattr__(self, "sites", tuple(sites))


@dataclass(frozen=True)
class Masks:
    """Mask values of R rollouts: [R, S, D] (shared) or [R, slots, S, D] (per_step); entries 0 or 1 / (1 - p)."""

    values: torch.Tensor
    spec: MaskSpec

    def factors(self, slots: Sequence[int]) -> torch.Tensor:
        """The factors of a forward pass whose positions lie in `slots`: [R, 1 or len(slots), S, D]."""
        if self.spec.scheme == "shared":
            return self.values[:, None]
        if len(set(slots)) == 1:
            return self.values[:, slots[0]][:, None]
        return self.values[:, list(slots)]

    def take(self, rows: torch.Tensor | slice) -> Masks:
        """The masks of some rows."""
        return Masks(self.values[rows], self.spec)


def rollout_seeds(run_seed: int, step: int, problem_ids: Sequence[str], num_generations: int) -> torch.Tensor:
    """One seed per rollout, from (run seed, step, problem id, k) alone: [R] int64, row b * K + k.

    Batch size, rank and process do not enter. A problem drawn twice in one step continues counting k.
    """
    seen: Counter[str] = Counter()
    seeds = []
    for problem_id in problem_ids:
        first = seen[problem_id]
        seen[problem_id] += num_generations
        for k in range(first, first + num_generations):
            digest = hashlib.blake2b(repr((run_seed, step, problem_id, k)).encode(), digest_size=8).digest()
            seeds.append(int.from_bytes(digest, "little", signed=True))
    return torch.tensor(seeds, dtype=torch.int64)


def draw_masks(spec: MaskSpec, model, seeds: torch.Tensor, *, num_slots: int | None = None) -> Masks | None:
    """Draw the masks of R rollouts from their seeds: [R, S, D], or [R, num_slots, S, D] for "per_step".

    `model` (a LatentReasoner) gives the number of sites S, the width D, device and dtype, and how many slots a
    rollout has unless `num_slots` says so. Scheme "none" gives None. Bits are the same on every device.
    """
    if spec.scheme == "none":
        return None
    shape = (model.num_sites(spec.sites), model.width)
    if spec.scheme == "per_step":
        shape = (num_slots or model.num_slots(spec.scope), *shape)
    counters = torch.arange(math.prod(shape), device=model.device)
    words = hash_words(seeds.to(model.device), MASK_STREAM, counters)
    keep = _shift_right(words, 11) >= round(spec.rate * 2**53)
    values = keep.to(model.dtype).mul_(1 / (1 - spec.rate))
    return Masks(values.view(len(seeds), *shape), spec)


def uniforms(seeds: torch.Tensor, t: int) -> torch.Tensor:
    """One uniform number in [0, 1) per row for answer token t: [R] float64, a function of (seed, t) alone."""
    words = hash_words(seeds, SAMPLE_STREAM, torch.tensor([t], device=seeds.device))
    return _shift_right(words, 11)[:, 0].double() * 2.0**-53


def hash_words(seeds: torch.Tensor, stream: int, counters: torch.Tensor) -> torch.Tensor:
    """64 pseudorandom bits for each (seed, stream, counter): [R, N] int64."""
    keys = _mix(seeds + _signed(stream * 0xD1342543DE82EF95))
    return _mix(keys[:, None] + (counters + 1) * _signed(0x9E3779B97F4A7C15))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser; int64 products wrap around, as the algorithm wants."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # logical shift: int64 shifts keep the sign


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
