"""Number-perturbed copies of a word problem: the same words and steps with other numbers, the chain recomputed.

The distinct digit values of a question are its variables; equal numbers stay tied. Each leaf of each equation must be
traced to a variable, to the result of an earlier step, or to a constant that the wording licenses (number words,
half and twice, unit facts, percent, cents). A leaf with two possible origins freezes every number that either depends
on; a leaf with none rejects the problem. The copies teach arithmetic and number binding, not new wording: they are
not GSM8K-Aug. `sources.benchmark("gsm8k_perturbed")`, validation with fresh numbers, tells reasoning from recall.
"""

import ast
import itertools
import operator
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from latentlab.problems import Problem, canonical_answer

_MISSES = 300  # draws without a new variant before a problem is taken to have no more
_NUMBER = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?![.,]?\d)")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

# Words that license constants. Generous on purpose: a constant that equals a question number freezes that number.
_LICENCES = [(re.compile(rf"\b(?:{words})", re.I), [Fraction(value) for value in values.split()]) for words, values in (
    ("half|halves|halfway|midway", "2 1/2"),
    ("twice|doubl|both|pairs?\\b|couples?\\b|twins?\\b|two\\b|either|bicycle|each other|second|biweekly|semi", "2"),
    ("tripl|thrice|third|tricycle|triang", "3 1/3 2 2/3"),
    ("quadrupl|quarter|fourth|squares?\\b|rectang|perimeter|sides|tires?|wheels?|legs?|feet|corners?|seasons?",
     "4 1/4 3/4 3 2"),
    ("eyes?\\b|ears?\\b|hands?\\b|arms?\\b|wings?\\b|shoes?\\b|socks?\\b|gloves?\\b|parents|round.?trip|and back", "2"),
    ("fifth", "5 1/5 4/5 4"), ("sixth", "6 1/6 5/6 5"), ("seventh", "7 1/7 6/7 6"), ("eighth", "8 1/8 7/8 7"),
    ("ninth", "9 1/9 8/9 8"), ("tenth", "10 1/10 9/10 9"), ("dozen", "12"), ("once|single|another|one\\b", "1"),
    ("(?:him|her|my|your)self|themselves|ourselves|including", "1"),
    ("seconds?\\b|minutes?\\b|hours?\\b|hourly", "60 3600"), ("hours?\\b|days?\\b|daily", "24"),
    ("days?\\b|daily|weeks?\\b|weekly|every ?day|weekdays?|weekends?|\\w+day", "7 5 2"),
    ("months?\\b|monthly|years?\\b|yearly|annual|january|february|march|april|may|june|july|august|september|october"
     "|november|december", "12 30 31 28 365 52 4"),
    ("foot|feet|ft\\b|inch|inches", "12"), ("yards?\\b|feet|foot", "3"), ("pounds?\\b|lbs?\\b|ounces?|oz\\b", "16"),
    ("kilo|km|kg|met(?:er|re)|lit(?:er|re)|grams?|mg\\b|ml\\b|milli", "1000"), ("cm\\b|centi|met(?:er|re)", "100"),
    ("gallons?|quarts?|pints?|cups?", "2 4 8 16 128"), ("decades?", "10"), ("centur", "100"), ("tons?\\b", "2000"),
    ("cents?\\b|penn(?:y|ies)|dimes?|nickels?|quarters?|coins?|change", "100 25 10 5 1 .25 .1 .05 .01"),
    ("percent|percentage", "100 1"), ("score", "20"), ("cards?", "52"), ("hundreds?", "100"), ("thousands?", "1000"),
    ("millions?", "1000000"), ("average", "2"), ("miles?", "5280"),
)]  # fmt: skip
_ONES = dict(zip(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split(), range(1, 20), strict=True,
))  # fmt: skip
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_WORD = re.compile(rf"\b(?:{'|'.join([*_TENS, *sorted(_ONES, key=len, reverse=True)])})", re.I)
_MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|march|april|may|june|july|aug(?:ust)?|sept(?:ember)?|oct(?:ober)?|nov(?:ember)?"
    "|dec(?:ember)?"
)

# Numbers that name something instead of counting it are frozen: dates, clock times, ordinals, fractions, ratios, names.
_NAMED_BEFORE = re.compile(
    rf"(?:[\w.,]|[/:#\u00d7\u2013-]\s?|\b(?:{_MONTHS}|grade|size|level|chapter|page|route|channel|room|number|no\.|day|week"
    r"|year|age|aged|door|house|model|type|version|phase|stage|step|at|since|ratio of|about|approximately)\s)$",
    re.I,
)
_NAMED_AFTER = re.compile(
    r"(?:(?!(?:kg|km|cm|mm|ml|mg|g|m|l|lbs?|ft|oz|mph|gb|mb|in)\b)[A-Za-z]|\s?[/:\u00d7\u2013]|\s?-\s?\d|-(?:in|for|to)-"
    r"|\s?(?:a\.?m\b|p\.?m\b|o['\u2019]clock|noon|BC|AD)|\s?to\s\d|\s(?:and|\d+/)\s?\d+/\d|\s\d+/\d|\s(?:halves|thirds|fourths|fifths))",
    re.I,
)
_YEAR_BEFORE = re.compile(r"(?:^|[a-z,(]\s|\()$")

# Units whose quantity has a natural ceiling: a value at most the ceiling stays at most there.
_CEILINGS = [(re.compile(pattern, re.I), ceilings) for pattern, ceilings in (
    (r"(?:\w+\s)?hours?\b", (12, 24)), (r"(?:\w+\s)?(?:minutes?|seconds?)\b", (60,)),
    (r"(?:\w+\s)?days?\b", (7, 30, 365)), (r"(?:\w+\s)?weeks?\b", (4, 52)), (r"(?:\w+\s)?months?\b", (12,)),
    (r"(?:years?\s?-?old|years? of age)", (18, 100)), (r"(?:ft|feet|foot)\b", (8,)),
)]  # fmt: skip


def perturb(problem: Problem, n: int, seed: int) -> list[Problem]:
    """Up to `n` copies of `problem` with other numbers, fewer where the numbers leave no room, none where in doubt.

    Variant k depends on (problem, seed, k) alone, not on n. Its id is "<id>~<k>", its source "<source>/perturbed".
    All variants differ from one another and from the original, every equation holds exactly, integers stay positive
    integers, decimals keep their places, and any two numbers of the question keep their order.
    """
    if n < 0:
        raise ValueError(f"got n = {n}, expected at least 0: pass the number of copies")
    template = trace(problem)
    if template is None or n == 0:
        return []
    rng = random.Random(f"perturb, seed {seed}, {problem.id}, {problem.question}")  # seeded through SHA-512
    grids = [_grid(template, i) if i in template.free else [value] for i, value in enumerate(template.values)]
    variants, seen, misses = [], {tuple(template.values)}, 0
    while len(variants) < n and misses < _MISSES:
        values = tuple([grid[int(rng.random() * len(grid))] if len(grid) > 1 else grid[0] for grid in grids])
        results = None if values in seen else template.recompute(values)
        if results is None:
            misses += 1
            continue
        misses = 0
        seen.add(values)
        question, steps = template.write(values, results)
        answer = canonical_answer(_plain(results[-1]))
        k = len(variants)
        variants.append(Problem(f"{problem.id}~{k}", question, steps, answer, f"{problem.source}/perturbed"))
    return variants


def perturbed(problems: Iterable[Problem], n: int, seed: int) -> list[Problem]:
    """`perturb` of each problem in turn, in one list."""
    return [variant for problem in problems for variant in perturb(problem, n, seed)]


@dataclass(frozen=True)
class Leaf:
    """A literal of an equation: a + b * (variable or earlier result `index`), or a constant where index is None."""

    text: str
    span: tuple[int, int]  # in the expression
    origin: str  # "variable", "result" or "constant"
    index: int
    a: Fraction
    b: Fraction


@dataclass(frozen=True)
class Template:
    """A problem with holes: where each number of the question and each literal of the chain comes from."""

    problem: Problem
    spans: list[tuple[int, int, int]]  # (start, end, variable) of each number of the question
    values: list[Fraction]  # of the variables, in the question
    free: frozenset[int]  # the variables that may change
    steps: list[tuple]  # (expression, leaves, postfix program, text of the result)
    results: list[Fraction]  # in the original

    def recompute(self, values: tuple[Fraction, ...]) -> list[Fraction] | None:
        """The results under new values; None where order, sign, wholeness or the number of decimals is not kept."""
        order = sorted(range(len(values)), key=self.values.__getitem__)
        if any(values[i] >= values[j] for i, j in itertools.pairwise(order)):
            return None
        results = []
        for (_, leaves, program, _), old in zip(self.steps, self.results, strict=True):
            new = _run(program, [_leaf_value(leaf, values, results) for leaf in leaves])
            if new is None or (new > 0) != (old > 0) or (new == 0) != (old == 0):
                return None
            places = _places(new)
            if places is None or places > _places(old) or not old / 5 <= new <= old * 5:
                return None
            results.append(new)
        return results

    def write(self, values: tuple[Fraction, ...], results: list[Fraction]) -> tuple[str, tuple[str, ...]]:
        """(question, steps) with these numbers, each written in the manner of the original."""
        question, steps = self.problem.question, []
        for start, end, i in reversed(self.spans):
            question = question[:start] + _write(values[i], question[start:end]) + question[end:]
        for (text, leaves, _, old), result in zip(self.steps, results, strict=True):
            for leaf in reversed(leaves):
                new = _write(_leaf_value(leaf, values, results), leaf.text)
                text = text[: leaf.span[0]] + new + text[leaf.span[1] :]
            steps.append(f"<<{text}={_write(result, old)}>>")
        return question, tuple(steps)


def trace(problem: Problem) -> Template | None:
    """The template of a problem, or None where the origin of some number is in doubt or nothing may change."""
    question = problem.question
    matches = list(_NUMBER.finditer(question))
    values = sorted({Fraction(m[0].replace(",", "")) for m in matches})
    spans = [(m.start(), m.end(), values.index(Fraction(m[0].replace(",", "")))) for m in matches]
    constants = _constants(question)
    named = {i for start, end, i in spans if _named(question, start, end) or values[i] <= 1 or values[i] in constants}
    percent = {i for _, end, i in spans if re.match(r"\s?(?:%|percent)", question[end:])}
    cents = {i for _, end, i in spans if re.match(r"\s?(?:cents?\b|\u00a2)", question[end:])}

    steps, results, supports, used, read, frozen = [], [], [], set(), set(), set(named)
    for step in problem.steps:
        parsed = parse_step(step)
        if parsed is None:
            return None
        text, literals, program, result = parsed
        leaves, support = [], set()
        for start, end in literals:
            literal = text[start:end]
            value = Fraction(literal)
            found = [("result", j, Fraction(0), Fraction(1)) for j, old in enumerate(results) if old == value]
            for i, old in enumerate(values):
                forms = [(Fraction(0), Fraction(1))]
                if i in percent | cents:
                    forms.append((Fraction(0), Fraction(1, 100)))
                if i in percent and old < 100:
                    forms += [(Fraction(x), Fraction(s, 100 // x)) for x in (1, 100) for s in (-1, 1)]
                found += [("variable", i, a, b) for a, b in forms if a + b * old == value]
            if value in constants:
                found.append(("constant", 0, value, Fraction(0)))
            if not found:
                return None
            behind = set()
            for origin, i, _, _ in found:
                behind |= {i} if origin == "variable" else supports[i] if origin == "result" else set()
                used |= {i} if origin == "variable" else set()
                read |= {i} if origin == "result" else set()
            if len(found) > 1:
                frozen |= behind
            support |= behind
            leaves.append(Leaf(literal, (start, end), *found[0]))
        old = _run(program, [Fraction(leaf.text) for leaf in leaves])
        if old is None or old != Fraction(result) or old <= 0 or _places(old) is None:
            return None
        steps.append((text, leaves, program, result))
        results.append(old)
        supports.append(support)
    if not steps or canonical_answer(_plain(results[-1])) != problem.answer:
        return None
    if not read >= set(range(len(steps) - 1)):  # a result that nothing uses: it served a comparison, as in "the slower"
        return None
    for i, value in enumerate(values):  # a number of the question that is also a result: given twice
        for result, support in zip(results, supports, strict=True):
            if value == result:
                frozen |= support | {i}
    totals = {value: {i} for i, value in enumerate(values)} | {
        total: set() for total in map(Fraction, (7, 12, 24, 30, 60, 100, 1)) if total in constants
    }
    for i, j in itertools.combinations(range(len(values)), 2):  # redundant givens: 10 boys, 15 girls, 25 children
        if (both := totals.get(values[i] + values[j])) is not None and values[i] + values[j] > 6:
            frozen |= {i, j} | both
    template = Template(problem, spans, values, frozenset(used - frozen), steps, results)
    whole = template.write(tuple(values), results) == (question, problem.steps)
    return template if whole and template.free else None


def parse_step(step: str) -> tuple[str, list[tuple[int, int]], list, str] | None:
    """(expression, spans of its literals, postfix program, text of the result) of "<<2*(3+4)=14>>".

    The program holds the index of a literal or an operation; None for anything but + - * / and parentheses.
    """
    match = re.fullmatch(r"<<([-+*/(). 0-9]{1,200})=((?:[0-9]+)?(?:\.[0-9]+)?)>>", step)
    if match is None or not match[2] or "**" in step or "//" in step:
        return None
    text = match[1]
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    shift = len(text) - len(text.lstrip())
    literals, program = [], []

    def visit(node) -> bool:
        if isinstance(node, ast.Constant):
            literals.append((shift + node.col_offset, shift + node.end_col_offset))
            program.append(len(literals) - 1)
            return re.fullmatch(r"[0-9]*\.?[0-9]+", text[literals[-1][0] : literals[-1][1]]) is not None
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            known = visit(node.left) and visit(node.right)
            program.append(_OPERATORS[type(node.op)])
            return known
        return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd) and visit(node.operand)

    return (text, literals, program, match[2]) if visit(tree) else None


def _run(program: list, leaves: list[Fraction]) -> Fraction | None:
    stack = []
    for item in program:
        if isinstance(item, int):
            stack.append(leaves[item])
        else:
            right, left = stack.pop(), stack.pop()
            if item is operator.truediv and not right:
                return None
            stack.append(item(left, right))
    return stack[0]


def _leaf_value(leaf: Leaf, values: tuple[Fraction, ...], results: list[Fraction]) -> Fraction:
    if leaf.origin == "constant":
        return leaf.a
    source = (values if leaf.origin == "variable" else results)[leaf.index]
    return source if leaf.b == 1 and not leaf.a else leaf.a + leaf.b * source


def _constants(question: str) -> set[Fraction]:
    """The constants that the words of a question license."""
    found = {value for pattern, values in _LICENCES if pattern.search(question) for value in values}
    if "%" in question:
        found |= {Fraction(100), Fraction(1)}
    if "\u00a2" in question:
        found.add(Fraction(100))
    words = [(m[0].lower(), m.start(), m.end()) for m in _WORD.finditer(question)]
    for (word, _, end), (following, start, _) in itertools.pairwise([*words, ("", -1, -1)]):
        value = (_TENS | _ONES)[word]
        found.add(Fraction(value))
        if word in _TENS and following in _ONES and 0 < start - end <= 1:
            found.add(Fraction(value + _ONES[following]))
        scale = re.match(r"[\s-](hundred|thousand)", question[end:], re.I)
        if scale:
            found.add(Fraction(value * {"hundred": 100, "thousand": 1000}[scale[1].lower()]))
        below = re.match(
            r"[\s-](half|halve|third|fourth|quarter|fifth|sixth|seventh|eighth|ninth|tenth)", question[end:], re.I
        )
        if below:
            names = "half third fourth fifth sixth seventh eighth ninth tenth".split()
            name = {"halve": "half", "quarter": "fourth"}.get(below[1].lower(), below[1].lower())
            found |= _share(value, names.index(name) + 2)
    for top, bottom in re.findall(r"(\d+)\s?/\s?(\d+)", question):
        found |= _share(int(top), int(bottom))
    return found


def _share(top: int, bottom: int) -> set[Fraction]:
    """What "3/4" or "three quarters" licenses: 3, 4, 3/4 and the rest, 1 and 1/4."""
    if not 0 < top <= bottom:
        return {Fraction(top), Fraction(bottom)}
    return {Fraction(x) for x in (top, bottom, bottom - top, 1)} | {Fraction(top, bottom), 1 - Fraction(top, bottom)}


def _named(question: str, start: int, end: int) -> bool:
    """Whether a number names something (a date, a time, an ordinal, a part of a fraction) instead of counting it."""
    before, after = question[:start], question[end:]
    if _NAMED_BEFORE.search(before) or _NAMED_AFTER.match(after):
        return True
    return bool(re.fullmatch(r"1[5-9]\d\d|20\d\d", question[start:end])) and bool(_YEAR_BEFORE.search(before))


def _grid(template: Template, i: int) -> list[Fraction]:
    """The values near the old one that variable i may take: as round, as many decimals, below its unit's ceiling."""
    old, question = template.values[i], template.problem.question
    places = _places(old)
    scale = 10**places
    ticks = int(old * scale)
    step = next((s for s in (1000, 500, 100, 50, 10, 5) if ticks % s == 0 and ticks >= 4 * s), 1)
    low, high = max(ticks // 2, 1 if places else 2), max(2 * ticks, ticks + 4)
    contexts = [(question[:start], question[start:end], question[end:]) for start, end, k in template.spans if k == i]
    for _, _, after in contexts:
        ceilings = (100,) if re.match(r"\s?(?:%|percent)", after) else ()
        for pattern, limits in _CEILINGS:
            if pattern.match(after.lstrip(" -")):
                ceilings = limits
        high = min([high, *[c * scale - (c == 100) for c in ceilings if old <= c][:1]])
    grid = [Fraction(t, scale) for t in range(-(-low // step) * step, high + 1, step)]
    for before, text, _ in contexts:
        article = re.search(r"\b(an?)\s$", before, re.I)
        if article:
            grid = [v for v in grid if _takes_an(v) == (article[1].lower() == "an")]
        if places and not (text[-1] == "0" or (before.endswith("$") and len(text.partition(".")[2]) == 2)):
            grid = [v for v in grid if _places(v) == places]
    return grid or [old]


def _takes_an(value: Fraction) -> bool:
    digits = str(int(value))
    return digits[0] == "8" or (digits[:2] in ("11", "18") and len(digits) % 3 == 2)


def _places(value: Fraction) -> int | None:
    """The number of decimals of a value, None beyond six."""
    return next((k for k in range(7) if 10**k % value.denominator == 0), None)


def _plain(value: Fraction) -> str:
    """ "2.5" for 5/2; for values with a finite decimal form."""
    places = _places(value)
    digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{digits[:-places]}.{digits[-places:]}" if places else digits


def _write(value: Fraction, like: str) -> str:
    """A value in the manner of a literal: its separators, its trailing zeros, its leading zero."""
    whole, _, part = _plain(value).partition(".")
    old_whole, _, old_part = like.partition(".")
    if "," in like:
        whole = f"{int(whole):,}"
    if old_part[-1:] == "0" or len(old_part) == 2:
        part = part.ljust(len(old_part), "0")
    if not old_whole and whole == "0":
        whole = ""
    return f"{whole}.{part}" if part else whole
