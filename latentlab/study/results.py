"""Result files: one JSON per notebook or run, read by figures.py and tables.py.

A result is `<reports>/<preset>/<name>.json`:

    {"schema_version": 1, "name": "01_deterministic_collapse", "preset": "tiny",
     "question": "...", "headline": "...", "parameters": {...},
     "metrics": {"none": {...}, "real": {"skipped": "no Hub", "last_measured": {...}}},
     "arms": [{"name": "shared", "seed": 0, "n": 4000, "correct": 3200, "interval": [0.78, 0.81],
               "difference": {"points": 4.1, "low": 3.2, "high": 5.0}, "rollouts": ..., ...}],
     "environment": {...}, "commit": "<sha>[-dirty]", "started": "<UTC>", "seconds": 61.2}

`interval` and `accuracy` are fractions, `difference` is in percentage points. Every key of an arm
but `name` may be missing.

`<reports>` is the user's own folder, ignored by git; `reports/published` holds the committed
results that README and docs quote. Readers prefer the user's own result to the published one.
"""

import json
import math
import os
import re
from contextlib import suppress
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal, NotRequired, Required

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from latentlab.runtime import environment as runtime
from latentlab.runtime.files import write_atomically

Number = Annotated[float, Field(allow_inf_nan=False)]


class Arm(TypedDict, total=False):
    """One row of `arms`: the keys that tables and figures use."""

    name: Required[str]
    seed: int | float | str | None
    n: Number
    correct: Number
    accuracy: Number
    rollouts: Number
    interval: Annotated[list[Number], Field(min_length=2, max_length=2)] | None
    difference: dict[str, Number] | None


class Result(TypedDict):
    """The keys that every result has, and the optional ones that tables use."""

    schema_version: Literal[1]
    name: str
    preset: str
    parameters: dict
    metrics: dict
    arms: list[Arm]
    environment: dict
    question: NotRequired[str]
    headline: NotRequired[str]
    seconds: NotRequired[Number]


def reports_folder() -> Path:
    """The folder of the user's own results: LATENTLAB_REPORTS, else `reports` in the repository."""
    return Path(os.environ.get("LATENTLAB_REPORTS") or runtime.repository_root() / "reports")


def published_folder() -> Path:
    """The folder of the committed results, `reports/published`."""
    return runtime.repository_root() / "reports" / "published"


def result_path(name: str, preset: str, suffix: str, directory=None) -> Path:
    """`<reports>/<preset>/<name><suffix>`; ValueError unless name and preset are plain words."""
    for label, text in (("name", name), ("preset", preset)):
        if not re.fullmatch(r"\w[\w-]*", str(text), re.ASCII):
            raise ValueError(f"{label}: got {text!r}, expected letters, digits, _ and -; it becomes a file name")
    return Path(directory or reports_folder()) / preset / f"{name}{suffix}"


def write_result(
    name: str,
    *,
    preset: str,
    parameters: dict,
    metrics: dict,
    arms=(),
    started: float | str,
    seconds: float,
    question: str = "",
    headline: str = "",
    environment: dict | None = None,
    directory=None,
) -> Path:
    """Write `<reports>/<preset>/<name>.json` atomically and return its path.

    Args:
        metrics: numbers, arrays and tensors. A section that could not run is `{"skipped": reason}`;
            its last measured version is then kept from the earlier file as "last_measured".
        started, seconds: start, as `time.time()` or ISO text, and duration.
        question, headline: what is asked, and the answer in one sentence with its main numbers.

    Raises ValueError for a NaN or inf, or a name that is no plain word; the earlier file stays.
    """
    path = result_path(name, preset, ".json", directory)
    iso = started if isinstance(started, str) else datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds")
    result = {"schema_version": 1, "name": name, "preset": preset, "question": question, "headline": headline}
    result |= {"parameters": parameters, "metrics": metrics, "arms": list(arms)}
    result |= {"environment": environment or runtime.environment()}
    result |= {"commit": runtime.commit(), "started": iso, "seconds": seconds}
    result = json.loads(json.dumps(result, default=lambda array: array.tolist()))
    for where, value in leaves(result):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'{name}: {where} is {value}, expected a finite number or a section {{"skipped": reason}}')
    with suppress(FileNotFoundError, ValueError):
        earlier = read_result(name, preset, directory)
        stamp = {key: earlier.get(key) for key in ("started", "commit")}
        result["metrics"] = _keep_measured(result["metrics"], earlier["metrics"], stamp)
    return write_atomically(path, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())


def _keep_measured(new, old, stamp: dict):
    """`new` with the last measured version of each skipped section, taken from `old`."""
    if not isinstance(new, dict):
        return new
    old = old if isinstance(old, dict) else {}
    if "skipped" not in new:
        return {key: _keep_measured(value, old.get(key), stamp) for key, value in new.items()}
    last = old.get("last_measured") if "skipped" in old else {**stamp, "section": old} if old else None
    return {**new, "last_measured": last} if last else new


def read_result(name: str, preset: str, directory=None) -> dict:
    """A result from `directory`, else the user's own, else the published one; `folder`: its place.

    Raises FileNotFoundError if there is no such file, ValueError if the file is not a result.
    """
    for folder in [directory] if directory else [reports_folder(), published_folder()]:
        path = result_path(name, preset, ".json", folder)
        if path.is_file():
            if result := load_result(path):
                return {**result, "folder": path.parent}
            raise ValueError(f"{path}: expected a result of schema 1; delete it and run it again")
    raise FileNotFoundError(f"no result {preset}/{name}.json; run `latentlab study --preset {preset}` first")


def find_result(name: str, preset: str) -> dict | None:
    """`read_result`, or None where there is no such result."""
    try:
        return read_result(name, preset)
    except FileNotFoundError:
        return None


def load_result(path: Path) -> dict | None:
    """The result in a file; None if there is no file or it is not a result of this schema."""
    try:
        result = json.loads(path.read_bytes())
        TypeAdapter(Result).validate_python(result, strict=True)
        return result
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def write_outcomes(path: Path, outcomes: dict) -> Path:
    """Write {run: [n] of 0/1}, right or wrong on the same n problems, as an .npz of packed bits."""
    packed, file = {name: np.packbits(x.astype(bool)) for name, x in outcomes.items()}, BytesIO()
    np.savez_compressed(file, n=len(next(iter(outcomes.values()))), **packed)  # type: ignore[arg-type]  # its flags
    return write_atomically(path, file.getvalue())


def read_outcomes(path: Path) -> dict:
    """The outcomes that `write_outcomes` wrote."""
    with np.load(path) as packed:
        n = int(packed["n"])
        return {name: np.unpackbits(packed[name])[:n] for name in packed.files if name != "n"}


def leaves(value, where: str = ""):
    """Yield (dotted path, value) of every scalar in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value
