"""Exercises of 03: the solution passes, typical mistakes get a message of their own."""

import numpy as np
import pytest

from latentlab.rollouts import rollout
from latentlab.teach.checks import training
from tests.teach.judging import expect_solved, expect_told_apart


def target(problem, stage, stages, steps=None):
    left = problem.steps[stage:] if steps is None else steps
    return "\n".join([*left, f"### {problem.answer}"])


def share(step, total, warmup, final):
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup)))


def texts(model, problems, edit=None):
    out = rollout(model, problems, num_generations=1, masks=None, temperature=0.0, run_seed=0, step=0, edit=edit)
    return out.thoughts, np.array(out.text)


def swapped(model, problems, shift=-1):
    thoughts, clean = texts(model, problems)
    given = thoughts.roll(shift, 0)
    return clean, texts(model, problems, edit=lambda i, z: given[:, i - 1])[1]


def follows(model, problems):
    clean, after = swapped(model, problems)
    return np.mean(after == np.roll(clean, -1))


def changed(model, problems):
    clean, after = swapped(model, problems)
    return np.mean(after != clean)


def forgotten(model, problems):
    clean = texts(model, problems)[1]
    return np.mean(clean == np.roll(clean, -1))


RIGHT = {training.stage_target: target, training.learning_rate_share: share, training.follows_donor: follows}
WRONG = {
    training.stage_target: (
        lambda p, stage, stages: target(p, stage, stages, p.steps[:stage]),
        lambda p, stage, stages: target(p, stage, stages, p.steps[stage + 1 :]),
        lambda p, stage, stages: "\n".join(p.steps[stage:]),
        lambda p, stage, stages: target(p, stage, stages).replace("\n", " "),
        lambda p, stage, stages: target(p, 0, stages),
    ),
    training.learning_rate_share: (
        lambda step, total, warmup, final: share(step, total, 0, final),
        lambda step, total, warmup, final: step / warmup if step < warmup else share(step, total, warmup, final),
        lambda step, total, warmup, final: share(step, total, warmup, 0.0),
        lambda step, total, warmup, final: 2 * share(step, total, warmup, final),
        lambda step, total, warmup, final: 0.5,
    ),
    training.follows_donor: (changed, forgotten, lambda model, problems: 1.0, lambda model, problems: 0.5),
}


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.name)
def test_solutions_pass_and_stubs_are_not_tried(check):
    expect_solved(check, RIGHT[check])


@pytest.mark.parametrize("check", WRONG, ids=lambda check: check.name)
def test_each_mistake_has_a_message_of_its_own(check, capsys):
    expect_told_apart(check, WRONG[check], capsys)
