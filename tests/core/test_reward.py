"""reward.py: one grading rule, and a vote that unparsable answers cannot win."""

import ast
from pathlib import Path

import pytest

from latentlab import problems, reward
from latentlab.problems import Problem, canonical_answer
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


HARD = {
    "1,000": "1000",
    "$3.50": "3.5",
    "50%": "50",
    "-7": "-7",
    ".5": "0.5",
    "1/2": "0.5",
    "18.0": "18",
    "18 apples": "18",
    "3 or 4": None,
    "": None,
    "no number": None,
    "\u0661\u0662": None,
    "\u00b2": None,
    "1e3": None,
    "9" * 400: "9" * 400,
    "1,5": None,
    "3:45": None,
    "1/0": None,
    "-0": "0",
    "nan": None,
    "__import__('os')": None,
    "\u22125": "-5",
}


@pytest.mark.parametrize(("text", "want"), HARD.items())
def test_hard_strings_follow_the_documented_rule(text, want):
    """Nothing raises, nothing is evaluated: a number is graded by its value, anything else is wrong."""
    assert canonical_answer(text) == want
    problem = Problem("a", "q", (), want or "1", "test")
    assert exact_answer(f"### {text}", problem) == float(want is not None)


def test_many_unparsable_answers_lose_the_vote_to_one_number():
    assert majority_vote(["### nothing"] * 9 + ["### 7"]) == "7"
    assert majority_vote(["### nothing", "no marker"]) is None


@pytest.mark.parametrize("module", [problems, reward], ids=lambda module: module.__name__)
def test_grading_never_evaluates_text(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    assert not {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {"eval", "exec"}
