"""Runs as processes of their own, side by side on this machine or as SLURM jobs: what a sweep is made of.

    runs/tiny/compare/shared-s0/    the run's folder; done.json is written last: the run is finished and never redone
    runs/tiny/compare/shared-s0.log what its processes said, appended
    runs/tiny/compare/table.md      one line a run, filled as runs finish

`local` starts `sweep.workers` processes at a time. `slurm` submits every run as a job through submitit, which has to be
installed; its own local executor is not used: it starts everything at once and hides the GPUs. A run that stops because
it was told to (exit code STOPPED) is queued again and resumes; a failed one is tried `retries` times more, then listed.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from latentlab.config import Config
from latentlab.runtime.environment import commit
from latentlab.runtime.files import expect_writable, read_json, write_atomically
from latentlab.study.tables import cell, table
from latentlab.training.run import Stopped, seconds_spent

try:
    import fcntl
except ImportError:  # not on Windows: there two sweeps in one folder are not told apart
    fcntl = None

STOPPED = Stopped.exit_code  # of a run that was told to stop, has saved itself and can be resumed

# Two processes on two cores: one thread each. The malloc settings keep freed memory instead of handing it back to the
# system; page faults otherwise cost a fifth of a step (measured on two-core x86 machines).
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
SLURM_DEFAULTS = {"job_name": "latentlab", "time": 240, "cpus_per_task": 2}  # submitit's own limit is 5 minutes


@dataclass(frozen=True)
class Job:
    """One run: its folder's name and the command line of `latentlab` that makes it."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Launcher:
    """Where runs are started. slurm: options of sbatch, as "partition=gpu", "time=600" (minutes), "gpus_per_node=1"."""

    executor: str = "local"  # local | slurm
    slurm: tuple[str, ...] = ()
    retries: int = 1  # further tries of a failed run

    def __post_init__(self):
        if self.slurm and self.executor != "slurm":
            raise ValueError(f"--slurm: got {self.slurm[0]} with --executor {self.executor}; add --executor slurm")


LOCAL = Launcher()


@dataclass
class Process:
    """One run: called, it starts the run's process, waits for it and returns its exit code. submitit pickles it."""

    words: tuple[str, ...]  # of `latentlab`, without --resume
    target: Path
    gpu: str = ""  # the only CUDA device that the run sees; "": all

    child = None  # the process while it runs
    told_to_stop = False

    def __call__(self) -> int:
        with open(self.target.with_name(f"{self.target.name}.log"), "a") as log:
            while not _locked(log):  # a process of a killed sweep is still at this run
                if self.told_to_stop:
                    return STOPPED
                time.sleep(1)
            return 0 if (self.target / "done.json").exists() else self._run(log)

    def _run(self, log) -> int:
        begun, made_by = time.time() - seconds_spent(self.target), commit()
        resume = ["--resume"] if (self.target / "config.json").exists() else []
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu else {}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "latentlab.cli", *self.words, *resume],
            stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **WORKER_ENVIRONMENT, **gpu},
        )  # fmt: skip
        if self.told_to_stop:
            self.child.terminate()
        said, _ = self.child.communicate()
        log.write(said)
        if self.child.returncode:
            return self.child.returncode
        try:
            summary = dict(json.loads(said.strip().splitlines()[-1]))
        except (ValueError, TypeError, IndexError):
            log.write("latentlab: got no summary in the last line of the run's output, expected JSON\n")
            return 1
        seconds = round(time.time() - begun, 1)
        record = {**summary, "seconds": seconds, "command": " ".join(self.words), "commit": made_by}
        write_atomically(self.target / "done.json", (json.dumps(record) + "\n").encode())
        return 0

    def stop(self) -> None:
        """Tell the run to save itself and end."""
        self.told_to_stop = True
        if self.child is not None:
            self.child.terminate()

    def checkpoint(self):
        """Called by submitit before a job's time is up: the run saves itself, then the job is queued again."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        with suppress(ChildProcessError):  # it has ended already
            if self.child is not None:  # no Popen.wait: that is what was interrupted
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(replace(self))


def run_jobs(jobs: list[Job], folder: Path, config: Config, overrides: list[str], launcher: Launcher = LOCAL) -> None:
    """Run what is not finished. Raises RuntimeError that lists the failed runs, Stopped after SIGTERM or SIGINT."""
    waiting = [job for job in jobs if not _finished(job, folder, config, overrides)]
    states = {path.parent.name: "finished" for path in sorted(folder.glob("*/done.json"))}
    states |= {job.name: "waiting" for job in waiting}
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished, {len(waiting)} to go", flush=True)
    _write_table(folder, states)
    if not waiting:
        return
    sizes = [sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file()) for name in states]
    expect_writable(folder, 2**20 + len(waiting) * max(sizes))  # as large as the largest so far; each looks for itself
    local = launcher.executor == "local"
    width = config.sweep.workers if local else len(waiting)
    start = Process.__call__ if local else _slurm(launcher, folder)
    gpus = queue.SimpleQueue()
    for i, visible in enumerate([_gpus() if local else []] * width):
        gpus.put(visible[i % len(visible)] if visible else "")
    told, processes = threading.Event(), []

    def run(job: Job) -> int:
        gpu, failures = gpus.get(), 0
        process = Process(_words(job, folder / job.name, config, overrides), folder / job.name, gpu)
        processes.append(process)
        try:
            while not told.is_set():
                try:
                    code = start(process)
                except (OSError, RuntimeError) as error:  # no disk, sbatch refused: the other runs go on
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

    with _on_signals(stop), ThreadPoolExecutor(width) as pool:
        futures = {pool.submit(run, job): job.name for job in waiting}
        for future in as_completed(futures):
            name, code = futures[future], future.result()
            states[name] = {0: "finished", STOPPED: "stopped"}.get(code, f"failed, exit code {code}")
            print(*_row(folder, name, states[name]), sep="  ", flush=True)
            _write_table(folder, states)
    failed = [job.name for job in waiting if states[job.name].startswith("failed")]
    if failed:
        logs = ", ".join(str(folder / f"{name}.log") for name in failed)
        raise RuntimeError(f"sweep: {len(failed)} runs failed, see {logs}; the same command tries them again")
    if told.is_set():
        raise Stopped("sweep: told to stop, its runs have saved themselves; the same command goes on")


def read_done(folder: Path, name: str) -> dict:
    """done.json of a finished run; ValueError, one line, if it is damaged."""
    return read_json(folder / name / "done.json", "the record of a finished run", "command")


# ---------------------------------------------------------------- where processes run
def _slurm(launcher: Launcher, folder: Path):
    """start(process) -> exit code, as a SLURM job. ValueError, one line, without submitit, SLURM or a known option."""
    try:
        import submitit
    except ImportError:
        raise ValueError("--executor slurm: got no package submitit; pip install submitit, or use local") from None
    options = dict(SLURM_DEFAULTS)
    for text in launcher.slurm:
        key, equals, value = text.partition("=")
        if not re.fullmatch(r"[a-z_]+=[\w.,:/@%+-]+", text, re.ASCII) or key in ("setup", "teardown", "srun_args"):
            raise ValueError(f"--slurm: got {text!r}, expected sbatch options such as partition=gpu time=600")
        options[key] = yaml.safe_load(value)
    try:
        executor = submitit.SlurmExecutor(folder / "slurm", max_num_timeout=1000)
        executor.update_parameters(**options)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"--executor slurm: {str(error).splitlines()[0]}; use local, or correct --slurm") from None

    def start(process: Process) -> int:
        job = executor.submit(process)
        while not job.done():
            if process.told_to_stop:
                job.cancel(check=False)  # SIGTERM: the run saves itself
                return STOPPED
            time.sleep(1)
        try:
            return job.result()
        except Exception as error:  # cancelled, a node lost, out of memory: submitit raises many kinds
            with open(process.target.with_name(f"{process.target.name}.log"), "a") as log:
                log.write(f"{error}\n")
            return 1

    return start


def _gpus() -> list[str]:
    """The CUDA devices of this machine that may be used: one after another for processes side by side."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def _on_signals(handler):
    """SIGTERM and SIGINT call `handler` while this is open; signals reach only a main thread."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _locked(log) -> bool:
    """Lock the log, until this process and the run's, which inherits it, have ended; False if others hold it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


# ---------------------------------------------------------------- what is there
def _words(job: Job, target: Path, config: Config, overrides: list[str]) -> tuple[str, ...]:
    """The command line of a run, without --resume."""
    verb, *fields = job.words
    return _last_of_each((verb, "--preset", config.preset, *overrides, *fields, "--out", str(target), "--threads", "1"))


def _last_of_each(words: tuple[str, ...]) -> tuple[str, ...]:
    """A command line without the options that a later one of the same name overrules."""
    options: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--") or not options:  # the verb comes first
            flag = word
            options[flag] = []
        else:
            options[flag].append(word)
    return tuple(word for flag, values in options.items() for word in (flag, *values))


def _finished(job: Job, folder: Path, config: Config, overrides: list[str]) -> bool:
    """Is the run done? ValueError if its folder was made by another command: its numbers are not this table's."""
    if not (folder / job.name / "done.json").exists():
        return False
    made, asked = read_done(folder, job.name)["command"], " ".join(_words(job, folder / job.name, config, overrides))
    if " ".join(_last_of_each(tuple(made.split(" ")))) != asked:
        raise ValueError(f"sweep: {job.name} was made by `{made}`, expected `{asked}`; delete it, or use another --out")
    return True


def _row(folder: Path, name: str, state: str) -> list[str]:
    done = read_done(folder, name) if state == "finished" else {}
    return [cell(value) for value in (name, state, done.get("validation_accuracy"), done.get("seconds"))]


def _write_table(folder: Path, states: dict[str, str]) -> None:
    rows = [_row(folder, name, state) for name, state in states.items()]
    text = table(["Run", "State", "Validation accuracy", "Seconds"], rows)
    write_atomically(folder / "table.md", (text + "\n").encode())
