"""Rewards: a completion's text and its problem in, a number out.

    exact_answer("<<48/2=24>>\\n<<48+24=72>>\\n### 72", problem) == 1.0    # problem.answer == "72"

A reward is any callable `(text: str, problem: Problem) -> float`; the rollout's rewards are then [B, K].
Grading is `problems.answers_match` and nothing else, here as in evaluation (GSM8K's rule: the final answer
alone counts, Cobbe et al. 2021, arXiv:2110.14168).
"""

from collections import Counter
from collections.abc import Iterable

from latentlab.problems import Problem, answers_match, canonical_answer, extract_answer


def exact_answer(text: str, problem: Problem) -> float:
    """1.0 where the answer after the last "###" of `text` equals the problem's, else 0.0; never raises.

    No marker, no number or more than one number after it: 0.0.
    """
    return 1.0 if answers_match(extract_answer(text), problem.answer) else 0.0


def majority_vote(texts: Iterable[str]) -> str | None:
    """The most frequent canonical answer of several completions of one problem; None where none has one.

    Unparsable completions have no vote, however many they are. Of equally frequent answers the one that
    occurs first wins, so the result depends on the order of `texts` and on nothing else.
    """
    answers = (canonical_answer(extract_answer(text) or "") for text in texts)
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__, default=None)  # max keeps the first of equals
