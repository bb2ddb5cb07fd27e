"""Equations of a chain, "<<2*(3+4)=14>>": parsed without eval, computed exactly."""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from operator import add, mul, sub

Number = int | Fraction  # int where whole, which is four times as fast

_OPERATIONS: dict = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: Fraction}


@dataclass(frozen=True)
class Equation:
    """One step: numbers, + - * / and parentheses on the left, one number on the right."""

    left: str
    literals: list[tuple[int, int]]  # (start, end) of each number on the left
    tree: ast.expr
    right: str

    def compute(self, values: Iterable[Number]) -> Number | None:
        """The left side with these values in place of its literals; None for a division by zero."""
        literals = iter(values)

        def value(node: ast.expr) -> Number:
            if isinstance(node, ast.BinOp):
                return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
            return value(node.operand) if isinstance(node, ast.UnaryOp) else next(literals)

        try:
            return simplest(value(self.tree))
        except ZeroDivisionError:
            return None

    def holds(self) -> bool:
        return self.compute(number(self.left[a:b]) for a, b in self.literals) == number(self.right)


def parse_step(step: str) -> Equation | None:
    """The equation of a step; None for anything else, and for a left side without an operation."""
    match = re.fullmatch(r"<<([-+*/(). 0-9]{1,200})=([0-9]{0,40}(?:\.[0-9]{1,40})?)>>", step)
    if match is None or not match[2]:
        return None
    left, right = match.groups()
    literals = [m.span() for m in re.finditer(r"[0-9.]+", left)]
    try:
        tree = ast.parse(left.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        return None
    known = (ast.BinOp, ast.UnaryOp, ast.UAdd, ast.Constant, *_OPERATIONS)
    if len(literals) < 2 or not all(isinstance(node, known) for node in ast.walk(tree)):
        return None
    if not all(re.fullmatch(r"[0-9]*\.?[0-9]+", left[start:end]) for start, end in literals):
        return None
    return Equation(left, literals, tree, right)


def number(text: str) -> Number:
    """The value of "12", ".5" or "1,000"."""
    text = text.replace(",", "")
    return int(text) if text.isdigit() else simplest(Fraction(text))


def simplest(value: Number) -> Number:
    """An int where the value is whole."""
    return value.numerator if value.denominator == 1 else value


def decimals(value: Number) -> int:
    """The number of decimals of a value; 7 for more than six."""
    return next((k for k in range(7) if 10**k % value.denominator == 0), 7)


def is_padded(literal: str) -> bool:
    """Whether the decimals of a literal may be padded with zeros: "$2.50", "0.25" or "18.0"."""
    part = literal.partition(".")[2]
    return part[-1:] == "0" or len(part) == 2


def write_like(value: Number, literal: str) -> str:
    """A value of at most six decimals in the format of a literal: separators, padding, zeros."""
    padded = len(literal.partition(".")[2]) if is_padded(literal) else 0
    places, separator = max(decimals(value), padded), "," if "," in literal else ""
    text = f"{Decimal(value.numerator) / value.denominator:{separator}.{places}f}"
    return text.removeprefix("0") if places and literal.startswith(".") else text
