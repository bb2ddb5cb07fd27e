"""`latentlab bench --against FOLDER`: this checkout and another one, row by row (rows.py).

All rows are timed in a process of their own, in turn there and here (A B, B A, ...), in CPU seconds
of one thread, which other load of the machine affects least. A pair gives one ratio per row; the
median of the ratios has a bootstrap interval over pairs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

import latentlab
from latentlab.bench import rows

HERE = Path(latentlab.__file__).parents[1]


def run_against(folder: Path, shape: str, pairs: int = 9) -> dict:
    """Time the pairs and print a line per row; returns the arguments of `study.results.write_result`.

    Raises ValueError, before anything is timed, if `folder` is no checkout of the project, and
    RuntimeError if a row fails in this one.
    """
    if not (folder / "latentlab" / "__init__.py").is_file():
        got = f"got {folder}, expected a checkout of this project"
        raise ValueError(f"against: {got}; make one, such as by `git worktree add FOLDER HEAD~1`")
    started, folders = time.time(), {"here": HERE, "there": folder.resolve()}
    found: dict[str, list[dict]] = {"here": [], "there": []}
    for pair in range(pairs):
        for side in ("there", "here") if pair % 2 == 0 else ("here", "there"):
            found[side].append(time_rows(folders[side], shape))
        if failed := found["here"][-1]["left_out"]:
            raise RuntimeError("bench: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
        print(f"pair {pair + 1} of {pairs}", file=sys.stderr)
    metrics, commit = compare(found["here"], found["there"]), git_commit(folder)
    for name, row in metrics["rows"].items():
        print(f"{name:<28}{row['speedup']:>6.2f} times as fast [{row['low']:.2f}, {row['high']:.2f}]")
    different, missing = (", ".join(metrics[key]) for key in ("different", "left_out"))
    headline = f"against {commit[:7]}, tokens and rewards " + (f"differ in {different}" if different else "are equal")
    headline += f"; left out: {missing}" if missing else ""
    print(headline)
    parameters = {"shape": shape, "device": "cpu", "threads": 1, "pairs": pairs, "against": commit}
    result = {"name": f"against_{shape}", "preset": "bench", "parameters": parameters, "metrics": metrics}
    question = "What does this version change, in CPU seconds?"
    return {**result, "started": started, "seconds": time.time() - started, "question": question, "headline": headline}


def time_rows(checkout: Path, shape: str) -> dict:
    """What `rows.main` prints in a process of its own that imports the library from `checkout`."""
    variables = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-P", rows.__file__, shape]  # -P: modules beside rows.py are not imported
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"against: got {last!r} from {checkout}, expected the rows of bench/rows.py; use a later commit"
        )
    return json.loads(done.stdout)


def compare(here: list[dict], there: list[dict]) -> dict[str, Any]:
    """Per row: how many times as fast this checkout is, and whether both computed the same."""
    first, other = here[0], there[0]
    metrics: dict[str, Any] = {"rows": {}, "left_out": other["left_out"], "different": []}
    for name in [name for name in first["seconds"] if name in other["seconds"]]:
        seconds = [np.array([found["seconds"][name] for found in side]) for side in (here, there)]
        ratios = seconds[1] / seconds[0]
        interval = bootstrap((ratios,), np.median, method="percentile", rng=0).confidence_interval
        row = {"speedup": float(np.median(ratios)), "low": float(interval.low), "high": float(interval.high)}
        row |= {f"seconds_{side}": float(np.median(x)) for side, x in zip(("here", "there"), seconds, strict=True)}
        ours, theirs = first["outcomes"][name], other["outcomes"][name]
        if "gradient" in ours:
            row["gradient_difference"] = abs(ours["gradient"] / theirs["gradient"] - 1)
        if ours["hash"] != theirs["hash"] or row.get("gradient_difference", 0.0) > 1e-4:
            metrics["different"].append(name)
        metrics["rows"][name] = row
    return metrics


def git_commit(folder: Path) -> str:
    """The commit of a checkout, or "unknown"."""
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
