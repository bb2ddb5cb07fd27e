"""Arms x seeds as independent runs, one process each, and one table of paired comparisons.

`latentlab sweep compare` trains, for each curriculum seed, the Coconut baseline and its controls, chooses mask rate,
learning rate and temperature on the validation set (first seed's baseline only), runs every arm from each baseline at
equal rollouts, and only then looks at the test set. How runs are started, kept and tried again: launch.py.

    runs/tiny/compare/coconut-s0, pause-s0, direct-s0      the curriculum
    runs/tiny/compare/tune-...                             trials, judged on validation
    runs/tiny/compare/shared-s0, ...                       the arms
    reports/tiny/compare.json, compare_outcomes.npz        the table; right or wrong for every problem
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from latentlab.config import Config, changed_words, check_arms, flat, to_dict
from latentlab.runtime.files import read_json, write_atomically
from latentlab.study.compare import write_compare
from latentlab.study.launch import LOCAL, Job, Launcher, read_done, run_jobs


def run_sweep(name: str, config: Config, *, out: str, launcher: Launcher = LOCAL) -> Path:
    """Run the sweep `name` ("compare") in folder `out`; returns the path of its result file."""
    started = time.time()
    folder, seeds = Path(out), config.sweep.seeds
    check_arms(config.sweep)
    _same_settings(config, folder)
    overrides = changed_words(to_dict(config), but=("sweep.",))
    run_jobs([_curriculum("coconut", seed) for seed in seeds], folder, config, overrides, launcher)
    chosen = _tune(folder, config, overrides, launcher)
    jobs = [_curriculum(control, seed) for seed in seeds for control in config.sweep.controls]  # the longest first
    jobs += [_grpo(arm, seed, config, folder, chosen[_family(arm)]) for seed in seeds for arm in config.sweep.arms]
    run_jobs(jobs, folder, config, overrides, launcher)
    return write_compare(config, folder, chosen, started)


def _same_settings(config: Config, folder: Path) -> None:
    """Make `folder`, or refuse one whose finished runs were made with other settings: they would not be redone."""
    # These change no run, or add some.
    free = ("sweep.workers", "sweep.seeds", "sweep.arms", "sweep.controls", "data.test_size", "evaluate.")
    asked = {key: value for key, value in flat(to_dict(config)).items() if not key.startswith(free)}
    asked["sweep.seeds, the first"] = config.sweep.seeds[0]  # what the tuning started from
    stored = folder / "sweep.json"
    if stored.exists():
        # A field younger than the folder had its default: before there was a choice, that is what was done.
        held = flat(to_dict(Config())) | read_json(stored, "the settings of a sweep")
        for key in sorted(asked):
            if held.get(key) != asked[key]:
                raise ValueError(
                    f"sweep: got {key}={asked[key]!r}, expected {held.get(key)!r} as in {stored}; use another --out"
                )
    write_atomically(stored, (json.dumps(asked, indent=1) + "\n").encode())


def _curriculum(control: str, seed: int) -> Job:
    return Job(f"{control}-s{seed}", ("curriculum", "--seed", str(seed), "--curriculum.control", control))


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


def _tune(folder: Path, config: Config, overrides: list[str], launcher: Launcher) -> dict[str, dict]:
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
    run_jobs(list(trials.values()), folder, config, overrides, launcher)
    scores = {key: read_done(folder, job.name)["validation_accuracy"] for key, job in trials.items()}
    chosen = {}
    for arm, grid in grids.items():
        chosen[arm] = max(enumerate(grid), key=lambda pair: scores[arm, pair[0]])[1]
    table = [{"arm": arm, **grids[arm][i], "validation_accuracy": score} for (arm, i), score in scores.items()]
    write_atomically(
        folder / "tuning.json", (json.dumps({"chosen": chosen, "trials": table}, indent=1) + "\n").encode()
    )
    return chosen
