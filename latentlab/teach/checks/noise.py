"""Exercises of 05_when_a_mask_helps: how many bases, equal compute, equal mean accuracy."""

from __future__ import annotations

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from latentlab.teach.exercise import Exercise

SPREADS = ((0.3, 0.35), (0.9, 0.35), (0.9, 0.2))  # (standard deviation between bases, half width), points
SECONDS = ((400, 0.14, 0.045), (100, 0.2, 0.1))  # iterations of a masked arm, CPU seconds an iteration of both
CURVE = ((0.9, 0.2), (0.5, 0.8), (0.7, 0.5))  # (mean accuracy, share of mixed groups) of three temperatures


def _bases(spread: float, half_width: float, critical=student.isf) -> int:
    return next(n for n in range(2, 1000) if critical(0.025, n - 1) * spread / n**0.5 <= half_width)


def _normal(tail: float, _: int) -> float:
    return float(norm.isf(tail))


def _whole(found: list) -> list[int] | None:
    return None if found[0] is None else [int(x) for x in found]


bases_for = Exercise(
    "bases_for",
    lambda answer: _whole([answer(*case) for case in SPREADS]),
    lambda found: found == [_bases(*case) for case in SPREADS],
    (
        (
            lambda found: found == [_bases(*case, critical=_normal) for case in SPREADS],
            "few bases: Student's t, not the normal's 1.96",
        ),
        (lambda found: found == [_bases(s, w / 2) for s, w in SPREADS], "half_width is half of the interval already"),
        (
            lambda found: (
                found == [_bases(*case, critical=lambda tail, n: student.isf(2 * tail, n)) for case in SPREADS]
            ),
            "95 % two-sided: a tail of 0.025 on either side",
        ),
        (
            lambda found: all(b < _bases(*c) for b, c in zip(found, SPREADS, strict=True)),
            "too few: the interval is still too wide",
        ),
        (
            lambda found: all(b > _bases(*c) for b, c in zip(found, SPREADS, strict=True)),
            "more than needed: the smallest number",
        ),
    ),
    "not yet: the half width with n bases is t(0.025, n - 1) * spread / sqrt(n)",
)

iterations_at_equal_seconds = Exercise(
    "iterations_at_equal_seconds",
    lambda answer: _whole([answer(*case) for case in SECONDS]),
    lambda found: found == [round(n * a / b) for n, a, b in SECONDS],
    (
        (
            lambda found: found == [round(n * b / a) for n, a, b in SECONDS],
            "the wrong way round: the cheaper arm gets more iterations",
        ),
        (lambda found: found == [n for n, *_ in SECONDS], "those are equal rollouts, not equal seconds"),
        (
            lambda found: found == [round(n * a) for n, a, _ in SECONDS],
            "those are seconds: how many iterations fit in them?",
        ),
    ),
)


MEANS, MIXED = (list(x) for x in zip(*CURVE, strict=True))
ASKED = (0.6, 0.84, 0.5)


def _mixed(answer) -> list[float] | None:
    found = [answer(MEANS, MIXED, mean) for mean in ASKED]
    return None if found[0] is None else [float(x) for x in found]


mixed_at = Exercise(
    "mixed_at",
    _mixed,
    lambda found: np.allclose(found, (0.65, 0.29, 0.8), atol=1e-9),
    (
        (
            lambda found: np.allclose(found, [np.interp(mean, MEANS, MIXED) for mean in ASKED]),
            "np.interp wants means in ascending order: sort the pairs first",
        ),
        (
            lambda found: set(found) <= set(MIXED) and len(set(found)) > 1,
            "the share of one temperature: interpolate between two",
        ),
        (lambda found: len(set(found)) == 1, "the same number for every mean"),
    ),
)
