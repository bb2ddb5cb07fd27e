"""Coverage of the library's 95 % intervals and error rates of its verdict, in simulated studies.

    python scripts/measure_intervals.py [FOLDER]      default: the user's own result folder

For maintainers. Writes `intervals/intervals.json`, from which docs/statistics.md is generated (a minute).
A study: S seeds answer the same n problems with two arms. A share `shared` of the problems has the
same difference (+1, 0 or -1) at every seed, the others draw it anew. The seeds' true differences
are normal about `difference` with standard deviation `seed_sd` (points).
"""

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.stats import binom

from latentlab.evaluation.statistics import half_width, verdict_rates, wilson_interval
from latentlab.study import results

STUDIES = 20_000  # a cell; the standard error of a coverage is 0.15 points
SEEDS, PROBLEMS, SEED_SDS = (1, 2, 3, 5, 10), (200, 1319, 4000), (0.0, 0.5, 1.0, 2.0)
ANSWERS = [(discordance, shared) for discordance in (0.05, 0.1, 0.3) for shared in (0.0, 0.1, 0.3)]
FEW = (1, 2, 3, 5, 10)  # discordant problems, expected at each seed
TARGET = 1.72


def simulate(
    rng: np.random.Generator,
    studies: int,
    *,
    seeds: int,
    n: int,
    discordance: float,
    seed_sd: float = 0.0,
    shared: float = 0.0,
    difference: float = 0.0,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Mean differences (points) [studies] and mean squares (seed, problem, residual), [studies] each.

    Of the problems only the number with each sum over seeds, -S..S, is drawn, seed after seed.
    """
    sums = np.arange(-seeds, seeds + 1)
    true = (difference + seed_sd * rng.standard_normal((studies, seeds))) / 100
    fixed = rng.multinomial(n, [*(shared * _chances(difference / 100, discordance)), 1 - shared], studies)
    rest = max(1 - shared, 1e-9)  # of no effect without others
    own = _chances((true - shared * difference / 100) / rest, discordance)  # [studies, seeds, 3]
    counts = np.zeros((studies, sums.size), int)
    counts[:, seeds] = fixed[:, 3]
    by_seed, discordant = np.empty((studies, seeds)), seeds * (fixed[:, 0] + fixed[:, 2])
    for seed in range(seeds):
        minus, zero, plus = np.moveaxis(rng.multinomial(counts, own[:, seed, None]), -1, 0)
        counts = zero + np.pad(minus[:, 1:], ((0, 0), (0, 1))) + np.pad(plus[:, :-1], ((0, 0), (1, 0)))
        by_seed[:, seed] = (plus - minus).sum(axis=1) + fixed[:, 2] - fixed[:, 0]
        discordant = discordant + (plus + minus).sum(axis=1)
    counts[:, [0, seeds, -1]] += fixed[:, :3]
    correction = by_seed.sum(axis=1) ** 2 / (seeds * n)
    seed_sum = (by_seed**2).sum(axis=1) / n - correction
    problem_sum = counts @ sums**2 / seeds - correction
    residual_sum = discordant - correction - seed_sum - problem_sum
    freedom = max(seeds - 1, 1)
    squares = [seed_sum / freedom, problem_sum / n, residual_sum / (freedom * n)]
    return 100 * by_seed.mean(axis=1) / n, squares


def _chances(mean, discordance: float) -> np.ndarray:
    """Chances of -1, 0 and +1 with this mean; `discordance` grows where the mean exceeds it."""
    spread = np.maximum(discordance, np.abs(mean))
    return np.stack([(spread - mean) / 2, 1 - spread, (spread + mean) / 2], axis=-1)


def coverage(rng: np.random.Generator, studies: int = STUDIES, *, difference: float = 0.0, **cell) -> float:
    """Share of the simulated studies whose 95 % interval contains the true difference."""
    mean, squares = simulate(rng, studies, difference=difference, **cell)
    half = 100 * half_width(*squares, seeds=cell["seeds"], n=cell["n"])
    return float(np.mean(np.abs(mean - difference) <= half))


def simulated_verdicts(rng: np.random.Generator, studies: int = STUDIES, **cell) -> list[float]:
    """Shares of the four verdicts, in the order of `verdict_rates`."""
    mean, squares = simulate(rng, studies, **cell)
    half = 100 * half_width(*squares, seeds=cell["seeds"], n=cell["n"])
    positive, reaches = mean - half > 0, mean + half >= TARGET
    words = (positive & reaches, positive & ~reaches, ~positive & ~reaches, ~positive & reaches)
    return [float(np.mean(word)) for word in words]


def wilson_coverage(n: int, share: float) -> float:
    """Exact: the chances of all counts whose interval contains the true share."""
    bounds = np.array([wilson_interval(count, n) for count in range(n + 1)])
    inside = (bounds[:, 0] <= share) & (share <= bounds[:, 1])
    return float(binom.pmf(np.flatnonzero(inside), n, share).sum())


def measure(folder: Path | None = None) -> Path:
    """Simulate all cells and return the path of the result file."""
    started, rng = time.time(), np.random.default_rng(0)
    covered: dict = {}
    for seeds in SEEDS:
        for n in PROBLEMS:
            for sd in SEED_SDS:
                values = [
                    coverage(rng, seeds=seeds, n=n, seed_sd=sd, discordance=discordance, shared=shared)
                    for discordance, shared in ANSWERS
                ]
                covered.setdefault(str(seeds), {}).setdefault(str(n), {})[f"{sd:g}"] = values
    few: dict = {}
    for seeds in SEEDS:
        for shared in (1.0, 0.5, 0.0):
            for count in FEW:
                values = [
                    coverage(
                        rng,
                        seeds=seeds,
                        n=n,
                        discordance=count / n,
                        shared=shared,
                        difference=100 * count / n * one_sided,
                    )
                    for n in PROBLEMS[:2]
                    for one_sided in (0, 1)
                ]
                few.setdefault(str(seeds), {}).setdefault(f"{shared:g}", {})[str(count)] = values
    verdicts, gap = [], 0.0
    for n in PROBLEMS[1:]:
        for seeds in SEEDS:
            for sd in (0.0, 1.0):
                row = {"n": n, "seeds": seeds, "seed_sd": sd}
                for true in (0.0, TARGET):
                    cell = {"n": n, "seeds": seeds, "discordance": 0.1, "shared": 0.1}
                    found = simulated_verdicts(rng, seed_sd=sd, difference=true, **cell)
                    said = verdict_rates(true, seed_effect_sd=sd, **cell)
                    gap = max(gap, *(abs(a - b) for a, b in zip(found, said.values(), strict=True)))
                    row[f"{true:g}"] = found
                verdicts.append(row)
    wilson = {str(n): [wilson_coverage(n, share) for share in (0.03, 0.3, 0.75, 0.95)] for n in PROBLEMS}
    several = [
        value for seeds in SEEDS[1:] for row in covered[str(seeds)].values() for v in row.values() for value in v
    ]
    metrics = {
        "studies": STUDIES,
        "coverage": covered,
        "lowest": min(several),
        "highest": max(several),
        "few_discordant": few,
        "verdicts": verdicts,
        "verdict_gap": gap,
        "wilson": wilson,
    }
    return results.write_result(
        "intervals",
        preset="intervals",
        parameters={"studies": STUDIES, "answers": ANSWERS, "target": TARGET},
        metrics=metrics,
        started=started,
        seconds=time.time() - started,
        directory=folder,
        question="How often do the 95 % intervals contain the true difference?",
        headline=f"95 % intervals over 2 to 10 seeds contain the true difference in {100 * min(several):.1f} to "
        f"{100 * max(several):.1f} % of simulated studies",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    print(measure(parser.parse_args().folder))
