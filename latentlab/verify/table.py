"""`latentlab verify`: one row per property, on this machine, this device and in this precision.

The exact rows (theory/proofs.py) always run in float64 on the CPU. The others (engine.py) check on
`device` in `dtype` that the engine equals the plain definition of a latent rollout and replays.
Rows of a checkpoint (`latentlab verify CHECKPOINT`) come first.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from latentlab.pretrained.loading import load_model
from latentlab.pretrained.selfcheck import ANSWER, THOUGHTS, compare
from latentlab.runtime.distributed import select_device
from latentlab.runtime.environment import environment
from latentlab.runtime.files import write_atomically
from latentlab.theory.enumeration import example
from latentlab.theory.proofs import PROOFS, Property
from latentlab.verify.engine import BOUNDS, CHECKS, Engine

NAMES = (*PROOFS, *CHECKS)


def run_verify(device: str = "cpu", dtype: str = "float64", only: Iterable[str] | None = None) -> list[Property]:
    """All properties, or those named in `only`, in the order of NAMES; one that cannot run fails.

    Raises ValueError for an unknown dtype, device or name.
    """
    names = NAMES if only is None else tuple(only)
    if unknown := sorted(set(names) - set(NAMES)):
        raise ValueError(f"verify: got the property {unknown[0]!r}, expected some of {', '.join(NAMES)}")
    if dtype not in BOUNDS:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(BOUNDS)}")
    device = str(select_device(device))
    x, engine = cache(example), cache(lambda: Engine(device, dtype))  # each is built for the first row that needs it
    rows = []
    for name in sorted(set(names), key=NAMES.index):
        try:
            rows.append(PROOFS[name](x()) if name in PROOFS else CHECKS[name](engine()))
        except Exception as error:  # the table is still printed, with this row failed
            rows.append(Property(name, math.nan, 0.0, False, f"{type(error).__name__}: {error}"))
    return rows


def compare_checkpoint(checkpoint: str, device: str, dtype: str) -> list[Property]:
    """The engine against the own forward of a checkpoint's backbone, one row each (selfcheck.py).

    Raises what `load_model` raises; a backbone that is not supported is refused there.
    """
    model = load_model(checkpoint, num_thoughts=THOUGHTS, max_new_tokens=ANSWER)  # the comparison has its own
    kind = f"{model.lm.config.model_type} in {checkpoint}"
    gaps = compare(model.to(device=torch.device(device), dtype=getattr(torch, dtype)), full=True)
    return [Property(gap.name, gap.value, gap.bound, gap.ok, kind) for gap in gaps]


def main(device: str = "cpu", dtype: str = "float32", json_path: str | Path | None = None, checkpoint: str = "") -> int:
    """Print the table, write it as JSON, and return the exit code: 1 if a property fails."""
    rows = []
    if checkpoint:
        print(f"comparing {checkpoint} with its own forward, then the library's own checks", file=sys.stderr)
        rows = compare_checkpoint(checkpoint, device, dtype)
    rows += run_verify(device, dtype)
    print(f"{'property':<18} {'value':>9}     {'bound':<8} ok   ")
    for p in rows:
        relation, ok = "≥" if p.at_least else "≤", "yes" if p.ok else "NO"
        print(f"{p.name:<18} {p.value:>9.2g}  {relation}  {p.bound:<8.2g} {ok:<4} {p.note}")
    failed = [p.name for p in rows if not p.ok]
    summary = f"{len(rows) - len(failed)} of {len(rows)} properties hold on {device} in {dtype}"
    print("; ".join([summary, *(f"{name} fails" for name in failed)]))
    if json_path:
        properties = [{**vars(p), "value": p.value if math.isfinite(p.value) else None} for p in rows]
        found = {"device": device, "dtype": dtype, "environment": environment(device=device)}
        text = json.dumps({"properties": properties, **found}, indent=1, allow_nan=False)
        write_atomically(Path(json_path), (text + "\n").encode())
    return 1 if failed else 0
