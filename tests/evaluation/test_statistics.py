"""statistics.py against numbers from other routes: by hand, by enumeration, by simulation, by scipy's own routines."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from latentlab.evaluation.statistics import (
    arm_comparison,
    detectable_difference,
    half_width,
    mean_squares,
    paired_comparison,
    pass_at_k,
    power_at,
    verdict,
    verdict_rates,
    wilson_interval,
)
from scripts.measure_intervals import coverage, simulate, simulated_verdicts


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays a, b [n] with the given counts of the four kinds of problems."""
    kinds = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [both, only_a, only_b, neither], axis=0)
    return kinds[:, 0], kinds[:, 1]


# Wilson


def test_wilson_interval_by_hand_at_an_easy_case():
    # 0 of n: the upper bound is z^2 / (n + z^2), the lower 0.
    z2 = 1.959963984540054**2
    assert wilson_interval(0, 10) == pytest.approx((0.0, z2 / (10 + z2)), abs=1e-12)
    assert wilson_interval(0, 1) == pytest.approx((0.0, z2 / (1 + z2)), abs=1e-12)


@pytest.mark.parametrize(("correct", "n", "confidence"), [(360, 1319, 0.95), (1, 3, 0.9), (7, 7, 0.99)])
def test_wilson_interval_equals_scipys(correct, n, confidence):
    expected = stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


# Paired comparison


def test_paired_comparison_counts_by_hand():
    result = paired_comparison(*outcomes(50, 9, 3, 38))
    assert (result["n"], result["only_a"], result["only_b"]) == (100, 9, 3)
    assert result["difference"] == 6.0 and result["discordance"] == 0.12
    # two-sided exact: 2 * P(X <= 3) with X ~ Binomial(12, 1/2) = 2 * (1 + 12 + 66 + 220) / 4096
    assert result["p_value"] == pytest.approx(2 * 299 / 4096, rel=1e-12)


@pytest.mark.parametrize(("only_a", "only_b"), [(1, 0), (5, 5), (70, 62), (23, 0)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_problems(only_a, only_b):
    expected = stats.binomtest(only_a, only_a + only_b).pvalue
    assert paired_comparison(*outcomes(300, only_a, only_b, 200))["p_value"] == pytest.approx(expected)


def test_the_interval_of_one_seed_by_hand():
    result = paired_comparison(*outcomes(300, 90, 60, 869))
    d = 30 / 1319
    half = 1.959964 * math.sqrt((150 + 2) / 1319 - d**2) / math.sqrt(1319)  # two more discordant problems
    assert (result["low"], result["high"]) == pytest.approx((100 * (d - half), 100 * (d + half)), abs=1e-5)


def test_the_interval_agrees_with_scipys_bootstrap():
    a, b = outcomes(300, 90, 60, 869)
    result = paired_comparison(a, b)
    other = stats.bootstrap(((a - b),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    limits = other.confidence_interval
    assert (result["low"], result["high"]) == pytest.approx((100 * limits.low, 100 * limits.high), abs=0.15)


def test_swapping_the_arms_changes_the_sign_alone():
    a, b = outcomes(40, 30, 10, 20)
    there, back = paired_comparison(a, b), paired_comparison(b, a)
    assert there["difference"] == -back["difference"] and there["p_value"] == back["p_value"]
    assert (there["only_a"], there["only_b"]) == (back["only_b"], back["only_a"])
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))


def test_the_order_of_problems_changes_nothing():
    a, b = outcomes(31, 17, 9, 210)
    order = np.random.default_rng(0).permutation(a.size)
    assert paired_comparison(a[order], b[order]) == paired_comparison(a, b)


@pytest.mark.parametrize("seeds", [1, 2, 3, 10])
def test_without_a_discordant_problem_the_interval_is_what_the_problems_alone_say(seeds):
    a = np.tile(outcomes(500, 0, 0, 819)[0], (seeds, 1))
    result = arm_comparison(a, a)
    assert result["difference"] == 0 and result["low"] == -result["high"]
    assert result["high"] == pytest.approx(100 * 1.959964 * math.sqrt(2) / 1319)  # +-2.8 problems for any S
    assert paired_comparison(a[0], a[0])["p_value"] == 1.0


def test_a_difference_never_leaves_plus_or_minus_100_points():
    assert (paired_comparison([1, 1], [0, 0])["low"], paired_comparison([1, 1], [0, 0])["high"]) < (100.0, 100.0)
    assert paired_comparison([1, 1], [0, 0])["high"] == 100 and paired_comparison([0], [1])["low"] == -100


# Several seeds


def crossed(seeds=4, n=200):
    """Outcomes a, b [seeds, n]: problems that gain at every seed, seeds that gain unequally, and noise."""
    rng = np.random.default_rng(0)
    start = rng.random((1, n)) < 0.5
    gains = (rng.random((1, n)) < 0.3) | (rng.random((seeds, n)) < np.linspace(0.05, 0.15, seeds)[:, None])
    a = (start | gains).astype(int)
    return a, (start & (rng.random((seeds, n)) < 0.9)).astype(int)


def looped_squares(d):
    """The three mean squares with one loop over the cells."""
    seeds, n = len(d), len(d[0])
    mean = sum(map(sum, d)) / (seeds * n)
    rows, columns = [sum(row) / n for row in d], [sum(row[i] for row in d) / seeds for i in range(n)]
    residual = sum((d[s][i] - rows[s] - columns[i] + mean) ** 2 for s in range(seeds) for i in range(n))
    between = n * sum((row - mean) ** 2 for row in rows) / (seeds - 1)
    return between, seeds * sum((c - mean) ** 2 for c in columns) / n, residual / ((seeds - 1) * n)


@pytest.mark.parametrize(("seeds", "confidence"), [(2, 0.95), (4, 0.95), (4, 0.8), (10, 0.99)])
def test_the_interval_over_seeds_equals_the_rule_in_loops(seeds, confidence):
    a, b = crossed(seeds)
    seed, problem, residual = looped_squares((a - b).tolist())
    assert mean_squares(a - b) == pytest.approx((seed, problem, residual))
    own = problem - residual
    assert own > 0 and seed > residual  # both parts of the rule are at work
    z, t = stats.norm.ppf((1 + confidence) / 2), stats.t.ppf((1 + confidence) / 2, seeds - 1)
    half = 100 * (own * z + seed * t) / math.sqrt((own + seed) * seeds * 200)
    result, mean = arm_comparison(a, b, confidence=confidence), 100 * (a - b).mean()
    assert (result["low"], result["difference"], result["high"]) == pytest.approx((mean - half, mean, mean + half))


def test_what_is_reported_beside_the_interval():
    a, b = crossed()
    seed, problem, residual = looped_squares((a - b).tolist())
    result, by_seed = arm_comparison(a, b), 100 * (a - b).mean(axis=1)
    assert (result["seeds"], result["n"]) == (4, 200)
    assert result["discordance"] == np.mean(a != b)
    assert result["seed_sd"] == pytest.approx(np.std(by_seed, ddof=1))
    assert result["seed_effect_sd"] == pytest.approx(100 * math.sqrt((seed - residual) / 200))
    common = (problem - residual) / 4
    assert result["shared"] == pytest.approx(common / (common + residual))
    assert result["per_seed"] == [paired_comparison(a[s], b[s]) for s in range(4)]


def test_one_seed_has_the_interval_over_problems():
    a, b = crossed(1)
    result, alone = arm_comparison(a, b), paired_comparison(a[0], b[0])
    assert [result[key] for key in ("low", "high", "n")] == [alone[key] for key in ("low", "high", "n")]
    assert result["seeds"] == 1 and "seed_sd" not in result


def test_equal_problems_leave_students_interval_over_the_seeds():
    """Problems that share nothing: P is 0."""
    a = (np.arange(1200).reshape(3, 400) % 7 < np.array([[1], [2], [3]])).astype(int)
    a = np.random.default_rng(0).permuted(a, axis=1)
    seed, problem, residual = mean_squares(a)
    assert problem <= residual
    result, by_seed = arm_comparison(a, np.zeros_like(a)), 100 * a.mean(axis=1)
    expected = stats.t.interval(0.95, 2, by_seed.mean(), stats.sem(by_seed))
    assert (result["low"], result["high"]) == pytest.approx(expected)


def test_equal_seeds_leave_the_interval_over_problems():
    a, b = outcomes(300, 90, 60, 869)
    one, four = paired_comparison(a, b), arm_comparison(np.tile(a, (4, 1)), np.tile(b, (4, 1)))
    assert four["seed_sd"] == 0 and four["shared"] == 1
    kept = {key: four[key] for key in ("n", "discordance", "seeds", "seed_effect_sd", "shared")}
    assert verdict_rates(1.72, **kept) == pytest.approx(verdict_rates(1.72, n=1319, discordance=150 / 1319), abs=0.01)
    assert (four["low"], four["high"]) == pytest.approx((one["low"], one["high"]))


def test_one_problem_settles_nothing_at_any_number_of_seeds():
    for seeds in (1, 2, 3):
        result = arm_comparison(np.ones((seeds, 1)), np.zeros((seeds, 1)))
        assert verdict(*(result[key] for key in ("difference", "low", "high"))) == "not resolved"


def test_seeds_that_agree_by_chance_give_no_interval_of_width_0():
    """M is at least the 5 % quantile of its distribution without variance between seeds."""
    residual, n = 0.1, 1000
    for seeds in (2, 3, 10):
        least = residual * stats.chi2.ppf(0.05, seeds - 1) / (seeds - 1)
        expected = stats.t.ppf(0.975, seeds - 1) * math.sqrt(least / (seeds * n))
        assert half_width(0.0, 0.0, residual, seeds=seeds, n=n) == pytest.approx(expected)
        assert half_width(least * 1.01, 0.0, residual, seeds=seeds, n=n) > expected


@pytest.mark.parametrize("seeds", [2, 5])
def test_two_extra_problems_count_for_less_where_seeds_differ_on_other_problems(seeds):
    """For max(2 - D / 3, 0) problems, D residual problems a seed: P alone, as M is far below it or known."""
    n, z, t = 10_000, stats.norm.ppf(0.975), stats.t.ppf(0.975, seeds - 1)
    for residual, extra in ((0, 2), (1.5, 1.5), (3, 1), (6, 0), (40, 0)):  # in problems
        own, between = seeds * (3 + extra), 1.5 * max(residual, 1)
        expected = (own * z + between * t) / math.sqrt((own + between) * seeds) / n
        squares = np.array([between, 3 * seeds + residual, residual]) / n
        assert half_width(*squares, seeds=seeds, n=n) == pytest.approx(expected)


# Coverage and error rates, simulated


def test_the_simulation_draws_what_it_says():
    """Against whole tables of differences, drawn cell by cell."""
    seeds, n, studies = 3, 400, 1500
    mean, squares = simulate(
        np.random.default_rng(0), studies, seeds=seeds, n=n, discordance=0.2, seed_sd=2.0, shared=0.3, difference=1.0
    )
    rng, tables = np.random.default_rng(1), []
    for _ in range(studies):
        true = rng.normal(0.01, 0.02, (seeds, 1))
        x = (true - 0.3 * 0.01) / 0.7
        u, fixed, same = rng.random((seeds, n)), rng.random(n), rng.random(n) < 0.3
        d = (u < (0.2 + x) / 2).astype(int) - (u > 1 - (0.2 - x) / 2)
        tables.append(np.where(same, (fixed < 0.105).astype(int) - (fixed > 1 - 0.095), d))
    drawn = np.array([mean_squares(d) for d in tables])
    assert np.mean(mean) == pytest.approx(1.0, abs=0.15)
    assert np.std(mean) == pytest.approx(np.std([100 * d.mean() for d in tables]), rel=0.08)
    for values, others in zip(squares, drawn.T, strict=True):
        assert np.mean(values) == pytest.approx(others.mean(), rel=0.1)
        assert np.median(values) == pytest.approx(np.median(others), rel=0.12)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("sd", [0.0, 0.5, 2.0])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(seeds, sd):
    cell = {"seeds": seeds, "n": 1319, "discordance": 0.1, "shared": 0.1, "difference": 1.72}
    assert 0.93 <= coverage(np.random.default_rng(0), 4000, seed_sd=sd, **cell) <= 0.975


@pytest.mark.parametrize("seeds", [1, 2, 3, 10])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_few_discordant_problems_in_one_direction_are_covered(seeds, count, shared):
    cell = {"seeds": seeds, "n": 200, "discordance": count / 200, "shared": shared, "difference": count / 2}
    assert coverage(np.random.default_rng(0), 4000, **cell) >= 0.93


def test_one_seed_covers_new_problems_and_not_new_seeds():
    cell = {"seeds": 1, "n": 1319, "discordance": 0.1}
    assert 0.94 <= coverage(np.random.default_rng(0), 10_000, **cell) <= 0.96
    assert coverage(np.random.default_rng(0), 4000, seed_sd=1.0, **cell) < 0.85


@pytest.mark.parametrize(("seeds", "sd", "true"), [(1, 0.0, 1.72), (1, 1.0, 0.0), (2, 1.0, 1.72), (5, 0.5, 0.0)])
def test_verdict_rates_agree_with_simulated_studies(seeds, sd, true):
    cell = {"n": 4000, "seeds": seeds, "discordance": 0.15, "shared": 0.2}
    found = simulated_verdicts(np.random.default_rng(0), 10_000, seed_sd=sd, difference=true, **cell)
    rates = verdict_rates(true, seed_effect_sd=sd, **cell)
    assert list(rates) == ["reproduced", "smaller gain", "not reproduced", "not resolved"]
    assert sum(rates.values()) == pytest.approx(1) and list(rates.values()) == pytest.approx(found, abs=0.015)


def test_verdict_rates_by_hand_for_one_seed():
    """se 0.8707 points, half width 1.7066 + a little: reproduced if the mean is above it, here half of the time."""
    rates = verdict_rates(1.72, n=1319, discordance=0.1)
    half = 100 * 1.959964 * math.sqrt((0.1 - 0.0172**2 + 2 / 1319) / 1319)
    se = 100 * math.sqrt((0.1 - 0.0172**2) / 1319)
    assert rates["reproduced"] == pytest.approx(stats.norm.sf((half - 1.72) / se), abs=1e-6)
    assert rates["not reproduced"] == pytest.approx(stats.norm.cdf((1.72 - half - 1.72) / se), abs=1e-6)
    assert rates["smaller gain"] == 0


PUBLISHED = Path(__file__).parents[2] / "reports" / "published" / "intervals" / "intervals.json"


def test_every_published_cell_lies_in_the_band_or_cannot():
    """One seed shows no variance between seeds; all other cells lie between 93 and 97.5 %."""
    metrics = json.loads(PUBLISHED.read_text())["metrics"]
    cells = [
        (seeds, n, sd, value)
        for seeds, sizes in metrics["coverage"].items()
        for n, by_sd in sizes.items()
        for sd, values in by_sd.items()
        for value in values
    ]
    assert {cell[:3] for cell in cells} == set(
        itertools.product(("1", "2", "3", "5", "10"), ("200", "1319", "4000"), ("0", "0.5", "1", "2"))
    )
    assert metrics["studies"] >= 2000 and len(cells) == 60 * 9
    outside = {cell[:3] for cell in cells if not 0.93 <= cell[3] <= 0.975}
    assert outside and all(seeds == "1" and sd != "0" for seeds, _, sd in outside)
    assert metrics["verdict_gap"] < 0.01
    few = metrics["few_discordant"]
    assert list(few) == ["1", "2", "3", "5", "10"] and all(list(kinds) == ["1", "0.5", "0"] for kinds in few.values())
    cells = [
        ((seeds, shared, count), value)
        for seeds, kinds in few.items()
        for shared, counts in kinds.items()
        for count, values in counts.items()
        for value in values
    ]
    assert len(cells) == 5 * 3 * 5 * 4 and min(value for _, value in cells) >= 0.925
    assert {cell for cell, value in cells if value < 0.93} <= {("10", "0.5", "10")}  # docs/statistics.md says so


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


def test_a_difference_at_an_end_of_its_interval_has_a_verdict():
    assert verdict(0.5, 0.5, 1.0) == verdict(1.0, 0.5, 1.0) == "smaller gain"


def test_verdict_takes_another_target():
    assert verdict(5.0, 1.0, 9.0, target=11.1) == "smaller gain"


# Errors


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(5, 4),
        lambda: wilson_interval(0, 0),
        lambda: wilson_interval(1, 4, confidence=95),
        lambda: paired_comparison([1, 0], [1]),
        lambda: paired_comparison([], []),
        lambda: paired_comparison([0.5, 1], [1, 0]),
        lambda: paired_comparison([float("nan"), 1], [1, 0]),
        lambda: paired_comparison([1, 0], [1, 0], confidence=95),
        lambda: arm_comparison([1, 0], [1, 0]),
        lambda: arm_comparison([[1, 0]], [[1, 0], [0, 0]]),
        lambda: arm_comparison(np.zeros((0, 3)), np.zeros((0, 3))),
        lambda: arm_comparison([[1, 2], [0, 0]], [[1, 0], [0, 0]]),
        lambda: verdict_rates(1.0, n=0, discordance=0.1),
        lambda: verdict_rates(11.0, n=100, discordance=0.1),
        lambda: verdict_rates(1.0, n=100, discordance=0.1, seeds=0),
        lambda: verdict_rates(1.0, n=100, discordance=0.1, seeds=2.5),
        lambda: verdict_rates(1.0, n=100, discordance=0.1, seed_effect_sd=-1.0),
        lambda: verdict_rates(1.0, n=100, discordance=0.1, seed_effect_sd=float("nan")),
        lambda: verdict_rates(1.0, n=100, discordance=0.1, shared=1.1),
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
        *(lambda share=share: wilson_interval(1, 4, confidence=share) for share in (0.0, 1.0)),
        lambda: wilson_interval(-1, 4),
        lambda: verdict_rates(1.0, n=100, discordance=0.1, shared=-0.1),
        lambda: pass_at_k([-1], 4, 1),
        lambda: pass_at_k([1], 4, 0),
        lambda: power_at(1.0, 0, 0.1),
        lambda: power_at(0.0, 100, 0.0),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(call, unchecked):
    with pytest.raises(ValueError, match="^got .*expected .*: ") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_every_discordance_of_a_real_table_has_a_detectable_difference():
    for count in range(20, 400):  # 100 * x / 100 is not always x
        assert 0 < detectable_difference(4000, count / 4000) < 10
