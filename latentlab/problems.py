"""Word problems, their answers, and the JSON Lines files that hold them.

One problem is one line of a file, with exactly these five keys:

    {"id": "gsm8k-train-00000", "question": "Natalia sold clips to 48 of …?",
     "steps": ["<<48/2=24>>", "<<48+24=72>>"], "answer": "72", "source": "gsm8k/train"}

`steps` follows GSM8K's calculator annotations (Cobbe et al. 2021, arXiv:2110.14168). A completion of a
model has the form `steps` joined by newlines, then `### answer`. Every place that grades an answer
(reward, evaluation, majority vote, data checks) goes through `extract_answer` and `answers_match`, so
that two places can never disagree on what is right.
"""

import dataclasses
import re
from fractions import Fraction

MARKER = "###"  # GSM8K's own files write "####", which this marker finds as well

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"(?P<sign>(?<!\w)[-+\u2212])?[$€£]?(?P<top>{_UNSIGNED})(?: ?/ ?(?P<bottom>{_UNSIGNED}))?")
_LONGEST_FRACTION = 100  # digits on either side of a "/"; keeps the exact arithmetic small


@dataclasses.dataclass(frozen=True)
class Problem:
    """One word problem; immutable, so that it can be a key and be shared between runs."""

    id: str  # unique within a file
    question: str  # plain text, without a trailing newline
    steps: tuple[str, ...]  # "<<48/2=24>>", …; empty where no chain is known
    answer: str  # canonical numeric string, see canonical_answer
    source: str  # which data set and split it came from


def canonical_answer(text: str) -> str | None:
    """The one number in `text` as a canonical numeric string, or None; never raises.

    The rule, in order:
    1. A number is made of ASCII digits, with an optional fraction part ("18.0", ".5", "18."), optional
       thousands separators in groups of three ("1,000"), an optional sign (-, + or U+2212) that touches
       it and does not follow a letter or digit, and an optional $, € or £ ("-$3.50"). Words, units and
       a percent sign around it are dropped: "18 apples" -> "18", "50%" -> "50".
    2. "a/b" is one number: "1/2" -> "0.5". A quotient without a finite decimal form stays a reduced
       fraction: "2/6" -> "1/3". Division by zero, or a side beyond 100 digits, reduced or not -> None.
    3. No number, or more than one -> None: an answer that names two values has not answered. So
       "1e3", "1,5", "3:45", "5-3" and "1 1/2" are None, as are digits outside ASCII.
    The result has no leading or trailing zeros, no separators, no "+", and zero has no sign. Values are
    compared as exact strings or fractions, never as floats, so 400 digits are as good as four.
    """
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    top, bottom = (found[0][part] for part in ("top", "bottom"))
    negative = found[0]["sign"] not in (None, "+")
    if bottom is None:
        return _signed(_plain_decimal(top), negative)
    if max(len(top), len(bottom)) > _LONGEST_FRACTION or not bottom.strip("0.,"):
        return None
    value = Fraction(_plain_decimal(top)) / Fraction(_plain_decimal(bottom))
    if max(value.numerator, value.denominator) >= 10**_LONGEST_FRACTION:
        return None
    return _signed(_plain_fraction(value), negative)


def _plain_decimal(digits: str) -> str:
    """ "1,000.50" -> "1000.5"; pure text, so the number of digits does not matter."""
    whole, _, part = digits.replace(",", "").partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    return f"{whole}.{part}" if part else whole


def _plain_fraction(value: Fraction) -> str:
    """A finite decimal if there is one (only factors 2 and 5 below the line), else "a/b" reduced."""
    places = next((k for k in range(value.denominator.bit_length()) if 10**k % value.denominator == 0), None)
    if places is None:
        return f"{value.numerator}/{value.denominator}"
    digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    return _plain_decimal(f"{digits[: len(digits) - places]}.{digits[len(digits) - places :]}")


def _signed(value: str, negative: bool) -> str:
    return f"-{value}" if negative and value != "0" else value


def extract_answer(text: str) -> str | None:
    """The rest of the line after the last "###" of a completion, stripped; None where there is none.

    Blank lines after the marker are skipped. A completion without a marker, or with nothing after it, is
    unparsable (None): the model has not said which of its numbers is the answer. The text is returned
    as written; `answers_match` makes it canonical.
    """
    _, marker, tail = text.rpartition(MARKER)
    lines = tail.strip().splitlines()
    return lines[0].strip() if marker and lines else None


def answers_match(a: str | None, b: str | None, rule: str = "numeric") -> bool:
    """Whether two answers are equal; None (unparsable) equals nothing, not even None.

    rule "numeric": equal canonical values, see `canonical_answer`; an answer without one matches nothing.
    rule "string": equal text after stripping blanks. Any other rule raises ValueError.
    """
    if rule not in ("numeric", "string"):
        raise ValueError(f'got rule {rule!r}, expected "numeric" or "string": pass one of the two')
    if a is None or b is None:
        return False
    if rule == "string":
        return a.strip() == b.strip()
    value = canonical_answer(a)
    return value is not None and value == canonical_answer(b)


def step_result(step: str) -> str:
    """The canonical result of one step, right of its last "=": "<<7+5=12>>" -> "12".

    Raises ValueError where there is no "=" or not exactly one number after it.
    """
    _, equals, right = step.rpartition("=")
    value = canonical_answer(right) if equals else None
    if value is None:
        raise ValueError(f'got step {step[:80]!r}, expected "<<expression=number>>": correct the step or leave it out')
    return value
