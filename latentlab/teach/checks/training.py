"""Exercises of 03_training: the target of a stage, a learning-rate schedule, swapped thoughts."""

from __future__ import annotations

import numpy as np

from latentlab.data.word_problems import word_problems
from latentlab.evaluation.thoughts import swap_thoughts
from latentlab.pretrained.loading import load_model
from latentlab.teach.exercise import Exercise
from latentlab.training.curriculum import stage_text
from latentlab.training.steps import warmup_cosine

PROBLEM, STAGES = word_problems("train", 1, seed=0)[0], 4


def _targets(answer) -> list[str] | None:
    found = [answer(PROBLEM, stage, STAGES) for stage in range(STAGES + 1)]
    return None if found[0] is None else [str(text) for text in found]


def _text(steps, answer: str = f"### {PROBLEM.answer}") -> str:
    return "\n".join([*steps, answer])


RIGHT = [stage_text(PROBLEM, stage, STAGES) for stage in range(STAGES + 1)]

stage_target = Exercise(
    "stage_target",
    _targets,
    lambda found: found == RIGHT,
    (
        (
            lambda found: found == [_text(PROBLEM.steps[:stage]) for stage in range(STAGES + 1)],
            "the first steps become thoughts, so the later ones are left",
        ),
        (
            lambda found: found == [_text(PROBLEM.steps[stage + 1 :]) for stage in range(STAGES + 1)],
            "one step too few: at stage 0 all steps are written",
        ),
        (
            lambda found: all("###" not in text for text in found),
            'the answer is missing: "### " and the answer, on a line of its own',
        ),
        (
            lambda found: [text.replace(" ", "\n") for text in found] == [text.replace(" ", "\n") for text in RIGHT],
            "steps stand on lines of their own",
        ),
    ),
    "not yet: the steps from number `stage` on, then the answer, joined by line breaks",
)

STEPS = (0, 4, 9, 10, 55, 99)


def _shares(answer) -> list[float] | None:
    found = [answer(step, 100, 10, 0.1) for step in STEPS]
    return None if found[0] is None else [float(x) for x in found]


def _cosine(final: float = 0.1, warmup: int = 10, half: float = 0.5) -> list[float]:
    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return final + (1 - final) * half * (1 + np.cos(np.pi * (step - warmup) / (100 - warmup)))

    return [float(share(step)) for step in STEPS]


learning_rate_share = Exercise(
    "learning_rate_share",
    _shares,
    lambda found: np.allclose(found, [warmup_cosine(s, total=100, warmup=10, final=0.1) for s in STEPS], atol=1e-9),
    (
        (lambda found: np.allclose(found, _cosine(warmup=0), atol=1e-6), "the warm-up is missing"),
        (lambda found: found[0] == 0, "the first step would do nothing: (step + 1) / warmup"),
        (lambda found: np.allclose(found, _cosine(final=0.0), atol=1e-6), "it must end at `final`, not at 0"),
        (lambda found: max(found) > 1 + 1e-9, "a share of the peak is at most 1: cos + 1 lies between 0 and 2"),
    ),
    "not yet: linear up to 1 during the warm-up, then half a cosine from 1 down to `final`",
)


def _swapped(answer) -> list[float] | None:
    found = answer(load_model("tiny"), word_problems("validation", 60, seed=0))
    return None if found is None else [float(found)]


def _true(name: str) -> float:
    return float(swap_thoughts(load_model("tiny"), word_problems("validation", 60, seed=0))[name])


follows_donor = Exercise(
    "follows_donor",
    _swapped,
    lambda found: abs(found[0] - _true("follows_donor")) < 1e-9,
    (
        (
            lambda found: abs(found[0] - _true("changed")) < 1e-9,
            "that is how many answers change: how many become the donor's own?",
        ),
        (
            lambda found: abs(found[0] - _true("same_by_chance")) < 1e-9,
            "those agree without any swap: is `edit` passed to rollout?",
        ),
        (
            lambda found: found[0] in (0.0, 1.0),
            "all or none: compare each answer with that of the problem that gave the thoughts",
        ),
    ),
    "not yet: record the clean thoughts, roll them by a problem, feed them in, compare with the donor's answer",
)
