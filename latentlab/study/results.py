"""Results: one JSON per notebook. Figures made from them: figures.py; tables: tables.py.

A result is `<reports>/<preset>/<name>.json`:

    {"schema_version": 1, "name": "01_deterministic_collapse", "preset": "tiny",
     "question": "...", "headline": "...",
     "parameters": {...},
     "metrics": {"none": {...}, "real": {"skipped": "no Hub", "last_measured": {...}}},
     "arms": [{"name": "shared", "seed": 0, "n": 4000, "correct": 3200, "interval": [0.787, 0.812],
               "difference": {"points": 4.1, "low": 3.2, "high": 5.0, "discordant": 310},
               "rollouts": ..., "seconds": ...}],
     "environment": {...}, "commit": "<sha>[-dirty]", "started": "<UTC>", "seconds": 61.2}

`interval` and `accuracy` are fractions, `difference` is in percentage points. Every key of an arm but `name` may be
missing. `<reports>` is LATENTLAB_REPORTS, else `reports` at the repository root.
"""

import json
import math
import os
import re
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from latentlab.runtime.environment import commit, repository_root
from latentlab.runtime.environment import environment as measured_environment
from latentlab.runtime.files import write_atomically

SCHEMA_VERSION = 1


# ---------------------------------------------------------------- where things lie


def reports_folder() -> Path:
    """The folder results are written to: LATENTLAB_REPORTS, else `reports` at the repository root."""
    chosen = os.environ.get("LATENTLAB_REPORTS")
    return Path(chosen) if chosen else repository_root() / "reports"


def result_path(name: str, preset: str, suffix: str, directory=None) -> Path:
    """`<reports>/<preset>/<name><suffix>`; ValueError for a name or preset that is no plain word."""
    for label, text in (("name", name), ("preset", preset)):
        if not re.fullmatch(r"\w[\w-]*", str(text), re.ASCII):
            raise ValueError(f"{label}: got {text!r}, expected letters, digits, _ and -; it becomes a file name")
    return Path(directory or reports_folder()) / preset / f"{name}{suffix}"


# ---------------------------------------------------------------- one result


def write_result(
    name: str, *, preset: str, parameters: dict, metrics: dict, arms=(), started: float | str, seconds: float,
    question: str = "", headline: str = "", environment: dict | None = None, directory=None,
) -> Path:  # fmt: skip
    """Write `<reports>/<preset>/<name>.json` atomically and return its path.

    `metrics` may hold numbers, arrays and tensors. A section that could not run is `{"skipped": reason}`: the last
    measured one is then kept from the earlier file under "last_measured", with its date and commit.
    `started` is `time.time()` or ISO text, `seconds` the duration; `headline` one sentence with the result's numbers,
    `question` what the notebook asks: both appear in the README. Raises ValueError on NaN, inf and bad names.
    """
    path = result_path(name, preset, ".json", directory)
    if not isinstance(started, str):
        started = datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds")
    result = {
        "schema_version": SCHEMA_VERSION, "name": name, "preset": preset, "question": question, "headline": headline,
        "parameters": parameters, "metrics": metrics, "arms": list(arms),
        "environment": environment or measured_environment(), "commit": commit(), "started": started,
        "seconds": seconds,
    }  # fmt: skip
    result = json.loads(json.dumps(result, default=lambda value: value.tolist()))  # arrays and tensors become lists
    for where, value in leaves(result):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'{name}: {where} is {value}, expected a finite number or a section {{"skipped": reason}}')
    try:
        earlier = read_result(name, preset, directory)
    except (FileNotFoundError, ValueError):
        earlier = {}
    stamp = {key: earlier.get(key) for key in ("started", "commit")}
    result["metrics"] = _keep_measured(result["metrics"], earlier.get("metrics"), stamp)
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
    """A result by name, from `directory`, else from the result folder, else from the committed `reports`.

    Raises FileNotFoundError when there is none and ValueError when the file is no result, each in one line.
    """
    folders = [directory] if directory else [reports_folder(), repository_root() / "reports"]
    for folder in folders:
        path = result_path(name, preset, ".json", folder)
        if path.is_file():
            result = load_result(path)
            if result is None:
                raise ValueError(f"{path}: expected a result of schema {SCHEMA_VERSION}; delete it and run it again")
            return result
    raise FileNotFoundError(f"no result {preset}/{name}.json; run `latentlab study --preset {preset}` first")


def find_result(name: str, preset: str) -> dict | None:
    """A result with the `folder` it lies in, from the result folder or the committed `reports`; None without one."""
    try:
        result = read_result(name, preset)
    except FileNotFoundError:
        return None
    folders = (reports_folder() / preset, repository_root() / "reports" / preset)
    return {**result, "folder": next(folder for folder in folders if (folder / f"{name}.json").is_file())}


def load_result(path: Path) -> dict | None:
    """The result in a file, or None if it is not one of this schema."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(result, dict) or result.get("schema_version") != SCHEMA_VERSION:
        return None
    shape = {"name": str, "preset": str, "parameters": dict, "metrics": dict, "arms": list, "environment": dict}
    good = all(isinstance(result.get(key), kind) for key, kind in shape.items())
    good = good and all(isinstance(result.get(key, ""), str) for key in ("question", "headline"))
    return result if good and _is_number(result.get("seconds", 0)) and all(map(_is_arm, result["arms"])) else None


def _is_arm(arm) -> bool:
    """Has a row of `arms` the types that tables and figures count on?"""
    if not isinstance(arm, dict) or not isinstance(arm.get("name"), str) or isinstance(arm.get("seed"), (dict, list)):
        return False
    interval, difference = arm.get("interval") or [0, 0], arm.get("difference") or {}
    if not isinstance(interval, (dict, list)) or not isinstance(difference, dict):
        return False
    bounds = list(interval.values()) if isinstance(interval, dict) else interval
    numbers = [arm.get(key, 0) for key in ("n", "correct", "accuracy", "rollouts")]
    numbers += [difference.get(key, 0) for key in ("points", "low", "high")]
    return len(bounds) == 2 and all(map(_is_number, [*bounds, *numbers]))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def write_outcomes(path: Path, outcomes: dict) -> Path:
    """Right or wrong on the same n problems, {run: [n] of 0/1}, as `path`, an .npz of packed bits."""
    import numpy as np

    packed, n = BytesIO(), len(next(iter(outcomes.values())))
    np.savez_compressed(packed, n=n, **{name: np.packbits(x.astype(bool)) for name, x in outcomes.items()})
    return write_atomically(path, packed.getvalue())


def read_outcomes(path: Path) -> dict:
    """What `write_outcomes` wrote."""
    import numpy as np

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
