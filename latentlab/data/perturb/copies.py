"""Number-perturbed copies of a word problem: the same words and steps with other numbers, the chain recomputed.

The distinct digit values of a question are its variables; equal numbers stay tied. Each literal of each equation must
be traced to a variable, to the result of an earlier step, or to a constant that the wording licenses (wording.py).
A literal with two possible origins freezes every number that either depends on; one with none rejects the problem.
The copies teach arithmetic and number binding, not new wording: they are not GSM8K-Aug.
`sources.benchmark("gsm8k_perturbed")`, validation with fresh numbers, tells reasoning from recall.
What came of it on GSM8K: `latentlab data --preset smol --copies-report reports` and reports/perturb.
"""

import bisect
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from latentlab.data.perturb import wording
from latentlab.data.perturb.equations import (
    Equation,
    Number,
    decimals,
    is_padded,
    number,
    parse_step,
    simplest,
    write_like,
)
from latentlab.problems import Problem, canonical_answer

_MISSES = 200  # draws in a row without a new variant, after which a problem is taken to have no more
_FACTOR = (2, 5)  # a result stays within 2/5 and 5/2 of the old one
_ROUND = ((1000, 8000), (500, 4000), (100, 800), (50, 400), (10, 80), (5, 20))  # (step, smallest value that takes it)
_CHANCE = 20  # numbers below it, all used by the chain, may add up to one another by chance


def perturb(problem: Problem, n: int, seed: int) -> list[Problem]:
    """Up to `n` copies of `problem` with other numbers: fewer where the numbers leave no room, none where in doubt.

    Variant k depends on (problem, seed, k) alone, not on n. Its id is "<id>~<k>", its source "<source>/perturbed".
    All variants differ from one another and from the original, every equation holds exactly, whole numbers stay
    positive whole numbers, decimals keep their places, and any two numbers of the question keep their order.
    Raises ValueError for n < 0.
    """
    if n < 0:
        raise ValueError(f"got n = {n}, expected at least 0: pass the number of copies")
    template = trace(problem)
    if template is None:
        return []
    rng = random.Random(f"perturb, seed {seed}, {problem.id}, {problem.question}")  # seeded through SHA-512 of the text
    grids = {i: _grid(template, i) for i in sorted(template.free)}
    variants, seen, misses = [], {template.values}, 0
    while len(variants) < n and misses < _MISSES:
        values = _draw(rng, template, grids)
        results = None if values is None or values in seen else template.recompute(values)
        if results is None:
            misses += 1
            continue
        misses = 0
        seen.add(values)
        question, steps = template.write(values, results)
        answer, k = write_like(results[-1], "0"), len(variants)
        variants.append(Problem(f"{problem.id}~{k}", question, steps, answer, f"{problem.source}/perturbed"))
    return variants


def perturbed(problems: Iterable[Problem], n: int, seed: int) -> list[Problem]:
    """`perturb` of each problem in turn, in one list."""
    return [variant for problem in problems for variant in perturb(problem, n, seed)]


@dataclass(frozen=True)
class Origin:
    """Where a literal comes from: a + b * (variable or result `index`), or the constant a."""

    kind: str  # "variable" | "result" | "constant"
    index: int
    a: Number
    b: Number

    def value(self, values: Sequence[Number], results: Sequence[Number]) -> Number:
        if self.kind == "constant":
            return self.a
        source = (values if self.kind == "variable" else results)[self.index]
        return source if self.b == 1 and not self.a else simplest(self.a + self.b * source)


@dataclass(frozen=True)
class Template:
    """A problem with holes: where each number of the question and each literal of the chain comes from."""

    problem: Problem
    spans: list[tuple[int, int, int]]  # (start, end, variable) of each number of the question
    values: tuple[Number, ...]  # of the variables in the original, ascending
    percent: list[int]  # the variable of each percentage
    free: frozenset[int]  # the variables that may change
    steps: list[tuple[Equation, list[Origin]]]
    results: list[Number]  # in the original
    limit: int | None  # what is at most this in the original stays there
    order: list[int]  # ranks of values + results, to be kept where the wording decides by comparison; else empty

    def recompute(self, values: tuple[Number, ...]) -> list[Number] | None:
        """The results under new values; None where sign, wholeness, decimals or an order that decides is not kept."""
        results = []
        for (equation, origins), old in zip(self.steps, self.results, strict=True):
            new = equation.compute([origin.value(values, results) for origin in origins])
            if new is None or old * _FACTOR[0] > new * _FACTOR[1] or new * _FACTOR[0] > old * _FACTOR[1]:
                return None
            places = decimals(new)
            if places is None or places > decimals(old):
                return None
            results.append(new)
        if sum([values[i] for i in self.percent]) > 100 >= sum([self.values[i] for i in self.percent]):
            return None
        old, new = [*self.values, *self.results], [*values, *results]
        if self.limit and any(a <= self.limit < b for a, b in zip(old, new, strict=True)):
            return None
        for i, j in itertools.pairwise(self.order):
            if new[i] > new[j] or (new[i] == new[j]) != (old[i] == old[j]):
                return None
        return results

    def write(self, values: tuple[Number, ...], results: list[Number]) -> tuple[str, tuple[str, ...]]:
        """(question, steps) with these numbers, each written in the manner of the original."""
        question, steps = self.problem.question, []
        for start, end, i in reversed(self.spans):
            question = question[:start] + write_like(values[i], question[start:end]) + question[end:]
        for (equation, origins), result in zip(self.steps, results, strict=True):
            left = equation.left
            for (start, end), origin in reversed(list(zip(equation.literals, origins, strict=True))):
                left = left[:start] + write_like(origin.value(values, results), left[start:end]) + left[end:]
            steps.append(f"<<{left}={write_like(result, equation.right)}>>")
        return question, tuple(steps)

    def contexts(self, i: int) -> list[tuple[str, str, str]]:
        """(text before, number, text after) of each place of variable i."""
        q = self.problem.question
        return [(q[:start], q[start:end], q[end:]) for start, end, k in self.spans if k == i]


def trace(problem: Problem) -> Template | None:
    """The template of a problem, or None where the origin of some literal is in doubt or no number may change."""
    question = problem.question
    found = [(m.start(), m.end(), number(m[0])) for m in wording.NUMBER.finditer(question)]
    values = tuple(sorted({value for _, _, value in found}))
    spans = [(start, end, values.index(value)) for start, end, value in found]
    mentions = [i for _, _, i in spans]
    percent = [i for _, end, i in spans if wording.PERCENT.match(question[end:])]
    hundredths = {i for _, end, i in spans if wording.CENTS.match(question[end:])}.union(percent)
    wholes = [(i, whole) for _, end, i in spans if (whole := wording.whole(question[end:]))]
    constants, doubtful = wording.constants(question)
    frozen = {i for i, value in enumerate(values) if value <= 1 or value in doubtful}
    frozen |= {i for start, end, i in spans if wording.is_name(question[:start], question[start:end], question[end:])}

    steps, results, behind, used, read = [], [], [], [], set()
    for step in problem.steps:
        equation = parse_step(step)
        if equation is None or not equation.holds():
            return None
        origins, behind_step = [], set()
        for start, end in equation.literals:
            value = number(equation.left[start:end])
            possible = [Origin("result", j, 0, 1) for j, old in enumerate(results) if old == value]
            for i, old in enumerate(values):
                forms = [(0, 1), (0, Fraction(1, 100))][: 2 if i in hundredths else 1]
                if i in percent and old < 100:  # what is left of, or comes to, a whole: 80 or .8 for "20% off"
                    forms += [(100, -1), (100, 1), (1, Fraction(-1, 100)), (1, Fraction(1, 100))]
                possible += [Origin("variable", i, a, b) for a, b in forms if a + b * old == value]
            if value in constants:
                possible.append(Origin("constant", 0, value, 0))
                frozen |= _in_disguise(value, values, wholes)
            if not possible:
                return None
            used += [origin.index for origin in possible if origin.kind == "variable"]
            read |= {origin.index for origin in possible if origin.kind == "result"}
            may_be = {origin.index for origin in possible if origin.kind == "variable"}
            may_be = may_be.union(*[behind[origin.index] for origin in possible if origin.kind == "result"])
            if len(possible) > 1:
                frozen |= may_be
            behind_step |= may_be
            origins.append(possible[0])
        steps.append((equation, origins))
        results.append(number(equation.right))
        behind.append(behind_step)
    if not steps or min(results) <= 0 or None in map(decimals, results):
        return None
    if canonical_answer(steps[-1][0].right) != problem.answer:
        return None
    if not read >= set(range(len(steps) - 1)):  # a result that nothing uses served a comparison: "the slower one"
        return None
    idle = {i for i in mentions if mentions.count(i) > used.count(i)}  # some mention explains nothing
    frozen |= idle | _given_twice(values, idle, constants, results, behind)
    for n in (2, 3):  # 40 that may be the 40 % or what 20 % and 40 % leave of 100
        for parts in itertools.combinations(sorted(set(percent)), n):
            rest = 100 - sum([values[i] for i in parts])
            frozen |= {values.index(rest), *parts} if rest in values else set()
    everything = [*values, *results]
    order = sorted(range(len(everything)), key=everything.__getitem__) if wording.decides(question) else []
    limit = 100 if wording.up_to_100(question) else None
    template = Template(problem, spans, values, percent, frozenset(set(used) - frozen), steps, results, limit, order)
    as_it_was = template.write(values, results) == (question, problem.steps)
    return template if as_it_was and template.free else None


def _given_twice(values: tuple, idle: set, constants: set, results: list, behind: list[set[int]]) -> set[int]:
    """Variables of redundant givens: 10 boys, 15 girls, 25 children; 3 days and 4 days of a week; a given result.

    `idle` are the variables with a mention that does not serve the chain: those add up to nothing by chance.
    """
    frozen = set()
    for i, value in enumerate(values):
        for result, variables in zip(results, behind, strict=True):
            frozen |= variables | {i} if value == result and (i in idle or value >= _CHANCE) else set()
    totals = {total: set() for total in (1, 7, 12, 24, 30, 60, 100) if total in constants}
    totals |= {value: {i} for i, value in enumerate(values)}
    for n in (2, 3):
        for parts in itertools.combinations(range(len(values)), n):
            total = sum([values[i] for i in parts])
            if total in totals:
                involved = totals[total].union(parts)
                doubtful = not totals[total] or idle & involved
                frozen |= involved if total >= (7 if doubtful else _CHANCE) * (n - 1) else set()
    return frozen


def _in_disguise(constant: Number, values: tuple, wholes: list[tuple[int, int]]) -> set[int]:
    """Variables that a constant may stand for: 2 for 50 %, 30 minutes or 6 months; 3 for 90 / 30 worked in the head."""
    units = {i for i, whole in wholes if whole in (constant * values[i], constant * (whole - values[i]))}
    units |= {i for i, whole in wholes if whole * constant == values[i]}
    pairs = itertools.combinations(range(len(values)), 2) if constant > 2 else ()
    return units.union(*[{i, j} for i, j in pairs if values[i] > 1 and values[i] * constant == values[j]])


def _grid(template: Template, i: int) -> tuple[int, Sequence[int]]:
    """(scale, ticks): variable i may become any tick / scale.

    Near the old value, as round, with as many decimals, below its unit's ceiling, and right after its "a" or "an".
    """
    old = template.values[i]
    scale = 10 ** decimals(old)
    ticks = int(old * scale)
    step = next((step for step, least in _ROUND if ticks % step == 0 and ticks >= least), 1)
    low, high = max(ticks * 3 // 5, 2 if scale == 1 else 1), max(ticks * 9 // 5, ticks + 3)
    ceilings = [wording.ceiling(old, after) for _, _, after in template.contexts(i)]
    high = min([high, *[limit * scale for limit in ceilings if limit is not None]])
    grid = range(-(-low // step) * step, high + 1, step)
    for before, text, _ in template.contexts(i):
        if article := wording.article(before):
            grid = [tick for tick in grid if wording.takes_an(tick // scale) == (article == "an")]
        if scale > 1 and not is_padded(text):
            grid = [tick for tick in grid if tick % 10]
    return scale, grid


def _draw(rng: random.Random, template: Template, grids: dict[int, tuple[int, Sequence[int]]]) -> tuple | None:
    """New values in the order of the old ones, each uniform between its neighbours so far; None where that fails."""
    values = [None if i in grids else value for i, value in enumerate(template.values)]
    left = list(grids)
    while left:
        i = left.pop(int(rng.random() * len(left)))
        scale, ticks = grids[i]
        below = next((values[j] for j in range(i - 1, -1, -1) if values[j] is not None), 0)
        above = next((values[j] for j in range(i + 1, len(values)) if values[j] is not None), None)
        low = bisect.bisect_right(ticks, below * scale)
        high = len(ticks) if above is None else bisect.bisect_left(ticks, above * scale)
        if low >= high:
            return None
        tick = ticks[low + int(rng.random() * (high - low))]
        values[i] = tick if scale == 1 else simplest(Fraction(tick, scale))
    return tuple(values)
