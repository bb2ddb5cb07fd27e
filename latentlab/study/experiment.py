"""One experiment: arms x seeds from latent baselines, with or without a time budget, and one report.

    runs/tiny/sweep/plan.json                        settings, time spent, and what a budget allowed each part
    runs/tiny/sweep/coconut-s0, pause-s0, direct-s0  the curriculum: the baseline and its controls
    runs/tiny/sweep/tune-shared-0, ...               trials, judged on the validation set
    runs/tiny/sweep/shared-s0, ...                   the arms, each from the baseline of its seed
    runs/tiny/sweep/answers/                         what finished models answered (answers.py)
    reports/tiny/arms.json, ...                      the report (arms_report.py)

Stages: baselines -> trials -> controls and arms -> answers -> report. Without a budget every seed has a baseline of
its own, and mask rate, learning rate and temperature are chosen by trials on the validation set. With one
(`budget_minutes`) all seeds share the first seed's baseline, the preset's own settings are used, every part is sized to
the budget (budget.py), and time that is left buys sampled answers and other benchmarks. The test set decides nothing.
The same command resumes an experiment that was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from latentlab.config import Config, GRPOConfig, arm_settings, check_arms, flat, to_dict
from latentlab.data import datasets
from latentlab.data.jsonl import read_jsonl, write_jsonl
from latentlab.evaluation.accuracy import evaluate
from latentlab.model import LatentReasoner, torch_device
from latentlab.pretrained.loading import load_model, model_from_config, save_model
from latentlab.problems import Problem
from latentlab.runtime.environment import commit, peak_memory_gib
from latentlab.study.answers import answers_path, read_answers, store_answers, store_swapped
from latentlab.study.arms_report import write_report
from latentlab.study.budget import Budget, answer_seconds, plan_curriculum, plan_grpo
from latentlab.study.launch import IN_PROCESS, Job, Launcher, read_done, run_jobs, run_processes, write_done
from latentlab.training.arms import fit_grpo
from latentlab.training.curriculum import fit_curriculum, set_stage
from latentlab.training.preflight import expect_together
from latentlab.training.run import seconds_spent

TRANSFER = ("gsm8k_perturbable", "gsm8k_perturbed", "svamp", "multiarith", "gsm_hard")
SAMPLED = ("coconut", "temperature", "shared")  # models that also answer by sampling
SAMPLED_PROBLEMS = 1000  # test problems for sampled answers and swapped thoughts, where no budget decides
CHECKPOINT_MINUTES = 3.0  # work that a kill may cost: the whole budget may be half an hour
ADDABLE = ("sweep.workers", "sweep.seeds", "sweep.arms", "sweep.controls")  # they change no run, or only add some


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

    budget_minutes: None for no budget, else the limit, in this process; 0 takes the preset's own steps.
    backbone: a folder or Hub id instead of the preset's. init_from: a trained Coconut checkpoint that replaces
    the curriculum, for all seeds. device: of the runs in this process, and of all answers.
    Raises ValueError or OSError, one line, before any compute: a missing data file, a foreign folder, too little
    memory; RuntimeError that lists failed runs; Stopped after SIGTERM or SIGINT.
    """
    start, folder, in_process = time.monotonic(), Path(out), launcher.executor == "in_process"
    _expect_valid(config, launcher, budget_minutes, backbone, init_from)
    if backbone:
        config = replace(config, backbone=replace(config.backbone, name_or_path=backbone))
    data = _load_data(config, folder, with_train=in_process)
    model = load_model(init_from) if init_from else model_from_config(config)
    model.place(device if in_process else "cpu", config.precision)
    _expect_runnable(model, data, config, curriculum=not init_from)
    place = torch_device(device).type
    budget = Budget(folder, _made_for(config, model, budget_minutes, place), budget_minutes, place, start)
    if in_process and not (folder / "train.jsonl").exists():
        write_jsonl(data["train"], folder / "train.jsonl")

    e = Experiment(config, folder, data, device, launcher, budget)
    weights = model.provenance
    names = e.make_baselines(model, init_from)
    del model  # the runs load their own
    chosen, trials = ({}, []) if e.budgeted else e.tune()
    names += e.run_arms(chosen)
    e.answer(names)
    e.answer_more(names, chosen)
    budget.save()
    return write_report(config, folder, names, data["test"], budget, chosen=chosen, trials=trials, weights=weights)


# ---------------------------------------------------------------- before any compute
def _expect_valid(config: Config, launcher: Launcher, minutes: float | None, backbone: str, init_from: str) -> None:
    if minutes is not None and not 0 <= minutes < float("inf"):
        raise ValueError(f"--budget-minutes: got {minutes:g}, expected at least 0; 0 takes the preset's own steps")
    if minutes is not None and launcher.executor != "in_process":
        raise ValueError(f"--budget-minutes: got it with --executor {launcher.executor}, expected in_process; drop one")
    if backbone and init_from:
        raise ValueError("--backbone and --init-from: got both, expected an untrained or a trained model; drop one")
    check_arms(config.sweep)


def _load_data(config: Config, folder: Path, *, with_train: bool) -> dict[str, list[Problem]]:
    """Problems by split. Training problems are kept in train.jsonl: making their copies takes half a minute."""
    data = {split: datasets.load(config.data, split) for split in ("validation", "test")}
    kept = folder / "train.jsonl"
    data["train"] = [] if not with_train else read_jsonl(kept) if kept.exists() else datasets.load(config.data, "train")
    return data


def _expect_runnable(model: LatentReasoner, data: dict, config: Config, *, curriculum: bool) -> None:
    """ValueError if model and problems do not fit together, OSError if the GPU is too small to train."""
    learned = [*data["train"], *data["validation"]]
    expect_together(model, [*learned, *data["test"]], config)
    if curriculum:
        expect_together(model, learned, config, curriculum=True)
    if model.device.type != "cuda":
        return
    need = 16 * sum(p.numel() for p in model.parameters()) + 2 * 2**30  # weights, gradients, two moments; activations
    free, _ = torch.cuda.mem_get_info(model.device)
    if free + torch.cuda.memory_allocated(model.device) < need:
        raise OSError(
            f"GPU: got {free / 2**30:.1f} GiB free, expected {need / 2**30:.1f} for weights, gradients, optimizer "
            "and a micro-batch; free some, or use a larger GPU"
        )


def _made_for(config: Config, model: LatentReasoner, minutes: float | None, device: str) -> dict:
    """The settings that a folder keeps: its finished runs would be taken for those of other settings."""
    settings = {**flat(to_dict(config)), "budget_minutes": minutes, "weights": model.provenance.get("sha256", "")}
    if minutes is not None:  # a plan is made for all seeds and arms, and for one device
        return {**settings, "device": device}
    kept = {key: value for key, value in settings.items() if key not in ADDABLE}
    return {**kept, "sweep.seeds, the first": config.sweep.seeds[0]}  # trials start from its baseline


# ---------------------------------------------------------------- the stages
@dataclass
class Experiment:
    """What the stages share; each stage runs what is missing and returns the names of its runs."""

    config: Config
    folder: Path
    data: dict[str, list[Problem]]
    device: str
    launcher: Launcher
    budget: Budget

    @property
    def budgeted(self) -> bool:
        return self.budget.minutes is not None

    def make_baselines(self, model: LatentReasoner, init_from: str) -> list[str]:
        """Train the baselines, or store `model`, a trained one, in their place; their test answers."""
        config, seeds = self.config, self.config.sweep.seeds
        names = [f"coconut-s{seed}" for seed in (seeds[:1] if self.budgeted or init_from else seeds)]
        if init_from:
            self._store_baseline(model, self.folder / names[0], init_from)
        else:
            if self.budgeted:
                plan = partial(plan_curriculum, model, self.data, config, self.budget)
                steps = self.budget.once("curriculum_steps", plan)
                warmup = min(config.curriculum.warmup_steps, max(1, min(steps) // 4))  # short stages: not all warm-up
                curriculum = replace(config.curriculum, steps=tuple(steps), warmup_steps=warmup)
                config = replace(config, curriculum=curriculum)
            self._run([_curriculum_job("coconut", int(name[9:]), config) for name in names])
        self.answer(names)
        return names

    def tune(self) -> tuple[dict[str, dict], list[dict]]:
        """Settings of each family of arms, by the validation accuracy of short trials, and the trials.

        They start from the first seed's baseline; a grid of one candidate needs no trial.
        """
        s = self.config.sweep
        grids: dict[str, list[dict]] = {
            "temperature": [{"learning_rate": lr, "temperature": t} for lr in s.learning_rates for t in s.temperatures],
            "shared": [{"learning_rate": lr, "mask.rate": p} for lr in s.learning_rates for p in s.rates],
            "supervised": [{"learning_rate": lr} for lr in s.learning_rates],
        }
        jobs = {
            (arm, i): replace(self._arm_job(arm, s.seeds[0], settings, s.tune_steps), name=f"tune-{arm}-{i}")
            for arm, grid in grids.items()
            for i, settings in enumerate(grid if len(grid) > 1 else [])
        }
        self._run(list(jobs.values()))
        scores = {key: read_done(self.folder, job.name)["validation_accuracy"] for key, job in jobs.items()}
        best = {arm: max(range(len(grid)), key=lambda i: scores.get((arm, i), 0)) for arm, grid in grids.items()}
        trials = [{"arm": arm, **grids[arm][i], "validation_accuracy": score} for (arm, i), score in scores.items()]
        return {arm: grid[best[arm]] for arm, grid in grids.items()}, trials

    def run_arms(self, chosen: dict[str, dict]) -> list[str]:
        """Controls and arms of every seed; a budget decides how many seeds and iterations."""
        s, seeds, iterations = self.config.sweep, self.config.sweep.seeds, self.config.grpo.steps
        controls = [] if self.budgeted else s.controls
        if self.budgeted:
            model = self._trained(f"coconut-s{seeds[0]}")
            plan = partial(plan_grpo, model, self.data, self.config, self.budget)
            count, iterations = self.budget.once("seeds_and_iterations", plan)
            seeds = seeds[: count if iterations else 0]
        jobs = [_curriculum_job(control, seed, self.config) for seed in seeds for control in controls]
        jobs += [self._arm_job(arm, seed, chosen.get(_family(arm), {}), iterations) for seed in seeds for arm in s.arms]
        self._run(jobs)
        return [job.name for job in jobs]

    def answer(self, names: list[str], benchmark: str = "test", problems: list[Problem] | None = None) -> None:
        """Store the greedy answers of these models."""
        for name in names:
            if not answers_path(self.folder, f"{name}.{benchmark}").exists():
                self._answer(name, benchmark, self._trained(name), problems or self.data["test"])
        self.budget.save()

    def answer_more(self, names: list[str], chosen: dict[str, dict]) -> None:
        """Sampled answers; then other benchmarks with what is left of a budget, or swapped thoughts without one."""
        test, k = self.data["test"], self.config.evaluate.num_generations
        first = f"-s{self.config.sweep.seeds[0]}"
        names = [name for name in names if _arm_of(name) in SAMPLED and (not self.budgeted or name.endswith(first))]
        size = max(1, 4 * self.config.evaluate.batch_size // k)  # rows are cheap beside the question that they share

        def noise(name: str) -> dict:
            """An arm's own; the baseline's is that of arm `shared`."""
            arm = "temperature" if _arm_of(name) == "temperature" else "shared"
            mask, temperature = arm_settings(_with_settings(self.config.grpo, chosen.get(arm, {})), arm)
            return {"batch_size": size, "num_generations": k, "mask": mask, "temperature": temperature}

        def affordable_problems() -> int:
            model = self._trained(names[0]) if self.budget.minutes else None
            each = answer_seconds(model, self.data["validation"], **noise(names[0])) if model else 0.0
            return self.budget.affordable(0.4 / len(names), each, len(test))

        limit = self.budget.once("sampled_problems", affordable_problems) if self.budgeted else SAMPLED_PROBLEMS
        for name in names if limit else []:
            if not answers_path(self.folder, f"{name}.sampled").exists():
                options = {**noise(name), "run_seed": self.config.seed}
                store_answers(self.folder, f"{name}.sampled", self._trained(name), test[:limit], **options)
        self.budget.save()
        if self.budgeted:
            return self._transfer(names)
        for name in names:
            if _arm_of(name) == "coconut" and not answers_path(self.folder, f"{name}.swapped").exists():
                store_swapped(self.folder, f"{name}.swapped", self._trained(name), test[:SAMPLED_PROBLEMS])

    def _transfer(self, names: list[str]) -> None:
        """Other benchmarks, on as many problems as the time left allows."""
        model, test = self._trained(names[0]), f"{names[0]}.test"
        rate = read_answers(self.folder, test)["seconds"] / len(self.data["test"])
        for i, benchmark in enumerate(TRANSFER):
            key, share = f"transfer_{benchmark}", 0.9 / (len(TRANSFER) - i) / len(names)
            try:
                problems = datasets.benchmark(benchmark)
                expect_together(model, problems, self.config)
            except (OSError, ValueError) as error:  # not in this data folder, or too long for this model
                self.budget.once(key, partial(str, f"skipped: {error}"))
                continue
            limit = self.budget.once(key, partial(self.budget.affordable, share, rate, len(problems)))
            self.answer(names if limit else [], benchmark, problems[:limit])

    # ------------------------------------------------------------ runs
    def _run(self, jobs: list[Job]) -> None:
        options = {"launcher": self.launcher, "workers": self.config.sweep.workers}
        in_process = self.launcher.executor == "in_process"
        run_jobs(jobs, self.folder, self._fit if in_process else partial(run_processes, **options))
        self.budget.save()

    def _fit(self, jobs: list[Job], folder: Path) -> Iterator[tuple[str, int]]:
        """Run jobs one after another in this process; yields (name, exit code)."""
        for job in jobs:
            target, made_by = folder / job.name, commit()
            begun = time.time() - seconds_spent(target)
            model = load_model(job.init_from) if job.init_from else model_from_config(job.config)
            model.place(self.device, job.config.precision)
            problems = (self.data["train"], self.data["validation"])
            options = {"out": str(target), "resume": True, "checkpoint_minutes": CHECKPOINT_MINUTES}
            fit = fit_grpo if job.verb == "grpo" else fit_curriculum
            cot = f"cot-s{job.config.seed}"
            if self.budgeted and fit is fit_curriculum and not answers_path(folder, f"{cot}.test").exists():
                fit_curriculum(model, *problems, job.config, last_stage=0, **options)
                set_stage(model, job.config, 0, self.data["validation"])
                self._answer(cot, "test", model, self.data["test"])
            summary = fit(model, *problems, job.config, **options)
            summary |= {"out": str(target), "peak_memory_gib": peak_memory_gib()}
            write_done(target, summary, job.words(folder), begun, made_by)
            yield job.name, 0

    def _arm_job(self, arm: str, seed: int, settings: dict, iterations: int) -> Job:
        """An arm from its baseline; `none` stops early, since nothing can move (the report checks it)."""
        steps = max(1, min(10, iterations) if arm == "none" else iterations)
        changed = _with_settings(self.config.grpo, settings)
        if self.budgeted:
            changed = replace(changed, eval_every=min(changed.eval_every, steps))
        config = replace(self.config, seed=seed, grpo=replace(changed, arm=arm, steps=steps))
        own = self.folder / f"coconut-s{seed}"
        base = own if own.exists() else self.folder / f"coconut-s{self.config.sweep.seeds[0]}"
        return Job(f"{arm}-s{seed}", "grpo", config, str(base / "best"))

    def _store_baseline(self, model: LatentReasoner, run: Path, init_from: str) -> None:
        """Store a model that was trained elsewhere where the curriculum would have left its own."""
        if (run / "done.json").exists():
            return
        begun = time.time()
        save_model(model, run / "best")
        found = evaluate(model, self.data["validation"], batch_size=self.config.evaluate.batch_size)
        summary = {"stages": {}, "validation_accuracy": found.accuracy}
        write_done(run, summary, ("--init-from", init_from), begun, commit())

    def _trained(self, name: str) -> LatentReasoner:
        """The best weights of a finished run."""
        return load_model(self.folder / name / "best").place(self.device, self.config.precision)

    def _answer(self, name: str, benchmark: str, model: LatentReasoner, problems: list[Problem]) -> None:
        size = self.config.evaluate.batch_size
        store_answers(self.folder, f"{name}.{benchmark}", model, problems, batch_size=size)


def _curriculum_job(control: str, seed: int, config: Config) -> Job:
    curriculum = replace(config.curriculum, control=control)
    return Job(f"{control}-s{seed}", "curriculum", replace(config, seed=seed, curriculum=curriculum))


def _with_settings(grpo: GRPOConfig, settings: dict) -> GRPOConfig:
    """`grpo` with the fields that tuning chose: learning_rate, temperature, mask.rate."""
    fields = {key: value for key, value in settings.items() if key != "mask.rate"}
    return replace(grpo, **fields, mask=replace(grpo.mask, rate=settings.get("mask.rate", grpo.mask.rate)))


def _arm_of(name: str) -> str:
    return name.rpartition("-s")[0]


def _family(arm: str) -> str:
    """Masked arms share the settings chosen with `shared`."""
    return "shared" if arm in ("shared", "per_step", "shared_greedy") else arm if arm == "supervised" else "temperature"
