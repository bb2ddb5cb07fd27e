"""Intervals, paired tests and power for 0/1 outcomes: thin calls of scipy.

Two arms answer the same n problems, so problem i gives d_i = a_i - b_i in {-1, 0, +1}, and

    difference d = mean(d_i),  Var(d) = (discordance - d^2) / n,  discordance = share of d_i != 0.

Differences and their bounds are in percentage points (100 x); shares, confidences, powers in 0..1.
Sources: Wilson 1927; McNemar 1947; Cochran & Cox 1957 (one variance of few degrees of freedom);
Connor 1987 (power for paired proportions); Hillis 2007 (crossed readers and cases, here seeds and
problems); Bonett & Price 2012 (few discordant pairs); Chen et al. 2021, arXiv:2107.03374 (pass@k).
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import binomtest, chi2, hypergeom, norm
from scipy.stats import t as student


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) in 0..1; ValueError unless 0 <= correct <= n and n >= 1."""
    _check_share("confidence", confidence)
    if not (n >= 1 and 0 <= correct <= n):
        raise ValueError(f"got correct = {correct} of n = {n}, expected 0 <= correct <= n and n >= 1: check the counts")
    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def paired_comparison(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95) -> dict[str, float | int]:
    """Arm `a` minus arm `b` on the same problems; a, b [n] of 0/1 in the same order.

    Returns n · difference, low, high (points; over problems alone, see `half_width`) · only_a, only_b
    (problems that one arm alone got right) · discordance (their share) · p_value (exact two-sided
    McNemar). Raises ValueError for other values than 0/1, or unequal or empty arrays.
    """
    a, b = _outcomes(a, b, ndim=1)
    only_a, only_b = int(np.sum(a > b)), int(np.sum(a < b))
    return {
        "n": a.size,
        **_interval((a - b)[None], confidence),
        "only_a": only_a,
        "only_b": only_b,
        "discordance": (only_a + only_b) / a.size,
        "p_value": float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    }


def arm_comparison(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95) -> dict:
    """Arm `a` minus arm `b` over S >= 1 training seeds and n problems; a, b [S, n] of 0/1.

    Row s of both arms must be the same training seed (hence the same start), column i the same
    problem. From two seeds on, the interval is for new seeds and new problems; one seed shows no
    variance between seeds, so its interval is over problems alone.

    Returns seeds, n · difference, low, high (points; see `half_width`) · discordance · per_seed, the
    `paired_comparison` of each seed · from two seeds on: seed_sd, the standard deviation of the
    seeds' differences; seed_effect_sd, the part of it that is not noise of the answers (points);
    shared, the share of the other variance that is the problems' own, common to all seeds.
    Raises ValueError for other values than 0/1, or unequal or empty arrays.
    """
    a, b = _outcomes(a, b, ndim=2)
    d, (seeds, n) = a - b, a.shape
    result: dict = {"seeds": seeds, "n": n, **_interval(d, confidence), "discordance": float(np.mean(d != 0))}
    if seeds > 1:
        seed, problem, residual = mean_squares(d)
        common = max(problem - residual, 0.0) / seeds
        result["seed_sd"] = 100 * float(np.sqrt(seed / n))
        result["seed_effect_sd"] = 100 * float(np.sqrt(max(seed - residual, 0.0) / n))
        result["shared"] = common / (common + residual) if common else 0.0
    return result | {"per_seed": [paired_comparison(*pair, confidence=confidence) for pair in zip(a, b, strict=True)]}


def mean_squares(d: np.ndarray) -> tuple[float, float, float]:
    """Mean squares (seed, problem, residual) of d [S, n], a two-way analysis of variance.

    Those of a single seed are (0, variance of the problems, 0). n stands for n - 1.
    """
    seeds, n = d.shape
    rows, columns, mean = d.mean(axis=1), d.mean(axis=0), d.mean()
    residual = np.sum((d - rows[:, None] - columns + mean) ** 2) / (max(seeds - 1, 1) * n)
    return float(n * np.sum((rows - mean) ** 2) / max(seeds - 1, 1)), float(seeds * columns.var()), float(residual)


def half_width(
    seed: ArrayLike, problem: ArrayLike, residual: ArrayLike, *, seeds: int, n: int, confidence: float = 0.95
) -> np.ndarray:
    """Half the interval's width, as a share, from the `mean_squares` of S x n differences.

    Seeds and problems are crossed random factors. The mean has the variance (P + M) / (S n), with
    P = max(problem - residual, 0), known nearly exactly from n problems, and M = seed, known from S
    seeds only. The critical value is the average of the normal quantile and Student's with S - 1
    degrees of freedom, weighted by P and M (Cochran & Cox 1957). M is at least what answers without
    any variance between seeds exceed with probability `confidence`.
    P counts two more problems than were seen, one for each arm at every seed (Bonett & Price 2012):
    without any, the interval is +-2.8 problems for every S. Where seeds differ on other problems,
    these two count for less: for max(2 - D / 3, 0), with D = n residual problems a seed. For one
    seed, seed = residual = 0, so M = 0. Simulated coverage: docs/statistics.md.
    The mean squares may be arrays of many studies.
    """
    tail, freedom = (1 - confidence) / 2, max(seeds - 1, 1)
    own = np.maximum(np.subtract(problem, residual), 0) + seeds * np.maximum(2 / n - np.asarray(residual) / 3, 0)
    between = np.maximum(seed, np.asarray(residual) * chi2.isf(confidence, freedom) / freedom)
    weight = own / (own + between)
    critical = norm.isf(tail) * weight + student.isf(tail, freedom) * (1 - weight)
    return critical * np.sqrt((own + between) / (seeds * n))


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


def verdict_rates(
    difference: float,
    *,
    n: int,
    discordance: float,
    seeds: int = 1,
    seed_effect_sd: float = 0.0,
    shared: float = 0.0,
    target: float = 1.72,
) -> dict[str, float]:
    """How often `verdict` says each word in studies whose true difference (points) is this one.

    n, discordance, seeds: of the study. seed_effect_sd: standard deviation of the true difference
    between seeds (points). shared: see `arm_comparison`. Returns {word: probability}, by the normal
    approximation of the mean, averaged over the distribution of the seeds' mean square.
    Raises ValueError where `power_at` does, and unless seeds is whole, seeds >= 1,
    seed_effect_sd >= 0 and 0 <= shared <= 1.
    """
    power_at(difference, n, discordance)  # its checks
    if not (seeds >= 1 and seeds % 1 == 0 and seed_effect_sd >= 0 and 0 <= shared <= 1):
        got = f"{seeds = }, {seed_effect_sd = }, {shared = }"
        raise ValueError(f"got {got}, expected whole seeds >= 1, seed_effect_sd >= 0, 0 <= shared <= 1: check units")
    noise = max(discordance - (difference / 100) ** 2, 1e-12)  # as in `power_at`
    residual = (1 - shared) * noise  # expected mean squares
    problem, seed = residual + seeds * shared * noise, residual + n * (seed_effect_sd / 100) ** 2
    chances = (np.arange(2000) + 0.5) / 2000
    drawn = seed * chi2.ppf(chances, seeds - 1) / (seeds - 1) if seeds > 1 else 0.0
    half = 100 * half_width(drawn, problem, residual if seeds > 1 else 0.0, seeds=seeds, n=n)
    sd = 100 * np.sqrt((seed + problem - residual) / (seeds * n))

    def below(bound: np.ndarray) -> float:
        return float(np.mean(norm.cdf((bound - difference) / sd)))

    above, lowest, highest = below(half), below(np.minimum(half, target - half)), below(np.maximum(half, target - half))
    words = ("reproduced", "smaller gain", "not reproduced", "not resolved")
    return dict(zip(words, (1 - highest, highest - above, lowest, above - lowest), strict=True))


def _interval(d: np.ndarray, confidence: float) -> dict[str, float]:
    _check_share("confidence", confidence)
    (seed, problem, residual), (seeds, n) = mean_squares(d), d.shape
    half = float(half_width(seed, problem, residual, seeds=seeds, n=n, confidence=confidence))
    mean, half = float(100 * d.sum() / d.size), 100 * half
    return {"difference": mean, "low": max(mean - half, -100.0), "high": min(mean + half, 100.0)}


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
