"""Templated multi-step arithmetic in plain English: an endless stream of problems from a seed.

Every sentence about an operation has six tokens, the full stop included, with the number third, so
that a one-layer transformer with absolute positions can learn it:

    Leo has 16 books. He gives 2 books away. He splits 2 ways evenly. He finds 4 more books.
    He gets 2 for each. How many books remain?
    <<16-2=14>> <<14/2=7>> <<7+4=11>> <<11*2=22>> ### 22
"""

import itertools
import random
from bisect import bisect
from hashlib import blake2b
from typing import SupportsIndex

from latentlab.masks import whole_number
from latentlab.problems import Problem

SPLITS = ("train", "validation", "test")

_LARGEST = 29  # every value is a whole number 0..29, so each number is one token
_OPERANDS = range(2, 10)
_NAMES = ("Leo", "Mia", "Sam", "Ana", "Tom", "Zoe", "Ben", "Eva")  # he, she, he, …
_OBJECTS = ("apples", "books", "cards", "coins", "marbles", "pens", "shells", "stamps")
PHRASES = {
    "+": ("finds {n} more {objects}", "buys {n} more {objects}"),
    "-": ("gives {n} {objects} away", "loses {n} {objects} today"),
    "*": ("gets {n} for each", "grows {n} from each"),
    "/": ("splits {n} ways evenly", "shares {n} ways evenly"),
}
_PHRASE_WORDS = sorted({w for both in PHRASES.values() for phrase in both for w in phrase.split() if "{" not in w})

_MARKS = (".", "?", ",", "+", "-", "*", "/", "=", "<<", ">>", "###", "\n")
_FIXED_WORDS = ("He", "She", "has", "How", "many", "remain")

WORDS = (*map(str, range(_LARGEST + 1)), *_MARKS, *_NAMES, *_FIXED_WORDS, *_OBJECTS, *_PHRASE_WORDS)
"""Every token of synthetic questions, steps and answers: numbers 0..29, marks, words."""


def word_problems(split: str, n: SupportsIndex, *, seed: SupportsIndex, steps: SupportsIndex = 4) -> list[Problem]:
    """The first `n` synthetic problems of one endless stream per (split, seed, steps).

    Each has `steps` operations on whole numbers 0..29: the start is uniform in 1..29; then each
    operation is uniform among those of + - * / that some operand 2..9 keeps within 0..29, and its
    operand uniform among those operands. "/" is floor division, as in "<<14/4=3>>".

    The splits are disjoint: blake2b of the arithmetic chain (start, operations, operands; not names
    and wording) sends about 10 % of all chains to validation and as many to test. Chains may recur
    in train, in other words, but not within one call for validation or test.

    The same arguments give the same list, and a longer call begins with the shorter one.
    Raises ValueError for an unknown split, for n < 0 or steps < 1, and where validation or test has
    fewer than n distinct chains (possible only for steps = 1 or 2, or an enormous n).
    """
    if split not in SPLITS:
        raise ValueError(f"got split {split!r}, expected one of {', '.join(SPLITS)}")
    n, seed, steps = whole_number("n", n), whole_number("seed", seed), whole_number("steps", steps)
    if n < 0 or steps < 1:
        raise ValueError(f"got n = {n} and steps = {steps}, expected n >= 0 and steps >= 1: change the arguments")
    rng = random.Random(f"word problems, {split}, seed {seed}, {steps} steps")  # seeded through SHA-512 of the text
    problems: list[Problem] = []
    seen, misses = set(), 0
    while len(problems) < n:
        start, moves = _draw_chain(rng, steps)
        chain = str(start) + "".join([move[0] for move in moves])
        if _split_of(chain) != split or chain in seen:
            misses += 1
            if misses > 100_000:
                got = f"n = {n} for {split} with steps = {steps}"
                raise ValueError(f"got {got}, expected at most some {len(problems)}: ask for fewer problems")
            continue
        misses = 0
        if split != "train":
            seen.add(chain)
        problems.append(_tell(rng, f"word-{split}-s{seed}-{steps}-{len(problems):06d}", split, start, moves))
    return problems


def _split_of(chain: str) -> str:
    tenth = blake2b(chain.encode(), digest_size=8).digest()[0] * 10 // 256
    return {0: "test", 1: "validation"}.get(tenth, "train")


def _moves(value: int) -> tuple[list[float], list[tuple[str, int]]]:
    """Bounds of the cumulative probabilities, and all moves ("-2", result) from `value`."""
    results = {"+": value.__add__, "-": value.__sub__, "*": value.__mul__, "/": value.__floordiv__}
    grouped = [[(f"{op}{k}", f(k)) for k in _OPERANDS if 0 <= f(k) <= _LARGEST] for op, f in results.items()]
    grouped = [group for group in grouped if group]
    shares = [1 / len(grouped) / len(group) for group in grouped for _ in group]
    return list(itertools.accumulate(shares))[:-1], [move for group in grouped for move in group]


_MOVES = tuple(_moves(value) for value in range(_LARGEST + 1))


def _draw_chain(rng: random.Random, steps: int) -> tuple[int, list[tuple[str, int]]]:
    """A start value and `steps` moves (operation with operand, result)."""
    start = value = 1 + int(rng.random() * _LARGEST)
    moves = []
    for _ in range(steps):
        bounds, possible = _MOVES[value]
        moves.append(possible[bisect(bounds, rng.random())])
        value = moves[-1][1]
    return start, moves


def _tell(rng: random.Random, id: str, split: str, start: int, moves: list[tuple[str, int]]) -> Problem:
    """Put a chain into words."""
    person = int(rng.random() * len(_NAMES))
    objects = _OBJECTS[int(rng.random() * len(_OBJECTS))]
    sentences, steps, value = [f"{_NAMES[person]} has {start} {objects}."], [], start
    for move, result in moves:
        phrase = PHRASES[move[0]][rng.random() < 0.5].format(n=move[1:], objects=objects)
        sentences.append(f"{('He', 'She')[person % 2]} {phrase}.")
        steps.append(f"<<{value}{move}={result}>>")
        value = result
    question = " ".join([*sentences, f"How many {objects} remain?"])
    return Problem(id, question, tuple(steps), str(value), f"word/{split}")
