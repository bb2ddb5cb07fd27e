"""The answers of trained models, stored once per model and benchmark; every score of a report is read from them.

answers/shared-s0.test.json      greedy answers of the clean model to the test problems
answers/shared-s0.svamp.json     the same on another benchmark
answers/shared-s0.sampled.json   K sampled answers per problem, with the noise that training used
answers/coconut-s0.swapped.json  what swapping thoughts between problems does
"""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from latentlab.evaluation.accuracy import evaluate
from latentlab.evaluation.statistics import pass_at_k, wilson_interval
from latentlab.model import LatentReasoner
from latentlab.problems import Problem, answers_match, extract_answer
from latentlab.runtime.files import read_json, write_atomically


def answers_path(folder: Path, name: str) -> Path:
    """The file of `name`, such as "shared-s0.test", in the experiment's `folder`."""
    return folder / "answers" / f"{name}.json"


def read_answers(folder: Path, name: str) -> dict:
    """What was stored under `name`."""
    return read_json(answers_path(folder, name), "stored answers")


def store_answers(path: Path, model: LatentReasoner, problems: list[Problem], *, mask=None, **options) -> None:
    """Answer n problems K times; store texts, grades by both rules, seconds and date. Options as in `evaluate`."""
    start = time.monotonic()
    found = evaluate(model, problems, mask=mask, **options)
    asked = [problem for problem in problems for _ in found.correct[0]]
    exact = [answers_match(extract_answer(t), p.answer, "string") for t, p in zip(found.text, asked, strict=True)]
    record = {
        "ids": [problem.id for problem in problems],
        "correct": found.correct.astype(int).tolist(),  # [n, K]
        "correct_string": exact,  # [n * K]
        "majority": found.majority().astype(int).tolist(),  # [n]
        "text": found.text,  # [n * K]
        "mask_rate": mask.rate if mask else 0.0,
        "seconds": round(time.monotonic() - start, 2),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomically(path, json.dumps(record, ensure_ascii=False).encode())


def greedy_score(folder: Path, name: str) -> dict:
    """Right answers by both grading rules, their interval, the commonest answer and its share, when and how long.

    A model that gives one number to many questions has learned the format, and is right by chance.
    """
    found = read_answers(folder, name)
    n, correct = len(found["ids"]), int(np.sum(found["correct"]))
    commonest, times = Counter(extract_answer(text) for text in found["text"]).most_common(1)[0]
    return {
        "n": n,
        "correct": correct,
        "interval": list(wilson_interval(correct, n)),
        "commonest_answer": commonest,
        "commonest_share": times / n,
        "correct_string_rule": sum(found["correct_string"]),
        "answer_seconds": found["seconds"],
        "evaluated_at": found["at"],
    }


def deployments(folder: Path, run: str) -> dict:
    """Two ways to use a model, on the same problems: the clean greedy one, and K answers sampled with its noise.

    sampled: their mean is what GRPO optimises; pass@k and the majority vote of K; seconds for all of them.
    """
    greedy, found = read_answers(folder, f"{run}.test"), read_answers(folder, f"{run}.sampled")
    counts = np.array(found["correct"])  # [n, K]
    n, k = counts.shape
    correct = int(np.sum(greedy["correct"][:n]))
    return {
        "n": n,
        "greedy": {
            "correct": correct,
            "pass@1": correct / n,
            "interval": list(wilson_interval(correct, n)),
            "correct_string_rule": sum(greedy["correct_string"][:n]),
        },
        "sampled": {
            "K": k,
            "mask_rate": found["mask_rate"],
            "mean": float(counts.mean()),
            "pass@k": {str(j): float(pass_at_k(counts.sum(1), k, j).mean()) for j in range(1, k + 1)},
            "majority": float(np.mean(found["majority"])),
            "seconds": found["seconds"],
        },
    }
