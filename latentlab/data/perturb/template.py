"""A word problem with holes for its numbers: where each number of the chain comes from.

The distinct digit values of a question are its variables; equal numbers stay tied. Each literal of
each equation must be traced to a variable, to the result of an earlier step, or to a constant that
the wording licenses (wording.py). A literal with two possible origins freezes every number that
either depends on; one with none rejects the problem.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from latentlab.data.perturb import wording
from latentlab.data.perturb.equations import Equation, Number, decimals, number, parse_step, simplest, write_like
from latentlab.problems import Problem, canonical_answer

_CHANCE = 20  # numbers below it, all used by the chain, may add up to one another by chance


class Origin(NamedTuple):
    """Where a literal comes from: a + b * numbers[source]; `numbers`: variables, then results."""

    source: int
    a: Number = 0
    b: Number = 1  # 0: the constant a, from no source

    def value(self, numbers: Sequence[Number]) -> Number:
        source = numbers[self.source]
        return source if self.b == 1 and not self.a else simplest(self.a + self.b * source)


def trace(problem: Problem) -> "Template | None":
    """The template of a problem; None if an origin is in doubt or no number may change."""
    template = Template(problem)
    if not problem.steps or not all(map(template.trace_step, problem.steps)):
        return None
    results = template.numbers[len(template.values) :]
    if min(results) <= 0 or max(map(decimals, results)) > 6:
        return None
    if canonical_answer(template.steps[-1][0].right) != problem.answer:
        return None
    if not all(template.uses[j] for j in range(len(template.values), len(template.numbers) - 1)):
        return None  # a result that nothing uses served a comparison: "the slower one"
    template.freeze_redundant()
    return template if template.free and template.write(template.numbers) == (problem.question, problem.steps) else None


class Template:
    """A problem with holes: the origin of each number of the question and literal of the chain."""

    def __init__(self, problem: Problem):
        text = problem.question
        found = [(m.start(), m.end(), number(m[0])) for m in wording.NUMBER.finditer(text)]
        self.problem = problem
        self.values: tuple[Number, ...] = tuple(sorted({value for _, _, value in found}))  # of the variables
        self.spans = [(start, end, self.values.index(value)) for start, end, value in found]  # variable of each number
        self.percent = [i for _, end, i in self.spans if wording.PERCENT.match(text[end:])]
        self.hundredths = {i for _, end, i in self.spans if wording.CENTS.match(text[end:])}.union(self.percent)
        self.wholes = [(i, whole) for _, end, i in self.spans if (whole := wording.whole(text[end:]))]
        self.constants, doubtful = wording.constants(text)
        self.frozen = {i for i, value in enumerate(self.values) if value <= 1 or value in doubtful}
        self.frozen |= {i for a, b, i in self.spans if wording.is_name(text[:a], text[a:b], text[b:])}
        self.up_to_100 = wording.UP_TO_100.search(text)
        self.decides = wording.DECISION.search(text)
        # of the chain, step by step
        self.steps: list[tuple[Equation, list[Origin]]] = []
        self.numbers = list(self.values)  # then the results
        self.behind = [{i} for i in range(len(self.values))]  # the variables that each of `numbers` depends on
        self.uses: Counter[int] = Counter()  # how many literals may come from each of `numbers`

    @property
    def free(self) -> set[int]:
        """The variables that may change."""
        return {i for i in range(len(self.values)) if self.uses[i]} - self.frozen

    def trace_step(self, step: str) -> bool:
        """Add a step; False if it is not a true equation or one of its literals has no origin."""
        equation = parse_step(step)
        if equation is None or not equation.holds():
            return False
        origins, behind_step = [], set[int]()
        for start, end in equation.literals:
            value = number(equation.left[start:end])
            possible = self._possible_origins(value)
            if not possible:
                return False
            may_be = [origin.source for origin in possible if origin.b]
            self.uses.update(may_be)
            behind = set[int]().union(*[self.behind[j] for j in may_be])
            self.frozen |= behind if len(possible) > 1 else set()
            self.frozen |= self._in_disguise(value) if value in self.constants else set()
            behind_step |= behind
            origins.append(possible[0])
        self.steps.append((equation, origins))
        self.numbers.append(number(equation.right))
        self.behind.append(behind_step)
        return True

    def _possible_origins(self, value: Number) -> list[Origin]:
        possible = [Origin(j) for j in range(len(self.values), len(self.numbers)) if self.numbers[j] == value]
        for i, old in enumerate(self.values):
            forms: list[tuple[Number, Number]] = [(0, 1)]
            forms += [(0, Fraction(1, 100))] if i in self.hundredths else []
            if i in self.percent and old < 100:  # what is left of, or comes to, a whole: 80 or .8 for "20% off"
                forms += [(100, -1), (100, 1), (1, Fraction(-1, 100)), (1, Fraction(1, 100))]
            possible += [Origin(i, a, b) for a, b in forms if a + b * old == value]
        return possible + [Origin(0, value, 0)] * (value in self.constants)

    def _in_disguise(self, constant: Number) -> set[int]:
        """Variables a constant may stand for: 2 for 50 %, 30 minutes, 6 months; 3 for 90/30."""
        values, c = self.values, constant
        parts = {i for i, of in self.wholes if of in (c * values[i], c * (of - values[i])) or of * c == values[i]}
        pairs = itertools.combinations(range(len(values)), 2) if constant > 2 else ()
        return parts.union(*[{i, j} for i, j in pairs if values[i] > 1 and values[i] * c == values[j]])

    def freeze_redundant(self) -> None:
        """Freeze redundant givens: 10 boys, 15 girls, 25 children; 3 and 4 days of a week."""
        values, n = self.values, len(self.values)
        mentions = Counter(i for _, _, i in self.spans)
        # With a mention that does not serve the chain: these add up to nothing by chance.
        idle = {i for i in mentions if mentions[i] > self.uses[i]}
        self.frozen |= idle
        for i, value in enumerate(values):
            for result, behind in zip(self.numbers[n:], self.behind[n:], strict=True):
                self.frozen |= behind | {i} if value == result and (i in idle or value >= _CHANCE) else set()
        totals: dict[Number, set[int]] = {x: set() for x in (1, 7, 12, 24, 30, 60, 100) if x in self.constants}
        totals |= {value: {i} for i, value in enumerate(values)}
        for parts in _pairs_and_triples(range(n)):
            total = sum([values[i] for i in parts])
            if total in totals:
                involved = totals[total].union(parts)
                least = 7 if not totals[total] or idle & involved else _CHANCE
                self.frozen |= involved if total >= least * (len(parts) - 1) else set()
        for parts in _pairs_and_triples(sorted(set(self.percent))):  # 40 may be the 40 % or what 20 % and 40 % leave
            if (rest := 100 - sum([values[i] for i in parts])) in values:
                self.frozen |= {values.index(rest), *parts}

    def recompute(self, values: tuple[Number, ...]) -> list[Number] | None:
        """`numbers` under new values; None if one of these does not hold.

        Results stay within 2/5 and 5/2 of the old ones and gain no decimals; percentages that add
        up to at most 100 still do; where the wording requires it, what is at most 100 stays so, and
        variables and results keep their order.
        """
        numbers = list(values)
        for equation, origins in self.steps:
            old = self.numbers[len(numbers)]
            new = equation.compute([origin.value(numbers) for origin in origins])
            if new is None or decimals(new) > decimals(old) or 2 * old > 5 * new or 2 * new > 5 * old:
                return None
            numbers.append(new)
        if sum([values[i] for i in self.percent]) > 100 >= sum([self.values[i] for i in self.percent]):
            return None
        if self.up_to_100 and any(a <= 100 < b for a, b in zip(self.numbers, numbers, strict=True)):
            return None
        return numbers if not self.decides or _ranks(numbers) == _ranks(self.numbers) else None

    def write(self, numbers: Sequence[Number]) -> tuple[str, tuple[str, ...]]:
        """(question, steps) with these numbers, each in the format of the original."""
        question = _fill(self.problem.question, [(start, end, numbers[i]) for start, end, i in self.spans])
        steps = []
        for (equation, origins), result in zip(self.steps, numbers[len(self.values) :], strict=True):
            literals = [(*span, origin.value(numbers)) for span, origin in zip(equation.literals, origins, strict=True)]
            steps.append(f"<<{_fill(equation.left, literals)}={write_like(result, equation.right)}>>")
        return question, tuple(steps)


def _pairs_and_triples(items: Sequence[int]):
    return itertools.chain(itertools.combinations(items, 2), itertools.combinations(items, 3))


def _ranks(numbers: Sequence[Number]) -> list[int]:
    return [sorted(set(numbers)).index(value) for value in numbers]


def _fill(text: str, holes: list[tuple[int, int, Number]]) -> str:
    """`text` with the number at each (start, end) replaced by a value in the same format."""
    for start, end, value in reversed(holes):
        text = text[:start] + write_like(value, text[start:end]) + text[end:]
    return text
