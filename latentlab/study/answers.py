"""Answers of trained models, stored once per model and benchmark; scores are read from them.

answers/shared-s0.test.json      greedy answers of the clean model to the test problems
answers/shared-s0.svamp.json     the same on another benchmark
answers/shared-s0.sampled.json   K sampled answers per problem, with the noise that training used
answers/coconut-s0.swapped.json  what swapping thoughts between problems does
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from operator import truediv
from pathlib import Path

import numpy as np
import torch

from latentlab.config import Config, GRPOConfig, arm_settings
from latentlab.data import datasets
from latentlab.evaluation.accuracy import evaluate
from latentlab.evaluation.statistics import pass_at_k, wilson_interval
from latentlab.evaluation.thoughts import swap_thoughts
from latentlab.model import LatentReasoner
from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem, answers_match, extract_answer
from latentlab.runtime.files import read_json, write_atomically
from latentlab.study.budget import Budget, answer_seconds
from latentlab.training.preflight import expect_together

TRANSFER = ("gsm8k_perturbable", "gsm8k_perturbed", "svamp", "multiarith", "gsm_hard")
SAMPLED = ("coconut-s", "temperature-s", "shared-s")  # models of a sweep that also answer by sampling
SAMPLED_PROBLEMS = 1000  # test problems for sampled answers and swapped thoughts, where no budget decides


def answers_path(folder: Path, name: str, benchmark: str) -> Path:
    """The file of a run's answers in the experiment's `folder`."""
    return folder / "answers" / f"{name}.{benchmark}.json"


def stored(folder: Path, names: Iterable[str], benchmark: str) -> dict[str, dict]:
    """The answers to `benchmark` of those runs that have them."""
    paths = {name: answers_path(folder, name, benchmark) for name in names}
    return {name: read_json(path, "stored answers") for name, path in paths.items() if path.exists()}


def graded_answers(model: LatentReasoner, problems: list[Problem], *, mask=None, **options) -> dict:
    """K answers to each of n problems, by `evaluate`: texts, grades by both rules, seconds."""
    start = time.monotonic()
    found = evaluate(model, problems, mask=mask, **options)
    exact = [answers_match(extract_answer(t), p.answer, "string") for p, texts in found.groups() for t in texts]
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


@dataclass
class TrainedModels:
    """The trained models of an experiment, and the answers that it stores of them."""

    config: Config
    folder: Path
    data: dict[str, list[Problem]]
    device: torch.device
    budget: Budget

    def store(self, name: str, benchmark: str, problems: list[Problem], model=None, **options) -> None:
        """Store the answers of run `name` once: by default greedy ones of its best weights."""
        path = answers_path(self.folder, name, benchmark)
        asked = [[p.id for p in problems], options.get("num_generations", 1)]
        if not path.exists() or read_json(path, "stored answers", "asked")["asked"] != asked:
            model = model or self.trained(name)
            options = {"batch_size": self.config.evaluate.batch_size, **options}
            swapped = benchmark == "swapped"
            found = swap_thoughts(model, problems) if swapped else graded_answers(model, problems, **options)
            write_atomically(path, json.dumps({"asked": asked, **found}, ensure_ascii=False).encode())
            self.budget.save()

    def store_sampled(self, names: list[str], chosen: dict[str, dict]) -> None:
        """K sampled answers of each SAMPLED model to test problems, as in its training."""
        names, test, k = self._shown(names), self.data["test"], self.config.evaluate.num_generations
        size = max(1, 4 * self.config.evaluate.batch_size // k)  # rows are cheap beside the question that they share

        def noise(name: str) -> dict:
            arm = name.rpartition("-s")[0]
            arm = arm if arm in ("temperature", "per_step") else "shared"  # the baseline's: that of `shared`
            family = chosen.get("temperature" if arm == "temperature" else "shared", {})
            mask, temperature = arm_settings(with_settings(self.config.grpo, family), arm)
            return {"batch_size": size, "num_generations": k, "mask": mask, "temperature": temperature}

        def affordable() -> int:
            model = self.trained(names[0])
            seconds = partial(answer_seconds, model, self.data["validation"], **noise(names[0]))
            return self.budget.affordable(0.4 / len(names), seconds, len(test))

        limit = self.budget.once("sampled_problems", affordable) if self.budget.planned else SAMPLED_PROBLEMS
        for name in names if limit else ():
            self.store(name, "sampled", test[:limit], run_seed=self.config.seed, **noise(name))

    def store_benchmarks(self, names: list[str]) -> None:
        """Other benchmarks, on as many problems as the time left in the budget allows."""
        names = self._shown(names)
        model, found = self.trained(names[0]), stored(self.folder, names, "test")[names[0]]
        for i, benchmark in enumerate(TRANSFER):
            key, share = f"transfer_{benchmark}", 0.9 / (len(TRANSFER) - i) / len(names)
            try:
                problems = datasets.benchmark(benchmark)
                expect_together(model, problems, self.config)
            except (OSError, ValueError) as error:  # not in this data folder, or too long for this model
                self.budget.once(key, partial(str, f"skipped: {error}"))
                continue
            rate = partial(truediv, found["seconds"], len(found["ids"]))
            limit = self.budget.once(key, partial(self.budget.affordable, share, rate, len(problems)))
            for name in names if limit else ():
                self.store(name, benchmark, problems[:limit])

    def store_swapped(self, names: list[str]) -> None:
        """What swapped thoughts do to the answers of each baseline."""
        for name in names:
            if name.startswith("coconut"):
                self.store(name, "swapped", self.data["test"][:SAMPLED_PROBLEMS])

    def trained(self, name: str) -> LatentReasoner:
        """The best weights of a finished run."""
        return load_model(self.folder / name / "best").place(self.device, self.config.precision)

    def _shown(self, names: list[str]) -> list[str]:
        """Under a budget all models of the first seed, else the SAMPLED ones of all seeds."""
        first = names[0].rpartition("-")[2]
        return [
            name for name in names if (name.endswith(f"-{first}") if self.budget.planned else name.startswith(SAMPLED))
        ]


def with_settings(grpo: GRPOConfig, settings: dict) -> GRPOConfig:
    """`grpo` with the fields that trials chose: learning_rate, temperature, mask.rate."""
    fields = {key: value for key, value in settings.items() if key != "mask.rate"}
    return replace(grpo, **fields, mask=replace(grpo.mask, rate=settings.get("mask.rate", grpo.mask.rate)))


# ---------------------------------------------------------------- scores
def greedy_score(answers: dict) -> dict:
    """Right answers by both grading rules, interval, commonest answer and its share, seconds, date.

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
    """Two ways to use a model, on the same n problems: clean and greedy, or K sampled answers.

    sampled: the mean is what GRPO optimises; pass@k; the majority vote; seconds for all of them.
    """
    counts = np.array(sampled["correct"])  # [n, K]
    n, k = counts.shape
    clean = _right(greedy, n)
    return {
        "n": n,
        "greedy": {**clean, "pass@1": clean["correct"] / n},
        "sampled": {
            "K": k,
            "mask_rate": sampled["mask_rate"],
            "mean": float(counts.mean()),
            "pass@k": {str(j): float(pass_at_k(counts.sum(1), k, j).mean()) for j in range(1, k + 1)},
            "majority": float(np.mean(sampled["majority"])),
            "seconds": sampled["seconds"],
        },
    }


def _right(answers: dict, n: int) -> dict:
    """The right ones of the first n greedy answers."""
    correct, exact = (int(np.sum(answers[key][:n])) for key in ("correct", "correct_string"))
    return {"n": n, "correct": correct, "interval": list(wilson_interval(correct, n)), "correct_string_rule": exact}
