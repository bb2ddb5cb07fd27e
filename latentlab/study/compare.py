"""What the runs of `sweep compare` say on the test set: paired differences, the main contrast, thought swapping.

Each run's checkpoint was chosen on validation; here it meets the test problems, greedily and without masks, and the
first thousand of them again for `deployments` and swapped thoughts. Nothing is chosen here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from latentlab.config import Config, arm_settings, to_dict
from latentlab.data import datasets
from latentlab.evaluation.accuracy import evaluate, summary
from latentlab.evaluation.statistics import arm_comparison, paired_comparison, wilson_interval
from latentlab.evaluation.thoughts import swap_thoughts
from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem
from latentlab.study import results
from latentlab.study.launch import read_done
from latentlab.training.run import read_metrics


def write_compare(config: Config, folder: Path, chosen: dict, started: float) -> Path:
    """Evaluate every run of `folder` on the test problems and write compare.json and compare_outcomes.npz."""
    test = datasets.load(config.data, "test")
    s = config.sweep
    names = ["coconut", *s.controls, *s.arms]
    outcomes = {
        f"{name}-s{seed}": _outcomes(folder / f"{name}-s{seed}", test, config) for seed in s.seeds for name in names
    }
    arms = [_arm(name, seed, outcomes, folder) for seed in s.seeds for name in names]
    metrics = {
        "run_seconds": sum(read_done(folder, path.parent.name)["seconds"] for path in folder.glob("*/done.json")),
        "chosen_on_validation": chosen,
        "tuning": json.loads((folder / "tuning.json").read_text())["trials"],
        "curriculum": {
            run: {key: read_done(folder, run)[key] for key in ("stages", "seconds")}
            for run in (f"{name}-s{seed}" for seed in s.seeds for name in ("coconut", *s.controls))
        },
        "curves": {f"{arm}-s{seed}": _curves(folder / f"{arm}-s{seed}") for seed in s.seeds for arm in s.arms},
        "deployments": {
            f"{name}-s{seed}": _deployments(folder / f"{name}-s{seed}" / "best", name, test[:1000], config, chosen)
            for seed in s.seeds
            for name in ("coconut", "temperature", "shared")
        },
        "main_contrast": contrast(outcomes, "shared", "temperature", s.seeds),
        "weights_unchanged": {f"none-s{seed}": _same_weights(folder, seed) for seed in s.seeds if "none" in s.arms},
        "swapped_thoughts": {
            f"coconut-s{seed}": swap_thoughts(load_model(folder / f"coconut-s{seed}" / "best"), test[:1000])
            for seed in s.seeds
        },
    }
    results.write_outcomes(results.reports_folder() / config.preset / "compare_outcomes.npz", outcomes)
    return results.write_result(
        "compare",
        preset=config.preset,
        parameters=to_dict(config),
        metrics=metrics,
        arms=arms,
        started=started,
        seconds=time.time() - started,
        question="Which arm helps, at equal rollouts?",
        headline=in_words(metrics["main_contrast"]),
    )


def _deployments(checkpoint: Path, name: str, test: list[Problem], config: Config, chosen: dict) -> dict:
    """Greedy, and sampled as the arm was trained; the baseline is sampled under the mask of arm `shared`."""
    arm = "temperature" if name == "temperature" else "shared"
    settings = chosen[arm]
    mask, _ = arm_settings(config.grpo, arm)
    if mask is not None:
        mask = replace(mask, rate=settings["mask.rate"])
    model = load_model(checkpoint)
    return summary(model, test, config, mask=mask, temperature=settings.get("temperature", config.grpo.temperature))


def _outcomes(run: Path, test: list[Problem], config: Config) -> np.ndarray:
    model = load_model(run / "best")
    return evaluate(model, test, batch_size=config.evaluate.batch_size).correct[:, 0]  # [n]


def _arm(name: str, seed: int, outcomes: dict, folder: Path) -> dict:
    """One row of the table; differences are paired with the Coconut baseline of the same seed."""
    mine, base = outcomes[f"{name}-s{seed}"], outcomes[f"coconut-s{seed}"]
    done = read_done(folder, f"{name}-s{seed}")
    n, correct = len(mine), int(mine.sum())
    row = {
        "name": name, "seed": seed, "n": n, "correct": correct, "interval": list(wilson_interval(correct, n)),
        "rollouts": done.get("rollouts", 0), "seconds": done["seconds"],
        "validation_accuracy": done["validation_accuracy"], "commit": done["commit"],
    }  # fmt: skip
    if "peak_memory_gib" in done:
        row["peak_memory_gib"] = done["peak_memory_gib"]
    gaps = [line["replay_gap"] for line in read_metrics(folder / f"{name}-s{seed}") if "replay_gap" in line]
    if gaps:
        row |= {"replay_gap": max(gaps), "replay_gap_over_1e-5": sum(gap > 1e-5 for gap in gaps) / len(gaps)}
    if name != "coconut":
        pair = paired_comparison(mine, base, seed=0)
        row["difference"] = {
            "points": pair["difference"],
            **{k: pair[k] for k in ("low", "high", "only_a", "only_b", "p_value")},
        }
    return row


def _curves(run: Path) -> dict[str, list]:
    """Every tenth iteration of a run's metrics, and its validations, as lists to plot."""
    lines = [line for line in read_metrics(run) if line["step"] >= 0]
    kept = lines[::10]
    curves = {key: [line[key] for line in kept if key in line] for key in ("step", "reward", "frac_reward_zero_std")}
    checks = [line for line in read_metrics(run) if "validation_accuracy" in line]
    return {
        **curves,
        "validation_step": [line["step"] for line in checks],
        "validation_accuracy": [line["validation_accuracy"] for line in checks],
    }


def contrast(outcomes: dict, arm: str, other: str, seeds: Sequence[int]) -> dict:
    """The `arm_comparison` of two arms, by seed (`by_seed`); outcomes as `results.read_outcomes` gives them."""
    ours, theirs = (np.stack([outcomes[f"{name}-s{seed}"] for seed in seeds]) for name in (arm, other))
    pooled = arm_comparison(ours, theirs, seed=0)
    by_seed = dict(zip(map(str, seeds), pooled.pop("per_seed"), strict=True))
    return {"arms": f"{arm} - {other}", **pooled, "by_seed": by_seed}


def in_words(found: dict) -> str:
    """One line of a `contrast`."""
    return (
        f"{found['arms']}: {found['difference']:+.2f} points "
        f"[{found['wide_low']:+.2f}, {found['wide_high']:+.2f}] over {found['seeds']} seed{'s' * (found['seeds'] > 1)}"
    )


def _same_weights(folder: Path, seed: int) -> bool:
    """Did arm `none` leave every weight bit-identical? Its last state is compared, not its best."""
    before = load_file(folder / f"coconut-s{seed}" / "best" / "model.safetensors")
    after = torch.load(folder / f"none-s{seed}" / "state.pt", weights_only=True)["model"]
    return all(torch.equal(value, after[name]) for name, value in before.items())
