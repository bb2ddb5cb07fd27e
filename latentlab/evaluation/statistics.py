"""Intervals, paired tests and power for 0/1 outcomes: thin calls of scipy.

Two arms answer the same n problems, so problem i gives d_i = a_i - b_i in {-1, 0, +1}, and

    difference d = mean(d_i),  Var(d) = (discordance - d^2) / n,  discordance = share of d_i != 0.

Differences and their bounds are in percentage points (100 x); shares, confidences, powers in 0..1.
Sources: Wilson 1927; McNemar 1947; Connor 1987 (power for paired proportions); Efron & Tibshirani
1993 (bootstrap); Owen 2007 (crossed factors); Chen et al. 2021, arXiv:2107.03374 (pass@k).
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import binomtest, hypergeom, norm
from scipy.stats import t as student

FEW_SEEDS = 3  # the least number of seeds for which Student's interval over seeds is reported


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) in 0..1; ValueError unless 0 <= correct <= n and n >= 1."""
    _check_share("confidence", confidence)
    if not (n >= 1 and 0 <= correct <= n):
        raise ValueError(f"got correct = {correct} of n = {n}, expected 0 <= correct <= n and n >= 1: check the counts")
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def paired_comparison(
    a: ArrayLike, b: ArrayLike, *, seed: int, confidence: float = 0.95, resamples: int = 10_000
) -> dict[str, float | int]:
    """Arm `a` minus arm `b` on the same problems; a, b [n] of 0/1 in the same order.

    Returns n · difference, low, high (points; percentile bootstrap over problems) · only_a, only_b
    (problems that one arm alone got right) · discordance (their share) · p_value (exact two-sided
    McNemar). Without discordant problems the interval is [0, 0]: see `detectable_difference`.
    Raises ValueError for other values than 0/1, or unequal or empty arrays.
    """
    a, b = _outcomes(a, b, ndim=1)
    only_a, only_b = int(np.sum(a > b)), int(np.sum(a < b))
    return {
        "n": a.size,
        "difference": 100 * (only_a - only_b) / a.size,
        **_bootstrap((a - b)[None], seed, confidence, resamples),
        "only_a": only_a,
        "only_b": only_b,
        "discordance": (only_a + only_b) / a.size,
        "p_value": float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    }


def seed_comparison(
    a: ArrayLike, b: ArrayLike, *, seed: int, confidence: float = 0.95, resamples: int = 10_000
) -> dict[str, float | int | list[float]]:
    """Arm `a` minus arm `b` over training seeds and problems; a, b [S, n] of 0/1.

    Row s of both arms must be the same training seed (hence the same start), column i the same
    problem. Each bootstrap resample draws S seeds and n problems with replacement, the same
    problems for every seed and both arms, since all answered one test set. With few seeds the
    interval is too narrow for new seeds: it has (S - 1) / S of the seed part of the variance.

    Returns seeds, n · difference, low, high (points) · seed_differences [S] and their standard
    deviation seed_sd (points) · t_low, t_high: Student's interval over the seeds alone, valid for
    few seeds.
    Raises ValueError for other values than 0/1, unequal shapes, or fewer than 2 seeds.
    """
    a, b = _outcomes(a, b, ndim=2)
    if len(a) < 2:
        raise ValueError(f"got {len(a)} seed, expected at least 2: run more seeds, or use paired_comparison for one")
    seeds, n = a.shape
    by_seed = 100 * (a - b).mean(axis=1)  # [S]
    mean, sd = float(by_seed.mean()), float(by_seed.std(ddof=1))
    half = float(student.isf((1 - confidence) / 2, seeds - 1) * sd / np.sqrt(seeds))
    interval = _bootstrap(a - b, seed, confidence, resamples)
    by_student = {"seed_sd": sd, "t_low": mean - half, "t_high": mean + half}
    return {"seeds": seeds, "n": n, "difference": mean, **interval, "seed_differences": by_seed.tolist(), **by_student}


def arm_comparison(a: ArrayLike, b: ArrayLike, *, seed: int) -> dict:
    """Arm `a` minus arm `b` over S >= 1 training seeds and per seed; a, b as in `seed_comparison`.

    Returns the keys of `seed_comparison` (one seed: `paired_comparison`) · wide_low, wide_high, the
    interval that decides: the bootstrap's, from FEW_SEEDS on the wider of it and Student's (12.7
    standard errors wide for two seeds) · per_seed, the `paired_comparison` of each.
    """
    a, b = _outcomes(a, b, ndim=2)
    per_seed = [paired_comparison(ours, theirs, seed=seed) for ours, theirs in zip(a, b, strict=True)]
    pooled = {"seeds": 1, **per_seed[0]} if len(a) == 1 else seed_comparison(a, b, seed=seed)
    bounds = [pooled[key] for key in ("low", "high", "t_low", "t_high")[: 4 if len(a) >= FEW_SEEDS else 2]]
    return {**pooled, "wide_low": min(bounds), "wide_high": max(bounds), "per_seed": per_seed}


def pass_at_k(correct_counts: ArrayLike, n: int, k: int) -> np.ndarray:
    """Unbiased estimate, per problem, that one of k rollouts is right: 1 - C(n - c, k) / C(n, k).

    correct_counts [B]: right rollouts c of each problem. Returns [B] in 0..1; the mean is pass@k.
    Raises ValueError unless 1 <= k <= n and every 0 <= c <= n is whole.
    """
    c = np.asarray(correct_counts)
    if not 1 <= k <= n:
        raise ValueError(f"got k = {k} and n = {n}, expected 1 <= k <= n: draw at least k rollouts a problem")
    if c.size == 0 or not np.all((c >= 0) & (c <= n) & (c == np.floor(c))):
        got = f"correct_counts {c.flatten()[:5].tolist()}"
        raise ValueError(f"got {got}, expected whole numbers in 0..{n}, at least one: check them")
    return hypergeom.sf(0, n, c, k)  # k drawn without replacement from n, c of which are right: at least one


def power_at(difference: float, n: int, discordance: float, confidence: float = 0.95) -> float:
    """Probability that a two-sided paired test resolves a true `difference` (points) on n problems.

    discordance: share of problems that exactly one arm gets right. Connor's normal approximation.
    Raises ValueError unless n >= 1, 0 < discordance <= 1 and |difference| <= 100 x discordance.
    """
    _check_share("confidence", confidence)
    d = difference / 100
    if not (n >= 1 and 0 < discordance <= 1 and abs(d) <= discordance * (1 + 1e-12)):  # 100 x / 100 rounds
        got = f"{n = }, {discordance = }, {difference = } points"
        expected = "n >= 1, 0 < discordance <= 1, |difference| <= 100 x discordance"
        raise ValueError(f"got {got}, expected {expected}: check units")
    bound = norm.isf((1 - confidence) / 2) * np.sqrt(discordance / n)  # |estimate| beyond this is significant
    scale = np.sqrt(max(discordance - d**2, 1e-12) / n)
    return float(norm.sf((bound - d) / scale) + norm.cdf((-bound - d) / scale))


def detectable_difference(n: int, discordance: float, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest true difference (points) that n problems resolve with probability `power`.

    Inverts `power_at`: arguments and errors as there; ValueError too where no difference suffices.
    """
    _check_share("power", power)
    largest = 100 * discordance
    if power_at(largest, n, discordance, confidence) < power:
        raise ValueError(f"got {n = }, {discordance = }, expected enough for power {power}: use more problems")
    if power <= 1 - confidence:
        return 0.0  # the test's error rate alone
    return float(brentq(lambda d: power_at(d, n, discordance, confidence) - power, 0.0, largest))


def verdict(difference_points: float, low: float, high: float, target: float = 1.72) -> str:
    """The study's rule for a paired difference with interval [low, high], all in points.

    low > 0: "reproduced" if high >= target, else "smaller gain"; low <= 0: "not reproduced" if
    high < target, else "not resolved". target: the paper's gain, 27.29 -> 29.01 %.
    Raises ValueError unless low <= difference_points <= high.
    """
    if not low <= difference_points <= high:  # also false for NaN
        got = f"difference {difference_points} with interval [{low}, {high}]"
        raise ValueError(f"got {got}, expected low <= difference <= high: pass the three of one comparison")
    if low > 0:
        return "reproduced" if high >= target else "smaller gain"
    return "not reproduced" if high < target else "not resolved"


def _bootstrap(d: np.ndarray, seed: int, confidence: float, resamples: int) -> dict[str, float]:
    """Percentile interval (points) of the mean of d [S, n] over resampled rows and columns.

    Columns alone if S = 1. Equal columns are drawn together, as a multinomial over the distinct
    ones (3 if S = 1).
    """
    _check_share("confidence", confidence)
    if resamples < 1:
        raise ValueError(f"got resamples = {resamples}, expected at least 1: 10,000 is usual")
    rng, (seeds, n) = np.random.default_rng(seed), d.shape
    patterns, counts = np.unique(d, axis=1, return_counts=True)  # [S, P], [P]
    problem_weights = rng.multinomial(n, counts / n, size=resamples)  # [resamples, P]
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # [resamples, S]
    means = ((seed_weights @ patterns) * problem_weights).sum(axis=1) / (seeds * n)
    low, high = 100 * np.quantile(means, [(1 - confidence) / 2, 1 - (1 - confidence) / 2])
    return {"low": float(low), "high": float(high)}


def _outcomes(a: ArrayLike, b: ArrayLike, *, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != ndim or a.size == 0:
        expected = f"two equal {'[n]' if ndim == 1 else '[seeds, n]'}, not empty"
        raise ValueError(f"got shapes {a.shape} and {b.shape}, expected {expected}: use the same problems")
    if (wrong := np.setdiff1d(np.union1d(a, b), (0, 1))).size:
        raise ValueError(f"got outcomes {wrong[:5].tolist()}, expected 0 or 1: pass right/wrong per problem")
    return a.astype(np.int64), b.astype(np.int64)


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"got {name} = {value}, expected a share between 0 and 1, such as 0.95: divide percent by 100")
