"""Files that are whole or as they were before, and what a checkpoint must agree on with the run that goes on from it.

write_whole(path, write)      a file or folder made beside its place, flushed to disk, renamed
read_state(path, identity)    a checkpoint of this run and no other: ValueError that names what differs
expect_space(folder, bytes)   before a run: will the disk hold its checkpoints?
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers

from latentlab.runtime import distributed
from latentlab.runtime.environment import commit

SLACK = 16 * 2**20  # bytes of a run folder that are no weights: tokenizer, metrics
REMEDIES = {
    "threads": "pass --threads {}: another number adds in another order",
    "init_from": "name the checkpoint that the run began with",
    "problems": "restore the data that the run began with",
}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file or folder beside `path`, flush it to disk, rename it: whole, or as it was before.

    The former folder stays as `<name>.old`. Raises OSError with one line.
    """
    partial, old = (path.with_name(path.name + end) for end in (".partial", ".old"))
    try:
        _remove(partial)
        write(partial)
        for part in (partial, *partial.rglob("*")):
            flush(part)
        if path.is_dir():  # a folder cannot be replaced in one call
            shutil.rmtree(path) if old.exists() else path.rename(old)
        os.replace(partial, path)
        flush(path.parent)
    except Exception as error:  # a full disk is an OSError, a RuntimeError of torch or a SafetensorError
        _remove(partial)
        raise OSError(not_written(path, error)) from error


def not_written(path: Path, error: Exception) -> str:
    """The line for a file that could not be written."""
    return (
        f"run: could not write {path} ({_first_line(error)}); the last checkpoint is kept: free some disk space, then "
        "the same command with --resume goes on"
    )


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # no such call there
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def settle_best(folder: Path, step: int | None) -> None:
    """After a kill between best/ and state.pt: of best/ and best.old/ keep the one made at `step`, as state.pt says."""
    best, old = folder / "best", folder / "best.old"
    if not old.exists():
        return
    try:
        known = json.loads((best / "validation.json").read_bytes())["step"] == step
    except (OSError, ValueError):
        known = False
    shutil.rmtree(old if known else best, ignore_errors=True)
    if not known:
        old.rename(best)


def expect_space(folder: Path, weights: int) -> None:
    """OSError if the disk cannot hold what checkpoints of `weights` bytes will need beside what is there."""
    needed = 9 * weights + SLACK  # weights, two moments, best: each twice while it is written; the former best
    held = sum(path.stat().st_size for path in (folder / "state.pt", *folder.glob("best/*")) if path.is_file())
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free + held < needed:
        raise OSError(
            f"run folder: got {free / 2**30:.2f} GiB free at {disk}, expected {(needed - held) / 2**30:.2f} for the "
            "checkpoints and their copies while they are written; free some, or use another --out"
        )


def identity(loop: str, config: dict, model, problems: Iterable) -> dict:
    """What must be the same when a run goes on: each a name that an error can tell."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(repr(problem).encode())
    weights = {key: value for key, value in model.provenance.items() if key != "name"}
    threads = torch.get_num_threads()
    return {**config, "loop": loop, "threads": threads, "init_from": weights, "problems": digest.hexdigest()[:16]}


def made_with() -> dict:
    """What may differ when a run goes on, and is then said: the code and its libraries."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "processes": distributed.size(),
    }


def read_config(path: Path) -> dict:
    """A run's config.json. Raises ValueError with one line."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(unusable(path, error)) from error


def read_state(path: Path, asked: dict) -> dict:
    """state.pt of a run with the same `identity`. Raises ValueError with one line."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch does not look at the checksums that it writes
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign files, which are refused in one line
            state = dict(torch.load(path, weights_only=True, map_location="cpu"))
        expect_same(state["identity"], asked, "the checkpoint")
        before, now = state["made_with"], made_with()
        changed = [f"{key} {before[key]} (now {now[key]})" for key in now if before[key] != now[key]]
    except Drift:
        raise
    except Exception as error:  # cut off, foreign, or a pickle that weights_only refuses: torch raises many kinds
        raise ValueError(unusable(path, error)) from error
    if changed and distributed.rank() == 0:
        print(f"resume: the checkpoint was made with {', '.join(changed)}; last digits may differ", file=sys.stderr)
    return state


class Drift(ValueError):
    """A checkpoint and a command that do not belong together."""


def expect_same(stored: dict, asked: dict, source: str, where: str = "") -> None:
    """Raise Drift that names the first field that differs."""
    for key in sorted(set(stored) | set(asked)):
        a, b = stored.get(key), asked.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            expect_same(a, b, source, f"{where}{key}.")
        elif a != b:
            name = f"{where}{key}"
            remedy = REMEDIES.get(name.split(".")[0], "").format(a)
            remedy = f"{remedy}; or use another --out" if remedy else "use another --out"
            raise Drift(f"resume: got {name}={b!r}, expected {a!r} as in {source}; {remedy}")


def unusable(path: Path, error: Exception) -> str:
    """The line for a file that cannot be gone on from."""
    return (
        f"resume: could not read {path} ({type(error).__name__}), expected it as this run wrote it; restore it, or "
        "start again with another --out"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------- numbers
def expect_finite(values: dict, step: int | None, remedy: str = "lower the learning rate, with another --out") -> None:
    """Raise FloatingPointError with one line if a float of `values` is NaN or infinite."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FloatingPointError(
                f"{name}: got {value} at step {step}, expected a finite number; the last good checkpoint is kept; "
                f"{remedy}"
            )


def expect_finite_tensors(tree, step: int | None, name: str) -> None:
    """The same for every tensor in nested dicts."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        expect_finite_tensors(value, step, f"{name}.{key}")
    if isinstance(tree, torch.Tensor) and not torch.isfinite(tree).all():
        expect_finite({name: math.nan}, step)
