"""The command line: `latentlab VERB --preset NAME [options]`.

    study      run the notebooks in order, write the report           --only 02
    curriculum train the curriculum (a Coconut baseline or a control)  --out FOLDER
    grpo       train one GRPO arm                                      --out FOLDER --init-from CHECKPOINT
    evaluate   accuracy of a checkpoint on a benchmark                 CHECKPOINT --benchmark gsm8k
    sweep      arms x seeds: `latentlab sweep compare --preset tiny`
               GSM8K in a time budget: `latentlab sweep reproduce --preset smol --budget-minutes 24`
    verify     exact theory, exact replay: a self-check                --device cuda --dtype bfloat16
    bench      time the engine                                         --shape gpt2
    data       print or write problems                                 --split test --n 5
    report     rebuild RESULTS.md and the README's tables from the result files

Every field of a preset can be set: `latentlab grpo --preset tiny --arms.learning-rate 1e-5`. A wrong use ends in one
line on stderr and exit code 2; `--debug` shows the traceback. SIGTERM, SIGINT and --max-minutes end a training run
after its step with exit code 75: the same command with --resume goes on.
"""

# Heavy imports happen inside a verb: --help and wrong uses answer at once.

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from latentlab.config import LARGEST, Config, check, load_preset


class Shared:
    """A verb whose work several processes may share: `accelerate launch ... -m latentlab.cli VERB`."""

    def __call__(self, config: Config) -> None:
        from latentlab.runtime import distributed

        with distributed.joined(self.device):
            result = self.run(config)
            if distributed.rank() == 0:
                self.report(result)

    def report(self, result: dict) -> None:
        print(json.dumps(result))


@dataclass
class Curriculum(Shared):
    """Train the curriculum: stage 0 with explicit steps, then one latent stage after another."""

    out: str = ""  # run folder; default runs/<preset>/curriculum-<control>-s<seed>
    init_from: str = ""  # a checkpoint to start from instead of the preset's backbone
    resume: bool = False
    max_minutes: float = 0.0  # stop after so many minutes, saved and ready for --resume; 0 is no limit
    checkpoint_minutes: float = 10.0  # at most so many minutes of work are lost by a kill
    device: str = "auto"  # auto (CUDA if there is one) | cpu | cuda | cuda:1
    threads: int = 0  # torch threads; 0 leaves torch's default

    def run(self, config: Config) -> dict:
        from latentlab.data import datasets
        from latentlab.runtime import environment, files
        from latentlab.training import curriculum, preflight

        out = self.out or f"runs/{config.preset}/curriculum-{config.curriculum.control}-s{config.seed}"
        files.expect_writable(Path(out))
        train, validation = (datasets.load(config.data, split) for split in ("train", "validation"))
        from latentlab.pretrained.loading import model_from_config

        model = model_from_config(config, init_from=self.init_from).place(self.device, config.precision)
        preflight.expect_together(model, [*train, *validation], config, curriculum=True)
        summary = curriculum.fit_curriculum(
            model, train, validation, config, out=out, resume=self.resume, max_minutes=self.max_minutes,
            checkpoint_minutes=self.checkpoint_minutes,
        )  # fmt: skip
        return {"out": out, **summary, "peak_memory_gib": environment.peak_memory_gib()}


@dataclass
class Grpo(Shared):
    """Train one GRPO arm from a checkpoint."""

    init_from: str = ""  # run folder, checkpoint or Hub id; default the one shipped in data/checkpoints
    out: str = ""  # run folder; default runs/<preset>/grpo-<arm>-s<seed>
    resume: bool = False
    max_minutes: float = 0.0  # stop after so many minutes, saved and ready for --resume; 0 is no limit
    checkpoint_minutes: float = 10.0  # at most so many minutes of work are lost by a kill
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    threads: int = 0  # torch threads; 0 leaves torch's default

    def run(self, config: Config) -> dict:
        from latentlab.data import datasets
        from latentlab.pretrained import loading
        from latentlab.runtime import environment, files
        from latentlab.training import arms, preflight

        out = self.out or f"runs/{config.preset}/grpo-{config.grpo.arm}-s{config.seed}"
        files.expect_writable(Path(out))
        checkpoint = self.init_from or loading.shipped_checkpoint(config.preset)
        from latentlab.pretrained.loading import load_model

        model = load_model(checkpoint).place(self.device, config.precision)
        train, validation = (datasets.load(config.data, split) for split in ("train", "validation"))
        preflight.expect_together(model, [*train, *validation], config)
        summary = arms.fit_grpo(
            model, train, validation, config, out=out, resume=self.resume, max_minutes=self.max_minutes,
            checkpoint_minutes=self.checkpoint_minutes,
        )  # fmt: skip
        return {"out": out, **summary, "peak_memory_gib": environment.peak_memory_gib()}


@dataclass
class Evaluate(Shared):
    """Accuracy of a checkpoint: greedy pass@1, and pass@k and the majority over masks."""

    checkpoint: str = ""  # run folder, checkpoint or Hub id; default the one shipped for the preset
    benchmark: str = (
        ""  # gsm8k | gsm8k_perturb(able|ed) | svamp | multiarith | gsm_hard; default the preset's own test split
    )
    limit: int = 0  # problems; 0 takes all
    json: str = ""  # write the result here as well
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    threads: int = 0  # torch threads; 0 leaves torch's default

    def run(self, config: Config) -> dict:
        from latentlab.data import datasets
        from latentlab.evaluation import accuracy
        from latentlab.pretrained import loading
        from latentlab.runtime import files
        from latentlab.training import preflight

        files.expect_file(self.json)
        checkpoint = self.checkpoint or loading.shipped_checkpoint(config.preset)
        problems = datasets.benchmark(self.benchmark) if self.benchmark else datasets.load(config.data, "test")
        from latentlab.pretrained.loading import load_model

        model = load_model(checkpoint).place(self.device, config.precision)
        g, problems = config.grpo, problems[: self.limit or None]
        preflight.expect_together(model, problems, config)
        return accuracy.summary(model, problems, config, mask=g.mask, temperature=g.temperature)

    def report(self, result: dict) -> None:
        from latentlab.runtime import files

        print(json.dumps(result, indent=1))
        if self.json:
            files.write_atomically(Path(self.json), (json.dumps(result, indent=1) + "\n").encode())


@dataclass
class Study:
    """Run notebooks 00-04 in order with papermill; finished ones are not run again."""

    only: str = ""  # number or name of one notebook, such as 02

    def __call__(self, config: Config) -> None:
        from latentlab.study import notebooks

        if config != load_preset(config.preset):
            raise ValueError(
                "study: got a changed field, expected a preset as it is; put the change into a preset file"
            )
        notebooks.run_study(config.preset, only=self.only or None)


@dataclass
class Sweep:
    """compare: arms x seeds as independent runs. reproduce: the GSM8K study in one process, inside a time budget."""

    name: str = ""  # compare | reproduce
    out: str = ""  # folder of the runs; default runs/<preset>/<name>
    budget_minutes: float = 24.0  # reproduce: its parts are sized to fit; 0 takes the preset's own steps
    weights: str = (
        ""  # reproduce: the backbone, a checkpoint or one in parts (latentlab.study.parts); default the preset's
    )
    init_from: str = ""  # reproduce: a trained Coconut checkpoint, straight into the arms
    device: str = "auto"  # reproduce
    threads: int = 0  # reproduce
    executor: Literal["local", "slurm"] = "local"  # processes on this machine, or SLURM jobs through submitit
    slurm: tuple[str, ...] = ()  # options of sbatch, as partition=gpu time=600 (minutes) gpus_per_node=1
    retries: int = 1  # further tries of a failed run

    def __call__(self, config: Config) -> None:
        from latentlab.runtime import files
        from latentlab.study import experiment, launch, results

        if self.name not in ("compare", "reproduce"):
            raise ValueError(f"sweep: got the name {self.name!r}, expected compare or reproduce; `sweep compare`, say")
        out = self.out or f"runs/{config.preset}/{self.name}"
        files.expect_writable(Path(out))
        files.expect_writable(results.reports_folder() / config.preset)
        if self.name == "reproduce":
            path = experiment.run_experiment(
                config,
                out=out,
                budget_minutes=self.budget_minutes,
                device=self.device,
                backbone=self.weights,
                init_from=self.init_from,
            )
        else:
            launcher = launch.Launcher(self.executor, self.slurm, self.retries)
            path = experiment.run_experiment(config, out=out, launcher=launcher)
        print("wrote", path)


@dataclass
class Verify:
    """Check the theory exactly, and that this machine replays rollouts to rounding error."""

    device: str = "cpu"  # cpu | cuda
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    json: str = ""  # write the table here as well

    def __call__(self, config: Config) -> int:
        from latentlab import model
        from latentlab.runtime import files
        from latentlab.verify import table

        device = str(model.torch_device(self.device))
        return table.main(device, self.dtype, files.expect_file(self.json))


@dataclass
class Bench:
    """Time the engine against other ways to make rollouts and against the floor; gpt2 takes twenty minutes."""

    shape: Literal["tiny", "gpt2", "smollm2"] = "gpt2"
    json: str = ""  # write the result here as well
    device: str = "cpu"  # cpu | cuda
    threads: int = 0  # torch threads; 0 leaves torch's default

    def __call__(self, config: Config) -> int:
        from latentlab import model
        from latentlab.bench import engine
        from latentlab.runtime import files
        from latentlab.study import results

        path = files.expect_file(self.json)
        files.expect_writable(results.reports_folder() / "bench")
        return engine.main(self.shape, str(model.torch_device(self.device)), path)


@dataclass
class Data:
    """Print problems as JSON lines, or write them into a file."""

    split: Literal["train", "validation", "test"] = "test"
    n: int = 5  # problems
    out: str = ""  # file to write; default stdout
    copies_report: str = ""  # measure the copies of GSM8K (perturb.py); write perturb/perturb.json into this folder

    def __call__(self, config: Config) -> None:
        from latentlab.data import datasets, jsonl
        from latentlab.runtime import files

        if self.copies_report:
            from latentlab.study import copies_report

            return copies_report.write(config, self.copies_report)
        files.expect_file(self.out)
        rows = datasets.load(dataclasses.replace(config.data, **{f"{self.split}_size": self.n}), self.split)
        if self.out:
            jsonl.write_jsonl(rows, self.out)
        for row in [] if self.out else rows:
            print(json.dumps(dataclasses.asdict(row), ensure_ascii=False))


@dataclass
class Report:
    """Rebuild reports/RESULTS.md and the README's tables and figure from the result files."""

    def __call__(self, config: Config) -> None:
        from latentlab.runtime import files
        from latentlab.study import results, tables

        files.expect_writable(results.reports_folder())
        print(tables.build_report())


VERBS = {
    "study": Study,
    "curriculum": Curriculum,
    "grpo": Grpo,
    "evaluate": Evaluate,
    "sweep": Sweep,
    "verify": Verify,
    "bench": Bench,
    "data": Data,
    "report": Report,
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 (a study or run failed), 2 (wrong use), 75 (stopped and saved)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    verb = None
    try:
        verb, config = parse(argv)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not isinstance(verb, Shared):
            raise ValueError(
                f"{argv[0]}: got {os.environ['WORLD_SIZE']} processes, expected one; only curriculum, grpo and "
                "evaluate can share their work"
            )
        if getattr(verb, "threads", 0):
            import torch

            torch.set_num_threads(verb.threads)
        return verb(config) or 0
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError, ImportError) as error:
        code = getattr(error, "exit_code", 2 if isinstance(error, (ValueError, OSError)) else 1)
        if debug and code != 75:
            raise
        # Of several processes one says what all of them know: a wrong command line, or what failed on any.
        if os.environ.get("RANK", "0") == "0" or not getattr(error, "known_to_all", verb is None):
            print(f"latentlab: {_one_line(error)}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("latentlab: aborted; a training run goes on from its last checkpoint with --resume", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    """What was got, what to do. Errors of this library say both; those of the system and of torch get it here."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno:
        remedy = REMEDIES.get(error.errno, "check this path")
        return f"{error.filename or 'a file'}: {error.strerror}; {remedy}, then the same command again"
    if isinstance(error, ModuleNotFoundError):
        return f"got no package {error.name}, expected it installed; pip install -e '.[study]'"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return f"out of memory ({text[:200]}); lower the batch sizes or the model's shape"
    return text or f"{type(error).__name__}, which says no more; --debug shows where"


REMEDIES = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some of your quota",
    errno.EACCES: "allow writing and reading there, or name another place",
    errno.EPERM: "allow writing and reading there, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOTDIR: "a file stands where a folder is expected: name another place",
    errno.EEXIST: "a file stands where a folder is expected: name another place",
    errno.EISDIR: "a folder stands where a file is expected: name another place",
    errno.ENOENT: "there is no such file: correct the path",
}


def parse(argv: list[str]):
    """(verb, config) from the command line; ValueError with one line for an unknown verb, preset, field or value."""
    if argv[0] not in VERBS:
        raise ValueError(f"got the verb {argv[0]!r}, expected one of {', '.join(VERBS)}")
    import tyro

    kind, words = VERBS[argv[0]], argv[1:]
    flags = [word.split("=")[0].replace("_", "-") for word in words if re.match("--[a-z]", word)]
    for word in flags:
        if flags.count(word) > 1:
            raise ValueError(f"{word}: got it twice, expected it once; drop one")
    if "" in words or any(re.fullmatch("--[^=]+=", word) for word in words):
        raise ValueError(f"{argv[0]}: got an empty value, expected none or a value; leave the option out")
    preset, words = _take_preset(words)
    if words and not words[0].startswith("-") and dataclasses.fields(kind):  # the first field may go without its flag
        words = [f"--{dataclasses.fields(kind)[0].name.replace('_', '-')}", *words]

    @dataclass
    class Call:
        verb: Annotated[kind, tyro.conf.arg(name="")] = field(default_factory=kind)
        config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=lambda: load_preset(preset))

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            call = tyro.cli(Call, args=words, prog=f"latentlab {argv[0]}", description=kind.__doc__)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = " ".join(re.sub(r"\x1b\[[0-9;]*m|╭.*╮|[─-╿]", " ", said.getvalue()).split())  # no colours, no box
        raise ValueError(f"{argv[0]}: {text}") from None
    check(call.config)
    for name in ("threads", "limit", "max_minutes", "checkpoint_minutes", "budget_minutes", "n", "retries"):
        got, most = getattr(call.verb, name, 0), 1024 if name == "threads" else LARGEST
        if not 0 <= got <= most:
            raise ValueError(f"--{name.replace('_', '-')}: got {got}, expected at least 0 and at most {most}")
    return call.verb, call.config


def _take_preset(words: list[str]) -> tuple[str, list[str]]:
    """The value of --preset (default tiny) and the other words."""
    for i, word in enumerate(words):
        if word.startswith("--preset="):
            return word.split("=", 1)[1], words[:i] + words[i + 1 :]
        if word == "--preset":
            if i + 1 == len(words):
                raise ValueError("--preset: got no name, expected smoke, tiny, smol or paper")
            return words[i + 1], words[:i] + words[i + 2 :]
    return "tiny", words


if __name__ == "__main__":
    sys.exit(main())
