"""Noise as values: one dropout mask per rollout, a pure function of an integer seed.

    m_k ~ Bernoulli(1 - p) / (1 - p)    per site and feature; k numbers the rollouts of a problem
    h <- h + m_k * branch(h)            at every masked position: one sample of the weights

    e_k ~ N(0, p^2)                     noise "gaussian", in place of a mask
    x <- x + rms(x) * e_k               rms(x): root mean square of the features of x

`rollout_seeds` derives one seed per rollout from (run seed, step, problem id, k); `draw_masks` turns
seeds into mask values with a counter-based hash (splitmix64). The same four numbers give the same
bits on every device, in any batch and in any process (of Gaussian noise up to last digits); there is
no generator state to share or save.

Source: Dropout-GRPO, arXiv 2606.10184; a mask as a sample of the weights: Gal & Ghahramani,
arXiv 1512.05287; the hash: Steele, Lea & Flood, "Fast splittable pseudorandom number generators"
(OOPSLA 2014); antithetic pairs: Hammersley & Morton 1956. Deviation: <|start-latent|> is masked too,
else the first thoughts of all K rollouts were equal.

Dimensions: R rollouts (rows), S mask sites, D width, T positions of one forward pass.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

MASK_STREAM, SAMPLE_STREAM = 1, 2  # independent random streams of one rollout seed
SCHEMES = ("shared", "per_step", "antithetic", "none")
NOISES = ("dropout", "gaussian")
SITES = ("attention", "mlp", "embedding")
SCOPES = ("latent", "prompt+latent", "all")


@dataclass(frozen=True)
class MaskSpec:
    """The kind of dropout mask, or of other noise, applied to a rollout.

    scheme: "shared" (one mask for all latent steps: the method), "per_step" (a new one per slot),
        "antithetic" (shared; rollouts 2j and 2j + 1 of a problem draw theirs from u and 1 - u) or "none".
    rate: p in [0, 1), the probability that a feature is set to zero; noise "gaussian": the standard
        deviation in units of the root mean square of what it is added to.
    sites: "attention" / "mlp" (the output of that branch in every layer), "embedding" (the inputs).
    scope: "latent" (<|start-latent|> to the last thought), "prompt+latent" or "all" (the answer too).
    noise: "dropout" (a mask multiplies) or "gaussian" (noise is added).
    """

    scheme: str = "shared"
    rate: float = 0.1
    sites: tuple[str, ...] = ("attention", "mlp")
    scope: str = "latent"
    noise: str = "dropout"

    def __post_init__(self):
        for name, allowed in (("scheme", SCHEMES), ("scope", SCOPES), ("noise", NOISES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"mask {name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if not isinstance(self.rate, Real) or isinstance(self.rate, bool) or not 0 <= self.rate < 1:
            raise ValueError(f"mask rate: got {self.rate!r}, expected a number in [0, 1); 0.1 drops one feature in ten")
        sites = self.sites
        if isinstance(sites, str) or not sites or set(sites) - set(SITES) or len(set(sites)) < len(sites):
            raise ValueError(f"mask sites: got {sites!r}, expected a list of different names from {', '.join(SITES)}")
        object.__setattr__(self, "sites", tuple(sites))
        object.__setattr__(self, "rate", float(self.rate))


# -- mask values ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masks:
    """Mask values of R rollouts: 0 or 1 / (1 - p), or of noise "gaussian" what is added, / rms.

    A per-step mask has one slot for question and <start>, one for each thought and, in scope "all",
    one for each answer position.
    """

    values: Float[Tensor, "R *slots S D"]  # [R, S, D], of per_step [R, slots, S, D]
    spec: MaskSpec

    def at(self, slot: int, count: int) -> Float[Tensor, "R T S D"]:
        """Values of `count` positions from slot `slot` on; T = 1 where they share one mask."""
        return self.values[:, slot : slot + count] if self.spec.scheme == "per_step" else self.values[:, None]

    def take(self, rows: Int[Tensor, " N"] | slice) -> Masks:
        """The masks of some rows."""
        return Masks(self.values[rows], self.spec)


def whole_number(name: str, value: SupportsIndex, least: int | None = None) -> int:
    """`value` as a plain int: equal numbers of other types (NumPy, tensors) give equal random numbers.

    Raises ValueError for anything else, bool included, and for a number below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    is_bool = getattr(value, "dtype", type(value)) in (bool, torch.bool)
    if number is None or is_bool or (least is not None and number < least):
        expected = "a whole number" if least is None else f"a whole number of at least {least}"
        remedy = "correct it" if number is not None and not is_bool else "convert it with int()"
        raise ValueError(f"{name}: got {value!r}, expected {expected}; {remedy}")
    return number


def rollout_seeds(
    run_seed: SupportsIndex, step: SupportsIndex, problem_ids: Sequence[str], num_generations: SupportsIndex
) -> Int[Tensor, " R"]:
    """One int64 seed per rollout, a hash of (run seed, step, problem id, k); row b * K + k.

    It does not depend on batch size, rank or process. If a problem occurs twice in one step, k
    continues counting. Raises ValueError for numbers that are not whole and ids that are not text.
    """
    run_seed, step = whole_number("run_seed", run_seed), whole_number("step", step)
    num_generations = whole_number("num_generations", num_generations, 1)
    for problem_id in problem_ids:
        if type(problem_id) is not str:
            raise ValueError(f"problem id: got {problem_id!r:.80}, expected text; convert it with str()")
    seen: Counter[str] = Counter()
    seeds = []
    for problem_id in problem_ids:
        first = seen[problem_id]
        seen[problem_id] += num_generations
        for k in range(first, first + num_generations):
            digest = hashlib.blake2b(repr((run_seed, step, problem_id, k)).encode(), digest_size=8).digest()
            seeds.append(int.from_bytes(digest, "little", signed=True))
    return torch.tensor(seeds, dtype=torch.int64)


def draw_masks(
    spec: MaskSpec, model, seeds: Int[Tensor, " R"], *, num_generations: int = 1, num_slots: int | None = None
) -> Masks | None:
    """The masks of R rollouts, from their seeds alone; None for scheme "none".

    `model` (a LatentReasoner) gives S, D, device, dtype and, unless `num_slots` is given, the number
    of slots of a per-step mask. Raises ValueError for an odd `num_generations` (K) under "antithetic".
    """
    if spec.scheme == "none":
        return None
    if spec.scheme == "antithetic" and num_generations % 2:
        got = f"got {num_generations} rollouts per problem, expected an even number, as they form pairs"
        raise ValueError(f"mask scheme antithetic: {got}; change num_generations, or use the scheme shared")
    slots = [num_slots or model.num_slots(spec.scope)] if spec.scheme == "per_step" else []
    shape = (*slots, model.num_sites(spec.sites), model.width)
    counters = torch.arange(math.prod(shape), device=model.device)
    drawn = seeds[::2] if spec.scheme == "antithetic" else seeds
    bits = _shift_right(hash_words(drawn.to(model.device), MASK_STREAM, counters), 11)  # 53 of them, as in a float64
    if spec.scheme == "antithetic":
        bits = torch.stack([bits, 2**53 - 1 - bits], 1).flatten(0, 1)
    if spec.noise == "gaussian":  # (n + 1/2) / 2^52 is exact
        values = torch.special.ndtri(((bits >> 1).double() + 0.5) * 2.0**-52).mul_(spec.rate).to(model.dtype)
    else:
        values = (bits >= round(spec.rate * 2**53)).to(model.dtype).mul_(1 / (1 - spec.rate))
    return Masks(values.view(len(seeds), *shape), spec)


def uniforms(seeds: Int[Tensor, " R"], t: int) -> Float[Tensor, " R"]:
    """One float64 in [0, 1) per row for answer token t, a function of (seed, t) alone."""
    words = hash_words(seeds, SAMPLE_STREAM, torch.tensor([t], device=seeds.device))
    return _shift_right(words, 11)[:, 0].double() * 2.0**-53


def hash_words(seeds: Int[Tensor, " R"], stream: int, counters: Int[Tensor, " N"]) -> Int[Tensor, "R N"]:
    """64 pseudorandom bits (int64) for each (seed, stream, counter)."""
    keys = _mix(seeds + _signed(stream * 0xD1342543DE82EF95))
    return _mix(keys[:, None] + (counters + 1) * _signed(0x9E3779B97F4A7C15))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer; int64 products wrap around, as it requires."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # logical shift: int64 shifts keep the sign


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


# -- masks on the outputs of modules --------------------------------------------------------------


@contextmanager
def perturbed(modules: list[nn.Module], values: Float[Tensor, "R T S D"], count: int, noise: str = "dropout"):
    """Inside, values[:, :, s] act on the first `count` output positions of module s."""
    with ExitStack() as hooks:
        for s, module in enumerate(modules):
            hook = lambda _, __, out, v=values[:, :, s]: perturb(out, v, count, noise)  # noqa: E731
            hooks.enter_context(module.register_forward_hook(hook))
        yield


def perturb(
    out: Float[Tensor, "R N D"], values: Float[Tensor, "R T D"], count: int, noise: str
) -> Float[Tensor, "R N D"]:
    """Let `values` (T = count, or 1 if shared) act on the first `count` of N positions.

    noise: "dropout" multiplies by them, "gaussian" adds them times the root mean square of a position.
    """
    if count < out.shape[1]:
        return torch.cat([perturb(out[:, :count], values, count, noise), out[:, count:]], 1)
    if noise == "dropout":
        return out * values
    rms = torch.linalg.vector_norm(out, dim=-1, keepdim=True, dtype=values.dtype) / math.sqrt(out.shape[-1])
    return out + values * rms
