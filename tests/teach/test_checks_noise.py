"""Exercises of 05: the solution passes, typical mistakes get a message of their own."""

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from latentlab.teach.checks import noise
from tests.teach.judging import expect_solved, expect_told_apart


def bases(spread, half_width, critical=student.isf, tail=0.025):
    n = 2
    while critical(tail, n - 1) * spread / n**0.5 > half_width:
        n += 1
    return n


def interpolated(means, mixed, mean):
    order = np.argsort(means)
    return np.interp(mean, np.array(means)[order], np.array(mixed)[order])


def nearest(means, mixed, mean):
    return mixed[int(np.argmin([abs(m - mean) for m in means]))]


RIGHT = {
    noise.bases_for: bases,
    noise.iterations_at_equal_seconds: lambda n, a, b: round(n * a / b),
    noise.mixed_at: interpolated,
}
WRONG = {
    noise.bases_for: (
        lambda s, w: bases(s, w, critical=lambda tail, _: norm.isf(tail)),
        lambda s, w: bases(s, w / 2),
        lambda s, w: bases(s, w, tail=0.05),
        lambda s, w: 2,
        lambda s, w: 500,
    ),
    noise.iterations_at_equal_seconds: (
        lambda n, a, b: round(n * b / a),
        lambda n, a, b: n,
        lambda n, a, b: n * a,
        lambda n, a, b: 7 * n,
    ),
    noise.mixed_at: (
        nearest,
        lambda means, mixed, mean: np.interp(mean, means, mixed),
        lambda means, mixed, mean: np.mean(mixed),
        lambda means, mixed, mean: 1 - mean,
    ),
}


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.name)
def test_solutions_pass_and_stubs_are_not_tried(check):
    expect_solved(check, RIGHT[check])


@pytest.mark.parametrize("check", WRONG, ids=lambda check: check.name)
def test_each_mistake_has_a_message_of_its_own(check, capsys):
    expect_told_apart(check, WRONG[check], capsys)
