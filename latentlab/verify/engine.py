"""The rows of `latentlab verify` that depend on device and precision.

The engine must equal the plain definition of a latent rollout (reference.py), and itself in any
batch. Bound on the largest difference, nats: float64 1e-12, float32 1e-5, bfloat16 0.1.
In bfloat16 two tokens may be equally likely, so answers that differ are reported and do not fail.
"""

from __future__ import annotations

import copy
import hashlib
import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from latentlab.masks import NOISES, SCOPES, MaskSpec, draw_masks, rollout_seeds
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
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA |= dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 0)
# sha256 of the mask bits of one fixed rollout: the same on every device and in every process
BITS_SHA256 = "75a81c5b80911a07a310038aa2ef0bd5b7078ff869dd78ffd7dcbe309dada5f9"


class Engine:
    """What the rows need: two small models on `device` in `dtype`, six questions, the bound."""

    def __init__(self, device: str, dtype: str):
        self.device, self.bound, self.tokens_decide = device, BOUNDS[dtype], dtype != "bfloat16"
        self.problems = tuple(Problem(f"q{i}", text, (), "1", "verify") for i, text in enumerate(QUESTIONS))
        sizes: dict[str, Any] = {"num_thoughts": 3, "max_new_tokens": 6}
        gpt2 = build_model(WORDS, n_layer=2, n_embd=32, n_head=4, n_positions=64, seed=0, **sizes)
        tokenizer = word_tokenizer(WORDS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA))
        self.models = {"gpt2": gpt2, "llama": LatentReasoner(llama, tokenizer, **sizes)}
        for model in self.models.values():
            sharpen(model, 8).to(device=device, dtype=getattr(torch, dtype))


def _sample(model, problems, spec, *, k: int = 4, temperature: float = 1.0, run_seed: int = 0) -> Rollouts:
    return rollout(model, problems, num_generations=k, masks=spec, temperature=temperature, run_seed=run_seed, step=0)


@torch.no_grad()
def replay(e: Engine) -> Property:
    """Recorded log-probs equal re-scored: all schemes, scopes, backbones; a shrinking batch."""
    specs = [
        MaskSpec(scheme, 0.2, ALL_SITES, scope, noise)
        for scheme, noise in product(("shared", "per_step", "antithetic"), NOISES)
        for scope in SCOPES
    ]
    gaps = []
    for model in e.models.values():
        batches = [_sample(model, e.problems, spec, temperature=0.8) for spec in specs]
        gaps += [_replay_gap(model, out) for out in (*batches, _shrinking_batch(e, model))]
    note = f"max |re-scored - recorded| over {len(gaps)} cases, one shrinks to a single row"
    return judge("replay", np.max(gaps), e.bound, note)


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
        out, scaled = _sample(model, [problem], MaskSpec(rate=0.2, scope="all"), k=1), copy.deepcopy(model)
        assert out.masks is not None
        for linear, factor in zip(branches(scaled.lm, ("attention", "mlp")), out.masks.values[0], strict=True):
            linear.weight.mul_(factor if isinstance(linear, Conv1D) else factor[:, None])  # Conv1D: [in, out]
            if linear.bias is not None:
                linear.bias.mul_(factor)
        gaps.append((scaled.score(out, masks=None) - model.score(out, masks=out.masks)).abs().max().item())
    note = "masked outputs = scaled weight columns and biases, without hooks"
    return judge("mask_identity", np.max(gaps), e.bound, note)


def mask_statistics(e: Engine) -> Property:
    """Rate, scale and independence of a million bits; equal seeds give equal bits everywhere."""
    model, rate, ids = e.models["gpt2"], 0.1, [f"p{i}" for i in range(1000)]
    values = _mask_values(model, rollout_seeds(0, 0, ids, 8), rate)  # [8000, S, D]
    base = (values > 0).double()
    drop = 1 - base.mean().item()
    error = abs(drop - rate) / math.sqrt(rate * (1 - rate) / base.numel())
    others = (
        _mask_values(model, rollout_seeds(1, 0, ids, 8), rate),  # another run seed
        _mask_values(model, rollout_seeds(0, 1, ids, 8), rate),  # another step
        values.roll(8, 0),  # another problem
        values.unflatten(0, (1000, 8)).roll(1, 1),  # another k
    )
    worst = np.max([abs(_correlation(base, (other > 0).double().view_as(base))) for other in others])
    scaled = bool(torch.isin(values, values.new_tensor([0, 1 / (1 - rate)])).all())
    batch, alone = (_mask_values(model, rollout_seeds(0, 0, some, 4), 0.3) for some in (ids[:4], ids[1:2]))
    same = torch.equal(batch[4:8], alone) and _bits_sha256(model.device) == _bits_sha256("cpu") == BITS_SHA256
    note = f"standard errors, {base.numel():.2g} bits: rate {drop:.5f}, correlations; same bits on {e.device} and CPU"
    return judge("mask_statistics", np.max([error, worst * math.sqrt(base.numel())]), 5, note, also=scaled and same)


def _mask_values(model, seeds: torch.Tensor, rate: float) -> torch.Tensor:
    """Shared masks, 0 or 1 / (1 - rate): [R, S, D]."""
    masks = draw_masks(MaskSpec(rate=rate), model, seeds)
    assert masks is not None
    return masks.values


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()).item()


def _bits_sha256(device) -> str:
    """sha256 of the mask bits [S, D] of one fixed rollout, drawn on `device`."""
    shape = SimpleNamespace(width=64, dtype=torch.float32, device=torch.device(device), num_sites=lambda sites: 4)
    bits = _mask_values(shape, rollout_seeds(7, 3, ["golden"], 2), 0.3)[1] > 0
    return hashlib.sha256(bits.cpu().numpy().tobytes()).hexdigest()


def batch_invariance(e: Engine) -> Property:
    """Tokens and log-probs of a problem do not depend on the rest of its batch, nor on K."""
    specs = (
        MaskSpec(rate=0.2),
        MaskSpec("per_step", 0.2, ALL_SITES, "all"),
        MaskSpec("antithetic", 0.2, ALL_SITES, noise="gaussian"),
    )
    pairs = []
    for model, temperature, spec in product(e.models.values(), (0.0, 1.0), specs):
        together = _sample(model, e.problems, spec, temperature=temperature)
        for i, problem in enumerate(e.problems):
            alone = _sample(model, [problem], spec, k=2, temperature=temperature)
            for k in range(2):
                (a, a_logp), (b, b_logp) = _answer(alone, k), _answer(together, i * 4 + k)
                pairs.append((a == b, np.abs(np.subtract(a_logp, b_logp)).max() if a == b else 0.0))
    return _judge_pairs("batch_invariance", e, pairs, "each problem alone with K = 2 against all six with K = 4")


@torch.no_grad()
def naive_equality(e: Engine) -> Property:
    """The engine equals the plain definition: one rollout at a time, no cache, no batch."""
    masked = ((1.0, MaskSpec(rate=0.2)), (1.0, MaskSpec("shared", 0.2, ALL_SITES, "all")))
    pairs = []
    for model, scope in zip(e.models.values(), ("prompt+latent", "all"), strict=True):
        noisy = [(0.7, MaskSpec("per_step", 0.2, ALL_SITES, scope, noise)) for noise in NOISES]
        for temperature, spec in ((0.0, None), *masked, *noisy):
            out = _sample(model, e.problems, spec, k=2, temperature=temperature)
            for row, seed in enumerate(out.seeds.to(e.device)):
                tokens, logp = _answer(out, row)
                masks = out.masks and out.masks.take(slice(row, row + 1))
                question = e.problems[row // 2].question
                naive, naive_logp = naive_rollout(model, question, temperature, seed[None], masks, tokens)
                pairs.append((naive == tokens, np.abs(np.subtract(naive_logp, logp)).max()))
    return _judge_pairs("naive_equality", e, pairs, "against the uncached reference")


def _answer(out: Rollouts, row: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probs of one rollout, up to its end."""
    length = int(out.token_mask[row].sum())
    return out.tokens[row, :length].tolist(), out.logp[row, :length].tolist()


def _judge_pairs(name: str, e: Engine, pairs: list[tuple[bool, float]], note: str) -> Property:
    """From pairs of answers: are the tokens equal, and the largest difference of log-probs."""
    different = sum(not same for same, _ in pairs)
    note += f": {different} of {len(pairs)} answers differ"
    largest = np.max([gap for _, gap in pairs])
    return judge(name, largest, e.bound, note, also=different == 0 or not e.tokens_decide)


CHECKS = {f.__name__: f for f in (replay, mask_identity, mask_statistics, batch_invariance, naive_equality)}
