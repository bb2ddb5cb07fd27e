"""Exercises of 04_gsm8k_reproduction: a paired interval, McNemar's test, a study with power."""

from __future__ import annotations

import numpy as np
from scipy.stats import binomtest, norm

from latentlab.evaluation.statistics import power_at
from latentlab.teach.exercise import Exercise

_rng = np.random.default_rng(0)
BEFORE = (_rng.random(400) < 0.3).astype(int)  # right or wrong, of one model
AFTER = np.where(_rng.random(400) < 0.12, 1 - BEFORE, BEFORE)  # of another, on the same problems
PAIRS = ((AFTER, BEFORE), (BEFORE, AFTER))


def _errors(a, b, how) -> float:
    d = a - b
    return {
        "paired": float(d.std() / len(d) ** 0.5),
        "unpaired": float(np.sqrt(a.var() / len(a) + b.var() / len(b))),
        "sd": float(d.std()),
    }[how]


def _intervals(answer) -> np.ndarray | None:
    found = [answer(a, b) for a, b in PAIRS]
    return None if found[0] is None else np.array([[float(x) for x in row] for row in found])


def _triples(how: str, scale: float = 100.0, width: float = 1.96) -> np.ndarray:
    rows = [(scale * (a - b).mean(), scale * width * _errors(a, b, how)) for a, b in PAIRS]
    return np.array([(d, d - half, d + half) for d, half in rows])


def _close(value: np.ndarray, target: np.ndarray) -> bool:
    return value.shape == target.shape and np.allclose(value, target, atol=0.02 * np.abs(target).max())


paired_interval = Exercise(
    "paired_interval",
    _intervals,
    lambda v: _close(v, _triples("paired")),
    (
        (lambda v: _close(v, _triples("unpaired")), "that interval forgets that both models saw the same problems"),
        (lambda v: _close(v, _triples("paired", 1.0)), "in percentage points: times 100"),
        (lambda v: _close(v, _triples("sd")), "a standard error is the standard deviation divided by sqrt(n)"),
        (lambda v: _close(v, _triples("paired", width=1.0)), "95 %: 1.96 standard errors on either side"),
        (lambda v: _close(v, _triples("paired")[::-1]), "the sign: the first model minus the second"),
    ),
    "not yet: with d = a − b, the mean of d ± 1.96 · sd(d) / sqrt(n), times 100",
)


def _p(a, b) -> float:
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return float(binomtest(wins, wins + losses).pvalue)


def _p_values(answer) -> list[float] | None:
    rows = [answer(a, b) for a, b in PAIRS]
    return None if rows[0] is None else [float(p) for p in rows]


def _one_sided(a, b) -> float:
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return float(binomtest(wins, wins + losses, alternative="greater").pvalue)


def _all_problems(a, b) -> float:
    return float(binomtest(int((a > b).sum()), len(a)).pvalue)


mcnemar = Exercise(
    "mcnemar",
    _p_values,
    lambda found: np.allclose(found, [_p(*pair) for pair in PAIRS], rtol=1e-6),
    (
        (
            lambda found: np.allclose(found, [_one_sided(*pair) for pair in PAIRS], rtol=1e-6),
            "two-sided: either model may win",
        ),
        (
            lambda found: np.allclose(found, [_all_problems(*pair) for pair in PAIRS], rtol=1e-3),
            "problems on which both agree say nothing: count the discordant ones alone",
        ),
        (lambda found: any(not 0 <= p <= 1 for p in found), "a p-value lies between 0 and 1"),
    ),
    "not yet: binomtest(wins, wins + losses), of the problems that exactly one model gets right",
)

CASES = ((1.72, 0.10), (0.5, 0.05))


def _needed(difference: float, discordance: float, power: float = 0.8) -> int:
    return next(n for n in range(100, 200_000, 100) if power_at(difference, n, discordance) >= power)


def _sizes(answer) -> list[int] | None:
    found = [answer(*case) for case in CASES]
    return None if found[0] is None else [int(n) for n in found]


def _near(found: list[int], target: list[float], share: float = 0.06) -> bool:
    return all(abs(n / t - 1) < share for n, t in zip(found, target, strict=True))


problems_needed = Exercise(
    "problems_needed",
    _sizes,
    lambda found: _near(found, [_needed(*case) for case in CASES]),
    (
        (
            lambda found: _near(found, [share * (norm.isf(0.025) / (d / 100)) ** 2 for d, share in CASES]),
            "that is power 0.5: a true difference needs room above the critical value, 1.96 + 0.84 errors",
        ),
        (
            lambda found: _near(found, [_needed(*case, power=0.9) for case in CASES]),
            "that is power 0.9; 0.8 is asked for",
        ),
        (lambda found: all(n < 100 for n in found), "points are hundredths: divide the difference by 100"),
    ),
    "not yet: var(d) is about the discordance, so its standard error is sqrt(discordance / n)",
)
