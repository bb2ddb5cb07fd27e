"""Runs as separate processes on this machine or as SLURM jobs, and the record of finished runs.

    runs/tiny/sweep/shared-s0/      a run; done.json is written last: it is finished, never redone
    runs/tiny/sweep/shared-s0.log   the output of its processes, appended
    runs/tiny/sweep/table.md        one line per run, updated as runs finish

`local` starts `sweep.workers` processes at a time; `slurm` submits every run as a job through
submitit, whose own local executor starts everything at once and hides the GPUs; `in_process` runs
them one after another (experiment.py). A run that stops on request (exit code STOPPED) is queued
again and resumes; a failed one gets `retries` further attempts, then it is listed.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from latentlab.config import Config, changed_words, to_dict
from latentlab.runtime.environment import commit, on_signals
from latentlab.runtime.files import expect_writable, read_json, write_atomically
from latentlab.study.tables import cell, table
from latentlab.training.run import Stopped, seconds_spent

STOPPED = Stopped.exit_code  # of a run that was asked to stop, has saved its state and can be resumed
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # side by side: one thread each
SLURM_DEFAULTS = {"job_name": "latentlab", "time": 240, "cpus_per_task": 2}  # submitit's own limit is 5 minutes


class Work(Protocol):
    """What one process does: its folder's name, and the command line of `latentlab`, without --resume."""

    @property
    def name(self) -> str: ...

    def words(self, folder: Path) -> tuple[str, ...]: ...


W = TypeVar("W", bound=Work)


@dataclass(frozen=True)
class Job:
    """One run: its folder's name, verb and configuration, and the checkpoint an arm starts from."""

    name: str
    verb: str  # curriculum | grpo
    config: Config
    init_from: str = ""

    def words(self, folder: Path) -> tuple[str, ...]:
        """The command line of `latentlab` that makes this run, without --resume."""
        changed = changed_words(to_dict(self.config), but=("sweep.", "data.test_size", "evaluate.num_generations"))
        start = ("--init-from", self.init_from) if self.init_from else ()
        return (self.verb, "--preset", self.config.preset, *changed, *start, "--out", str(folder / self.name))


@dataclass(frozen=True)
class Launcher:
    """Where runs are started. slurm: sbatch options, such as "time=600" (minutes)."""

    executor: str = "local"  # in_process | local | slurm
    slurm: tuple[str, ...] = ()
    retries: int = 1  # further attempts of a failed run

    def __post_init__(self):
        if self.slurm and self.executor != "slurm":
            raise ValueError(f"--slurm: got {self.slurm[0]} with --executor {self.executor}; add --executor slurm")


IN_PROCESS = Launcher("in_process")


@dataclass
class Process:
    """One run as a process: a call starts it, waits and returns its exit code."""

    words: tuple[str, ...]
    target: Path
    gpu: str = ""  # the only CUDA device that the run sees; "": all
    child: subprocess.Popen | None = field(default=None, init=False)
    told_to_stop: bool = field(default=False, init=False)

    def __call__(self) -> int:
        with open(self.target.with_name(f"{self.target.name}.log"), "a") as log:
            while not locked(log):  # a process of a killed sweep still works on this run
                if self.told_to_stop:
                    return STOPPED
                time.sleep(1)
            return 0 if (self.target / "done.json").exists() else self._run(log)

    def _run(self, log) -> int:
        begun, made_by = time.time() - seconds_spent(self.target), commit()
        resume = ["--resume"] if (self.target / "config.json").exists() else []
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu else {}
        command = [sys.executable, "-m", "latentlab", *self.words, *resume]
        environment = {**os.environ, **WORKER_ENVIRONMENT, **gpu}
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        if self.told_to_stop:
            self.child.terminate()
        said, _ = self.child.communicate()
        log.write(said)
        if self.child.returncode == 0:
            try:
                summary = dict(json.loads(said.strip().splitlines()[-1]))
            except (ValueError, TypeError, IndexError):
                log.write("latentlab: got no summary in the last line of the run's output, expected JSON\n")
                return 1
            write_done(self.target, summary, self.words, begun, made_by)
        return self.child.returncode

    def stop(self) -> None:
        """Ask the run to save its state and exit."""
        self.told_to_stop = True
        if self.child is not None:
            self.child.terminate()

    def checkpoint(self):
        """Called by submitit before a job's time is up: save the state, queue the job again."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        with suppress(ChildProcessError):  # it has exited already
            if self.child is not None:  # not Popen.wait: that call is what was interrupted
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(replace(self))


# ---------------------------------------------------------------- the record of finished runs
def write_done(target: Path, summary: dict, words: Iterable[str], begun: float, made_by: str) -> None:
    """Write done.json of a finished run that began at `begun` (time.time()), commit `made_by`."""
    seconds = round(time.time() - begun, 1)
    record = {**summary, "seconds": seconds, "command": " ".join(words), "commit": made_by}
    write_atomically(target / "done.json", (json.dumps(record) + "\n").encode())


def read_done(folder: Path, name: str) -> dict:
    """done.json of a finished run; a one-line ValueError if it is damaged."""
    return read_json(folder / name / "done.json", "the record of a finished run", "command")


def _finished(job: Work, folder: Path) -> bool:
    """Is the run done? ValueError if another command made its folder."""
    if not (folder / job.name / "done.json").exists():
        return False
    made, asked = read_done(folder, job.name)["command"], " ".join(job.words(folder))
    if without_places(made) != without_places(asked):
        raise ValueError(f"sweep: {job.name} was made by `{made}`, expected `{asked}`; delete it, or use another --out")
    return True


def without_places(command: str) -> str:
    """A command without the folders that hold its runs: an experiment may be moved as a whole."""
    return re.sub(r"(--out|--init-from) \S*?([^/\s]+(/best)?)(?=\s|$)", r"\1 \2", command)


def run_jobs(jobs: list[W], folder: Path, execute: Callable[[list[W], Path], Iterator[tuple[str, int]]]) -> None:
    """Run what is unfinished; `execute` yields (name, exit code).

    Raises RuntimeError that lists failed runs, else Stopped if runs were told to stop.
    """
    waiting = [job for job in jobs if not _finished(job, folder)]
    states = {path.parent.name: "finished" for path in sorted(folder.glob("*/done.json"))}
    states |= {job.name: "waiting" for job in waiting}
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished, {len(waiting)} to go", flush=True)
    _write_table(folder, states)
    if not waiting:
        return
    sizes = [sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file()) for name in states]
    expect_writable(folder, 2**20 + len(waiting) * max(sizes))  # estimate: as large as the largest run so far
    for job in waiting:
        if not (folder / job.name).exists():  # what an earlier run answered, whose folder was deleted
            for name in {job.name, job.name.replace("coconut-", "cot-")}:  # cot: the baseline after stage 0
                for path in (folder / "answers").glob(f"{name}.*"):
                    path.unlink()
    for name, code in execute(waiting, folder):
        states[name] = {0: "finished", STOPPED: "stopped"}.get(code, f"failed, exit code {code}")
        rows = _write_table(folder, states)
        print(*rows[name], sep="  ", flush=True)
    logs = [str(folder / f"{job.name}.log") for job in waiting if states[job.name].startswith("failed")]
    if logs:
        raise RuntimeError(f"sweep: {len(logs)} runs failed, see {', '.join(logs)}; the same command tries them again")
    if "stopped" in states.values():
        raise Stopped("sweep: told to stop, its runs have saved their state; the same command resumes them")


def _write_table(folder: Path, states: dict[str, str]) -> dict[str, list]:
    """Write table.md, and return its rows by run."""
    rows = {}
    for name, state in states.items():
        done = read_done(folder, name) if state == "finished" else {}
        rows[name] = [cell(value) for value in (name, state, done.get("validation_accuracy"), done.get("seconds"))]
    text = table(["Run", "State", "Validation accuracy", "Seconds"], list(rows.values()))
    write_atomically(folder / "table.md", f"{text}\n".encode())
    return rows


# ---------------------------------------------------------------- processes
def run_processes(jobs: Sequence[Work], folder: Path, launcher: Launcher, workers: int) -> Iterator[tuple[str, int]]:
    """Run jobs as local processes or SLURM jobs; yields (name, exit code) as they end.

    SIGTERM and SIGINT stop all of them with their state saved.
    """
    local = launcher.executor == "local"
    width = workers if local else len(jobs)
    start = Process.__call__ if local else _slurm(launcher, folder)
    visible = (_gpus() if local else []) or [""]
    gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
    for gpu in islice(cycle(visible), width):
        gpus.put(gpu)
    told, processes = threading.Event(), []

    def run(job: Work) -> int:
        gpu, failures = gpus.get(), 0
        process = Process(job.words(folder), folder / job.name, gpu)
        processes.append(process)
        try:
            while not told.is_set():
                try:
                    code = start(process)
                except (OSError, RuntimeError) as error:  # full disk, sbatch refused: the other runs continue
                    print(f"{job.name}: {' '.join(str(error).split())}", file=sys.stderr)
                    code = 1
                failures += code != STOPPED
                if code == 0 or failures > launcher.retries and not told.is_set():
                    return code
            return STOPPED
        finally:
            gpus.put(gpu)

    def stop(*_) -> None:
        told.set()
        for process in processes:
            process.stop()

    with on_signals(stop), ThreadPoolExecutor(width) as pool:
        futures = {pool.submit(run, job): job.name for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _slurm(launcher: Launcher, folder: Path) -> Callable[[Process], int]:
    """start(process) -> exit code, as a SLURM job. ValueError without submitit or SLURM."""
    options: dict[str, Any] = dict(SLURM_DEFAULTS)
    for text in launcher.slurm:
        key, _, value = text.partition("=")
        if not re.fullmatch(r"[a-z_]+=[\w.,:/@%+-]+", text, re.ASCII) or key in ("setup", "teardown", "srun_args"):
            raise ValueError(f"--slurm: got {text!r}, expected sbatch options such as partition=gpu time=600")
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        options[key] = int(value) if value.isdigit() else words.get(value.lower(), value)
    try:
        import submitit

        executor = submitit.SlurmExecutor(folder / "slurm", max_num_timeout=1000)
        executor.update_parameters(**options)
    except ImportError:
        raise ValueError("--executor slurm: got no package submitit; pip install submitit, or use local") from None
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"--executor slurm: {str(error).splitlines()[0]}; use local, or correct --slurm") from None

    def start(process: Process) -> int:
        job = executor.submit(process)
        while not job.done():
            if process.told_to_stop:
                job.cancel(check=False)  # sends SIGTERM: the run saves its state
                return STOPPED
            time.sleep(1)
        try:
            return job.result()
        except Exception as error:  # cancelled, node lost, out of memory: submitit raises many types
            with open(process.target.with_name(f"{process.target.name}.log"), "a") as log:
                log.write(f"{error}\n")
            return 1

    return start


def _gpus() -> list[str]:
    """The CUDA devices that may be used; processes side by side take them in turn."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def locked(log) -> bool:
    """Lock the log until this process and its child exit; False if another process holds it."""
    if os.name == "nt":  # no such locks: two sweeps in one folder are not told apart
        return True
    import fcntl

    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # other errors: a file system without locks
    return True
