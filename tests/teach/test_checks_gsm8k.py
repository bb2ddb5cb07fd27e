"""Exercises of 04: the solution passes, typical mistakes get a message of their own."""

import numpy as np
import pytest
from scipy.stats import binomtest

from latentlab.teach.checks import gsm8k
from tests.teach.judging import expect_solved, expect_told_apart


def interval(a, b, scale=100, width=1.96, root=True, paired=True):
    d = a - b
    error = d.std() if paired else np.sqrt(a.var() + b.var())
    half = width * error / (len(d) ** 0.5 if root else 1)
    return scale * d.mean(), scale * (d.mean() - half), scale * (d.mean() + half)


def mcnemar(a, b, **options):
    return binomtest(int((a > b).sum()), int((a != b).sum()), **options).pvalue


def needed(difference, discordance, z=1.96 + 0.8416):
    return int(np.ceil((discordance - (difference / 100) ** 2) * (z / (difference / 100)) ** 2))


RIGHT = {gsm8k.paired_interval: interval, gsm8k.mcnemar: mcnemar, gsm8k.problems_needed: needed}
WRONG = {
    gsm8k.paired_interval: (
        lambda a, b: interval(a, b, paired=False),
        lambda a, b: interval(a, b, scale=1),
        lambda a, b: interval(a, b, root=False),
        lambda a, b: interval(a, b, width=1),
        lambda a, b: interval(b, a),
        lambda a, b: (0, 0, 0),
    ),
    gsm8k.mcnemar: (
        lambda a, b: mcnemar(a, b, alternative="greater"),
        lambda a, b: binomtest(int((a > b).sum()), len(a)).pvalue,
        lambda a, b: 100 * mcnemar(a, b) + 1,
        lambda a, b: 0.5,
    ),
    gsm8k.problems_needed: (
        lambda d, s: needed(d, s, z=1.96),
        lambda d, s: needed(d, s, z=1.96 + 1.2816),
        lambda d, s: int(needed(100 * d, 1)) + 1,
        lambda d, s: 1319,
    ),
}


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.name)
def test_solutions_pass_and_stubs_are_not_tried(check):
    expect_solved(check, RIGHT[check])


@pytest.mark.parametrize("check", WRONG, ids=lambda check: check.name)
def test_each_mistake_has_a_message_of_its_own(check, capsys):
    expect_told_apart(check, WRONG[check], capsys)
