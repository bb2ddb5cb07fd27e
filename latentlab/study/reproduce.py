"""The GSM8K study inside a time budget: one process, one device, no network, no Jupyter.

    latentlab sweep reproduce --preset smol --budget-minutes 24          python -m latentlab.study.reproduce: without tyro

    runs/smol/reproduce/plan.json           seconds spent so far, and the steps that the budget allowed each part
    runs/smol/reproduce/train.jsonl         the training problems, copies included: making them takes half a minute
    runs/smol/reproduce/coconut-s0/         the curriculum: chain of thought, then the latent stages
    runs/smol/reproduce/shared-s0/ …        the GRPO arms, each from the same baseline
    runs/smol/reproduce/answers/            every answer of every finished model; written once per model and benchmark
    reports/smol/reproduce.json …           the small files that remain (gsm8k_report.py); smol-cpu if made on a CPU

Each part is sized to the budget (budget.py); what is left over buys sampled answers and transfer. The same command goes
on after an interruption. The test set decides nothing: each finished model answers it greedily once, the baseline and
the first seed's arms once more by sampling.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from latentlab.config import Config, arm_settings, check_arms, from_dict, load_preset, to_dict
from latentlab.data import datasets
from latentlab.data.jsonl import read_jsonl, write_jsonl
from latentlab.evaluation.accuracy import evaluate
from latentlab.model import LatentReasoner
from latentlab.pretrained.loading import load_model, model_from_config, save_model
from latentlab.problems import Problem
from latentlab.runtime.devices import select_device
from latentlab.runtime.files import write_atomically
from latentlab.study import parts
from latentlab.study.budget import Budget, affordable, answer_seconds, plan_curriculum, plan_grpo
from latentlab.study.gsm8k_report import write_report
from latentlab.training.arms import fit_grpo
from latentlab.training.curriculum import fit_curriculum, set_stage
from latentlab.training.preflight import expect_together

TRANSFER = ("gsm8k_perturbable", "gsm8k_perturbed", "svamp", "multiarith", "gsm_hard")
CHECKPOINT_MINUTES = 3.0  # what a kill may cost: the whole budget may be half an hour


def reproduce(
    config: Config, *, out: str, budget_minutes: float, device: str = "auto", weights: str = "", init_from: str = ""
) -> Path:
    """Run or go on with the study in folder `out`; returns the path of its result file.

    budget_minutes 0: no limit, the preset's own steps. `weights`: the backbone, a checkpoint or one that `parts.split`
    made; default the preset's. `init_from`: a trained Coconut checkpoint, straight into the arms: no curriculum.
    Raises ValueError or OSError, one line, before any compute: a missing data file, a damaged part, too little memory.
    """
    if not 0 <= budget_minutes < float("inf"):
        raise ValueError(
            f"--budget-minutes: got {budget_minutes:g}, expected at least 0; 0 takes the preset's own steps"
        )
    if weights and init_from:
        raise ValueError("--weights and --init-from: got both, expected a backbone or a trained checkpoint; drop one")
    check_arms(config.sweep)
    start, folder = time.monotonic(), Path(out)
    data = {split: datasets.load(config.data, split) for split in ("validation", "test")}
    kept = folder / "train.jsonl"
    data["train"] = read_jsonl(kept) if kept.exists() else datasets.load(config.data, "train")
    folder.mkdir(parents=True, exist_ok=True)
    model = _load(config, folder, weights or init_from, trained=bool(init_from)).place(
        select_device(device), config.precision
    )
    learned = [*data["train"], *data["validation"]]
    expect_together(model, [*learned, *data["test"]], config)
    if not init_from:
        expect_together(model, learned, config, curriculum=True)
    _expect_memory(model)
    budget, source = Budget(folder, config, budget_minutes, model, start), model.provenance
    if not kept.exists():
        write_jsonl(data["train"], kept)

    baseline = folder / "coconut-s0"
    if init_from:
        _keep_baseline(model, data["validation"], config, baseline)
    else:
        steps = budget.once("curriculum_steps", lambda: plan_curriculum(model, data, config, budget))
        warmup = min(config.curriculum.warmup_steps, max(1, min(steps) // 4))  # short stages are not all warm-up
        config = replace(config, curriculum=replace(config.curriculum, steps=tuple(steps), warmup_steps=warmup))
        _train_curriculum(model, data, config, baseline, folder, budget)
    model = _trained(baseline, config, device)
    _greedy("coconut-s0", model, data["test"], config, folder)
    budget.save()

    seeds, iterations = budget.once("seeds_and_iterations", lambda: plan_grpo(model, data, config, budget))
    runs = [(arm, seed) for seed in config.sweep.seeds[:seeds] for arm in config.sweep.arms] if iterations else []
    grpo = replace(config.grpo, steps=max(1, iterations), eval_every=min(config.grpo.eval_every, max(1, iterations)))
    for arm, seed in runs:
        name = f"{arm}-s{seed}"
        if not (folder / "answers" / f"{name}.gsm8k.json").exists():
            arm_config = replace(config, seed=seed, grpo=replace(grpo, arm=arm))
            arm_model = _trained(baseline, config, device)
            summary = fit_grpo(
                arm_model, data["train"], data["validation"], arm_config, out=folder / name, resume=True,
                checkpoint_minutes=CHECKPOINT_MINUTES,
            )  # fmt: skip
            write_atomically(folder / name / "done.json", (json.dumps(summary) + "\n").encode())
            _greedy(name, arm_model, data["test"], config, folder)
        budget.save()
    names = ["coconut-s0", *(f"{arm}-s{seed}" for arm, seed in runs)]
    _spend_the_rest(names, data, config, folder, device, budget)
    budget.save()
    return write_report(
        config, folder, names, data["test"], cot=None if init_from else "cot-s0", device=budget.device,
        weights=source, started=budget.data["started"], plan=budget.data["plan"],
        minutes=budget.spent() / 60, budget_minutes=budget_minutes, peak_memory_gib=budget.data["peak_memory_gib"],
        commits=budget.data["commits"],
    )  # fmt: skip


def _load(config: Config, folder: Path, weights: str, *, trained: bool) -> LatentReasoner:
    """The model to start from: rejoined from parts, a folder, a Hub id, or the preset's backbone."""
    if weights and parts.is_split(weights):
        weights = str(parts.join(weights, folder / "weights"))
    if trained:
        return load_model(weights)
    if weights:
        config = replace(config, backbone=replace(config.backbone, name_or_path=weights))
    return model_from_config(config)


def _trained(run: Path, config: Config, device: str) -> LatentReasoner:
    """The best weights of a finished run."""
    return load_model(run / "best").place(select_device(device), config.precision)


def _expect_memory(model: LatentReasoner) -> None:
    """OSError if the GPU cannot hold weights, gradients, two moments and some activations."""
    if model.device.type != "cuda":
        return
    need = 16 * sum(p.numel() for p in model.parameters()) + 2 * 2**30
    free, _ = torch.cuda.mem_get_info(model.device)
    if free + torch.cuda.memory_allocated(model.device) < need:
        raise OSError(
            f"GPU: got {free / 2**30:.1f} GiB free, expected {need / 2**30:.1f} for weights, gradients, optimizer "
            "and a micro-batch; free some, or use a larger GPU"
        )


# ---------------------------------------------------------------- the parts
def _keep_baseline(model, validation: list[Problem], config: Config, run: Path) -> None:
    """Store a checkpoint that was trained elsewhere where the curriculum would have left its own."""
    if (run / "done.json").exists():
        return
    save_model(model, run / "best")
    accuracy = evaluate(model, validation, batch_size=config.evaluate.batch_size).accuracy
    summary = {"stages": {}, "validation_accuracy": accuracy}
    write_atomically(run / "done.json", (json.dumps(summary) + "\n").encode())


def _train_curriculum(model, data, config: Config, run: Path, folder: Path, budget: Budget) -> None:
    """Chain of thought, answered on the test set, then the latent stages."""
    if (run / "done.json").exists():
        return
    options = {"out": run, "resume": True, "checkpoint_minutes": CHECKPOINT_MINUTES}
    if not (folder / "answers" / "cot-s0.gsm8k.json").exists():
        fit_curriculum(model, data["train"], data["validation"], config, last_stage=0, **options)
        budget.save()
        set_stage(model, config, 0, data["validation"])
        _greedy("cot-s0", model, data["test"], config, folder)
        budget.save()
    summary = fit_curriculum(model, data["train"], data["validation"], config, **options)
    write_atomically(run / "done.json", (json.dumps(summary) + "\n").encode())


def _greedy(name: str, model, problems: list[Problem], config: Config, folder: Path, benchmark: str = "gsm8k") -> None:
    _answer(folder, f"{name}.{benchmark}", model, problems, batch_size=config.evaluate.batch_size)


def _answer(folder: Path, name: str, model, problems: list[Problem], **options) -> None:
    """Write answers/<name>.json, unless it is there: the answers, which are right, when and in how many seconds."""
    path = folder / "answers" / f"{name}.json"
    if path.exists():
        return
    start = time.monotonic()
    found = evaluate(model, problems, **options)
    record = {
        "ids": [p.id for p in problems], "correct": found.correct.astype(int).tolist(), "text": list(found.text),
        "seconds": round(time.monotonic() - start, 2), "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    write_atomically(path, json.dumps(record, ensure_ascii=False).encode())


def _spend_the_rest(names: list[str], data: dict, config: Config, folder: Path, device: str, budget: Budget) -> None:
    """Sampled answers under masks, then the other benchmarks, on as many problems as the remaining time allows."""
    test, k = data["test"], config.evaluate.num_generations
    first = names[: 1 + len(config.sweep.arms)]  # the baseline, and the arms of the first seed
    models = {name: _trained(folder / name, config, device) for name in first}

    def sampling(name: str) -> dict:
        """An arm's own noise, so far as it has any; the baseline's and a greedy arm's: the method's."""
        arm = name.rpartition("-s")[0]
        mask, temperature = arm_settings(config.grpo, arm if arm in ("temperature", "per_step") else "shared")
        size = max(1, 4 * config.evaluate.batch_size // k)  # rows are cheap beside the question that they share
        return {"batch_size": size, "num_generations": k, "mask": mask, "temperature": temperature}

    def sampled_problems() -> int:
        each = answer_seconds(models[names[0]], data["validation"], **sampling(names[0])) if budget.minutes else 0.0
        return affordable(budget, 0.4 / len(models), each, len(test))

    limit = budget.once("sampled_problems", sampled_problems)
    for name, model in models.items() if limit else ():
        _answer(folder, f"{name}.sampled", model, test[:limit], run_seed=config.seed, **sampling(name))
    budget.save()
    rate = json.loads((folder / "answers" / f"{names[0]}.gsm8k.json").read_text())["seconds"] / len(test)
    for i, benchmark in enumerate(TRANSFER):
        try:
            problems = datasets.benchmark(benchmark)
            expect_together(models[names[0]], problems, config)
        except (OSError, ValueError) as error:  # not in this data folder, or too long for this model: a row less
            budget.once(f"transfer_{benchmark}", lambda error=error: f"skipped: {error}")
            continue
        share = 0.9 / (len(TRANSFER) - i) / len(models)
        limit = budget.once(f"transfer_{benchmark}", lambda s=share, p=problems: affordable(budget, s, rate, len(p)))
        for name, model in models.items() if limit else ():
            _greedy(name, model, problems[:limit], config, folder, benchmark)
        budget.save()


def main(argv: list[str] | None = None) -> int:
    """The same command on a machine without tyro: fields as `--set grpo.num_problems=16`."""
    parser = argparse.ArgumentParser(prog="python -m latentlab.study.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="smol")
    parser.add_argument("--budget-minutes", type=float, default=24.0)
    parser.add_argument("--out", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights", default="", help="a folder of weights in parts, or a checkpoint")
    parser.add_argument("--init-from", default="", help="a trained Coconut checkpoint: straight into the arms")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="fields")
    options = parser.parse_args(argv)
    try:
        config = _with_fields(load_preset(options.preset), options.fields)
        if options.threads:
            torch.set_num_threads(options.threads)
        out = options.out or f"runs/{options.preset}/reproduce"
        path = reproduce(
            config, out=out, budget_minutes=options.budget_minutes, device=options.device, weights=options.weights,
            init_from=options.init_from,
        )  # fmt: skip
        print("wrote", path)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"latentlab: {' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "exit_code", 2 if isinstance(error, (ValueError, OSError)) else 1)
    return 0


def _with_fields(config: Config, fields: list[str]) -> Config:
    """`config` with dotted fields set from FIELD=VALUE, the value in YAML."""
    import yaml

    values = to_dict(config)
    for field in fields:
        name, equals, text = field.partition("=")
        *path, last = name.split(".")
        section = values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict) or last not in section:
            raise ValueError(f"--set: got {field!r}, expected a field of the preset and a value: grpo.num_problems=16")
        section[last] = yaml.safe_load(text)
    return from_dict(values)


if __name__ == "__main__":
    sys.exit(main())
