"""What thoughts contain: decoded by the head, under noise, and swapped between problems."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from latentlab.advantage import is_collapsed
from latentlab.masks import MaskSpec
from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.reward import exact_answer
from latentlab.rollouts import Rollouts, first_tokens, rollout

_greedy = functools.partial(rollout, num_generations=1, masks=None, temperature=0.0, run_seed=0, step=0)


@torch.no_grad()
def decoded_thoughts(model: LatentReasoner, problems: list[Problem], top: int = 5) -> list[list[list[str]]]:
    """For each problem and thought, the `top` most probable tokens under the head (logit lens)."""
    tokens = model.head(_greedy(model, problems).thoughts).topk(top, -1).indices  # [n, L, top]
    return [[[model.tokenizer.decode([t]) for t in thought] for thought in row] for row in tokens.tolist()]


def thought_divergence(
    model: LatentReasoner, problems: Sequence[Problem], *, mask: MaskSpec | None, num_generations: int, run_seed: int
) -> list[float]:
    """By latent step, [L]: the share of groups of K rollouts whose decoded thoughts differ."""
    sampling: dict[str, Any] = {"num_generations": num_generations, "run_seed": run_seed}
    tokens = _grouped_tokens(model, rollout(model, problems, masks=mask, temperature=0.0, step=0, **sampling))
    return (tokens != tokens[:, :1]).any(1).double().mean(0).tolist()


def diversity(
    model: LatentReasoner, problems: Sequence[Problem], *, mask: MaskSpec | None, temperature: float, **sampling: Any
) -> dict[str, float]:
    """What noise costs and buys: mean reward and pass@K, share of mixed groups, distinct answers and thoughts.

    `trains` is the mean number of different trains of thought in a group, decoded.
    sampling: `num_generations` (K) and `run_seed` of `rollout`.
    """
    out = rollout(model, problems, masks=mask, temperature=temperature, step=0, **sampling)
    rewards, k = out.rewards(exact_answer), out.num_generations
    return {
        "mean": rewards.mean().item(),
        "pass@k": (rewards > 0).any(1).double().mean().item(),
        "mixed": 1 - is_collapsed(rewards).double().mean().item(),
        "answers": float(np.mean([len(set(out.text[i : i + k])) for i in range(0, len(out.text), k)])),
        "trains": float(np.mean([len(set(map(tuple, group))) for group in _grouped_tokens(model, out).tolist()])),
    }


@torch.no_grad()
def _grouped_tokens(model: LatentReasoner, out: Rollouts) -> torch.Tensor:
    """The most probable token of each thought, [B, K, L]."""
    return model.head(out.thoughts).argmax(-1).unflatten(0, (-1, out.num_generations))


def swap_thoughts(model: LatentReasoner, problems: list[Problem]) -> dict:
    """Give each problem the thoughts of the next one: how often does the answer follow the donor?

    Returns n, and shares in [0, 1]: `changed` · `follows_donor`, the answer is the donor's own
    clean one · `same_by_chance`, the two clean answers agree anyway.
    """
    clean = _greedy(model, problems)
    given = clean.thoughts.roll(-1, 0)  # [n, L, D]: recorded, so that all L thoughts are the donor's own
    swapped = _greedy(model, problems, edit=lambda i, z: given[:, i - 1])
    before, after, donor = np.array([clean.text, swapped.text, clean.text[1:] + clean.text[:1]], dtype=object)
    return {
        "n": len(problems),
        "changed": float(np.mean(before != after)),
        "follows_donor": float(np.mean(after == donor)),
        "same_by_chance": float(np.mean(before == donor)),
    }


@torch.no_grad()
def decode(model: LatentReasoner, out: Rollouts) -> list[tuple[str, ...]]:
    """The most probable token of each thought under the head, [R][L]."""
    tokens = model.head(out.thoughts).argmax(-1).tolist() if out.thoughts.numel() else [[]] * len(out.text)
    return [tuple(model.tokenizer.decode([token]).strip() for token in row) for row in tokens]


def right_thoughts(model: LatentReasoner, thoughts: Sequence[str], results: Sequence[str]) -> tuple[bool | None, ...]:
    """Is each decoded thought the first token of the result of the step that it completes?

    results: those of the steps, in order. None where no step ends with a thought, or none is known.
    """
    if not results or len(thoughts) % len(results):
        return (None,) * len(thoughts)
    each, tokens = len(thoughts) // len(results), first_tokens(model.tokenizer, results)
    first = [model.tokenizer.decode([tokens[result]]).strip() for result in results]
    return tuple(z == first[i // each] if (i + 1) % each == 0 else None for i, z in enumerate(thoughts))
