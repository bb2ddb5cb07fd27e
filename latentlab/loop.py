"""What both training loops share: a run folder with config, metrics and checkpoints, and data order as a function.

    runs/NAME/config.json      the whole configuration
    runs/NAME/metrics.jsonl    one JSON object per line, written as it happens
    runs/NAME/state.pt         everything needed to go on: weights, optimizer, position, metrics offset
    runs/NAME/best/            the checkpoint with the best validation accuracy, as plain transformers loads it

Randomness is a function of (seed, step) everywhere, so a resumed run needs no generator state. A checkpoint is written
beside its place and then renamed, so there is never half a one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path

import torch

from latentlab.config import Config, to_dict


class Run:
    """A run folder of `loop`, "curriculum" or "grpo". `resume` goes on from state.pt, else a used folder is refused."""

    def __init__(self, folder: str | Path, config: Config, *, loop: str, resume: bool = False):
        self.folder, self.loop = Path(folder), loop
        self.started = time.time()
        self.state = None
        stored = self.folder / "config.json"
        if stored.exists() and not resume:
            raise FileExistsError(
                f"run folder: got {folder}, which holds a run already; pass --resume, or another --out"
            )
        if stored.exists():
            _same_config(json.loads(stored.read_text()), to_dict(config))
            if (self.folder / "state.pt").exists():
                self.state = _read_state(self.folder / "state.pt", loop)
            if (self.folder / "best.old").exists() and not (self.folder / "best").exists():
                (self.folder / "best.old").rename(self.folder / "best")  # killed between the two renames of save_best
        self.folder.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(to_dict(config), indent=1) + "\n")
        self.metrics = self.folder / "metrics.jsonl"
        self.metrics.touch()
        os.truncate(self.metrics, self.state["metrics_offset"] if self.state else 0)

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl, with the seconds since this process began. Raises on a NaN."""
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(
                    f"{key}: got {value} at step {record.get('step')}, expected a finite number; the last good "
                    f"checkpoint is kept in {self.folder}; lower the learning rate"
                )
        record = {**record, "seconds": round(time.time() - self.started, 3)}
        with open(self.metrics, "ab") as lines:
            lines.write((json.dumps(record) + "\n").encode())

    def save(self, **state) -> None:
        """Write state.pt: tensors, state dicts and plain numbers."""
        temporary = self.folder / "state.pt.partial"
        torch.save({**state, "loop": self.loop, "metrics_offset": self.metrics.stat().st_size}, temporary)
        os.replace(temporary, self.folder / "state.pt")

    def save_best(self, model) -> None:
        """Write best/, whole or not at all."""
        temporary, old, best = (self.folder / name for name in ("best.partial", "best.old", "best"))
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        model.save_pretrained(temporary)
        if best.exists():
            best.rename(old)
        temporary.rename(best)
        shutil.rmtree(old, ignore_errors=True)

    def load_best(self, model) -> None:
        """Give `model` the weights of best/."""
        model.lm.load_state_dict(type(model).from_pretrained(self.folder / "best").lm.state_dict())


def _read_state(path: Path, loop: str) -> dict:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # cut off, foreign, or a pickle that weights_only refuses: torch raises many kinds
        raise ValueError(
            f"resume: could not read {path} ({type(error).__name__}), expected a checkpoint of this run; "
            "delete it to start this run again, or use another --out"
        ) from error
    if state.get("loop", loop) != loop:
        raise ValueError(
            f"resume: got a run of loop {state['loop']} in {path.parent}, expected {loop}; use another --out"
        )
    return state


def _same_config(stored: dict, asked: dict, where: str = "") -> None:
    for key in sorted(set(stored) | set(asked)):
        a, b = stored.get(key), asked.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _same_config(a, b, f"{where}{key}.")
        elif a != b:
            raise ValueError(
                f"resume: got {where}{key}={b!r}, expected {a!r} as in the run's config.json; use another --out"
            )


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def batch_indices(total: int, size: int, *, seed: int, step: int) -> list[int]:
    """Which of `total` items make batch `step`: epochs of fresh permutations, a function of (seed, step) alone."""
    order: dict[int, list[int]] = {}
    picked = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, total)
        if epoch not in order:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order[epoch] = torch.randperm(total, generator=generator).tolist()
        picked.append(order[epoch][place])
    return picked


def warmup_cosine(step: int, *, total: int, warmup: int, final: float) -> float:
    """The share of the peak learning rate at `step`: linear warm-up, then a cosine down to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
