"""reward.py: one grading rule, and a vote that unparsable answers cannot win."""

import pytest

from latentlab.problems import Problem
from latentlab.reward import exact_answer, majority_vote

PROBLEM = Problem("a", "How many?", ("<<500*2=1000>>",), "1000", "test")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<<500*2=1000>>\n### 1000", 1.0),
        ("### $1,000.00", 1.0),
        ("### 999", 0.0),
        ("### 1000 or 999", 0.0),  # naming several values is not an answer
        ("### 999\n### 1000", 1.0),  # the last marker counts
        ("1000", 0.0),  # no marker: unparsable
        ("### many", 0.0),
        ("", 0.0),
    ],
)
def test_exact_answer_grades_the_final_answer_alone(text, reward):
    assert exact_answer(text, PROBLEM) == reward


def test_unparsable_answers_never_win_the_vote():
    assert majority_vote(["", "no idea", "### many", "### 7"]) == "7"
    assert majority_vote(["", "### 1 2"]) is None
    assert majority_vote([]) is None


def test_equal_values_pool_their_votes():
    assert majority_vote(["### 8", "### 1,000", "### 8", "### 1000.0", "### $1000"]) == "1000"


def test_a_tie_goes_to_the_first_occurrence():
    assert majority_vote(["### 2", "### 1", "### 1", "### 2"]) == "2"
    assert majority_vote(["### 1", "### 2", "### 2", "### 1"]) == "1"
