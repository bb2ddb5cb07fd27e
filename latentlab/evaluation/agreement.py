"""Many answers to one problem: their majority, and what their agreement says about it.

agreement   share of the K answers of a problem that equal its majority answer
AUROC       the chance that a right majority has a larger agreement than a wrong one; 0.5: none
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from latentlab.evaluation.accuracy import Evaluation, evaluate
from latentlab.masks import MaskSpec
from latentlab.model import LatentReasoner
from latentlab.problems import Problem, answers_match, extract_answer
from latentlab.reward import majority_vote


def majority_row(
    model: LatentReasoner,
    problems: Sequence[Problem],
    k: int,
    *,
    batch_size: int,
    mask: MaskSpec | None,
    temperature: float,
) -> dict[str, Any]:
    """The majority of k answers to each problem under one kind of noise, and what they cost.

    Returns n, k, mean and majority (shares in 0..1), CPU seconds of the process and, for k > 1,
    `auroc` and `reliability` of the agreement.
    """
    begun, size = time.process_time(), max(1, batch_size // k)
    found = evaluate(model, problems, batch_size=size, num_generations=k, mask=mask, temperature=temperature)
    shares, right = agreement(found)
    row: dict[str, Any] = {"n": len(problems), "k": k, "mean": found.accuracy, "majority": float(right.mean())}
    row["cpu_seconds"] = round(time.process_time() - begun, 2)
    if k > 1:
        row |= {"auroc": auroc(shares, right), "reliability": reliability(shares, right)}
    return row


def agreement(found: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Of each problem: the share of its answers that equal the majority's, and is that one right: [n], [n].

    Unparsable answers do not vote, but count among all.
    """
    shares, right = [], []
    for problem, texts in found.groups():
        winner = majority_vote(texts)
        votes = [answers_match(extract_answer(text), winner) for text in texts] if winner is not None else [False]
        shares.append(float(np.mean(votes)))
        right.append(answers_match(winner, problem.answer))
    return np.array(shares), np.array(right, dtype=bool)


def auroc(scores: np.ndarray, right: np.ndarray) -> float | None:
    """Area under the ROC curve of `scores` for `right`; ties count half. None if all or none are right."""
    if right.all() or not right.any():
        return None
    return float(mannwhitneyu(scores[right], scores[~right]).statistic / (right.sum() * (~right).sum()))


def reliability(shares: np.ndarray, right: np.ndarray, bins: int = 8) -> list[dict[str, float]]:
    """The reliability diagram: of each bin of agreement with problems in it, n, mean agreement, accuracy."""
    place = np.minimum((shares * bins).astype(int), bins - 1)
    rows = []
    for bin in np.unique(place).tolist():
        inside = place == bin
        means = {"agreement": float(shares[inside].mean()), "accuracy": float(right[inside].mean())}
        rows.append({"bin": bin, "n": int(inside.sum()), **means})
    return rows
