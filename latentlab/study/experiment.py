"""One experiment: arms x seeds from latent baselines, with or without a time budget, one report.

    runs/tiny/sweep/plan.json              settings, time spent, what a budget allowed each part
    runs/tiny/sweep/coconut-s0, pause-s0   the curriculum: a baseline, a control
    runs/tiny/sweep/tune-shared-0          a trial, judged on the validation set
    runs/tiny/sweep/shared-s0              an arm, from the baseline of its seed
    runs/tiny/sweep/answers/               what finished models answered (answers.py)
    reports/tiny/arms.json                 the report (arms_report.py)

Without a budget every seed has its own baseline, and mask rate, learning rate and temperature are
chosen by trials on the validation set. With one (`budget_minutes`) all seeds share the first seed's
baseline, the preset's own settings are used, every part is sized to the budget (budget.py), and the
time left over buys sampled answers and other benchmarks. The test set decides nothing. The same
command resumes an interrupted experiment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from latentlab.config import Config, check_arms, flat, to_dict
from latentlab.data import datasets
from latentlab.data.jsonl import read_jsonl, write_jsonl
from latentlab.evaluation.accuracy import evaluate
from latentlab.model import LatentReasoner
from latentlab.pretrained.adapters import attach_adapter
from latentlab.pretrained.loading import load_model, model_from_config, save_model
from latentlab.runtime.distributed import select_device
from latentlab.runtime.environment import commit, peak_memory_gib
from latentlab.study.answers import TrainedModels, answers_path, with_settings
from latentlab.study.arms_report import write_report
from latentlab.study.budget import Budget, plan_curriculum, plan_grpo
from latentlab.study.launch import IN_PROCESS, Job, Launcher, read_done, run_jobs, run_processes, write_done
from latentlab.training.arms import fit_grpo
from latentlab.training.curriculum import fit_curriculum, set_stage
from latentlab.training.preflight import expect_together, say_precision
from latentlab.training.run import seconds_spent

CHECKPOINT_MINUTES = 3.0  # work that a kill may cost: the whole budget may be half an hour
FAMILY = {arm: "shared" for arm in ("shared", "per_step", "shared_greedy", "antithetic")}  # tuned together
FAMILY |= {arm: arm for arm in ("gaussian", "supervised")}
# Fields that change no run, or only add some.
ADDABLE = {"sweep.workers", "sweep.seeds", "sweep.arms", "sweep.controls", "data.test_size", "evaluate.num_generations"}


def run_experiment(
    config: Config,
    *,
    out: str,
    launcher: Launcher = IN_PROCESS,
    budget_minutes: float | None = None,
    device: str = "auto",
    backbone: str = "",
    init_from: str = "",
) -> Path:
    """Run or resume the experiment in folder `out`; returns the path of its result file.

    budget_minutes: None for no budget; 0 for the preset's own steps, no limit; needs IN_PROCESS.
    backbone: a folder or Hub id, instead of the preset's. init_from: a trained Coconut checkpoint
    that replaces the curriculum, for all seeds. device: of runs in this process and of answers.
    Raises ValueError or OSError, one line, before any compute (wrong arguments, missing data, a
    folder of another experiment, too little memory); RuntimeError that lists failed runs; Stopped
    after a signal.
    """
    start, folder, in_process = time.monotonic(), Path(out), launcher.executor == "in_process"
    if backbone and init_from:
        raise ValueError("--backbone and --init-from: got both, expected an untrained or a trained model; drop one")
    if budget_minutes is not None and not (in_process and 0 <= budget_minutes < math.inf):
        got = f"{budget_minutes} minutes with executor {launcher.executor}"
        raise ValueError(f"budget: got {got}, expected at least 0 and finite, with in_process; correct or drop it")
    check_arms(config.sweep)
    if backbone:
        config = replace(config, backbone=replace(config.backbone, name_or_path=backbone))
    data = {split: datasets.load(config.data, split) for split in ("validation", "test")}
    kept, place = folder / "train.jsonl", select_device(device)
    data["train"] = [] if not in_process else read_jsonl(kept) if kept.exists() else datasets.load(config.data, "train")
    weights = _checked_weights(config, data, place if in_process else "cpu", init_from)
    say_precision(config, place)
    made_for = _made_for(config, weights, budget_minutes, place.type)
    budget = Budget(folder, made_for, budget_minutes, place.type, start)
    if data["train"] and not kept.exists():  # read back by the next process: filtering it is slow
        write_jsonl(data["train"], kept)

    e = Experiment(config, folder, data, place, budget, launcher)
    names = e.make_baselines(init_from)
    tuning = {} if budget.planned else e.tune()
    chosen = tuning.get("chosen_on_validation", {})
    names += e.run_arms(chosen)
    for name in names:
        e.store(name, "test", data["test"])
    e.store_sampled(names, chosen)
    e.store_benchmarks(names) if budget.planned else e.store_swapped(names)
    budget.save()
    return write_report(config, folder, names, data["test"], budget, tuning=tuning, weights=weights)


# ---------------------------------------------------------------- before any compute
def _checked_weights(config: Config, data: dict, device: torch.device | str, init_from: str) -> dict:
    """Provenance of the model to start from; it must fit the problems, and the GPU must fit it."""
    model = model_from_config(config, init_from=init_from).place(device, config.precision)
    attach_adapter(model, config)
    learned = [*data["train"], *data["validation"]]
    expect_together(model, [*learned, *data["test"]], config)
    if not init_from:
        expect_together(model, learned, config, curriculum=True)
    _expect_memory(model, 4 if config.lora.r else 16)
    return model.provenance


def _expect_memory(model: LatentReasoner, per_weight: int) -> None:
    """OSError if the GPU cannot hold weights, what trains them (16 bytes in all) and some activations."""
    if model.device.type != "cuda":
        return
    need = per_weight * sum(p.numel() for p in model.parameters()) + 2 * 2**30
    free, _ = torch.cuda.mem_get_info(model.device)
    if free + torch.cuda.memory_allocated(model.device) < need:
        got, expected = f"{free / 2**30:.1f} GiB free", f"{need / 2**30:.1f} for weights, gradients, optimizer, batch"
        raise OSError(f"GPU: got {got}, expected {expected}; free some, or use a larger GPU")


def _made_for(config: Config, weights: dict, minutes: float | None, device: str) -> dict:
    """The settings that a folder's finished runs are valid for."""
    settings = {**flat(to_dict(config)), "budget_minutes": minutes, "weights": weights.get("sha256", "")}
    if minutes is not None:  # planned for all seeds and arms, on one device
        return {**settings, "device": device}
    kept = {key: value for key, value in settings.items() if key not in ADDABLE}
    return {**kept, "sweep.seeds, the first": config.sweep.seeds[0]}  # trials start from its baseline


# ---------------------------------------------------------------- the stages
@dataclass
class Experiment(TrainedModels):
    """The stages that train models; each does only what is missing."""

    launcher: Launcher

    def make_baselines(self, init_from: str) -> list[str]:
        """Train the baselines, or store `init_from` in their place; returns their names."""
        config, seeds = self.config, self.config.sweep.seeds
        seeds = seeds[:1] if self.budget.planned or init_from else seeds
        jobs = [_curriculum_job("coconut", seed, config) for seed in seeds]
        if init_from:
            self._store_baseline(self.folder / jobs[0].name, init_from)
        else:
            self._run([self._fitted(job) for job in jobs] if self.budget.planned else jobs)
        for job in jobs:
            self.store(job.name, "test", self.data["test"])
        return [job.name for job in jobs]

    def tune(self) -> dict[str, Any]:
        """Settings of each family of arms, by the validation accuracy of short trials; the trials.

        They start from the first seed's baseline; a grid of one candidate needs no trial.
        """
        s = self.config.sweep
        grids: dict[str, list[dict]] = {
            "temperature": [{"learning_rate": lr, "temperature": t} for lr in s.learning_rates for t in s.temperatures],
            "shared": [{"learning_rate": lr, "mask.rate": p} for lr in s.learning_rates for p in s.rates],
            "supervised": [{"learning_rate": lr} for lr in s.learning_rates],
        }
        jobs = {
            (arm, i): self._arm_job(arm, s.seeds[0], settings, s.tune_steps, f"tune-{arm}-{i}")
            for arm, grid in grids.items()
            for i, settings in enumerate(grid)
            if len(grid) > 1
        }
        self._run(list(jobs.values()))
        scores = {key: read_done(self.folder, job.name)["validation_accuracy"] for key, job in jobs.items()}
        best = {arm: max(range(len(grid)), key=lambda i: scores.get((arm, i), 0.0)) for arm, grid in grids.items()}
        table = [{"arm": arm, **grids[arm][i], "validation_accuracy": score} for (arm, i), score in scores.items()]
        return {"chosen_on_validation": {arm: grids[arm][i] for arm, i in best.items()}, "tuning": table}

    def run_arms(self, chosen: dict[str, dict]) -> list[str]:
        """Controls and arms of every seed, at equal iterations; returns their names."""
        config, seeds, controls = self.config, self.config.sweep.seeds, self.config.sweep.controls
        iterations = config.grpo.steps
        if self.budget.planned:
            model = self.trained(f"coconut-s{seeds[0]}")
            plan = partial(plan_grpo, model, self.data, config, self.budget)
            count, iterations = self.budget.once("seeds_and_iterations", plan)
            seeds, controls = seeds[: count if iterations else 0], ()
        jobs = [_curriculum_job(control, seed, config) for seed in seeds for control in controls]  # the longest first
        for seed, arm in product(seeds, config.sweep.arms):
            family = FAMILY.get(arm, "temperature")
            jobs.append(self._arm_job(arm, seed, chosen.get(family, {}), iterations, f"{arm}-s{seed}"))
        self._run(jobs)
        return [job.name for job in jobs]

    def _fitted(self, job: Job) -> Job:
        """The job of a baseline, its stages sized to the budget."""
        config, c = job.config, job.config.curriculum
        model = model_from_config(config).place(self.device, config.precision)
        attach_adapter(model, config)
        plan = partial(plan_curriculum, model, self.data, config, self.budget)
        steps = tuple(self.budget.once("curriculum_steps", plan))
        warmup = min(c.warmup_steps, max(1, min(steps) // 4))  # short stages are not all warm-up
        return replace(job, config=replace(config, curriculum=replace(c, steps=steps, warmup_steps=warmup)))

    def _run(self, jobs: list[Job]) -> None:
        processes = partial(run_processes, launcher=self.launcher, workers=self.config.sweep.workers)
        run_jobs(jobs, self.folder, self._fit if self.launcher.executor == "in_process" else processes)
        self.budget.save()

    def _fit(self, jobs: list[Job], folder: Path) -> Iterator[tuple[str, int]]:
        """Run jobs one after another in this process; yields (name, exit code)."""
        train, validation = self.data["train"], self.data["validation"]
        for job in jobs:
            target, config, made_by = folder / job.name, job.config, commit()
            begun = time.time() - seconds_spent(target)
            model = model_from_config(config, init_from=job.init_from).place(self.device, config.precision)
            fit: Any = partial(fit_grpo if job.verb == "grpo" else fit_curriculum, model, train, validation, config)
            fit = partial(fit, out=str(target), resume=True, checkpoint_minutes=CHECKPOINT_MINUTES)
            cot = f"cot-s{config.seed}"
            if self.budget.planned and job.verb == "curriculum" and not answers_path(folder, cot, "test").exists():
                fit(last_stage=0)  # chain of thought alone
                set_stage(model, config, 0, validation)
                self.store(cot, "test", self.data["test"], model)
            summary = {**fit(), "out": str(target), "peak_memory_gib": peak_memory_gib()}
            write_done(target, summary, job.words(folder), begun, made_by)
            yield job.name, 0

    def _arm_job(self, arm: Any, seed: int, settings: dict, iterations: int, name: str) -> Job:
        """An arm from its baseline; `none`, which changes nothing, stops early."""
        steps = max(1, min(10, iterations) if arm == "none" else iterations)
        grpo = replace(with_settings(self.config.grpo, settings), arm=arm, steps=steps)
        if self.budget.planned:
            grpo = replace(grpo, eval_every=min(grpo.eval_every, steps))
        own, first = (self.folder / f"coconut-s{s}" for s in (seed, self.config.sweep.seeds[0]))
        start = (own if own.exists() else first) / "best"  # its own, or the one that all seeds share
        return Job(name, "grpo", replace(self.config, seed=seed, grpo=grpo), str(start))

    def _store_baseline(self, run: Path, init_from: str) -> None:
        """Store a model that was trained elsewhere where the curriculum would have left its own."""
        if not (run / "done.json").exists():
            begun, model = time.time(), load_model(init_from).place(self.device, self.config.precision)
            save_model(model, run / "best")
            found = evaluate(model, self.data["validation"], batch_size=self.config.evaluate.batch_size)
            summary = {"stages": {}, "validation_accuracy": found.accuracy}
            write_done(run, summary, ("--init-from", init_from), begun, commit())


def _curriculum_job(control: Any, seed: int, config: Config) -> Job:
    curriculum = replace(config.curriculum, control=control)
    return Job(f"{control}-s{seed}", "curriculum", replace(config, seed=seed, curriculum=curriculum))
