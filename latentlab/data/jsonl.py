"""JSON Lines files of problems: read and written strictly, all or nothing."""

import dataclasses
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from latentlab.problems import Problem, canonical_answer

_CONTROL = re.compile(r"<\|[\w-]+\|>")  # "<|latent|>", "<|im_end|>", …: tokenizers take it for a control token


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
