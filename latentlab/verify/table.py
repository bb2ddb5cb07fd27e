"""`latentlab verify`: one line per property, on this machine, this device and this precision.

The exact rows (proofs.py) always run in float64 on the CPU. The others (checks.py) ask whether the engine, on `device`
in `dtype`, equals the plain definition of a latent rollout: does *my* GPU and precision replay exactly?
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from latentlab.runtime.files import write_atomically
from latentlab.theory.enumeration import example
from latentlab.theory.proofs import PROOFS, Property
from latentlab.verify.engine import BOUNDS, CHECKS, Engine

NAMES = (*PROOFS, *CHECKS)


def run_verify(device: str = "cpu", dtype: str = "float64", only: Iterable[str] | None = None) -> list[Property]:
    """All properties, or those named in `only`, in the order of NAMES. A property that cannot run is a red row.

    Raises ValueError for an unknown dtype, device or name.
    """
    names = NAMES if only is None else tuple(only)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"verify: got the property {unknown[0]!r}, expected some of {', '.join(NAMES)}")
    if dtype not in BOUNDS:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(BOUNDS)}")
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, expected cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device: got cuda, expected a machine with a CUDA device; use --device cpu")
    rows, x, e = [], None, None
    for name in NAMES:
        if name not in names:
            continue
        try:
            if name in PROOFS:
                x = x or example()
                rows.append(PROOFS[name](x))
            else:
                e = e or Engine(device, dtype)
                rows.append(CHECKS[name](e))
        except Exception as error:  # whatever breaks, the table is still printed, with this row red
            rows.append(Property(name, math.nan, 0.0, False, f"{type(error).__name__}: {error}"))
    return rows


def table(rows: list[Property]) -> str:
    """The rows as text: name, value, relation, bound, ok, note."""
    lines = [f"{'property':<18} {'value':>9}     {'bound':<8} ok   "]
    for p in rows:
        relation = "≥" if p.at_least else "≤"
        lines.append(f"{p.name:<18} {p.value:>9.2g}  {relation}  {p.bound:<8.2g} {'yes' if p.ok else 'NO':<4} {p.note}")
    return "\n".join(lines)


def report(rows: list[Property], device: str, dtype: str) -> dict:
    """What `--json` writes."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "properties": [{**vars(p), "value": p.value if math.isfinite(p.value) else None} for p in rows],
        "device": device,
        "dtype": dtype,
        "environment": {
            "device_name": name,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
    }


def main(device: str = "cpu", dtype: str = "float32", json_path: str | Path | None = None) -> int:
    """Print the table, write the JSON, and return the exit code: 1 if a property fails."""
    rows = run_verify(device, dtype)
    print(table(rows))
    failed = [p.name for p in rows if not p.ok]
    summary = f"{len(rows) - len(failed)} of {len(rows)} properties hold on {device} in {dtype}"
    print("; ".join([summary, *(f"{name} fails" for name in failed)]))
    if json_path:
        write_atomically(Path(json_path), (json.dumps(report(rows, device, dtype), indent=1) + "\n").encode())
    return 1 if failed else 0
