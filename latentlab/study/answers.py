"""The answers of trained models, stored once per model and benchmark; every score of a report is read from them.

answers/shared-s0.test.json      greedy answers of the clean model to the test problems
answers/shared-s0.svamp.json     the same on another benchmark
answers/shared-s0.sampled.json   K sampled answers per problem, with the noise that training used
answers/coconut-s0.swapped.json  what swapping thoughts between problems does
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from latentlab.evaluation.accuracy import evaluate
from latentlab.evaluation.statistics import pass_at_k, wilson_interval
from latentlab.model import LatentReasoner
from latentlab.problems import Problem, answers_match, extract_answer
from latentlab.runtime.files import read_json


def answers_path(folder: Path, name: str, benchmark: str) -> Path:
    """The file of a run's answers in the experiment's `folder`."""
    return folder / "answers" / f"{name}.{benchmark}.json"


def stored(folder: Path, names: Iterable[str], benchmark: str) -> dict[str, dict]:
    """The answers to `benchmark` of those runs that have them."""
    paths = {name: answers_path(folder, name, benchmark) for name in names}
    return {name: read_json(path, "stored answers") for name, path in paths.items() if path.exists()}


def graded_answers(model: LatentReasoner, problems: list[Problem], *, mask=None, **options) -> dict:
    """Answers to n problems, K each: texts, grades by both rules, seconds, date. Options as in `evaluate`."""
    start = time.monotonic()
    found = evaluate(model, problems, mask=mask, **options)
    asked = [problem for problem in problems for _ in found.correct[0]]
    exact = [answers_match(extract_answer(t), p.answer, "string") for t, p in zip(found.text, asked, strict=True)]
    return {
        "ids": [problem.id for problem in problems],
        "correct": found.correct.astype(int).tolist(),  # [n, K]
        "correct_string": exact,  # [n * K]
        "majority": found.majority().astype(int).tolist(),  # [n]
        "text": found.text,  # [n * K]
        "mask_rate": mask.rate if mask else 0.0,
        "seconds": round(time.monotonic() - start, 2),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def greedy_score(answers: dict) -> dict:
    """Right answers by both grading rules, their interval, the commonest answer and its share, when and how long.

    A model that gives one number to many questions has learned the format, and is right by chance.
    """
    commonest, times = Counter(extract_answer(text) for text in answers["text"]).most_common(1)[0]
    return {
        **_right(answers, len(answers["ids"])),
        "commonest_answer": commonest,
        "commonest_share": times / len(answers["ids"]),
        "answer_seconds": answers["seconds"],
        "evaluated_at": answers["at"],
    }


def deployments(greedy: dict, sampled: dict) -> dict:
    """Two ways to use a model, on the same problems: clean and greedy, and K answers sampled under its noise.

    sampled: their mean is what GRPO optimises; pass@k and the majority vote of K; seconds for all of them.
    """
    counts = np.array(sampled["correct"])  # [n, K]
    n, k = counts.shape
    found = {
        "K": k,
        "mask_rate": sampled["mask_rate"],
        "mean": float(counts.mean()),
        "pass@k": {str(j): float(pass_at_k(counts.sum(1), k, j).mean()) for j in range(1, k + 1)},
        "majority": float(np.mean(sampled["majority"])),
        "seconds": sampled["seconds"],
    }
    clean = _right(greedy, n)
    return {"n": n, "greedy": {**clean, "pass@1": clean["correct"] / n}, "sampled": found}


def _right(answers: dict, n: int) -> dict:
    """The right ones of the first n greedy answers."""
    correct, exact = (int(np.sum(answers[key][:n])) for key in ("correct", "correct_string"))
    return {"n": n, "correct": correct, "interval": list(wilson_interval(correct, n)), "correct_string_rule": exact}
