"""The verbs of the command line: cli.py parses one of these classes with tyro and calls it.

The comment behind a field is its help text. What only one verb needs is imported inside it.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from latentlab.config import Config, Count, Rate, Section, load_preset
from latentlab.data import datasets, jsonl
from latentlab.runtime import distributed, environment, files
from latentlab.study import results

Minutes = Annotated[float, Field(ge=0, le=10_000_000)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Stage = Literal["pilot", "main", "map", "long", "others", "readings"]


class Verb(Section):
    config: Annotated[Config, tyro.conf.arg(name="")]


class Computing(Verb):
    device: str = "auto"  # auto (CUDA if there is one) | cpu | cuda | cuda:1
    threads: Threads = 0  # torch threads; 0 leaves torch's default


class Shared(Computing):
    """A verb whose work several processes may share: `torchrun ... -m latentlab VERB`."""

    def __call__(self) -> None:
        with distributed.joined(self.device):
            result = self.run()
            if distributed.rank() == 0:
                self.report(result)

    def run(self) -> dict:
        raise NotImplementedError

    def report(self, result: dict) -> None:
        print(json.dumps(result))


class Training(Shared):
    out: str = ""  # run folder; default runs/<preset>/curriculum-<control>-s<seed> or grpo-<arm>-s<seed>
    init_from: str = ""  # run folder, checkpoint or Hub id to start from; default the preset's
    resume: bool = False  # continue an interrupted run from its last checkpoint
    shard: bool = False  # with torchrun: split weights, gradient and optimizer state over the processes (FSDP2)
    max_minutes: Minutes = 0.0  # stop after this many minutes, saved and ready for --resume; 0 is no limit
    checkpoint_minutes: Minutes = 10.0  # minutes between checkpoints: the most work that a kill can lose
    tensorboard: bool = False  # write the metrics for TensorBoard as well, into the run folder

    def fit(self, fit, name: str, init_from: str, *, curriculum: bool) -> dict:
        """Pre-flight checks, then `fit` in its run folder."""
        from latentlab.pretrained.loading import model_from_config
        from latentlab.training import preflight

        config, out = self.config, self.out or f"runs/{self.config.preset}/{name}-s{self.config.seed}"
        files.expect_writable(Path(out))
        if self.resume and not any(Path(out, name).exists() for name in ("config.json", "state.pt", "state")):
            raise ValueError(f"resume: got {out}, expected the folder of a run; correct --out, or drop --resume")
        model = model_from_config(config, init_from=init_from, curriculum=curriculum)
        model.place(distributed.select_device(self.device), config.precision)
        train, validation = (datasets.load(config.data, split) for split in ("train", "validation"))
        preflight.expect_together(model, [*train, *validation], config, curriculum=curriculum)
        preflight.say_precision(config, model.device)
        names = ("resume", "shard", "max_minutes", "checkpoint_minutes", "tensorboard")
        options = {name: getattr(self, name) for name in names}
        summary = fit(model, train, validation, config, out=out, **options)
        return {"out": out, **summary, "peak_memory_gib": environment.peak_memory_gib()}


class Curriculum(Training):
    """Train the curriculum: stage 0 with explicit steps, then one latent stage after another."""

    def run(self) -> dict:
        from latentlab.training.curriculum import fit_curriculum

        return self.fit(fit_curriculum, f"curriculum-{self.config.curriculum.control}", self.init_from, curriculum=True)


class Grpo(Training):
    """Train one GRPO arm from a checkpoint, by default the one shipped for the preset."""

    def run(self) -> dict:
        from latentlab.pretrained.loading import shipped_checkpoint
        from latentlab.training.arms import fit_grpo

        start = self.init_from or str(shipped_checkpoint(self.config.preset))
        return self.fit(fit_grpo, f"grpo-{self.config.grpo.arm}", start, curriculum=False)


class Evaluate(Shared):
    """Accuracy of a checkpoint: greedy pass@1, and pass@k and the majority over masks."""

    checkpoint: tyro.conf.Positional[str] = ""  # run folder, checkpoint or Hub id; default the one shipped
    benchmark: str = ""  # gsm8k | gsm8k_perturb(able|ed) | svamp | multiarith | gsm_hard; default: preset's test split
    limit: Count = 0  # problems; 0 takes all
    json: str = ""  # write the result to this file as well

    def run(self) -> dict:
        from latentlab.evaluation import accuracy
        from latentlab.pretrained.loading import load_model, shipped_checkpoint
        from latentlab.training import preflight

        config = self.config
        files.expect_file(self.json)
        checkpoint = self.checkpoint or shipped_checkpoint(config.preset)
        problems = datasets.benchmark(self.benchmark) if self.benchmark else datasets.load(config.data, "test")
        problems = problems[: self.limit or None]
        model = load_model(checkpoint).place(distributed.select_device(self.device), config.precision)
        preflight.expect_together(model, problems, config)
        preflight.say_precision(config, model.device)
        found = accuracy.summary(model, problems, config, mask=config.grpo.mask, temperature=config.grpo.temperature)
        return {"checkpoint": str(checkpoint), "preset": config.preset, "problems": problems[0].source, **found}

    def report(self, result: dict) -> None:
        text = json.dumps(result, indent=1) + "\n"
        print(text, end="")
        if self.json:
            files.write_atomically(Path(self.json), text.encode())
        greedy, sampled, k = result["greedy"], result["sampled"], self.config.evaluate.num_generations
        low, high = greedy["interval"]
        print(
            f"{result['checkpoint']}: {greedy['correct']:,} of {result['n']:,} problems right, {greedy['pass@1']:.1%} "
            f"[{low:.1%}, {high:.1%}], by greedy answers; of {k} sampled ones {sampled['mean']:.1%} on average, "
            f"{sampled['pass@k'][str(k)]:.1%} of problems at least once",
            file=sys.stderr,
        )


class Ask(Verb):
    """Answer a question of one's own: the clean train of thought, and those under masks."""

    question: tyro.conf.Positional[str] = ""  # in the words of its training
    checkpoint: str = ""  # run folder, checkpoint or Hub id; default the one shipped
    rate: Rate = 0.1  # of the masks; 0: none
    k: Annotated[int, Field(ge=1, le=1024)] = 8  # rollouts; --seed draws other masks

    def __call__(self) -> None:
        from latentlab.pretrained.loading import load_model, shipped_checkpoint
        from latentlab.teach.thoughts import ask

        model = load_model(self.checkpoint or shipped_checkpoint(self.config.preset))
        print(ask(model, self.question, rate=self.rate, k=self.k, seed=self.config.seed))


class Plot(Verb):
    """Draw a training run: what it learned, and how many groups had a signal."""

    run: tyro.conf.Positional[str] = ""  # a run folder

    def __call__(self) -> None:
        from latentlab.study import figures

        print("wrote", figures.draw_run(Path(self.run)))


class Study(Verb):
    """Run notebooks 00-04 in order with papermill; finished ones are not run again."""

    only: str = ""  # number or name of one notebook, such as 02

    def __call__(self) -> None:
        from latentlab.study import notebooks

        if self.config != load_preset(self.config.preset):
            raise ValueError("study: got a changed field, expected an unchanged preset; put the change into its file")
        notebooks.run_study(self.config.preset, only=self.only or None)


class Sweep(Verb):
    """Arms x seeds as independent runs, one process each; with --plan the study of a settings file."""

    out: str = ""  # folder of the runs; default runs/<preset>/sweep, or runs/<preset>/<plan>
    plan: str = ""  # TOML file of a study of many bases, or "noise", which asks when a mask helps
    stages: tuple[Stage, ...] = ()  # of the plan; default all
    unit: str = ""  # one unit of the plan in this process, STAGE/BASE/SEED; what a plan's processes run
    executor: Literal["local", "slurm"] = "local"  # processes on this machine, or SLURM jobs through submitit
    slurm: tuple[str, ...] = ()  # options of sbatch, as partition=gpu time=600 (minutes) gpus_per_node=1
    retries: Count = 1  # further tries of a failed run

    def __call__(self) -> None:
        from latentlab.study.experiment import run_experiment
        from latentlab.study.launch import Launcher

        launcher = Launcher(self.executor, self.slurm, self.retries)
        if self.plan:
            self.run_plan(launcher)
        elif self.unit or self.stages:
            raise ValueError("sweep: got --unit or --stages without --plan, expected them of a plan; add --plan noise")
        else:
            print("wrote", run_experiment(self.config, out=_study_folder(self, "sweep"), launcher=launcher))

    def run_plan(self, launcher) -> None:
        """The stages of a plan, or one of its units."""
        from latentlab.study.noise import plan, stages

        if self.config != load_preset("tiny"):
            raise ValueError(
                "sweep: got a preset or a field with --plan, expected neither; put the change into its file"
            )
        out = Path(self.out or f"runs/{plan.load_plan(self.plan).preset}/{Path(self.plan).stem}")
        files.expect_writable(out)
        if self.unit:
            print(json.dumps(stages.run_unit(self.plan, out, self.unit)))
            return
        files.expect_writable(results.reports_folder())
        for path in stages.run_plan(self.plan, out, self.stages, launcher):
            print("wrote", path)


class Reproduce(Computing):
    """The GSM8K study: curriculum, arms and their answers in one process, inside a time budget."""

    out: str = ""  # folder of the run; default runs/<preset>/reproduce
    budget_minutes: Minutes = 24.0  # the parts are sized to fit; 0 takes the preset's own steps
    backbone: str = ""  # folder or Hub id instead of the preset's backbone
    init_from: str = ""  # a trained Coconut checkpoint, straight into the arms

    def __call__(self) -> None:
        from latentlab.study.experiment import run_experiment

        asked = {name: getattr(self, name) for name in ("budget_minutes", "backbone", "init_from", "device")}
        print("wrote", run_experiment(self.config, out=_study_folder(self, "reproduce"), **asked))


def _study_folder(verb: Sweep | Reproduce, name: str) -> str:
    """The folder of a study's runs, checked to be writable, as is the folder of its report."""
    out = verb.out or f"runs/{verb.config.preset}/{name}"
    files.expect_writable(Path(out))
    files.expect_writable(results.reports_folder() / verb.config.preset)
    return out


class Verify(Verb):
    """Check the theory exactly, that this machine replays rollouts, and a checkpoint's backbone."""

    checkpoint: tyro.conf.Positional[str] = ""  # "tiny", run folder, checkpoint or Hub id to compare with itself
    device: str = "cpu"  # cpu | cuda
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    json: str = ""  # write the table to this file as well

    def __call__(self) -> int:
        from latentlab.verify import table

        device = str(distributed.select_device(self.device))
        return table.main(device, self.dtype, files.expect_file(self.json), self.checkpoint)


class Bench(Computing):
    """Time the engine and the training loops; gpt2 takes fifteen minutes.

    With --against another checkout of the project is timed beside this one, row by row.
    """

    shape: Literal["tiny", "gpt2", "smollm2"] = "gpt2"
    against: str = ""  # another checkout, such as made by `git worktree add FOLDER HEAD~1`; on one CPU thread
    pairs: Annotated[int, Field(ge=2, le=1000)] = 9  # of processes, in turn here and there, with --against
    json: str = ""  # write the result to this file as well
    device: str = "cpu"  # cpu | cuda

    def __call__(self) -> None:
        import matplotlib  # noqa: F401  # for the figure: a missing package is reported before the timing

        from latentlab.bench import against, run
        from latentlab.study import figures

        copy, folder = files.expect_file(self.json), results.reports_folder()
        files.expect_writable(folder / "bench")
        if self.against and self.device != "cpu":
            raise ValueError(
                f"against: got --device {self.device}, expected cpu; two checkouts are timed on one thread"
            )
        if self.against:
            result = against.run_against(Path(self.against), self.shape, self.pairs)
        else:
            result = run.run_bench(self.shape, str(distributed.select_device(self.device)))
        path = results.write_result(**result)
        if copy:
            files.write_atomically(copy, path.read_bytes())
        if not self.against:
            figures.draw_bench(result, folder)
        print("wrote", path)


class Data(Verb):
    """Print problems as JSON lines, or write them to a file."""

    split: Literal["train", "validation", "test"] = "test"
    n: Count = 5  # problems; 0 takes all for the split train
    out: str = ""  # file to write; default stdout

    def __call__(self) -> None:
        files.expect_file(self.out)
        size: dict[str, Any] = {f"{self.split}_size": self.n}
        rows = datasets.load(dataclasses.replace(self.config.data, **size), self.split)
        if self.out:
            jsonl.write_jsonl(rows, self.out)
        else:
            print(*(json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in rows), sep="\n")


class Report(Verb):
    """Rebuild RESULTS.md; with --publish the committed results and what README and docs quote."""

    publish: bool = False  # for maintainers: copy the results over into reports/published

    def __call__(self) -> None:
        from latentlab.study import tables

        files.expect_writable(results.reports_folder())
        print(tables.publish() if self.publish else tables.build_report())
