"""agreement.py: the majority of several answers, and what their agreement says."""

import numpy as np
import pytest

from latentlab.evaluation.accuracy import Evaluation
from latentlab.evaluation.agreement import agreement, auroc, majority_row, reliability
from latentlab.masks import MaskSpec
from latentlab.problems import Problem


def evaluation(*groups):
    """An Evaluation of groups of answers to problems whose answer is 7."""
    problems = tuple(Problem(f"p{i}", "?", (), "7", "t") for i in range(len(groups)))
    texts = tuple("" if a is None else f"### {a}" for group in groups for a in group)
    return Evaluation(problems, np.array([[a == 7 for a in group] for group in groups], float), texts)


def test_agreement_is_the_share_of_the_commonest_answer():
    shares, right = agreement(evaluation([7, 7, 7, 7], [7, 3, 3, 3], [None, None, None, 7], [None] * 4))
    assert shares.tolist() == [1.0, 0.75, 0.25, 0.0]
    assert right.tolist() == [True, False, True, False]
    texts = tuple(f"### {a}" for a in ("12", "12.0", "13", "13", "$12", "none", "none", "foo", "bar", "7"))
    mixed = Evaluation((Problem("a", "?", (), "12", "t"), Problem("b", "?", (), "7", "t")), np.zeros((2, 5)), texts)
    shares, right = agreement(mixed)
    assert shares.tolist() == [0.6, 0.2] and right.tolist() == [True, True] == mixed.majority().astype(bool).tolist()


def test_auroc_is_the_chance_that_a_right_one_scores_higher():
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 5, 60) / 4, rng.random(60) < 0.6
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[right] for b in scores[~right]]
    assert auroc(scores, right) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auroc(np.array([0.1, 0.9]), np.array([False, True])) == 1.0
    assert auroc(scores, np.ones(60, bool)) is auroc(scores, np.zeros(60, bool)) is None


def test_the_reliability_diagram_counts_every_problem_once():
    shares, right = np.array([1.0, 0.99, 0.5, 0.51, 0.1]), np.array([1, 0, 1, 1, 0], bool)
    rows = reliability(shares, right, bins=4)
    assert [(row["bin"], row["n"]) for row in rows] == [(0, 1), (2, 2), (3, 2)]
    assert [row["accuracy"] for row in rows] == [0.0, 1.0, 0.5]
    assert [row["agreement"] for row in rows] == pytest.approx([0.1, 0.505, 0.995])


def test_a_row_has_the_majority_of_evaluate_and_its_cost(gpt2, problems):
    noise = {"mask": MaskSpec(rate=0.3), "temperature": 1.0}
    row = majority_row(gpt2, problems, 4, batch_size=8, **noise)
    assert row["n"] == len(problems) and row["k"] == 4 and row["cpu_seconds"] > 0
    assert sum(x["n"] for x in row["reliability"]) == len(problems)
    single = majority_row(gpt2, problems, 1, batch_size=8, **noise)
    assert single["mean"] == single["majority"] and "auroc" not in single
