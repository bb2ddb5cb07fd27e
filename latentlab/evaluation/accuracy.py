"""Accuracy of a latent reasoner on any list of problems.

pass@1     greedy answers of the clean model: what is deployed
mean       average accuracy of K sampled or masked answers: the policy that GRPO optimises
pass@k     the chance that one of k answers is right, unbiased from K
majority   the most frequent of K answers; unparsable ones are not counted
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

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

    def groups(self) -> list[tuple[Problem, tuple[str, ...]]]:
        """Each problem with its K answers."""
        k = self.correct.shape[1]
        return [(problem, self.text[i * k : (i + 1) * k]) for i, problem in enumerate(self.problems)]

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k, in [0, 1]."""
        return float(pass_at_k(self.correct.sum(1), self.correct.shape[1], k).mean())

    def correct_by_string(self) -> int:
        """How many answers equal the problem's as text: the stricter of the two grading rules."""
        return sum(answers_match(extract_answer(t), p.answer, "string") for p, texts in self.groups() for t in texts)

    def majority(self) -> np.ndarray:
        """[n] of 0/1: is the majority answer right?"""
        return np.array(
            [answers_match(majority_vote(texts), problem.answer) for problem, texts in self.groups()], float
        )

    def distinct_answers(self) -> float:
        """Mean number of different answers among the K of a problem."""
        return float(np.mean([len(set(texts)) for _, texts in self.groups()]))


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

    Distributed processes share the batches and all get the whole result: every process must call.
    Raises ValueError for an empty problem list, or an id that occurs twice.
    """
    if not problems:
        raise ValueError("problems: got an empty list, expected at least one; check the data source and its filters")
    for problem_id, count in Counter(problem.id for problem in problems).items():
        if count > 1:  # its seeds would depend on how the list is split into batches
            raise ValueError(
                f"problems: got id {problem_id!r} {count} times, expected each once; rename or drop repeats"
            )
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].question))  # similar lengths: little padding
    batches = [[problems[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    sampling: dict[str, Any] = {"num_generations": num_generations, "temperature": temperature, "run_seed": run_seed}

    def answer() -> list[tuple[torch.Tensor, tuple[str, ...]]]:
        # Whole batches: the numbers are those of one process, bit for bit.
        quiet: dict[str, Any] = (
            {"disable": True} if distributed.rank() else {}
        )  # TQDM_DISABLE=1 silences rank 0 as well
        mine = tqdm(distributed.shard(batches), desc="answers", unit="batch", delay=5, leave=False, **quiet)
        outs = (rollout(model, batch, masks=mask, step=0, **sampling) for batch in mine)
        return [(out.rewards(exact_answer), out.text) for out in outs]

    correct, text = zip(*distributed.in_order(distributed.gather(answer)), strict=True)
    back = np.argsort(order)  # from the order of the batches to that of `problems`
    answers = np.concatenate([np.array(texts, dtype=object) for texts in text]).reshape(len(problems), -1)[back]
    return Evaluation(tuple(problems), torch.cat(correct).numpy()[back], tuple(answers.flatten()))


def summary(
    model: LatentReasoner, problems: Sequence[Problem], config: Config, *, mask: MaskSpec | None, temperature: float
) -> dict:
    """Both deployments on one list: the clean greedy model, and K sampled answers under `mask`."""
    n, k, size = len(problems), config.evaluate.num_generations, config.evaluate.batch_size
    clean = evaluate(model, problems, batch_size=size)
    sampling: dict[str, Any] = {"num_generations": k, "mask": mask, "temperature": temperature}
    masked = evaluate(model, problems, batch_size=max(1, size // k), run_seed=config.seed, **sampling)
    correct = int(clean.correct.sum())
    right = {"correct": correct, "pass@1": clean.accuracy, "interval": list(wilson_interval(correct, n))}
    sampled = {
        "mask_rate": mask.rate if mask else 0.0,
        "mean": masked.accuracy,
        "pass@k": {str(j): masked.pass_at(j) for j in range(1, k + 1)},
        "majority": float(masked.majority().mean()),
    }
    greedy = {**right, "correct_string_rule": clean.correct_by_string()}
    return {"n": n, "greedy": greedy, "sampled": sampled, "weights": model.provenance}
