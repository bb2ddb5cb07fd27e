"""Equations of a chain, "<<2*(3+4)=14>>": parsed without eval, computed exactly."""

import ast
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

Number = int | Fraction  # int where whole, which is four times as fast

_OPERATIONS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: Fraction,
}


@dataclass(frozen=True)
class Equation:
    """One step: numbers, + - * / and parentheses on the left, one number on the right."""

    left: str
    literals: list[tuple[int, int]]  # (start, end) of each number on the left
    program: list  # postfix: None for the next literal, or an operation
    right: str

    def compute(self, values: Iterable[Number]) -> Number | None:
        """The left side with these values in place of its literals; None for a division by zero."""
        literals, stack = iter(values), list[Number]()
        try:
            for operation in self.program:
                right = stack.pop() if operation else next(literals)
                stack.append(operation(stack.pop(), right) if operation else right)
        except ZeroDivisionError:
            return None
        return simplest(stack[0])

    def holds(self) -> bool:
        return self.compute(number(self.left[a:b]) for a, b in self.literals) == number(self.right)


def parse_step(step: str) -> Equation | None:
    """The equation of a step; None for anything else, and for a left side without an operation."""
    match = re.fullmatch(r"<<([-+*/(). 0-9]{1,200})=([0-9]{0,40}(?:\.[0-9]{1,40})?)>>", step)
    if match is None or not match[2]:
        return None
    equation = Equation(match[1], [], [], match[2])
    shift = len(match[1]) - len(match[1].lstrip())

    def visit(node: ast.expr) -> None:
        if isinstance(node, ast.BinOp):
            visit(node.left)
            visit(node.right)
            equation.program.append(_OPERATIONS[type(node.op)])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd):
            visit(node.operand)
        else:  # a number, or what has no place here
            start, end = shift + node.col_offset, shift + (node.end_col_offset or 0)
            if not re.fullmatch(r"[0-9]*\.?[0-9]+", equation.left[start:end]):
                raise ValueError
            equation.literals.append((start, end))
            equation.program.append(None)

    try:
        visit(ast.parse(match[1].strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, RecursionError, MemoryError):
        return None
    return equation if len(equation.program) > 1 else None


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
