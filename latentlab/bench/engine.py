"""What is timed at a shape: rollouts and updates of the engine and of other ways to make them.

Random weights of the named shape; questions of exactly 48 tokens, 6 thoughts, answers of exactly 8
tokens, so that all variants do equal work. `official` and `definition` are timed on a few rollouts
and scaled up (run.py); what each optimization saves is timed on half of the problems.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from latentlab.bench.baselines import VARIANTS, EarlyEnd, floor, official, plain
from latentlab.bench.timing import measure, seconds_of
from latentlab.data.word_problems import WORDS
from latentlab.masks import MaskSpec, draw_masks
from latentlab.model import Edit, LatentReasoner
from latentlab.pretrained.scratch import word_tokenizer
from latentlab.problems import Problem
from latentlab.rollouts import Rollouts, rollout
from latentlab.theory.moments import relative_error
from latentlab.verify.reference import naive_rollout

IDS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
NO_DROPOUT: dict[str, Any] = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
SMOLLM2: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
SHAPES = {
    "tiny": GPT2Config(vocab_size=128, n_layer=1, n_embd=128, n_head=4, n_positions=256, **NO_DROPOUT, **IDS),
    "gpt2": GPT2Config(**NO_DROPOUT, **IDS),  # GPT-2 small, vocabulary 50,257
    "smollm2": LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **SMOLLM2, **IDS),
}
QUESTION, THOUGHTS, ANSWER = 48, 6, 8  # tokens of a prompt, <start> included; thoughts; answer tokens
SPEC = MaskSpec(rate=0.1)
OFFICIAL_ROWS = 2  # rollouts of the official scheme that are timed; of the definition one
AXES = {"num_generations": (1, 16, 64), "question": (16, 64, 128), "thoughts": (0, 6, 12), "answer": (2, 8, 16)}


def build(shape: str, device: str = "cpu") -> LatentReasoner:
    """A model of the named shape with random weights, in which no answer ends early."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(SHAPES[shape])
    model = LatentReasoner(lm, word_tokenizer(WORDS), num_thoughts=THOUGHTS, max_new_tokens=ANSWER)
    model.eos_id = -1  # no token is eos: answers have max_new_tokens tokens
    return model.place(device, "bfloat16" if device.startswith("cuda") else "float32")


def variant(model: LatentReasoner, kind: type[LatentReasoner] = LatentReasoner, **sizes: Any) -> LatentReasoner:
    """The same weights in a model of another class, or with other numbers of thoughts or tokens."""
    sizes = {"num_thoughts": model.num_thoughts, "max_new_tokens": model.max_new_tokens, **sizes}
    other = kind(model.lm, model.tokenizer, **sizes)
    other.autocast_dtype = model.autocast_dtype
    other.eos_id = other.eos_id if kind is EarlyEnd else -1
    return other


def questions(count: int, length: int = QUESTION) -> list[Problem]:
    """Problems whose prompts have `length` tokens, <start> included."""
    words = [word for word in WORDS if word.isalpha()] * (count + length)
    return [Problem(f"bench-{i}", " ".join(words[i : i + length - 2]), (), "1", "bench") for i in range(count)]


def sample(
    model: LatentReasoner, problems: list[Problem], k: int, masks: MaskSpec | None = SPEC, edit: Edit | None = None
) -> Rollouts:
    """K rollouts of each problem at temperature 1."""
    settings: dict[str, Any] = {"masks": masks, "temperature": 1.0, "run_seed": 0, "step": 0}
    return rollout(model, problems, num_generations=k, edit=edit, **settings)


def update(model: LatentReasoner, log_probs: Callable[[], torch.Tensor]) -> None:
    """Forward and backward pass of an update; no optimizer."""
    model.zero_grad(set_to_none=True)
    log_probs().sum().backward()


def score(model: LatentReasoner, recorded: Rollouts) -> torch.Tensor:
    """Log-probs of `recorded` under its own masks, with gradient."""
    return model.score(recorded, masks=recorded.masks)


def timed_runs(model: LatentReasoner, count: int, k: int) -> dict[str, Callable[[], object]]:
    """What is timed at `count` problems and K rollouts, by name; updates begin with "update"."""
    problems = questions(count)
    recorded = sample(model, problems, k)
    prompts, seeds = recorded.prompt_ids.repeat_interleave(k, 0), recorded.seeds.to(model.device)
    dense = (count * k, count * (QUESTION - 1) + count * k * (1 + THOUGHTS + ANSWER), ANSWER)
    masks, tokens = recorded.masks and recorded.masks.take(slice(1)), recorded.tokens[0].tolist()
    return {
        "rollout": partial(sample, model, problems, k),
        "unmasked": partial(sample, model, problems, k, None),
        "unmasked_per_row": partial(sample, model, problems, k, None, lambda i, z: z),  # edited: a thought per row
        "official": lambda: [official(model, prompts[:1]) for _ in range(OFFICIAL_ROWS)],
        "definition": partial(naive_rollout, model, problems[0].question, 1.0, seeds[:1], masks, tokens),
        "plain": torch.no_grad()(partial(plain, model, prompts, seeds)),
        "floor": partial(floor, model, *dense, update=False),
        "update": partial(update, model, partial(score, model, recorded)),
        "update_plain": partial(update, model, partial(plain, model, prompts, seeds, recorded.tokens)),
        "update_floor": partial(floor, model, *dense, update=True),
        "mask_drawing": partial(draw_masks, SPEC, model, recorded.seeds),
    }


def bfloat16_runs(model: LatentReasoner, count: int, k: int) -> dict[str, Callable[[], object]]:
    """Rollout and update with matrix products in bfloat16."""
    half, problems = in_bfloat16(model), questions(count)
    recorded = sample(half, problems, k)
    runs: dict[str, Callable[[], object]] = {"rollout_bfloat16": partial(sample, half, problems, k)}
    return runs | {"update_bfloat16": partial(update, half, partial(score, half, recorded))}


def in_bfloat16(model: LatentReasoner) -> LatentReasoner:
    """The same weights in a model whose matrix products are in bfloat16."""
    other = variant(model)
    other.autocast_dtype = torch.bfloat16
    return other


def trick_runs(model: LatentReasoner, count: int, k: int) -> dict[str, Callable[[], object]]:
    """The engine, and the engine without one of its optimizations: "rollout_*" and "update_*"."""
    problems = questions(count)
    separate = [p for p in problems for _ in range(k)]  # each rollout a problem of its own: no shared prefix
    recorded, unshared = sample(model, problems, k), sample(model, separate, 1)
    runs: dict[str, Callable[[], object]] = {
        "rollout": partial(sample, model, problems, k),
        "rollout_prefix_per_row": partial(sample, model, separate, 1),
        "rollout_ends_early": partial(sample, variant(model, EarlyEnd), problems, k),
        "update": partial(update, model, partial(score, model, recorded)),
        "update_prefix_per_row": partial(update, model, partial(score, model, unshared)),
    }
    for name, kind in VARIANTS.items():
        other = variant(model, kind)
        runs[f"rollout_{name}"] = partial(sample, other, problems, k)
        if name != "cache_grown":  # it grows in an update anyway
            runs[f"update_{name}"] = partial(update, other, partial(score, other, recorded))
    return runs


def gradient_error(model: LatentReasoner) -> float:
    """Relative error of the engine's gradient against plain transformers, on two rollouts."""
    recorded, weights = sample(model, questions(1), 2, None), list(model.parameters())
    ours = score(model, recorded)
    theirs = plain(model, recorded.prompt_ids.expand(2, -1), recorded.seeds, recorded.tokens)
    grads = (torch.autograd.grad(logp.sum(), weights) for logp in (ours, theirs))
    return relative_error(*(torch.cat([g.flatten() for g in parts]) for parts in grads))


def scaling(model: LatentReasoner, axis: str, values: tuple[int, ...], repeats: int, device: str) -> dict:
    """Seconds of a rollout of one problem along an axis and the fitted line; K = 16 by default."""
    runs: dict[str, Callable] = {}
    for value in values:
        sizes: dict[str, Any] = {"thoughts": {"num_thoughts": value}, "answer": {"max_new_tokens": value}}.get(axis, {})
        problems = questions(1, value if axis == "question" else QUESTION)
        k = value if axis == "num_generations" else 16
        runs[str(value)] = partial(sample, variant(model, **sizes), problems, k)
    seconds = list(measure(runs, repeats, device)[0].values())
    slope, intercept = statistics.linear_regression(values, seconds)
    r2 = statistics.correlation(values, seconds) ** 2
    return {"values": list(values), "seconds": seconds, "slope": slope, "intercept": intercept, "r2": r2}


def whole_iterations(model: LatentReasoner, k: int = 32, most: int = 2**20) -> dict:
    """Rollout and update with AdamW, at ever more problems until memory or `most` rows end it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    rows, speeds, count = [], [], 1

    def iteration() -> None:
        update(model, partial(score, model, sample(model, questions(count), k)))
        optimizer.step()

    try:
        while count * k <= most:
            seconds = [seconds_of(iteration, model.device.type) for _ in range(3)][-1]  # the last of three counts
            rows.append(count * k)
            speeds.append(count * k / seconds)
            count *= 2
    except torch.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
    try:
        utilisation: Any = torch.cuda.utilization()
    except (ModuleNotFoundError, RuntimeError, AssertionError):  # needs NVIDIA's library
        utilisation = {"skipped": "torch.cuda.utilization needs the package nvidia-ml-py"}
    found = {"num_generations": k, "rows": rows, "rollouts_per_second": speeds, "utilisation_percent": utilisation}
    return found | {"best_rollouts_per_second": max(speeds), "largest_rows": max(rows)}
