"""The run folder that both training loops share: metrics, checkpoints, resume, stops.

    runs/NAME/config.json    the whole configuration
    runs/NAME/metrics.jsonl  one JSON object per line, as it happens; resuming leaves the same bytes
    runs/NAME/timing.jsonl   step, seconds and CPU seconds, from 0 in every process that continues the run
    runs/NAME/tensorboard/   the numbers of metrics.jsonl as TensorBoard events, if asked for
    runs/NAME/state.pt       everything that resuming needs: 12 bytes per trained weight in float32
    runs/NAME/state/         the same from a sharded model: shards as safetensors, and state.json
    runs/NAME/best/          the weights of the best validation accuracy, as transformers loads them,
                             or the LoRA adapter alone, as peft loads it

The state is written at every validation, every `checkpoint_minutes` and when the run must stop.
Randomness, learning rate and data order follow from (seed, step), and bfloat16 autocast needs no
loss scaler, so the step is all of their state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from latentlab.config import Config, to_dict
from latentlab.evaluation.accuracy import evaluate
from latentlab.model import LatentReasoner
from latentlab.pretrained import adapters
from latentlab.pretrained.loading import load_model, save_model
from latentlab.problems import Problem
from latentlab.runtime import distributed, files
from latentlab.runtime.environment import on_signals
from latentlab.training import checkpoint, sharding
from latentlab.training.checkpoint import RESTORE, Progress, expect_finite, load_trained, trained_state, writing
from latentlab.training.steps import trained
from latentlab.training.tensorboard import Events

SLACK = 16 * 2**20  # bytes of a run folder beside weights: tokenizer, metrics
FILES = ("metrics.jsonl", "timing.jsonl", "best", "best.old", "best.*.partial", "state", "state.*")
Problems = Sequence[Problem]


class Stopped(RuntimeError):
    """A run was asked to end before its last step; its state is saved."""

    exit_code = 75  # EX_TEMPFAIL: try again


@dataclass(eq=False, repr=False)
class Run:
    """The folder of one training run of `model`.

    All processes read it, on a shared disk; rank 0 writes. Raises ValueError, FileExistsError or
    OSError before anything is written: no data, a used folder, another run's checkpoint, a small disk.
    """

    folder: Path
    config: Config
    model: LatentReasoner
    train: Problems
    validation: Problems
    _: KW_ONLY
    loop: str  # curriculum | grpo
    resume: bool = False  # continue from the saved state; else a used folder is refused
    shard: bool = False  # FSDP2: every process holds its share of weights, gradient and optimizer state
    max_minutes: float = 0.0  # stop after so many; 0 is no limit
    checkpoint_minutes: float = 10.0  # a kill loses at most so many
    tensorboard: bool = False  # write events for TensorBoard as well

    def __post_init__(self):
        if self.shard and distributed.size() == 1:
            remedy = "start them with torchrun --nproc_per_node N, or drop --shard"
            raise ValueError(f"--shard: got one process, expected several to split the model over; {remedy}")
        if self.shard and adapters.adapted(self.model):
            got = "got --shard with a LoRA adapter, whose base every process holds whole"
            raise ValueError(f"shard: {got}, expected one of the two; drop --shard, or set lora.r to 0")
        if not self.train or not self.validation:
            n, m = len(self.train), len(self.validation)
            raise ValueError(f"data: got {n} training and {m} validation problems, expected both")
        for name, problems in (("training", self.train), ("validation", self.validation)):
            if twice := [key for key, count in Counter(p.id for p in problems).items() if count > 1]:
                got = f"the problem id {twice[0]!r} twice in {name}, expected different ones"
                raise ValueError(f"data: got {got}; give every problem its own")
        self.metrics, self.timing = self.folder / "metrics.jsonl", self.folder / "timing.jsonl"
        self.started = self.saved = time.monotonic()
        self.cpu_started = time.process_time()
        self.asked, self.progress = "", Progress()  # asked: the signal that asked the run to stop
        self.settings, used = to_dict(self.config), [*self.train, *self.validation]
        self.identity = checkpoint.identity(self.loop, self.settings, self.model, used)
        self.made_with = checkpoint.made_with()
        self.state: dict | None = None
        self.metrics_hash, self.best_sha256 = hashlib.sha256(), None  # of the lines so far, of best/
        self.own_best: Path | None = None
        self.events: Events | None = None
        distributed.gather(self._read)  # all have read before rank 0 writes
        distributed.check_same(**self.identity, checkpoint=self.progress.step)
        self.new = self.state is None
        distributed.on_main(self._open)

    def _read(self) -> None:
        """Read what an earlier process left in the folder; check that all of it belongs to this run."""
        out, stored, state = self.folder, self.folder / "config.json", checkpoint.state_path(self.folder, self.shard)
        if not stored.exists() and not state.exists():
            left = (path.name for pattern in FILES for path in out.glob(pattern))
            if foreign := next(left, None):
                got = f"{out}, which holds {foreign} but no config.json, expected a new folder or a run"
                raise FileExistsError(f"run folder: got {got}; use another --out")
            return
        if not self.resume:
            held = (stored if stored.exists() else state).name
            remedy = "pass --resume if that is this run, or another --out"
            raise FileExistsError(f"run folder: got {out}, which holds {held} already, expected a new folder; {remedy}")
        checkpoint.expect_state(out, self.shard)
        try:
            config = files.read_json(stored, "the configuration of this run")
        except FileNotFoundError:
            got = f"{state} without {stored.name}, expected both, as a run writes them"
            raise ValueError(f"resume: got {got}; {RESTORE}") from None
        except (OSError, ValueError) as error:  # damaged: never started over
            raise ValueError(checkpoint.unusable(stored, error)) from error
        checkpoint.expect_same(config, self.settings, "the run's config.json")
        lines, counted = self.metrics.read_bytes() if self.metrics.exists() else b"", 0
        if state.exists():
            self.state = checkpoint.read_state(state, self.identity)
            self.progress, counted = self.state["progress"], self.state["metrics_offset"]
            self.best_sha256 = self.state["best_sha256"]
            self.metrics_hash.update(lines[:counted])
            if len(lines) < counted or self.metrics_hash.hexdigest() != self.state["metrics_sha256"]:
                got = f"{len(lines)} bytes of {self.metrics}, expected the {counted} that the checkpoint counted"
                raise ValueError(f"resume: got {got}, unchanged; {RESTORE}")
        elif lines.count(b'"validation_accuracy"') > 1:  # state.pt follows the first one
            raise ValueError(f"resume: got {self.metrics} without state.pt, expected both; {RESTORE}")
        self.own_best = checkpoint.own_best(out, self.best_sha256, lines[counted:])
        try:
            seconds_spent(out)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(checkpoint.unusable(self.timing, error)) from error

    def _open(self) -> None:
        """Make the folder, or repair it: drop lines after the checkpoint and partial files."""
        if self.tensorboard:
            import_module("torch.utils.tensorboard")  # without the package an error before anything is written
        held = [self.folder / "state.pt", *self.folder.glob("state/*"), *self.folder.glob("best/*")]
        weights = sum(p.numel() * p.element_size() for p in trained(self.model))
        # Weights, two moments and best/, each twice while it is written; the former best/.
        need = 9 * weights + SLACK - sum(path.stat().st_size for path in held if path.is_file())
        files.expect_writable(self.folder, need)
        for name in ("config.json", "state", "best"):
            for partial in self.folder.glob(f"{name}.*partial"):
                files.remove(partial)
        checkpoint.settle_state(self.folder)
        self._write(self.folder / "config.json", (json.dumps(self.settings, indent=1) + "\n").encode())
        checkpoint.settle_best(self.folder, self.own_best)  # before the lines that show whose best/ is are cut
        self.metrics.touch()
        self.timing.touch()
        os.truncate(self.metrics, self.state["metrics_offset"] if self.state else 0)
        os.truncate(self.timing, self.timing.read_bytes().rfind(b"\n") + 1)
        self._append(self.timing, {"step": self.progress.step - 1, "seconds": 0.0, "cpu_seconds": 0.0})
        if self.tensorboard:
            self.events = Events(self.folder, first=self.progress.step if self.state else -1)

    def shard_models(self, *models: LatentReasoner) -> None:
        """Shard models over the processes, if the run is to be sharded."""
        for model in models:
            if self.shard and not sharding.is_sharded(model):
                sharding.shard(model, [self.config.curriculum.mask.sites, self.config.grpo.mask.sites])

    def restore(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load the state into the model and `optimizer`, once; a new run's stay as they are."""
        if self.state is None:
            return
        try:
            if self.shard:
                checkpoint.load_shards(self.folder / "state", self.model.lm, optimizer)
            else:
                load_trained(self.model, self.state["model"])
                if optimizer is not None:
                    optimizer.load_state_dict(self.state["optimizer"])
                torch.set_rng_state(self.state["rng"])
        except Exception as error:  # not the tensors that this model has
            raise ValueError(checkpoint.unusable(checkpoint.state_path(self.folder, self.shard), error)) from error
        self.state = None

    def accuracy(self) -> float:
        """Greedy pass@1 of the clean model on the validation problems."""
        with sharding.gathered(self.model):
            return evaluate(self.model, self.validation, batch_size=self.config.evaluate.batch_size).accuracy

    def end_step(self, optimizer, record: dict, *, last: bool = False, keep_best: bool = True) -> None:
        """Log `record` of a finished step, save what is due. Raises Stopped if asked to stop."""
        self.progress.step = record["step"] + 1
        accuracy = record.get("validation_accuracy", -1.0)
        best = keep_best and accuracy > self.progress.best
        if best:
            self.progress.best, self.progress.best_step = accuracy, record["step"]
        # After the last step only a signal counts: it also stops what a study would run next.
        late = not last and self.max_minutes and time.monotonic() - self.started >= 60 * self.max_minutes
        reason = self.asked or (f"--max-minutes {self.max_minutes:g}" if late else "")
        stop = max(distributed.gather(lambda: reason))  # one asked: all stop
        due = accuracy >= 0 or bool(stop) or time.monotonic() - self.saved >= 60 * self.checkpoint_minutes
        save = distributed.gather(lambda: due)[0]  # by the clock of rank 0
        weights = sharding.whole_weights(self.model.lm) if best and self.shard else None

        def write() -> None:
            self.log(record)
            if best:
                self.save_best(weights)
            if save and not self.shard:
                self.save(optimizer)

        distributed.on_main(write)
        if save and self.shard:
            self.save_shards(optimizer)
        if stop:
            where = f"after step {record['step']}" if record["step"] >= 0 else "before the first step"
            remedy = "run the same command with --resume to continue"
            raise Stopped(f"stopped by {stop} {where}, everything is saved in {self.folder}; {remedy}")

    def log(self, record: dict) -> None:
        """Append `record` to metrics.jsonl, its time to timing.jsonl, write its events. Refuses a NaN."""
        expect_finite(record, record["step"])
        self.metrics_hash.update(self._append(self.metrics, record))
        clocks = {"seconds": time.monotonic() - self.started, "cpu_seconds": time.process_time() - self.cpu_started}
        self._append(self.timing, {"step": record["step"], **{name: round(x, 3) for name, x in clocks.items()}})
        if self.events:
            self.events.write(record)

    def _append(self, path: Path, record: dict) -> bytes:
        line = (json.dumps(record) + "\n").encode()
        with writing(path), open(path, "ab") as lines:
            lines.write(line)
        return line

    def _write(self, path: Path, content) -> None:
        with writing(path):
            files.write_atomically(path, content)

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write state.pt: weights, optimizer, progress, and the identity to check on resume."""
        state: dict[str, Any] = {"model": trained_state(self.model), "optimizer": optimizer.state_dict()}
        expect_finite({"weights": state["model"], "optimizer": state["optimizer"]["state"]}, self.progress.step - 1)
        state |= self._facts()
        self._write(self.folder / "state.pt", lambda path: torch.save(state, path))
        self._saved()

    def save_shards(self, optimizer: torch.optim.Optimizer) -> None:
        """Write state/ from all processes: their shards, and what else `save` writes."""
        weights, moments = checkpoint.shards(self.model.lm, optimizer)
        step = self.progress.step - 1
        distributed.gather(lambda: expect_finite({"weights": weights, "optimizer": moments}, step))
        checkpoint.write_shards(self.folder / "state", weights | moments, self._facts)
        distributed.on_main(self._saved)

    def _facts(self) -> dict:
        """What resuming needs to know, apart from weights and optimizer."""
        files.flush(self.metrics)  # before the state that counts its bytes
        return {
            "progress": vars(self.progress),
            "metrics_offset": self.metrics.stat().st_size,
            "metrics_sha256": self.metrics_hash.hexdigest(),
            "best_sha256": self.best_sha256,
            "rng": torch.get_rng_state(),  # a reward function may draw from it
            "identity": self.identity,
            "made_with": self.made_with,
        }

    def _saved(self) -> None:
        shutil.rmtree(self.folder / "best.old", ignore_errors=True)
        self.saved = time.monotonic()

    def save_best(self, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write best/; the former one stays in best.old/ until the state names the new step.

        weights: those of a sharded model, whole.
        """
        step, accuracy = self.progress.best_step, self.progress.best
        expect_finite({"weights": weights or trained_state(self.model)}, self.progress.step - 1)

        def write(path: Path) -> None:
            save_model(self.model, path, weights)
            (path / "validation.json").write_text(json.dumps({"step": step, "validation_accuracy": accuracy}) + "\n")
            self.best_sha256 = files.digests(path)

        self._write(self.folder / "best", write)

    def load_best(self) -> None:
        """Load best/ into the model."""
        best = self.folder / "best"
        if adapters.adapted(self.model):
            adapters.lora().read(self.model, best)
        elif self.shard:
            sharding.load_whole(self.model.lm, load_model(best).lm)
        else:
            self.model.lm.load_state_dict(load_model(best).lm.state_dict())

    def stop_on_signals(self) -> AbstractContextManager[None]:
        """Context: signals end the run after its step; a second SIGINT aborts at once."""
        return on_signals(self._ask, ("SIGINT", "SIGTERM", "SIGUSR2"))  # SIGUSR2: SLURM

    def _ask(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if name == self.asked == "SIGINT":
            raise KeyboardInterrupt
        self.asked = name
        if distributed.rank() == 0:
            print(f"{name}: finishing the step, then saving; a second SIGINT aborts at once", file=sys.stderr)


def read_metrics(folder: str | Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a run's file, without a last one that a kill cut off."""
    return [json.loads(line) for line in Path(folder, name).read_bytes().rpartition(b"\n")[0].splitlines()]


def seconds_spent(folder: str | Path, clock: str = "seconds") -> float:
    """Seconds, or `clock` "cpu_seconds", that all processes of a run took, as far as they logged.

    Each process counts from 0.
    """
    if not Path(folder, "timing.jsonl").exists():
        return 0.0
    times = [line[clock] for line in read_metrics(folder, "timing.jsonl")]
    return sum(now for now, after in pairwise([*times, 0.0]) if after < now)
