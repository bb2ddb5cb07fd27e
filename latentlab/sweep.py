"""Arms x seeds as independent runs, one process each, and one table of paired comparisons.

`latentlab sweep compare` trains, for each curriculum seed, the Coconut baseline and its controls, chooses mask rate,
learning rate and temperature on the validation set (first seed's baseline only), runs every arm from each baseline at
equal rollouts, and only then looks at the test set. A finished run holds done.json and is not redone; a failed one is
listed with its log.

    runs/tiny/compare/coconut-s0, pause-s0, direct-s0      the curriculum
    runs/tiny/compare/tune-...                             trials, judged on validation
    runs/tiny/compare/shared-s0, ...                       the arms
    reports/tiny/compare.json, compare_outcomes.npz        the table; right or wrong for every problem
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from latentlab.compare import read_done, write_compare
from latentlab.config import Config, load_preset, to_dict
from latentlab.loop import seconds_spent
from latentlab.report import commit, write_atomically

# Two processes on two cores: one thread each. The malloc settings keep freed memory instead of handing it back to the
# system; page faults otherwise cost a fifth of a step (measured on two-core x86 machines).
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


@dataclass(frozen=True)
class Job:
    """One run: its folder's name and the command line of `latentlab` that makes it."""

    name: str
    words: tuple[str, ...]


def run_sweep(name: str, config: Config, *, out: str) -> Path:
    """Run the sweep `name` ("compare") in folder `out`; returns the path of its result file."""
    started = time.time()
    folder, seeds = Path(out), config.sweep.seeds
    _check_plan(config)
    _same_settings(config, folder)
    overrides = _fields(config)
    run_jobs([_sft("coconut", seed) for seed in seeds], folder, config, overrides)
    chosen = _tune(folder, config, overrides)
    jobs = [_sft(control, seed) for seed in seeds for control in config.sweep.controls]  # the longest first
    jobs += [_grpo(arm, seed, config, folder, chosen[_family(arm)]) for seed in seeds for arm in config.sweep.arms]
    run_jobs(jobs, folder, config, overrides)
    return write_compare(config, folder, chosen, started)


def run_jobs(jobs: list[Job], folder: Path, config: Config, overrides: list[str]) -> None:
    """Run what is not finished, `sweep.workers` at a time. Raises RuntimeError that lists the failed runs."""
    waiting = [job for job in jobs if not _finished(job, folder, config, overrides)]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished, {len(waiting)} to go", flush=True)
    with ThreadPoolExecutor(config.sweep.workers) as pool:
        failed = [name for name in pool.map(lambda job: _run(job, folder, config, overrides), waiting) if name]
    if failed:
        logs = ", ".join(str(folder / f"{name}.log") for name in failed)
        raise RuntimeError(f"sweep: {len(failed)} runs failed, see {logs}; the same command tries them again")


def _run(job: Job, folder: Path, config: Config, overrides: list[str]) -> str | None:
    """One process; its name if it failed. done.json is written last, with the seconds it took."""
    target = folder / job.name
    begun, made_by = time.time() - seconds_spent(target), commit()
    words = _words(job, target, config, overrides)
    resume = ["--resume"] if (target / "config.json").exists() else []
    with open(folder / f"{job.name}.log", "a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "latentlab.cli", *words, *resume],
            stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **WORKER_ENVIRONMENT},
        )  # fmt: skip
        log.write(done.stdout)
    seconds = round(time.time() - begun, 1)
    print(f"{'failed' if done.returncode else 'finished'} {job.name} ({seconds:.0f} s)", flush=True)
    if done.returncode:
        return job.name
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    record = {**summary, "seconds": seconds, "command": " ".join(words), "commit": made_by}
    write_atomically(target / "done.json", (json.dumps(record) + "\n").encode())
    return None


def _words(job: Job, target: Path, config: Config, overrides: list[str]) -> list[str]:
    """The command line of a run, without --resume."""
    verb, *fields = job.words
    return [verb, "--preset", config.preset, *overrides, *fields, "--out", str(target), "--threads", "1"]


def _finished(job: Job, folder: Path, config: Config, overrides: list[str]) -> bool:
    """Is the run done? ValueError if its folder was made by another command: its numbers are not this table's."""
    if not (folder / job.name / "done.json").exists():
        return False
    made, asked = read_done(folder, job.name)["command"], " ".join(_words(job, folder / job.name, config, overrides))
    if made != asked:
        raise ValueError(f"sweep: {job.name} was made by `{made}`, expected `{asked}`; delete it, or use another --out")
    return True


def _check_plan(config: Config) -> None:
    """What the table will need, before any run: ValueError otherwise."""
    s = config.sweep
    for arm in ("shared", "temperature"):
        if arm not in s.arms:
            raise ValueError(
                f"sweep.arms: got no {arm}, expected shared and temperature, whose difference is reported; add it"
            )
    for name in ("seeds", "arms", "controls"):
        values = getattr(s, name)
        if len(set(values)) < len(values):
            raise ValueError(
                f"sweep.{name}: got {values}, expected different ones: each is a run folder; drop the repeated"
            )


def _same_settings(config: Config, folder: Path) -> None:
    """Make `folder`, or refuse one whose finished runs were made with other settings: they would not be redone."""
    # These change no run, or add some.
    free = ("sweep.workers", "sweep.seeds", "sweep.arms", "sweep.controls", "data.test_size", "evaluate.")
    asked = {key: value for key, value in _flat(to_dict(config)).items() if not key.startswith(free)}
    asked["sweep.seeds, the first"] = config.sweep.seeds[0]  # what the tuning started from
    stored = folder / "sweep.json"
    if stored.exists():
        held = json.loads(stored.read_text())
        for key in sorted(held.keys() | asked.keys()):
            if held.get(key) != asked.get(key):
                raise ValueError(
                    f"sweep: got {key}={asked.get(key)!r}, expected {held.get(key)!r} as in {stored}; use another --out"
                )
    write_atomically(stored, (json.dumps(asked, indent=1) + "\n").encode())


def _sft(control: str, seed: int) -> Job:
    return Job(f"{control}-s{seed}", ("sft", "--seed", str(seed), "--curriculum.control", control))


def _grpo(arm: str, seed: int, config: Config, folder: Path, settings: dict, *, steps: int = 0, name: str = "") -> Job:
    """An arm from the baseline of its seed; `none` stops early, since nothing can move (checked by the report)."""
    steps = steps or (min(10, config.grpo.steps) if arm == "none" else config.grpo.steps)
    fields = {"arm": arm, "steps": steps, **settings}
    options = [word for key, value in fields.items() for word in (f"--grpo.{key.replace('_', '-')}", str(value))]
    start = str(folder / f"coconut-s{seed}" / "best")
    return Job(name or f"{arm}-s{seed}", ("grpo", "--seed", str(seed), "--init-from", start, *options))


def _family(arm: str) -> str:
    """Arms that wear masks share the settings chosen with `shared`."""
    return "shared" if arm in ("shared", "per_step", "shared_greedy") else arm if arm == "supervised" else "temperature"


def _tune(folder: Path, config: Config, overrides: list[str]) -> dict[str, dict]:
    """Settings of each family, by the best validation accuracy of short trials on the first seed's baseline."""
    s = config.sweep
    grids = {
        "temperature": [{"learning_rate": lr, "temperature": t} for lr in s.learning_rates for t in s.temperatures],
        "shared": [{"learning_rate": lr, "mask.rate": p} for lr in s.learning_rates for p in s.rates],
        "supervised": [{"learning_rate": lr} for lr in s.learning_rates],
    }
    trials = {
        (arm, i): _grpo(arm, s.seeds[0], config, folder, settings, steps=s.tune_steps, name=f"tune-{arm}-{i}")
        for arm, grid in grids.items() for i, settings in enumerate(grid)
    }  # fmt: skip
    run_jobs(list(trials.values()), folder, config, overrides)
    scores = {key: read_done(folder, job.name)["validation_accuracy"] for key, job in trials.items()}
    chosen = {}
    for arm, grid in grids.items():
        chosen[arm] = max(enumerate(grid), key=lambda pair: scores[arm, pair[0]])[1]
    table = [{"arm": arm, **grids[arm][i], "validation_accuracy": score} for (arm, i), score in scores.items()]
    (folder / "tuning.json").write_text(json.dumps({"chosen": chosen, "trials": table}, indent=1) + "\n")
    return chosen


def _fields(config: Config) -> list[str]:
    """The fields that differ from the preset, as command-line words, so that every run gets them."""
    base, words = _flat(to_dict(load_preset(config.preset))), []
    for key, value in _flat(to_dict(config)).items():
        if value != base[key] and not key.startswith("sweep."):
            words += [f"--{key.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def _flat(values: dict, where: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return flat
