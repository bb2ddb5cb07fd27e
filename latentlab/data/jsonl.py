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
from latentlab.runtime.files import write_atomically

_CONTROL = re.compile(r"<\|[\w-]+\|>")  # "<|latent|>", "<|im_end|>", …: tokenizers read a control token


def read_jsonl(path: str | os.PathLike) -> list[Problem]:
    """Read problems from a .jsonl or .jsonl.gz file, in file order.

    Strict: UTF-8, one JSON object a line with exactly the five keys, non-empty strings, a list of
    strings for `steps`, a canonical answer, unique ids, at least one line.
    Raises FileNotFoundError where there is no such file and ValueError (one line: file, line
    number, what was expected) for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected a .jsonl or .jsonl.gz file of problems, check the path")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            lines = file.readlines()  # bytes: split at "\n" alone, never at U+2028 inside a question
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip data ({error}), expected a whole .gz file: fetch it again") from None
    return _parse(lines, path, "correct or restore this line")


def write_jsonl(problems: Iterable[Problem], path: str | os.PathLike) -> None:
    """Write problems to a .jsonl file that `read_jsonl` reads back equal, atomically.

    Raises ValueError for anything that `read_jsonl` would refuse, and for a path that ends in .gz;
    nothing is written then and an older file stays as it was.
    """
    path = Path(path)
    if path.suffix == ".gz":
        raise ValueError(f"got path {path}, expected a name ending in .jsonl: write it plain, then gzip it")
    texts = [json.dumps(dataclasses.asdict(problem), ensure_ascii=False) + "\n" for problem in problems]
    lines = [text.encode("utf-8", "surrogatepass") for text in texts]  # half a surrogate pair: refused by _parse
    _parse(lines, path, "correct this problem, nothing was written")
    write_atomically(path, b"".join(lines))


def refuse_control_tokens(text: str) -> None:
    """ValueError if a text contains a control token of a tokenizer, such as "<|latent|>"."""
    if found := _CONTROL.search(text):
        raise ValueError(f"got {found[0][:80]!r} in the text, which a model reads as a command, expected plain text")


def _parse(lines: list[bytes], path: Path, remedy: str) -> list[Problem]:
    if not lines:
        raise ValueError(f"{path}: got no problem at all, expected at least one line: fetch or make the file again")
    problems: dict[str, Problem] = {}
    for number, line in enumerate(lines, start=1):
        try:
            problem = _parse_line(line)
            if problem.id in problems:
                first = list(problems).index(problem.id) + 1
                raise ValueError(f"got id {problem.id!r} again (first on line {first}), expected unique ids")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}: {remedy}") from None
        problems[problem.id] = problem
    return list(problems.values())


def _parse_line(line: bytes) -> Problem:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # fails for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise ValueError(f"got {error}, expected one JSON object of strings in UTF-8") from None
    names = [field.name for field in dataclasses.fields(Problem)]
    if not isinstance(row, dict) or set(row) != set(names):
        got = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"got {got[:120]}, expected an object with exactly the keys {names}")
    for name in ("id", "question", "answer", "source"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"got {name} = {repr(row[name])[:80]}, expected a string that is not blank")
    if not isinstance(row["steps"], list) or not all(isinstance(step, str) for step in row["steps"]):
        raise ValueError(f"got steps = {repr(row['steps'])[:80]}, expected a list of strings")
    if (canonical := canonical_answer(row["answer"])) != row["answer"]:
        hint = "one number" if canonical is None else f'"{canonical[:80]}"'
        raise ValueError(f"got answer = {row['answer'][:80]!r}, expected a canonical numeric string ({hint})")
    for text in (row["question"], *row["steps"]):
        refuse_control_tokens(text)
    return Problem(**row | {"steps": tuple(row["steps"])})


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # NaN and ±Infinity, which Python reads but JSON does not have
