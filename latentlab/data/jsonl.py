"""JSON Lines files of problems: read and written strictly, all or nothing."""

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from latentlab.problems import Problem, canonical_answer
from latentlab.runtime.files import parse_json, write_atomically


def read_jsonl(path: str | os.PathLike) -> list[Problem]:
    """Read problems from a .jsonl or .jsonl.gz file, in file order.

    Strict: UTF-8, one JSON object a line with exactly the five keys, each once, non-empty strings, a list of
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
    texts = [json.dumps(dataclasses.asdict(problem), ensure_ascii=False, default=repr) + "\n" for problem in problems]
    lines = [text.encode("utf-8", "surrogatepass") for text in texts]  # half a surrogate pair: refused by _parse
    _parse(lines, path, "correct this problem, nothing was written")
    write_atomically(path, b"".join(lines))


def _canonical(answer: str) -> str:
    if answer != (canonical := canonical_answer(answer)):
        raise ValueError(f"expected a canonical numeric string, {canonical[:80] if canonical else 'one number'}")
    return answer


_NotBlank = Annotated[str, Field(pattern=r"\S")]


class _Row(BaseModel, strict=True, extra="forbid", regex_engine="python-re"):
    id: _NotBlank
    question: _NotBlank
    steps: tuple[str, ...]
    answer: Annotated[str, AfterValidator(_canonical)]
    source: _NotBlank


def _parse(lines: list[bytes], path: Path, remedy: str) -> list[Problem]:
    if not lines:
        raise ValueError(f"{path}: got no problem at all, expected at least one line: fetch or make the file again")
    problems: dict[str, Problem] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            parse_json(line)
            problem = Problem(**dict(_Row.model_validate_json(line)))
        except ValidationError as error:
            fault = error.errors()[0]
            got = f"{'.'.join(map(str, fault['loc'])) or 'line'} = {repr(fault['input'])[:80]}"
            raise ValueError(f"{where}: got {got}, expected a problem ({fault['msg']}): {remedy}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}, expected a problem as one JSON object: {remedy}") from None
        if problem.id in problems:
            first = list(problems).index(problem.id) + 1
            raise ValueError(
                f"{where}: got id {problem.id!r} again (first on line {first}), expected another: {remedy}"
            )
        problems[problem.id] = problem
    return list(problems.values())
