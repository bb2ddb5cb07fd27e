"""Number-perturbed copies of a word problem: the same words and steps with other numbers, the chain recomputed.

The distinct digit values of a question are its variables; equal numbers stay tied. Each literal of each equation must
be traced to a variable, to the result of an earlier step, or to a constant that the wording licenses (wording.py).
A literal with two possible origins freezes every number that either depends on; one with none rejects the problem.
The copies teach arithmetic and number binding, not new wording: they are not GSM8K-Aug.
`sources.benchmark("gsm8k_perturbed")`, validation with fresh numbers, tells reasoning from recall.
"""

import ast
import bisect
import itertools
import operator
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from latentlab import wording
from latentlab.problems import Problem, canonical_answer

_MISSES = 200  # draws in a row without a new variant, after which a problem is taken to have no more
_FACTOR = 5  # a result stays within this factor of the old one
_ROUND = ((1000, 8000), (500, 4000), (100, 800), (50, 400), (10, 80), (5, 20))  # (step, smallest value that takes it)
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: Fraction}
Number = int | Fraction  # int where whole: four times as fast


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
        answer, k = canonical_answer(_plain(results[-1])), len(variants)
        variants.append(Problem(f"{problem.id}~{k}", question, steps, answer, f"{problem.source}/perturbed"))
    return variants


def perturbed(problems: Iterable[Problem], n: int, seed: int) -> list[Problem]:
    """`perturb` of each problem in turn, in one list."""
    return [variant for problem in problems for variant in perturb(problem, n, seed)]


@dataclass(frozen=True)
class Leaf:
    """A literal of an equation and its origin: a + b * (variable or result `index`), or the constant a."""

    text: str
    span: tuple[int, int]  # in the expression
    origin: str  # "variable" | "result" | "constant"
    index: int
    a: Number
    b: Number

    def value(self, values: tuple[Number, ...], results: list[Number]) -> Number:
        if self.origin == "constant":
            return self.a
        source = (values if self.origin == "variable" else results)[self.index]
        return source if self.b == 1 and not self.a else _whole(self.a + self.b * source)


@dataclass(frozen=True)
class Template:
    """A problem with holes: where each number of the question and each literal of the chain comes from."""

    problem: Problem
    spans: list[tuple[int, int, int]]  # (start, end, variable) of each number of the question
    values: tuple[Number, ...]  # of the variables in the original, ascending
    free: frozenset[int]  # the variables that may change
    steps: list[tuple[str, list[Leaf], list, str]]  # expression, literals, postfix program, text of the result
    results: list[Number]  # in the original
    order: list[int]  # ranks of values + results, to be kept where the wording decides by comparison; else empty

    def recompute(self, values: tuple[Number, ...]) -> list[Number] | None:
        """The results under new values; None where sign, wholeness, places or an order that decides is not kept."""
        results = []
        for (_, leaves, program, _), old in zip(self.steps, self.results, strict=True):
            new = _run(program, [leaf.value(values, results) for leaf in leaves])
            if new is None or not old <= new * _FACTOR or not new <= old * _FACTOR:
                return None
            places = _places(new)
            if places is None or places > _places(old):
                return None
            results.append(new)
        if self.order:
            old, new = [*self.values, *self.results], [*values, *results]
            if any(
                new[i] > new[j] or (new[i] == new[j]) != (old[i] == old[j]) for i, j in itertools.pairwise(self.order)
            ):
                return None
        return results

    def write(self, values: tuple[Number, ...], results: list[Number]) -> tuple[str, tuple[str, ...]]:
        """(question, steps) with these numbers, each written in the manner of the original."""
        question, steps = self.problem.question, []
        for start, end, i in reversed(self.spans):
            question = question[:start] + _write(values[i], question[start:end]) + question[end:]
        for (text, leaves, _, old), result in zip(self.steps, results, strict=True):
            for leaf in reversed(leaves):
                text = text[: leaf.span[0]] + _write(leaf.value(values, results), leaf.text) + text[leaf.span[1] :]
            steps.append(f"<<{text}={_write(result, old)}>>")
        return question, tuple(steps)

    def contexts(self, i: int) -> list[tuple[str, str, str]]:
        """(text before, number, text after) of each place of variable i."""
        q = self.problem.question
        return [(q[:start], q[start:end], q[end:]) for start, end, k in self.spans if k == i]


def trace(problem: Problem) -> Template | None:
    """The template of a problem, or None where the origin of some literal is in doubt or no number may change."""
    question = problem.question
    places = [(m.start(), m.end(), _number(m[0].replace(",", ""))) for m in wording.NUMBER.finditer(question)]
    values = tuple(sorted({value for _, _, value in places}))
    spans = [(start, end, values.index(value)) for start, end, value in places]
    constants, doubtful = wording.constants(question)
    percent = {i for _, end, i in spans if wording.PERCENT.match(question[end:])}
    cents = {i for _, end, i in spans if wording.CENTS.match(question[end:])}
    wholes = [(i, whole) for _, end, i in spans if (whole := wording.whole(question[end:]))]
    frozen = {i for i, value in enumerate(values) if value <= 1 or value in doubtful}
    frozen |= {i for start, end, i in spans if wording.is_name(question[:start], question[start:end], question[end:])}

    steps, results, behind_result, used, read = [], [], [], [], set()
    for step in problem.steps:
        parsed = parse_step(step)
        if parsed is None:
            return None
        text, literals, program, written = parsed
        leaves, behind_step = [], set()
        for start, end in literals:
            value = _number(text[start:end])
            origins = [("result", j, 0, 1) for j, old in enumerate(results) if old == value]
            for i, old in enumerate(values):
                forms = [(0, 1)]
                if i in percent | cents:
                    forms.append((0, Fraction(1, 100)))
                if i in percent and old < 100:  # what is left of, or comes to, a whole: 80 or .8 for "20% off"
                    forms += [(100, -1), (100, 1), (1, Fraction(-1, 100)), (1, Fraction(1, 100))]
                origins += [("variable", i, a, b) for a, b in forms if a + b * old == value]
            if value in constants:
                origins.append(("constant", 0, value, 0))
                frozen |= _in_disguise(value, values, wholes)
            if not origins:
                return None
            behind = set()  # the variables that the literal may depend on
            for origin, i, _, _ in origins:
                behind |= {i} if origin == "variable" else behind_result[i] if origin == "result" else set()
                used += [i] if origin == "variable" else []
                read |= {i} if origin == "result" else set()
            if len(origins) > 1:
                frozen |= behind
            behind_step |= behind
            leaves.append(Leaf(text[start:end], (start, end), *origins[0]))
        result = _run(program, [_number(leaf.text) for leaf in leaves])
        if result is None or result != _number(written) or result <= 0 or _places(result) is None:
            return None
        steps.append((text, leaves, program, written))
        results.append(result)
        behind_result.append(behind_step)
    if not steps or canonical_answer(_plain(results[-1])) != problem.answer:
        return None
    if not read >= set(range(len(steps) - 1)):  # a result that nothing uses served a comparison: "the slower one"
        return None
    said = [i for _, _, i in spans]
    idle = {i for i in range(len(values)) if said.count(i) > used.count(i)}  # some mention explains nothing
    frozen |= idle | _given_twice(values, idle, constants, results, behind_result)
    all_values = [*values, *results]
    order = sorted(range(len(all_values)), key=all_values.__getitem__) if wording.decides(question) else []
    template = Template(problem, spans, values, frozenset(set(used) - frozen), steps, results, order)
    as_it_was = template.write(values, results) == (question, problem.steps)
    return template if as_it_was and template.free else None


def _given_twice(values: tuple, idle: set, constants: set, results: list, behind_result: list[set[int]]) -> set[int]:
    """Variables of redundant givens: 10 boys, 15 girls, 25 children; 3 days and 4 days of a week; a given result.

    Small numbers that all serve the chain may add up by chance; `idle` are the variables with a mention that does not.
    """
    frozen = set()
    for i, value in enumerate(values):
        for result, behind in zip(results, behind_result, strict=True):
            frozen |= behind | {i} if value == result and (i in idle or value >= 20) else set()
    totals = {total: set() for total in (7, 12, 24, 30, 60, 100, 1) if total in constants}
    totals |= {value: {i} for i, value in enumerate(values)}
    for n in (2, 3):
        for parts in itertools.combinations(range(len(values)), n):
            total = sum([values[i] for i in parts])
            if total in totals:
                doubtful = not totals[total] or idle & totals[total].union(parts)
                frozen |= totals[total].union(parts) if total >= (7 if doubtful else 20) * (n - 1) else set()
    return frozen


def _in_disguise(constant: Number, values: tuple, wholes: list[tuple[int, int]]) -> set[int]:
    """Variables that a constant may stand for: 2 for 50 %, 30 minutes or 6 months; 3 for 90 / 30 worked in the head."""
    parts = {i for i, whole in wholes if whole in (constant * values[i], constant * (whole - values[i]))}
    multiples = {i for i, whole in wholes if whole * constant == values[i]}
    ratios = {
        k
        for i, j in itertools.combinations(range(len(values)), 2)
        for k in (i, j)
        if constant > 2 and values[i] > 1 and values[i] * constant == values[j]
    }
    return parts | multiples | ratios


def parse_step(step: str) -> tuple[str, list[tuple[int, int]], list, str] | None:
    """(expression, spans of its literals, postfix program, text of the result) of "<<2*(3+4)=14>>".

    The program holds the index of a literal or an operation. None for anything but numbers, + - * / and parentheses,
    and for an expression without an operation.
    """
    match = re.fullmatch(r"<<([-+*/(). 0-9]{1,200})=([0-9]{0,40}(?:\.[0-9]{1,40})?)>>", step)
    if match is None or not match[2]:
        return None
    text = match[1]
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    shift = len(text) - len(text.lstrip())
    literals, program = [], []

    def visit(node: ast.expr) -> bool:
        if isinstance(node, ast.Constant):
            literals.append((shift + node.col_offset, shift + node.end_col_offset))
            program.append(len(literals) - 1)
            return re.fullmatch(r"[0-9]*\.?[0-9]+", text[slice(*literals[-1])]) is not None
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            known = visit(node.left) and visit(node.right)
            program.append(_OPERATORS[type(node.op)])
            return known
        return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd) and visit(node.operand)

    return (text, literals, program, match[2]) if visit(tree) and len(program) > 1 else None


def _run(program: list, leaves: list[Number]) -> Number | None:
    """The value of a postfix program; None for a division by zero."""
    stack = []
    for item in program:
        if isinstance(item, int):
            stack.append(leaves[item])
        else:
            right, left = stack.pop(), stack.pop()
            if item is Fraction and not right:
                return None
            stack.append(item(left, right))
    return _whole(stack[0])


def _grid(template: Template, i: int) -> tuple[int, Sequence[int]]:
    """(scale, ticks): variable i may become any tick / scale.

    Near the old value, as round, with as many decimals, below its unit's ceiling, and right after its "a" or "an".
    """
    old = template.values[i]
    scale = 10 ** _places(old)
    ticks = int(old * scale)
    step = next((s for s, least in _ROUND if ticks % s == 0 and ticks >= least), 1)
    low, high = max(ticks * 3 // 5, 2 if scale == 1 else 1), max(ticks * 9 // 5, ticks + 3)
    ceilings = [wording.ceiling(old, template.problem.question, after) for _, _, after in template.contexts(i)]
    high = min([high, *[limit * scale for limit in ceilings if limit is not None]])
    grid = range(-(-low // step) * step, high + 1, step)
    for before, text, _ in template.contexts(i):
        if article := wording.article(before):
            grid = [tick for tick in grid if wording.takes_an(tick // scale) == (article == "an")]
        if scale > 1 and not _pads(text):
            grid = [tick for tick in grid if tick % 10]
    return scale, grid


def _draw(
    rng: random.Random, template: Template, grids: dict[int, tuple[int, Sequence[int]]]
) -> tuple[Number, ...] | None:
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
        values[i] = tick if scale == 1 else _whole(Fraction(tick, scale))
    return tuple(values)


def _number(text: str) -> Number:
    return int(text) if text.isdigit() else _whole(Fraction(text))


def _whole(value: Number) -> Number:
    return value.numerator if value.denominator == 1 else value


def _places(value: Number) -> int | None:
    """The number of decimals of a value, None beyond six."""
    return 0 if value.denominator == 1 else next((k for k in range(7) if 10**k % value.denominator == 0), None)


def _plain(value: Number) -> str:
    """ "2.5" for 5/2; for values with a finite decimal form."""
    places = _places(value)
    digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{digits[:-places]}.{digits[-places:]}" if places else digits


def _pads(like: str) -> bool:
    """Whether a literal's decimals are padded with zeros, as in "$2.50", "0.25" or "18.0"."""
    part = like.partition(".")[2]
    return part[-1:] == "0" or len(part) == 2


def _write(value: Number, like: str) -> str:
    """A value in the manner of a literal: its separators, its trailing zeros, its leading zero."""
    whole, _, part = _plain(value).partition(".")
    old_whole, _, old_part = like.partition(".")
    whole = f"{int(whole):,}" if "," in like else "" if not old_whole and whole == "0" else whole
    part = part.ljust(len(old_part), "0") if _pads(like) else part
    return f"{whole}.{part}" if part else whole or "0"
