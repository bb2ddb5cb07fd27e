"""Rewards: a completion's text and its problem in, a number out.

    exact_answer("<<48/2=24>>\\n<<48+24=72>>\\n### 72", problem) == 1.0    # problem.answer == "72"

A reward is any callable `(text, problem) -> float`; `Rollouts.rewards` applies it to a batch: [B, K].
Source: GSM8K, arXiv 2110.14168: only the final answer is graded, by `problems.answers_match`.
"""

from collections import Counter
from collections.abc import Iterable

from latentlab.problems import Problem, answers_match, canonical_answer, extract_answer


def exact_answer(text: str, problem: Problem) -> float:
    """1.0 if the answer after the last "###" of `text` equals the problem's, else 0.0.

    A completion without a marker, or without exactly one number after it, gets 0.0.
    """
    return 1.0 if answers_match(extract_answer(text), problem.answer) else 0.0


def majority_vote(texts: Iterable[str]) -> str | None:
    """The most frequent canonical answer of several completions of one problem, or None.

    Completions without an answer do not vote. Ties go to the answer that occurs first.
    """
    answers = (canonical_answer(extract_answer(text) or "") for text in texts)
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__, default=None)  # max returns the first of equals
