"""Accuracy of a latent reasoner on any list of problems.

pass@1     greedy answers of the clean model: what is deployed
mean       average accuracy of K sampled or masked answers: the policy that GRPO optimises
pass@k     the chance that one of k answers is right, unbiased from K
majority   the vote of K answers; unparsable ones have no vote
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from latentlab.config import Config
from latentlab.evaluation.statistics import pass_at_k, wilson_interval
from latentlab.masks import MaskSpec
from latentlab.model import LatentReasoner
from latentlab.problems import Problem, answers_match, extract_answer
from latentlab.reward import exact_answer, majority_vote
from latentlab.rollouts import rollout
from latentlab.runtime import distributed


@dataclass(frozen=True)
class Evaluation:
    """Outcomes on n problems: correct [n, K] of 0/1, text (n * K answers)."""

    problems: tuple[Problem, ...]
    correct: np.ndarray
    text: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Mean over problems and rollouts, in [0, 1]."""
        return float(self.correct.mean())

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k, in [0, 1]."""
        return float(pass_at_k(self.correct.sum(1), self.correct.shape[1], k).mean())

    def correct_by_string(self) -> int:
        """How many answers equal the problem's as text: the stricter of the two grading rules in use."""
        k = self.correct.shape[1]
        return sum(
            answers_match(extract_answer(t), self.problems[i // k].answer, "string") for i, t in enumerate(self.text)
        )

    def majority(self) -> np.ndarray:
        """[n] of 0/1: is the majority answer right?"""
        k = self.correct.shape[1]
        votes = [majority_vote(self.text[i * k : (i + 1) * k]) for i in range(len(self.problems))]
        return np.array(
            [vote is not None and exact_answer(f"### {vote}", p) for vote, p in zip(votes, self.problems, strict=True)],
            float,
        )

    def distinct_answers(self) -> float:
        """Mean number of different answers among the K of a problem."""
        k = self.correct.shape[1]
        return float(np.mean([len(set(self.text[i * k : (i + 1) * k])) for i in range(len(self.problems))]))


def evaluate(
    model: LatentReasoner,
    problems: Sequence[Problem],
    *,
    batch_size: int,
    num_generations: int = 1,
    mask: MaskSpec | None = None,
    temperature: float = 0.0,
    run_seed: int = 0,
) -> Evaluation:
    """Answer every problem `num_generations` times; the default is the clean greedy model.

    Several processes share the batches and all get the whole result: every one of them must call.
    """
    if not problems:
        raise ValueError("problems: got an empty list, expected at least one; check the data source and its filters")
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].question))  # like lengths: little padding
    places = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [[problems[i] for i in part] for part in places]

    def answer() -> list[tuple[torch.Tensor, tuple[str, ...]]]:
        results = []
        for batch in distributed.shard(batches):  # whole batches: the numbers are those of one process, bit for bit
            out = rollout(
                model, batch, num_generations=num_generations, masks=mask, temperature=temperature,
                run_seed=run_seed, step=0,
            )  # fmt: skip
            results.append((out.rewards(exact_answer), out.text))
        return results

    correct, text = zip(*distributed.in_order(distributed.gather(answer)), strict=True)
    back = np.argsort(order)  # from the order of the batches to that of `problems`
    answers = np.array(list(chain.from_iterable(text)), dtype=object).reshape(len(problems), -1)[back]
    return Evaluation(tuple(problems), torch.cat(correct).numpy()[back], tuple(answers.flatten()))


def summary(
    model: LatentReasoner, problems: Sequence[Problem], config: Config, *, mask: MaskSpec | None, temperature: float
) -> dict:
    """Both deployments on one list: the clean greedy model, and K sampled answers under `mask`."""
    e, k = config.evaluate, config.evaluate.num_generations
    clean = evaluate(model, problems, batch_size=e.batch_size)
    masked = evaluate(
        model, problems, batch_size=max(1, e.batch_size // k), num_generations=k, mask=mask,
        temperature=temperature, run_seed=config.seed,
    )  # fmt: skip
    correct = int(clean.correct.sum())
    return {
        "n": len(problems),
        "greedy": {
            "correct": correct,
            "pass@1": clean.accuracy,
            "interval": list(wilson_interval(correct, len(problems))),
            "correct_string_rule": clean.correct_by_string(),
        },
        "sampled": {
            "mask_rate": mask.rate if mask else 0.0,
            "mean": masked.accuracy,
            "pass@k": {str(j): masked.pass_at(j) for j in range(1, k + 1)},
            "majority": float(masked.majority().mean()),
        },
        "weights": model.provenance,
    }
