"""What both training loops share: a run folder with one checkpoint for everything, and functions of the step.

    runs/NAME/config.json      the whole configuration
    runs/NAME/metrics.jsonl    one JSON object per line, written as it happens; the same whether a run was killed or not
    runs/NAME/timing.jsonl     step and seconds since the run was opened, from 0 for every process that worked on it
    runs/NAME/state.pt         all that is needed to go on (Run.save): 12 bytes a weight in float32
    runs/NAME/best/            the weights with the best validation accuracy, as plain transformers loads them: 4 bytes

state.pt is written at every validation, every `checkpoint_minutes` and when the run is asked to stop. Randomness is a
function of (seed, step) everywhere, bfloat16 by autocast needs no loss scaler, and learning rate, data order and seeds
follow from the step: the step is all of their state.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from latentlab.config import Config, to_dict
from latentlab.pretrained.loading import load_model, save_model
from latentlab.runtime import distributed
from latentlab.training import checkpoint
from latentlab.training.checkpoint import expect_finite, expect_finite_tensors, write_whole


class Stopped(RuntimeError):
    """A run ended before its last step because it was asked to; its state is saved."""

    exit_code = 75  # EX_TEMPFAIL: try again


@dataclass
class Progress:
    """Where a run stands, beside weights and optimizer."""

    step: int = 0  # the next one
    stages: dict[str, float] = field(default_factory=dict)  # curriculum: the best validation accuracy of each stage
    best: float = -1.0  # validation accuracy of best/
    best_step: int | None = None
    rollouts: int = 0  # grpo: how many were made, whether an update took them or not


class Run:
    """A run folder of `loop`, "curriculum" or "grpo". `resume` goes on from state.pt, else a used folder is refused.

    As a context it catches SIGTERM and SIGINT: the step is finished and saved, then `Stopped` is raised; so it is when
    `max_minutes` (0: no limit) have passed. A second SIGINT aborts at once. Raises FileExistsError, ValueError or
    OSError before anything is written: a used folder, a checkpoint of another run, a disk too small. Of several
    processes all read and only rank 0 writes: the folder must be one that every machine sees.
    """

    def __init__(
        self, folder: str | Path, config: Config, model, *, loop: str, problems: Iterable = (), resume: bool = False,
        max_minutes: float = 0.0, checkpoint_minutes: float = 10.0,
    ):  # fmt: skip
        self.folder, self.metrics, self.timing = (Path(folder, n) for n in ("", "metrics.jsonl", "timing.jsonl"))
        self.max_minutes, self.checkpoint_minutes = max_minutes, checkpoint_minutes
        self.started = self.saved = time.monotonic()
        self.asked, self.progress, self.state = "", Progress(), None
        self.identity = checkpoint.identity(loop, to_dict(config), model, problems)
        self.made_with = checkpoint.made_with()
        stored, state = self.folder / "config.json", self.folder / "state.pt"

        def look() -> None:
            if stored.exists() and not resume:
                raise FileExistsError(
                    f"run folder: got {folder}, which holds a run already; pass --resume, or another --out"
                )
            if stored.exists():
                checkpoint.expect_same(checkpoint.read_config(stored), to_dict(config), "the run's config.json")
                self.state = self._read(state) if state.exists() else None

        distributed.gather(look)  # all have looked before rank 0 writes
        distributed.check_same(**self.identity, checkpoint=self.progress.step)
        self.new = self.state is None
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        distributed.on_main(lambda: self._open(stored, to_dict(config), weights))

    def _read(self, path: Path) -> dict:
        state = checkpoint.read_state(path, self.identity)
        try:
            self.progress, counted = Progress(**state["progress"]), int(state["metrics_offset"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(checkpoint.unusable(path, error)) from error
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        if size < counted:
            raise ValueError(
                f"resume: got {size} bytes of {self.metrics}, expected the {counted} that the checkpoint counted; "
                "restore it, or use another --out"
            )
        return state

    def _open(self, stored: Path, config: dict, weights: int) -> None:
        """Make the folder, or mend it: drop what was written after the checkpoint, and a line that a kill cut off."""
        checkpoint.expect_space(self.folder, weights)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(stored, lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))
        checkpoint.settle_best(self.folder, self.progress.best_step)
        self.metrics.touch()
        self.timing.touch()
        os.truncate(self.metrics, 0 if self.new else self.state["metrics_offset"])
        os.truncate(self.timing, self.timing.read_bytes().rfind(b"\n") + 1)
        self._append(self.timing, {"step": self.progress.step - 1, "seconds": 0.0})  # here a process begins

    def restore(self, model, optimizer=None) -> None:
        """Give `model` and `optimizer` what state.pt holds, once; a new run's stay as they are."""
        if self.state is None:
            return
        try:
            model.lm.load_state_dict(self.state["model"])
            if optimizer is not None:
                optimizer.load_state_dict(self.state["optimizer"])
            torch.set_rng_state(self.state["rng"])
        except Exception as error:  # not the tensors that this model has
            raise ValueError(checkpoint.unusable(self.folder / "state.pt", error)) from error
        self.state = None

    def end_step(self, model, optimizer, record: dict, *, last: bool = False, keep_best: bool = True) -> None:
        """Log `record`, whose step is done; save what is due; raise `Stopped` if the run was asked to stop."""
        self.progress.step = record["step"] + 1
        accuracy = record.get("validation_accuracy")
        best = accuracy is not None and keep_best and accuracy > self.progress.best
        if best:
            self.progress.best, self.progress.best_step = accuracy, record["step"]
        stop = max(distributed.gather(lambda: self.stop_reason(last)))  # of one process: of all, at the same step

        def write() -> None:
            self.log(record)
            if best:
                self.save_best(model, accuracy, record["step"])
            if accuracy is not None or stop or time.monotonic() - self.saved >= 60 * self.checkpoint_minutes:
                self.save(model, optimizer)

        distributed.on_main(write)
        if stop:
            where = f"after step {record['step']}" if record["step"] >= 0 else "before the first step"
            raise Stopped(
                f"stopped by {stop} {where}, everything is saved in {self.folder}; the same command with --resume "
                "goes on"
            )

    def stop_reason(self, last: bool = False) -> str:
        """What asked this run to stop: the name of a signal, or the time limit; "" if nothing did.

        After the last step a signal still counts: its sender means what would come next, too.
        """
        over = not last and self.max_minutes and time.monotonic() - self.started >= 60 * self.max_minutes
        return self.asked or (f"--max-minutes {self.max_minutes:g}" if over else "")

    def log(self, record: dict) -> None:
        """Append a line to metrics.jsonl, and its seconds to timing.jsonl. Raises FloatingPointError on a NaN."""
        expect_finite(record, record["step"])
        timing = {"step": record["step"], "seconds": round(time.monotonic() - self.started, 3)}
        self._append(self.metrics, record)
        self._append(self.timing, timing)

    def _append(self, path: Path, line: dict) -> None:
        try:
            with open(path, "ab") as lines:
                lines.write((json.dumps(line) + "\n").encode())
        except OSError as error:
            raise OSError(checkpoint.not_written(path, error)) from error

    def save(self, model, optimizer) -> None:
        """Write state.pt: weights, optimizer, progress, and what the run is, to be compared when it goes on."""
        state = {"model": model.lm.state_dict(), "optimizer": optimizer.state_dict()}
        expect_finite_tensors(state["model"], self.progress.step - 1, "weights")
        expect_finite_tensors(state["optimizer"]["state"], self.progress.step - 1, "optimizer")
        checkpoint.flush(self.metrics)  # before the state that counts on its lines
        state |= {
            "progress": vars(self.progress), "metrics_offset": self.metrics.stat().st_size,
            "rng": torch.get_rng_state(),  # the library draws nothing from it; a reward function may
            "identity": self.identity, "made_with": self.made_with,
        }  # fmt: skip
        write_whole(self.folder / "state.pt", lambda path: torch.save(state, path))
        shutil.rmtree(self.folder / "best.old", ignore_errors=True)
        self.saved = time.monotonic()

    def save_best(self, model, accuracy: float, step: int) -> None:
        """Write best/, and which it is. The former one stays in best.old/ until state.pt knows of the new one."""
        expect_finite_tensors(model.lm.state_dict(), step, "weights")

        def write(path: Path) -> None:
            save_model(model, path)
            (path / "validation.json").write_text(json.dumps({"step": step, "validation_accuracy": accuracy}) + "\n")

        write_whole(self.folder / "best", write)

    def load_best(self, model) -> None:
        """Give `model` the weights of best/."""
        model.lm.load_state_dict(load_model(self.folder / "best").lm.state_dict())

    def __enter__(self) -> Run:
        main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
        names = ("SIGINT", "SIGTERM", "SIGUSR2")  # the last from SLURM, before a job's time is up; not on Windows
        numbers = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
        self._handlers = {n: signal.signal(n, self._ask) for n in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if name == self.asked == "SIGINT":
            raise KeyboardInterrupt
        self.asked = name
        if distributed.rank() == 0:
            print(f"{name}: finishing the step, then saving; a second SIGINT aborts at once", file=sys.stderr)


def update(model, optimizer: torch.optim.Optimizer, stats: dict, *, step: int, max_grad_norm: float) -> dict:
    """One step of the optimizer on `.grad`, clipped before and cleared after: `stats` and the norm before clipping.

    Gradients of several processes are summed first, so that all take the same step. Raises FloatingPointError before
    any weight moves if the norm or a number of `stats` is not finite.
    """
    distributed.sum_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    stats = {**stats, "grad_norm": norm}
    expect_finite(stats, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return stats


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; a last one that a kill cut off is left out."""
    return _read_lines(Path(folder) / "metrics.jsonl")


def seconds_spent(folder: str | Path) -> float:
    """Seconds that all processes of a run took, as far as they logged: each counts from 0."""
    timing = Path(folder) / "timing.jsonl"
    clock = [line["seconds"] for line in _read_lines(timing)] if timing.exists() else []
    return sum(now for now, after in zip(clock, [*clock[1:], 0.0], strict=False) if after < now)


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().rpartition(b"\n")[0].splitlines()]


def progress_bar(*arguments, **settings) -> tqdm:
    """tqdm, of several processes on rank 0 alone; TQDM_DISABLE=1 switches it off."""
    return tqdm(*arguments, leave=False, **settings, **({"disable": True} if distributed.rank() else {}))


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
