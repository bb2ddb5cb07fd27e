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
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

MARKER = "###"  # GSM8K's own files write "####", which this marker finds as well

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"(?P<sign>(?<!\w)[-+\u2212])?[$€£]?(?P<top>{_UNSIGNED})(?: ?/ ?(?P<bottom>{_UNSIGNED}))?")
_CONTROL = re.compile(r"<\|[\w-]+\|>")  # "<|latent|>", "<|im_end|>", …: tokenizers take it for a control token
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


def read_jsonl(path: str | os.PathLike) -> list[Problem]:
    """Read problems from a .jsonl or .jsonl.gz file, in file order, all or nothing.

    Strict: UTF-8, one JSON object a line with exactly the five keys, non-empty strings, a list of strings
    for `steps`, a canonical answer, unique ids, at least one line. Raises FileNotFoundError where there is
    no such file and ValueError (one line: file, line number, what was expected) for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected a .jsonl or .jsonl.gz file of problems, check the path")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            lines = file.readlines()  # bytes: split at "\n" alone, never at U+2028 inside a question
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip data ({error}), expected a whole .gz file: fetch it again") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_parse(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}: correct or restore this line") from None
    _check_file(rows, path)
    return rows


def write_jsonl(problems: Iterable[Problem], path: str | os.PathLike) -> None:
    """Write problems to a .jsonl file that `read_jsonl` reads back equal; whole or not at all.

    Raises ValueError for anything that `read_jsonl` would refuse, and for a path that ends in .gz;
    nothing is written then and an older file stays as it was.
    """
    path, problems = Path(path), list(problems)
    if path.suffix == ".gz":
        raise ValueError(f"got path {path}, expected a name ending in .jsonl: write it plain, then gzip it")
    for number, problem in enumerate(problems, start=1):
        try:
            steps = list(problem.steps) if isinstance(problem.steps, tuple) else problem.steps
            _check_row(dataclasses.asdict(problem) | {"steps": steps})
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}: correct this problem, nothing was written") from None
    _check_file(problems, path)
    text = "".join(json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n" for p in problems)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(text.encode("utf-8"))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # left only where the disk was full


def _parse(line: bytes) -> Problem:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"got byte 0x{line[error.start]:02x} at {error.start}, expected UTF-8 text") from None
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"got {error.msg} at column {error.colno}, expected one whole JSON object") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {error}, expected one JSON object of strings") from None
    _check_row(row)
    return Problem(**row | {"steps": tuple(row["steps"])})


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # NaN and ±Infinity, which Python reads but JSON does not have


def _check_row(row: object) -> None:
    names = [field.name for field in dataclasses.fields(Problem)]
    if not isinstance(row, dict) or set(row) != set(names):
        got = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"got {got[:120]}, expected an object with exactly the keys {names}")
    for name in ("id", "question", "answer", "source"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"got {name} = {repr(row[name])[:80]}, expected a string that is not blank")
    if not isinstance(row["steps"], list) or not all(isinstance(step, str) for step in row["steps"]):
        raise ValueError(f"got steps = {repr(row['steps'])[:80]}, expected a list of strings")
    if canonical_answer(row["answer"]) != row["answer"]:
        wanted = canonical_answer(row["answer"])
        hint = "one number" if wanted is None else f'"{wanted[:80]}"'
        raise ValueError(f"got answer = {row['answer'][:80]!r}, expected a canonical numeric string ({hint})")
    for text in (row["question"], *row["steps"]):
        refuse_control_tokens(text)
    try:
        "".join([row["id"], row["question"], row["source"], *row["steps"]]).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("got half of a surrogate pair, expected text that UTF-8 can hold") from None


def refuse_control_tokens(text: str) -> None:
    """ValueError if a question or step holds what a tokenizer would read as a control token, such as "<|latent|>"."""
    if found := _CONTROL.search(text):
        raise ValueError(f"got {found[0][:80]!r} in the text, which a model reads as a command, expected plain text")


def _check_file(problems: list[Problem], path: Path) -> None:
    if not problems:
        raise ValueError(f"{path}: got no problem at all, expected at least one line: fetch or make the file again")
    first: dict[str, int] = {}
    for number, problem in enumerate(problems, start=1):
        if first.setdefault(problem.id, number) != number:
            raise ValueError(
                f"{path}, line {number}: got id {problem.id!r} again (first on line {first[problem.id]}), "
                "expected unique ids: rename or remove one"
            )
