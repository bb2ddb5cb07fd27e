"""What thoughts hold: decoded by the head, and swapped between problems."""

from __future__ import annotations

import numpy as np
import torch

from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.rollouts import rollout


def decoded_thoughts(model: LatentReasoner, problems: list[Problem], top: int = 5) -> list[list[list[str]]]:
    """For each problem and thought, the `top` tokens that the head finds likeliest (logit lens)."""
    out = rollout(model, problems, num_generations=1, masks=None, temperature=0.0, run_seed=0, step=0)
    with torch.no_grad():
        tokens = model.head(out.thoughts).topk(top, -1).indices  # [n, L, top]
    return [[[model.tokenizer.decode([t]) for t in thought] for thought in row] for row in tokens.tolist()]


def swap_thoughts(model: LatentReasoner, problems: list[Problem]) -> dict:
    """Give each problem the thoughts of the next one: how often does the answer change, and become the donor's?

    Returns shares in [0, 1]: `changed`, `follows_donor` (the donor's own clean answer) and `same_by_chance`: how often
    the two clean answers agree anyway.
    """
    options = {"num_generations": 1, "masks": None, "temperature": 0.0, "run_seed": 0, "step": 0}
    clean = rollout(model, problems, **options)
    given = clean.thoughts.roll(-1, 0)  # [n, L, D]: recorded, so that all L thoughts are the donor's own
    swapped = rollout(model, problems, **options, edit=lambda i, z: given[:, i - 1])
    donor = clean.text[1:] + clean.text[:1]
    pairs = list(zip(clean.text, swapped.text, donor, strict=True))
    return {
        "n": len(problems),
        "changed": float(np.mean([a != b for a, b, _ in pairs])),
        "follows_donor": float(np.mean([b == c for _, b, c in pairs])),
        "same_by_chance": float(np.mean([a == c for a, _, c in pairs])),
    }
