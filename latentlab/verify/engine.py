"""The rows of `latentlab verify` that depend on device and precision.

The engine must equal the plain definition of a latent rollout (reference.py), and itself in any
batch. Bound for "equal", nats, largest over all tokens: float64 1e-12, float32 1e-5, bfloat16 0.1.

In bfloat16 two tokens may be equally likely, so answers that differ are reported and do not fail.
"""

from __future__ import annotations

import copy
import hashlib
import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from latentlab.masks import SCOPES, Masks, MaskSpec, draw_masks, rollout_seeds
from latentlab.model import LatentReasoner
from latentlab.pretrained.scratch import build_model, word_tokenizer
from latentlab.problems import Problem
from latentlab.rollouts import Rollouts, replay_gap, rollout
from latentlab.theory.enumeration import sharpen
from latentlab.theory.proofs import Property, judge
from latentlab.verify.reference import branches, naive_rollout

BOUNDS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.1}
WORDS = ("one", "two", "three", "four", "five", "six", "?", "\n")
QUESTIONS = ("one ?", "two three four five six ?", "three one", "four two two two ?", "five", "six six six six six")
ALL_SITES = ("attention", "mlp", "embedding")
LLAMA: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
# sha256 of the mask bits of one fixed rollout: the same on every device and in every process
BITS_SHA256 = "75a81c5b80911a07a310038aa2ef0bd5b7078ff869dd78ffd7dcbe309dada5f9"


class Engine:
    """What the rows need: two small models on `device` in `dtype`, six questions, the bound."""

    def __init__(self, device: str, dtype: str):
        self.device, self.bound = device, BOUNDS[dtype]
        self.tokens_decide = dtype != "bfloat16"
        gpt2 = build_model(
            WORDS, n_layer=2, n_embd=32, n_head=4, n_positions=64, num_thoughts=3, max_new_tokens=6, seed=0
        )
        self.models = {"gpt2": gpt2, "llama": _llama()}
        for model in self.models.values():
            sharpen(model, 8).to(device=device, dtype=getattr(torch, dtype))
        self.problems = tuple(Problem(f"q{i}", text, (), "1", "verify") for i, text in enumerate(QUESTIONS))


def _llama() -> LatentReasoner:
    tokenizer = word_tokenizer(WORDS)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, **LLAMA)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LatentReasoner(LlamaForCausalLM(config), tokenizer, num_thoughts=3, max_new_tokens=6)


def _sample(model, problems, spec, *, k: int = 4, temperature: float = 1.0, run_seed: int = 0) -> Rollouts:
    """K rollouts of each problem under the masks of `spec` (None: no masks)."""
    return rollout(model, problems, num_generations=k, masks=spec, temperature=temperature, run_seed=run_seed, step=0)


@torch.no_grad()
def replay(e: Engine) -> Property:
    """Recorded log-probs equal re-scored: all schemes, scopes, backbones; a shrinking batch."""
    gaps = []
    for model in e.models.values():
        for scheme, scope in product(("shared", "per_step"), SCOPES):
            out = _sample(model, e.problems, MaskSpec(scheme, 0.2, ALL_SITES, scope), temperature=0.8)
            gaps.append(_replay_gap(model, out))
        gaps.append(_replay_gap(model, _shrinking_batch(e, model)))
    note = f"max |re-scored - recorded| over {len(gaps)} cases, one shrinks to a single row"
    return judge("replay", _largest(gaps), e.bound, note)


def _replay_gap(model, out: Rollouts) -> float:
    """Largest gap of recorded and re-scored log-probs; infinite for an answer without its end."""
    ended = ((out.tokens == model.eos_id) & out.token_mask).any(1) | (out.token_mask.sum(1) == model.max_new_tokens)
    return replay_gap(model.score(out, masks=out.masks), out) if ended.all() else math.inf


def _shrinking_batch(e: Engine, model) -> Rollouts:
    """Three rollouts of which two end early: the batch shrinks to one row."""
    for seed in range(200):
        out = _sample(model, e.problems[:3], MaskSpec(rate=0.2), k=1, run_seed=seed)
        if out.token_mask[:, -1].sum() == 1:
            return out
    raise RuntimeError("got no batch that shrinks to a single row, expected one; answers never end early: check eos")


@torch.no_grad()
def mask_identity(e: Engine) -> Property:
    """A shared mask equals scaling the output features of the branches' last linear maps."""
    gaps = []
    for model, problem in product(e.models.values(), e.problems[:3]):
        out = _sample(model, [problem], MaskSpec(rate=0.2, scope="all"), k=1)
        scaled = _scaled_copy(model, _values(out.masks)[0])
        gaps.append((scaled.score(out, masks=None) - model.score(out, masks=out.masks)).abs().max().item())
    note = "masked outputs = scaled weight columns and biases, without hooks"
    return judge("mask_identity", _largest(gaps), e.bound, note)


def _scaled_copy(model: LatentReasoner, mask: torch.Tensor) -> LatentReasoner:
    """A copy with mask [S, D] multiplied into weights and biases; sites attention, mlp."""
    copied = copy.deepcopy(model)
    for linear, factor in zip(branches(copied.lm, ("attention", "mlp")), mask, strict=True):
        linear.weight.mul_(factor if isinstance(linear, Conv1D) else factor[:, None])  # Conv1D: [in, out]
        if linear.bias is not None:
            linear.bias.mul_(factor)
    return copied


def _values(masks: Masks | None) -> torch.Tensor:
    assert masks is not None
    return masks.values


def mask_statistics(e: Engine) -> Property:
    """Rate, scale and independence of a million bits; equal seeds give equal bits everywhere."""
    model, rate, sigma = e.models["gpt2"], 0.1, 5.0
    ids = [f"p{i}" for i in range(1000)]
    base = _bits(model, rollout_seeds(0, 0, ids, 8), rate)  # [8000, S * D]
    drop = 1 - base.mean().item()
    error = abs(drop - rate) / math.sqrt(rate * (1 - rate) / base.numel())
    others = (
        _bits(model, rollout_seeds(1, 0, ids, 8), rate),  # another run seed
        _bits(model, rollout_seeds(0, 1, ids, 8), rate),  # another step
        base.view(1000, 8, -1).roll(1, 0).reshape(base.shape),  # another problem
        base.view(1000, 8, -1).roll(1, 1).reshape(base.shape),  # another k
    )
    worst = max(abs(_correlation(base, other)) * math.sqrt(base.numel()) for other in others)
    values = _values(draw_masks(MaskSpec(rate=rate), model, rollout_seeds(0, 0, ids, 1)))
    scaled = torch.isin(values, torch.tensor([0, 1 / (1 - rate)], dtype=values.dtype, device=values.device)).all()
    batch, alone = (_bits(model, rollout_seeds(0, 0, some, 4), 0.3) for some in (ids[:4], ids[1:2]))
    same = torch.equal(batch[4:8], alone) and _bits_sha256(model.device) == _bits_sha256("cpu") == BITS_SHA256
    note = f"standard errors, {base.numel():.2g} bits: rate {drop:.5f}, correlations; same bits on {e.device} and CPU"
    return judge("mask_statistics", max(error, worst), sigma, note, also=bool(scaled) and same)


def _bits(model, seeds: torch.Tensor, rate: float) -> torch.Tensor:
    """Kept features as 1.0, dropped as 0.0: [R, S * D] float64."""
    return (_values(draw_masks(MaskSpec(rate=rate), model, seeds)) > 0).flatten(1).double()


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()).item()


def _bits_sha256(device) -> str:
    """sha256 of the mask bits [S, D] of one fixed rollout, drawn on `device`."""
    shape = SimpleNamespace(width=64, dtype=torch.float32, device=torch.device(device), num_sites=lambda sites: 4)
    bits = _values(draw_masks(MaskSpec(rate=0.3), shape, rollout_seeds(7, 3, ["golden"], 2)))[1] > 0
    return hashlib.sha256(bits.cpu().numpy().tobytes()).hexdigest()


def batch_invariance(e: Engine) -> Property:
    """Tokens and log-probs of a problem do not depend on the rest of its batch, nor on K."""
    specs = (MaskSpec(rate=0.2), MaskSpec("per_step", 0.2, ALL_SITES, "all"))
    pairs = []
    for model, temperature, spec in product(e.models.values(), (0.0, 1.0), specs):
        together = _sample(model, e.problems, spec, temperature=temperature)
        for i, problem in enumerate(e.problems):
            alone = _sample(model, [problem], spec, k=2, temperature=temperature)
            for k in range(2):
                (a, a_logp), (b, b_logp) = _answer(alone, k), _answer(together, i * 4 + k)
                pairs.append((a == b, _difference(a_logp, b_logp) if a == b else 0.0))
    return _judge_pairs("batch_invariance", e, pairs, "each problem alone with K = 2 against all six with K = 4")


@torch.no_grad()
def naive_equality(e: Engine) -> Property:
    """The engine equals the plain definition: one rollout at a time, no cache, no batch."""
    specs = (None, MaskSpec(rate=0.2), MaskSpec("shared", 0.2, ALL_SITES, "all"))
    scopes, pairs = {"gpt2": "prompt+latent", "llama": "all"}, []
    for name, model in e.models.items():
        cases = zip((0.0, 1.0, 1.0, 0.7), (*specs, MaskSpec("per_step", 0.2, ALL_SITES, scopes[name])), strict=True)
        for temperature, spec in cases:
            out = _sample(model, e.problems, spec, k=2, temperature=temperature)
            for row, seed in enumerate(out.seeds.to(e.device)):
                tokens, logp = _answer(out, row)
                masks = out.masks and out.masks.take(slice(row, row + 1))
                question, settings = out.problems[row // 2].question, (temperature, seed[None], masks, tokens)
                naive, naive_logp = naive_rollout(model, question, *settings)
                pairs.append((naive == tokens, _difference(naive_logp, logp)))
    return _judge_pairs("naive_equality", e, pairs, "against the uncached reference")


def _answer(out: Rollouts, row: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probs of one rollout, up to its end."""
    length = int(out.token_mask[row].sum())
    return out.tokens[row, :length].tolist(), out.logp[row, :length].tolist()


def _difference(a: list[float], b: list[float]) -> float:
    return _largest([abs(x - y) for x, y in zip(a, b, strict=True)])


def _largest(gaps: list[float]) -> float:
    """The largest gap; NaN if one is NaN, which Python's max would hide."""
    return torch.tensor(gaps, dtype=torch.float64).max().item()


def _judge_pairs(name: str, e: Engine, pairs: list[tuple[bool, float]], note: str) -> Property:
    """From pairs of answers: are the tokens equal, and the largest difference of log-probs."""
    different = sum(not same for same, _ in pairs)
    note += f": {different} of {len(pairs)} answers differ"
    return judge(name, _largest([gap for _, gap in pairs]), e.bound, note, also=different == 0 or not e.tokens_decide)


CHECKS = {f.__name__: f for f in (replay, mask_identity, mask_statistics, batch_invariance, naive_equality)}
