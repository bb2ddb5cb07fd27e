"""Copies of a problem with other numbers, drawn from a seed.

The copies teach arithmetic and number binding, not new wording: they are not GSM8K-Aug.
`datasets.benchmark("gsm8k_perturbed")`, validation with fresh numbers, tells reasoning from recall.
The measured quality of the copies of GSM8K: scripts/measure_copies.py.
"""

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import SupportsIndex

from latentlab.data.perturb import wording
from latentlab.data.perturb.equations import Number, decimals, is_padded, simplest, write_like
from latentlab.data.perturb.template import Template, trace
from latentlab.masks import whole_number
from latentlab.problems import Problem

_Grid = tuple[int, Sequence[int]]
_MISSES = 200  # draws in a row without a new variant, after which a problem is taken to have no more
_ROUND = ((1000, 8000), (500, 4000), (100, 800), (50, 400), (10, 80), (5, 20))  # (step, smallest value that takes it)


def perturb(problem: Problem, n: SupportsIndex, seed: SupportsIndex) -> list[Problem]:
    """Up to `n` copies of `problem` with other numbers.

    Fewer where the numbers leave no room, none where the origin of a number is in doubt. Variant k
    depends on (problem, seed, k) alone; its id is "<id>~<k>", its source "<source>/perturbed". All
    variants differ from one another and from the original, every equation holds exactly, whole
    numbers stay positive and whole, decimals keep their places, numbers of the question their order.
    Raises ValueError for n < 0.
    """
    n, seed = whole_number("n", n), whole_number("seed", seed)
    if n < 0:
        raise ValueError(f"got n = {n}, expected at least 0: pass the number of copies")
    template = trace(problem)
    if template is None:
        return []
    rng = random.Random(f"perturb, seed {seed}, {problem.id}, {problem.question}")  # seeded through SHA-512 of the text
    grids = {i: _grid(template, i) for i in sorted(template.free)}
    variants: list[Problem] = []
    seen, misses = {template.values}, 0
    while len(variants) < n and misses < _MISSES:
        values = _draw(rng, template, grids)
        if values is None or values in seen or (numbers := template.recompute(values)) is None:
            misses += 1
            continue
        misses = 0
        seen.add(values)
        id, answer = f"{problem.id}~{len(variants)}", write_like(numbers[-1], "0")
        variants.append(Problem(id, *template.write(numbers), answer, f"{problem.source}/perturbed"))
    return variants


def perturbed(problems: Iterable[Problem], n: SupportsIndex, seed: SupportsIndex) -> list[Problem]:
    """`perturb` of each problem in turn, in one list."""
    return [variant for problem in problems for variant in perturb(problem, n, seed)]


def _grid(template: Template, i: int) -> _Grid:
    """(scale, ticks): variable i may become any tick / scale.

    Near the old value, as round, with as many decimals, below its unit's ceiling, fit for its a(n).
    """
    old = template.values[i]
    scale = 10 ** decimals(old)
    ticks = int(old * scale)
    step = next((step for step, least in _ROUND if ticks % step == 0 and ticks >= least), 1)
    low, high = max(ticks * 3 // 5, 2 if scale == 1 else 1), max(ticks * 9 // 5, ticks + 3)
    question = template.problem.question
    spans = [(start, end) for start, end, variable in template.spans if variable == i]
    ceilings = [wording.ceiling(old, question[end:]) for _, end in spans]
    high = min([high, *[limit * scale for limit in ceilings if limit is not None]])
    grid: Sequence[int] = range(-(-low // step) * step, high + 1, step)
    for start, end in spans:
        if article := wording.ARTICLE.search(question[:start]):
            grid = [tick for tick in grid if wording.takes_an(tick // scale) == (article[1].lower() == "an")]
        if scale > 1 and not is_padded(question[start:end]):
            grid = [tick for tick in grid if tick % 10]
    return scale, grid


def _draw(rng: random.Random, template: Template, grids: dict[int, _Grid]) -> tuple[Number, ...] | None:
    """New values in the order of the old, each uniform between its neighbours, or None."""
    known = {i: value for i, value in enumerate(template.values) if i not in grids}
    left = list(grids)
    while left:
        i = left.pop(int(rng.random() * len(left)))
        scale, ticks = grids[i]
        below = max([value for j, value in known.items() if j < i], default=0)
        above = min([value for j, value in known.items() if j > i], default=math.inf)
        low, high = bisect_right(ticks, below * scale), bisect_left(ticks, above * scale)
        if low >= high:
            return None
        tick = ticks[low + int(rng.random() * (high - low))]
        known[i] = tick if scale == 1 else simplest(Fraction(tick, scale))
    return tuple(known[i] for i in range(len(known)))
