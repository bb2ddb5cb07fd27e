"""Word problems, and the one rule by which answers are graded.

A completion has the form of GSM8K's chains (Cobbe et al. 2021, arXiv 2110.14168): `steps`, one per
line, then the marker and the answer.

    <<48/2=24>>
    <<48+24=72>>
    ### 72

Reward, evaluation, majority vote and data checks all grade with `extract_answer` and `answers_match`.
Problems are stored as JSON Lines with the fields of `Problem` (data/jsonl.py).
"""

import dataclasses
import re
import unicodedata
from fractions import Fraction

MARKER = "###"  # GSM8K's own files write "####", which this marker finds as well

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_LETTER = r"[^\W\d_]"
_NUMBER = re.compile(  # `joined` and `rest` are what must not touch a number; "²", "–", "±": see _stand_in
    rf"(?P<joined>[+<>|~^–±²,.]\$*|(?<!{_LETTER})[-/]\$*|\w(?=\.))??"
    rf"(?P<sign>(?<!\w)[-+])?\$?(?P<top>{_UNSIGNED})(?: ?/ ?(?P<bottom>{_UNSIGNED}))?"
    rf"(?P<rest>[+<=|~^–±²]|[-/](?!{_LETTER})|\.\.|[xX][0-9a-fA-F])?"
)
_TAG = re.compile(r"</?[A-Za-z]+ ?/?>")
_PARTED_SIGN = re.compile(  # only markup, quotes, brackets or a currency between sign and number: "-**18**", "- $18"
    r"(?<!\w)(?:[-+–]|±(?!\s))(?!\s*[.]?[0-9]|\$[.]?[0-9])"
    rf"(?:{_TAG.pattern}|\\[A-Za-z]+|[A-Z]{{1,3}}(?![A-Za-z_])|[^\w<>=.,+–±-]|_)++[.]?[0-9]"
)
_FOREIGN_NUMBER = re.compile(rf"(?<!{_LETTER})²")
_JOINS = ("Sm", "Sk", "Lm", "Mn", "Mc", "Me", "Cf")  # signs, modifiers, combining and invisible characters
_SEPARATORS = "\u00b7\u066b\u066c\uff0c\uff0e"  # decimal points and thousands separators of other scripts
_LONGEST_FRACTION = 100  # digits on either side of a "/"; keeps the exact arithmetic small


@dataclasses.dataclass(frozen=True)
class Problem:
    """One word problem."""

    id: str  # unique within a data set, such as gsm8k-train-00000
    question: str  # plain text, without a trailing newline
    steps: tuple[str, ...]  # "<<48/2=24>>", ...; empty if no chain is known
    answer: str  # canonical numeric string, see canonical_answer
    source: str  # data set and split, such as gsm8k/train


def canonical_answer(text: str) -> str | None:
    r"""The single number in `text` as a canonical numeric string, or None; never raises.

    1. A number has ASCII digits, an optional fraction part ("18.0", ".5"), optional thousands
       separators ("1,000"), an optional sign (-, + or U+2212) that touches it and does not follow a
       letter or digit, and an optional currency sign ("-$3.50"). Around it words, units, percent
       signs, a full stop, "=" in front, ">" behind, tags, and a hyphen or slash next to a letter are
       dropped: "7 apples", "7kg", "7%", "7.", "x=7", "<b>7</b>", "7-day", "$7/hour" -> "7".
    2. "a/b" is one number: "1/2" -> "0.5". A quotient without a finite decimal form stays a reduced
       fraction: "2/6" -> "1/3". Division by zero, or more than 100 digits on a side -> None.
    3. A number counts as a whole. If another sign, a comparison, a separator or a numeric, modifier,
       combining or invisible character touches it, the text gives None: "--5", "5-", "~5", "5..",
       "5\u2026", "Rs.18", "10\u2076", "5\u4e07" (5 times 10,000). So does a sign that only markup,
       quotes, brackets or a currency part from the number: "-**18**", "-\boxed{18}", "-(18)",
       "- $18". A hyphen and a space alone are a list item: "- 18" -> "18".
    4. No number, or more than one -> None: two values are no answer. So "1e3", "1,5", "3:45", "5-3"
       and "1 1/2" give None, as do numerals outside ASCII ("\uff15", "\u00bd"), unless they follow a
       letter ("18 m\u00b2" -> "18").

    The result has no leading or trailing zeros, no separators, no "+" and no signed zero. It is exact:
    no number passes through a float.
    """
    text = re.sub(r"[^\x00-\x7f]", _stand_in, text)
    if _PARTED_SIGN.search(text) or _FOREIGN_NUMBER.search(text):
        return None
    found = list(_NUMBER.finditer(_TAG.sub(" ", text)))
    if len(found) != 1 or found[0]["joined"] or found[0]["rest"]:
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


def _stand_in(found: re.Match[str]) -> str:
    """What stands for each class of characters outside ASCII that `_NUMBER` tells apart."""
    character = found[0]
    kind = unicodedata.category(character)
    if character == "\u2212":
        return "-"
    if character in _SEPARATORS:
        return ","
    if kind[0] == "N":
        return "²"
    if kind == "Sc":
        return "$"
    if character in "…‥":
        return ".."
    if kind == "Pd":
        return "–"
    if kind in _JOINS or character in "➕➖➗" or character.isnumeric():
        return "±"
    return "a" if kind[0] == "L" else ";"


def _plain_decimal(digits: str) -> str:
    """ "1,000.50" -> "1000.5"; as text, so any number of digits is exact."""
    whole, _, part = digits.replace(",", "").partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    return f"{whole}.{part}" if part else whole


def _plain_fraction(value: Fraction) -> str:
    """A finite decimal if there is one (denominator divides a power of 10), else "a/b" reduced."""
    places = next((k for k in range(value.denominator.bit_length()) if 10**k % value.denominator == 0), None)
    if places is None:
        return f"{value.numerator}/{value.denominator}"
    digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    return _plain_decimal(f"{digits[: len(digits) - places]}.{digits[len(digits) - places :]}")


def _signed(value: str, negative: bool) -> str:
    return f"-{value}" if negative and value != "0" else value


def extract_answer(text: str) -> str | None:
    """The line after the last "###" of a completion, stripped; None if there is none.

    Blank lines after the marker are skipped. Without a marker there is no answer, only numbers.
    """
    _, marker, tail = text.rpartition(MARKER)
    lines = tail.strip().splitlines()
    return lines[0].strip() if marker and lines else None


def answers_match(a: str | None, b: str | None, rule: str = "numeric") -> bool:
    """Whether two answers are equal; None (no answer) equals nothing, not even None.

    rule "numeric": equal canonical values (`canonical_answer`). rule "string": equal stripped text.
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

    Raises ValueError if there is no "=" or not exactly one number after it.
    """
    _, equals, right = step.rpartition("=")
    value = canonical_answer(right) if equals else None
    if value is None:
        raise ValueError(f'got step {step[:80]!r}, expected "<<expression=number>>": correct the step or leave it out')
    return value
