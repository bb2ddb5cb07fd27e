"""A word problem with holes for its numbers: where each number of the chain comes from.

The distinct digit values of a question are its variables; equal numbers stay tied. Each literal of each equation must
be traced to a variable, to the result of an earlier step, or to a constant that the wording licenses (wording.py).
A literal with two possible origins freezes every number that either depends on; one with none rejects the problem.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from latentlab.data.perturb import wording
from latentlab.data.perturb.equations import Equation, Number, decimals, number, parse_step, simplest, write_like
from latentlab.problems import Problem, canonical_answer

_CHANCE = 20  # numbers below it, all used by the chain, may add up to one another by chance


class Origin(NamedTuple):
    """Where a literal comes from: a + b * numbers[source], numbers being the variables, then the results so far."""

    source: int
    a: Number = 0
    b: Number = 1  # 0: the constant a

    def value(self, numbers: Sequence[Number]) -> Number:
        if not self.b:
            return self.a
        source = numbers[self.source]
        return source if self.b == 1 and not self.a else simplest(self.a + self.b * source)


@dataclass(frozen=True)
class Template:
    """A problem with holes: where each number of the question and each literal of the chain comes from."""

    problem: Problem
    spans: list[tuple[int, int, int]]  # (start, end, variable) of each number of the question
    values: tuple[Number, ...]  # of the variables in the original, ascending
    numbers: list[Number]  # values, then the results of the steps, in the original
    percent: list[int]  # the variable of each percentage
    free: frozenset[int]  # the variables that may change
    steps: list[tuple[Equation, list[Origin]]]
    limit: int | None  # what is at most this in the original stays there
    order: list[int]  # ranks of `numbers`, to be kept where the wording decides by comparison; else empty

    def recompute(self, values: tuple[Number, ...]) -> list[Number] | None:
        """`numbers` under new values; None where a result leaves 2/5 to 5/2 of the old one,
        or where sign, wholeness, decimals or an order that decides is not kept.
        """
        numbers = list(values)
        for equation, origins in self.steps:
            old = self.numbers[len(numbers)]
            new = equation.compute([origin.value(numbers) for origin in origins])
            if new is None or decimals(new) > decimals(old) or 2 * old > 5 * new or 2 * new > 5 * old:
                return None
            numbers.append(new)
        if sum(values[i] for i in self.percent) > 100 >= sum(self.values[i] for i in self.percent):
            return None
        if self.limit and any(a <= self.limit < b for a, b in zip(self.numbers, numbers, strict=True)):
            return None
        for i, j in itertools.pairwise(self.order):
            if numbers[i] > numbers[j] or (numbers[i] == numbers[j]) != (self.numbers[i] == self.numbers[j]):
                return None
        return numbers

    def write(self, numbers: Sequence[Number]) -> tuple[str, tuple[str, ...]]:
        """(question, steps) with these numbers, each written in the manner of the original."""
        question = _fill(self.problem.question, [(start, end, numbers[i]) for start, end, i in self.spans])
        steps = []
        for (equation, origins), result in zip(self.steps, numbers[len(self.values) :], strict=True):
            literals = [(*span, origin.value(numbers)) for span, origin in zip(equation.literals, origins, strict=True)]
            steps.append(f"<<{_fill(equation.left, literals)}={write_like(result, equation.right)}>>")
        return question, tuple(steps)

    def contexts(self, i: int) -> list[tuple[str, str, str]]:
        """(text before, number, text after) of each place of variable i."""
        q = self.problem.question
        return [(q[:start], q[start:end], q[end:]) for start, end, k in self.spans if k == i]


def _fill(text: str, holes: list[tuple[int, int, Number]]) -> str:
    """`text` with the number at each (start, end) replaced by a value, written in the same manner."""
    for start, end, value in reversed(holes):
        text = text[:start] + write_like(value, text[start:end]) + text[end:]
    return text


def trace(problem: Problem) -> Template | None:
    """The template of a problem, or None where the origin of some literal is in doubt or no number may change."""
    question = _Question(problem.question)
    chain = _trace_chain(problem.steps, question)
    if chain is None or not chain.steps:
        return None
    values, numbers = question.values, chain.numbers
    results = numbers[len(values) :]
    if min(results) <= 0 or max(map(decimals, results)) > 6:
        return None
    if canonical_answer(chain.steps[-1][0].right) != problem.answer:
        return None
    if not all(chain.uses[j] for j in range(len(values), len(numbers) - 1)):
        return None  # a result that nothing uses served a comparison: "the slower one"
    mentions = Counter(i for _, _, i in question.spans)
    idle = {i for i in mentions if mentions[i] > chain.uses[i]}  # some mention explains nothing
    frozen = question.fixed | chain.doubtful | idle | _given_twice(question, chain, idle) | _percent_left(question)
    order = sorted(range(len(numbers)), key=numbers.__getitem__) if wording.DECISION.search(problem.question) else []
    limit = 100 if wording.UP_TO_100.search(problem.question) else None
    free = frozenset(i for i in range(len(values)) if chain.uses[i]) - frozen
    template = Template(problem, question.spans, values, numbers, question.percent, free, chain.steps, limit, order)
    return template if free and template.write(numbers) == (problem.question, problem.steps) else None


class _Question:
    """The numbers of a question, and what its words say about them."""

    def __init__(self, text: str):
        found = [(m.start(), m.end(), number(m[0])) for m in wording.NUMBER.finditer(text)]
        self.values: tuple[Number, ...] = tuple(sorted({value for _, _, value in found}))
        self.spans = [(start, end, self.values.index(value)) for start, end, value in found]
        self.percent = [i for _, end, i in self.spans if wording.PERCENT.match(text[end:])]
        self.hundredths = {i for _, end, i in self.spans if wording.CENTS.match(text[end:])}.union(self.percent)
        self.wholes = [(i, whole) for _, end, i in self.spans if (whole := wording.whole(text[end:]))]
        self.constants, doubtful = wording.constants(text)
        self.fixed = {i for i, value in enumerate(self.values) if value <= 1 or value in doubtful}
        self.fixed |= {i for a, b, i in self.spans if wording.is_name(text[:a], text[a:b], text[b:])}

    def origins(self, value: Number) -> list[Origin]:
        """Variables and constants that a literal of this value may come from."""
        possible = []
        for i, old in enumerate(self.values):
            forms: list[tuple[Number, Number]] = [(0, 1)]
            if i in self.hundredths:
                forms.append((0, Fraction(1, 100)))
            if i in self.percent and old < 100:  # what is left of, or comes to, a whole: 80 or .8 for "20% off"
                forms += [(100, -1), (100, 1), (1, Fraction(-1, 100)), (1, Fraction(1, 100))]
            possible += [Origin(i, a, b) for a, b in forms if a + b * old == value]
        return possible + [Origin(0, value, 0)] * (value in self.constants)


@dataclass
class _Chain:
    """The steps with the origins of their literals, and what these say about the variables."""

    numbers: list[Number]  # the variables, then the results
    behind: list[set[int]]  # the variables that each of `numbers` depends on
    steps: list[tuple[Equation, list[Origin]]] = field(default_factory=list)
    uses: Counter[int] = field(default_factory=Counter)  # how many literals may come from each of `numbers`
    doubtful: set[int] = field(default_factory=set)  # variables behind literals with several possible origins


def _trace_chain(steps: Sequence[str], question: _Question) -> _Chain | None:
    """The origins of every literal of every step; None where a step is no true equation or a literal has no origin."""
    variables = len(question.values)
    chain = _Chain(list(question.values), [{i} for i in range(variables)])
    for step in steps:
        equation = parse_step(step)
        if equation is None or not equation.holds():
            return None
        origins, behind_step = [], set[int]()
        for start, end in equation.literals:
            value = number(equation.left[start:end])
            possible = [Origin(variables + j) for j, old in enumerate(chain.numbers[variables:]) if old == value]
            possible += question.origins(value)
            if not possible:
                return None
            may_be = [origin.source for origin in possible if origin.b]
            chain.uses.update(may_be)
            behind = set[int]().union(*[chain.behind[j] for j in may_be])
            if len(possible) > 1:
                chain.doubtful |= behind
            if value in question.constants:
                chain.doubtful |= _in_disguise(value, question)
            behind_step |= behind
            origins.append(possible[0])
        chain.steps.append((equation, origins))
        chain.numbers.append(number(equation.right))
        chain.behind.append(behind_step)
    return chain


def _given_twice(question: _Question, chain: _Chain, idle: set[int]) -> set[int]:
    """Variables of redundant givens: 10 boys, 15 girls, 25 children; 3 days and 4 days of a week; a given result.

    `idle` are the variables with a mention that does not serve the chain: those add up to nothing by chance.
    """
    values, frozen = question.values, set[int]()
    for i, value in enumerate(values):
        for result, variables in zip(chain.numbers[len(values) :], chain.behind[len(values) :], strict=True):
            if value == result and (i in idle or value >= _CHANCE):
                frozen |= variables | {i}
    totals: dict[Number, set[int]] = {n: set() for n in (1, 7, 12, 24, 30, 60, 100) if n in question.constants}
    totals |= {value: {i} for i, value in enumerate(values)}
    for n in (2, 3):
        for parts in itertools.combinations(range(len(values)), n):
            total = sum([values[i] for i in parts])
            if total in totals:
                involved = totals[total].union(parts)
                doubtful = not totals[total] or idle & involved
                frozen |= involved if total >= (7 if doubtful else _CHANCE) * (n - 1) else set()
    return frozen


def _percent_left(question: _Question) -> set[int]:
    """Variables of percentages and what they leave of 100: 40 that may be the 40 % or what 20 % and 40 % leave."""
    frozen = set[int]()
    for n in (2, 3):
        for parts in itertools.combinations(sorted(set(question.percent)), n):
            rest = 100 - sum([question.values[i] for i in parts])
            if rest in question.values:
                frozen |= {question.values.index(rest), *parts}
    return frozen


def _in_disguise(constant: Number, question: _Question) -> set[int]:
    """Variables that a constant may stand for: 2 for 50 %, 30 minutes or 6 months; 3 for 90 / 30 worked in the head."""
    values, wholes = question.values, question.wholes
    units = {i for i, whole in wholes if whole in (constant * values[i], constant * (whole - values[i]))}
    units |= {i for i, whole in wholes if whole * constant == values[i]}
    pairs = itertools.combinations(range(len(values)), 2) if constant > 2 else ()
    return units.union(*[{i, j} for i, j in pairs if values[i] > 1 and values[i] * constant == values[j]])
