"""statistics.py against numbers from other routes: by hand, by enumeration, by simulation, by scipy's own routines."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from latentlab.evaluation.statistics import (
    detectable_difference,
    paired_comparison,
    pass_at_k,
    power_at,
    seed_comparison,
    verdict,
    wilson_interval,
)


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays a, b [n] with the given counts of the four kinds of problems."""
    kinds = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [both, only_a, only_b, neither], axis=0)
    return kinds[:, 0], kinds[:, 1]


# Wilson


def test_wilson_interval_by_hand_at_an_easy_case():
    # 0 of n: the upper bound is z^2 / (n + z^2), the lower 0.
    z2 = 1.959963984540054**2
    assert wilson_interval(0, 10) == pytest.approx((0.0, z2 / (10 + z2)), abs=1e-12)


@pytest.mark.parametrize(("correct", "n", "confidence"), [(360, 1319, 0.95), (1, 3, 0.9), (7, 7, 0.99)])
def test_wilson_interval_equals_scipys(correct, n, confidence):
    expected = stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


# Paired comparison


def test_paired_comparison_counts_by_hand():
    result = paired_comparison(*outcomes(50, 9, 3, 38), seed=0)
    assert (result["n"], result["only_a"], result["only_b"]) == (100, 9, 3)
    assert result["difference"] == 6.0 and result["discordance"] == 0.12
    # two-sided exact: 2 * P(X <= 3) with X ~ Binomial(12, 1/2) = 2 * (1 + 12 + 66 + 220) / 4096
    assert result["p_value"] == pytest.approx(2 * 299 / 4096, rel=1e-12)


@pytest.mark.parametrize(("only_a", "only_b"), [(1, 0), (5, 5), (70, 62), (23, 0)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_problems(only_a, only_b):
    expected = stats.binomtest(only_a, only_a + only_b).pvalue
    assert paired_comparison(*outcomes(300, only_a, only_b, 200), seed=0)["p_value"] == pytest.approx(expected)


def test_interval_agrees_with_the_normal_one_and_with_scipys_bootstrap():
    a, b = outcomes(300, 90, 60, 869)
    result = paired_comparison(a, b, seed=0)
    d = (90 - 60) / 1319
    half = 1.96 * math.sqrt((150 / 1319 - d**2) / 1319)
    assert (result["low"], result["high"]) == pytest.approx((100 * (d - half), 100 * (d + half)), abs=0.12)
    other = stats.bootstrap(((a - b),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    limits = other.confidence_interval
    assert (result["low"], result["high"]) == pytest.approx((100 * limits.low, 100 * limits.high), abs=0.15)


def test_interval_is_the_exact_resampling_distribution_of_a_tiny_case():
    # d = (1, 1, 0, -1): all 4^4 resamples can be listed, and their quantiles read off.
    a, b = [1, 1, 0, 0], [0, 0, 0, 1]
    means = [100 * sum(pick) / 4 for pick in itertools.product([1, 1, 0, -1], repeat=4)]
    result = paired_comparison(a, b, seed=0, confidence=0.8, resamples=20_000)
    assert (result["low"], result["high"]) == tuple(np.quantile(means, [0.1, 0.9]))


def test_swapping_the_arms_changes_the_sign_alone():
    a, b = outcomes(40, 30, 10, 20)
    there, back = paired_comparison(a, b, seed=0), paired_comparison(b, a, seed=0)
    assert there["difference"] == -back["difference"] and there["p_value"] == back["p_value"]
    assert (there["only_a"], there["only_b"]) == (back["only_b"], back["only_a"])
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]), abs=1.01)  # one problem = 1


def test_the_seed_alone_decides_the_interval():
    a, b = outcomes(31, 17, 9, 210)
    first = paired_comparison(a, b, seed=0, confidence=0.937)
    assert first == paired_comparison(a, b, seed=0, confidence=0.937)
    order = np.random.default_rng(0).permutation(a.size)
    assert first == paired_comparison(a[order], b[order], seed=0, confidence=0.937)


def test_equal_arms_differ_by_exactly_nothing():
    a, _ = outcomes(5, 3, 0, 4)
    result = paired_comparison(a, a, seed=0)
    assert (result["difference"], result["low"], result["high"], result["p_value"]) == (0.0, 0.0, 0.0, 1.0)


# Several seeds


def test_seed_comparison_equals_a_plain_loop_over_resampled_seeds_and_problems():
    rng = np.random.default_rng(0)
    start = rng.random((1, 200)) < 0.5
    a = (start | (rng.random((4, 200)) < np.array([[0.05], [0.1], [0.2], [0.3]]))).astype(int)
    b = (start & (rng.random((4, 200)) < 0.9)).astype(int)
    result = seed_comparison(a, b, seed=1, resamples=20_000)
    d, means = a - b, []
    for _ in range(20_000):
        seeds, problems = rng.integers(4, size=4), rng.integers(200, size=200)
        means.append(100 * d[seeds][:, problems].mean())
    assert (result["low"], result["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.5)
    assert result["difference"] == pytest.approx(100 * d.mean())
    assert result["seed_differences"] == pytest.approx((100 * d.mean(axis=1)).tolist())
    assert result["seed_sd"] == pytest.approx(np.std(100 * d.mean(axis=1), ddof=1))


def test_equal_seeds_leave_the_variability_of_problems_alone():
    a, b = outcomes(300, 90, 60, 869)
    one = paired_comparison(a, b, seed=0)
    four = seed_comparison(np.tile(a, (4, 1)), np.tile(b, (4, 1)), seed=0)
    assert four["seed_sd"] == 0.0
    assert (four["low"], four["high"]) == pytest.approx((one["low"], one["high"]), abs=0.1)


def test_equal_problems_leave_the_variability_of_seeds_alone():
    a = np.repeat([[1], [1], [0], [0]], 50, axis=1)  # two seeds gain everything, two nothing
    result = seed_comparison(a, np.zeros_like(a), seed=0, confidence=0.8, resamples=20_000)
    means = [100 * sum(pick) / 4 for pick in itertools.product([1, 1, 0, 0], repeat=4)]
    assert (result["low"], result["high"]) == tuple(np.quantile(means, [0.1, 0.9]))


# pass@k


@pytest.mark.parametrize(("n", "k"), [(6, 1), (6, 3), (6, 6), (1, 1)])
def test_pass_at_k_equals_the_share_of_all_subsets_with_a_right_one(n, k):
    expected = []
    for c in range(n + 1):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        expected.append(sum(any(s) for s in subsets) / len(subsets))
    assert pass_at_k(range(n + 1), n, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_one_is_the_pass_rate_and_large_groups_stay_exact():
    assert pass_at_k([0, 3, 8], 8, 1).tolist() == pytest.approx([0, 3 / 8, 1])
    assert pass_at_k([1], 10_000, 5000)[0] == pytest.approx(0.5)


# Power


def test_one_seed_resolves_the_papers_gain_half_the_time():
    assert 100 * math.sqrt(0.1 / 1319) == pytest.approx(0.87, abs=0.005)
    assert power_at(1.72, 1319, 0.10) == pytest.approx(0.5, abs=0.02)


def test_power_agrees_with_simulated_comparisons():
    n, plus, minus = 400, 0.12, 0.06
    counts = np.random.default_rng(0).multinomial(n, [plus, minus, 1 - plus - minus], size=40_000)
    z = (counts[:, 0] - counts[:, 1]) / np.sqrt(counts[:, 0] + counts[:, 1])  # McNemar's statistic
    assert power_at(6.0, n, 0.18) == pytest.approx(np.mean(np.abs(z) > 1.959964), abs=0.02)


def test_power_by_hand_where_the_difference_narrows_the_variance():
    # bound 1.96 sqrt(0.5/20) = 0.3099, sd sqrt((0.5 - 0.4^2)/20) = 0.1304, z = (0.4 - 0.3099)/0.1304 = 0.691
    assert power_at(40.0, 20, 0.5) == pytest.approx(0.7552, abs=5e-4)


def test_without_a_difference_power_is_the_error_rate():
    assert power_at(0.0, 500, 0.2, confidence=0.9) == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "discordance", "power"), [(1319, 0.1, 0.8), (1319, 0.1, 0.5), (200, 0.3, 0.9), (50, 1.0, 0.8)]
)
def test_detectable_difference_inverts_power(n, discordance, power):
    difference = detectable_difference(n, discordance, power)
    assert power_at(difference, n, discordance) == pytest.approx(power, abs=1e-6)


def test_detectable_difference_by_hand():
    # (1.96 + 0.8416) standard errors of 0.8707 points, less the little that d^2 takes from the variance
    assert detectable_difference(1319, 0.1) == pytest.approx(2.8016 * 0.8707, abs=0.02)


# Verdict


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 3.0, "reproduced"),
        (0.1, 1.72, "reproduced"),  # the target itself counts as reached
        (2.0, 3.0, "reproduced"),
        (0.1, 1.71, "smaller gain"),
        (-0.5, 1.0, "not reproduced"),
        (0.0, 1.0, "not reproduced"),  # zero itself is not above zero
        (-3.0, -1.0, "not reproduced"),
        (0.0, 1.72, "not resolved"),
        (-1.0, 3.0, "not resolved"),
    ],
)
def test_verdict_follows_the_rule(low, high, expected):
    assert verdict((low + high) / 2, low, high) == expected


def test_verdict_takes_another_target():
    assert verdict(5.0, 1.0, 9.0, target=11.1) == "smaller gain"


# Errors


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(5, 4),
        lambda: wilson_interval(0, 0),
        lambda: wilson_interval(1, 4, confidence=95),
        lambda: paired_comparison([1, 0], [1], seed=0),
        lambda: paired_comparison([], [], seed=0),
        lambda: paired_comparison([0.5, 1], [1, 0], seed=0),
        lambda: paired_comparison([float("nan"), 1], [1, 0], seed=0),
        lambda: paired_comparison([1, 0], [1, 0], seed=0, resamples=0),
        lambda: seed_comparison([1, 0], [1, 0], seed=0),
        lambda: seed_comparison([[1, 0]], [[1, 0]], seed=0),
        lambda: seed_comparison([[1, 2], [0, 0]], [[1, 0], [0, 0]], seed=0),
        lambda: pass_at_k([1], 4, 5),
        lambda: pass_at_k([5], 4, 1),
        lambda: pass_at_k([1.5], 4, 1),
        lambda: pass_at_k([], 4, 1),
        lambda: power_at(11.0, 100, 0.1),
        lambda: power_at(1.0, 100, 10),
        lambda: power_at(float("nan"), 100, 0.1),
        lambda: detectable_difference(3, 0.1),
        lambda: detectable_difference(100, 0.1, power=80),
        lambda: verdict(1.0, 2.0, 3.0),
        lambda: verdict(float("nan"), 0.0, 1.0),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(call):
    with pytest.raises(ValueError, match="^got .*expected .*: ") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_every_discordance_of_a_real_table_has_a_detectable_difference():
    for count in range(20, 400):  # 100 * x / 100 is not always x
        assert 0 < detectable_difference(4000, count / 4000) < 10
