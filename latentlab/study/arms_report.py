"""The report of an experiment, made from its small files: done.json, metrics.jsonl and answers/.

    <reports>/<preset>/arms.json            arms, paired differences, main contrast, verdict, curves, cost
    <reports>/<preset>/arms_outcomes.npz    right or wrong for every test problem and model
    <reports>/<preset>/arms_samples.json    problems whose answer changed and some whose did not, thoughts decoded

<preset> is smol-cpu instead of smol where a budgeted run was made on a CPU. Here models are loaded only to decode
thoughts, and nothing is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from latentlab.config import Config, to_dict
from latentlab.evaluation.statistics import (
    FEW_SEEDS,
    arm_comparison,
    detectable_difference,
    paired_comparison,
    power_at,
    verdict,
)
from latentlab.evaluation.thoughts import decoded_thoughts
from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem
from latentlab.runtime.environment import environment
from latentlab.runtime.files import write_atomically
from latentlab.study import results
from latentlab.study.answers import answers_path, deployments, greedy_score, read_answers
from latentlab.study.budget import Budget
from latentlab.study.launch import read_done
from latentlab.training.run import read_metrics, seconds_spent

PUBLISHED = {"baseline": 27.29, "after": 29.01, "points": 1.72}  # arXiv 2606.10184, GPT-2, GSM8K test
SAMPLES = 10  # problems of each kind (became right, became wrong, stayed right) whose answers and thoughts are kept
CURVES = ("reward", "frac_reward_zero_std", "replay_gap", "kl", "validation_accuracy")
NOT_ON_GPU = "not run on a GPU"


def write_report(
    config: Config,
    folder: Path,
    names: list[str],
    test: list[Problem],
    budget: Budget,
    *,
    chosen: dict,
    trials: list[dict],
    weights: dict,
) -> Path:
    """Write the three files for the runs `names` of `folder`, all of which have answered the `test` problems."""
    budgeted = budget.minutes is not None
    names = sorted(names, key=_seed_of)  # of each seed: baseline, controls, arms
    seeds = [_seed_of(name) for name in names if name.startswith("shared-s")]
    cot = f"cot-s{_seed_of(names[0])}"
    answered = [name for name in (cot, *names) if answers_path(folder, f"{name}.test").exists()]
    outcomes = {name: np.array(read_answers(folder, f"{name}.test")["correct"])[:, 0] for name in answered}
    arms = [_row(name, outcomes, folder) for name in names]
    gain, main = (contrast(outcomes, "shared", other, seeds) for other in ("coconut", "temperature"))
    metrics = {
        "data": config.data.name,
        "published": PUBLISHED,
        "gain": gain,
        "main_contrast": main,
        "verdict": verdict_of(gain, budget.device, config.data.name),
        "curriculum": {
            n: {k: done[k] for k in ("stages", "seconds")} for n in names if "stages" in (done := read_done(folder, n))
        },
        "curves": {name: _curves(folder / name) for name in names if (folder / name / "metrics.jsonl").exists()},
        "deployments": {n: deployments(folder, n) for n in names if answers_path(folder, f"{n}.sampled").exists()},
        "weights_unchanged": {n: _same_weights(folder, _base(n, names), n) for n in names if n.startswith("none-s")},
        "cost": _cost(folder, names, budget),
        "commits": budget.data["commits"],  # of every process that took part; the result's own is that which wrote it
        "weights": weights,
    }
    if budgeted:
        elsewhere = {"skipped": "the baseline was trained elsewhere"}
        metrics["cot"] = greedy_score(folder, f"{cot}.test") if cot in outcomes else elsewhere
        metrics |= {"plan": budget.data["plan"], "transfer": _transfer(folder, names, budget.data["plan"])}
    else:
        swapped = [name for name in names if answers_path(folder, f"{name}.swapped").exists()]
        metrics |= {"chosen_on_validation": chosen, "tuning": trials}
        metrics["swapped_thoughts"] = {name: read_answers(folder, f"{name}.swapped") for name in swapped}
    preset = f"{config.preset}-cpu" if budgeted and budget.device != "cuda" else config.preset
    target = results.reports_folder() / preset
    results.write_outcomes(target / "arms_outcomes.npz", outcomes)
    samples = _samples(config, folder, names, outcomes, test, budget.device)
    write_atomically(target / "arms_samples.json", (json.dumps(samples, indent=1, ensure_ascii=False) + "\n").encode())
    return results.write_result(
        "arms",
        preset=preset,
        parameters=to_dict(config),
        metrics=metrics,
        arms=arms,
        started=budget.data["started"],
        seconds=budget.spent(),
        environment=environment(weights, device=budget.device),
        question="Which arm helps, at equal rollouts?",
        headline=_headline(outcomes, arms[0], metrics) if budgeted else in_words(main),
    )


# ---------------------------------------------------------------- reading a report
def read_arms(*presets: str) -> dict | None:
    """The first of these presets' results that exists, with `outcomes` {run: [n] of 0/1} and `samples`; or None."""
    for preset in presets:
        found = results.find_result("arms", preset)
        if found:
            samples = found["folder"] / "arms_samples.json"
            found["samples"] = json.loads(samples.read_text()) if samples.exists() else []
            return {**found, "outcomes": results.read_outcomes(found["folder"] / "arms_outcomes.npz")}
    return None


def contrast(outcomes: dict, arm: str, other: str, seeds: Sequence[int]) -> dict:
    """The `arm_comparison` of two arms, by seed (`by_seed`); outcomes as `results.read_outcomes` gives them.

    before, after: shares of right answers of `other` and `arm`. A seed without a run of `other` is compared with the
    first seed's: a shared baseline.
    """
    if not seeds:
        return {"skipped": f"arm {arm} was not trained: no time was left in the budget"}
    ours = np.stack([outcomes[f"{arm}-s{seed}"] for seed in seeds])
    theirs = np.stack([outcomes.get(f"{other}-s{seed}", outcomes[f"{other}-s{seeds[0]}"]) for seed in seeds])
    pooled = arm_comparison(ours, theirs, seed=0)
    by_seed = dict(zip(map(str, seeds), pooled.pop("per_seed"), strict=True))
    for row in by_seed.values():
        if PUBLISHED["points"] <= 100 * row["discordance"]:
            row["power_at_published_gain"] = power_at(PUBLISHED["points"], row["n"], row["discordance"])
            with suppress(ValueError):  # too few problems to detect any difference
                row["detectable_points"] = detectable_difference(row["n"], row["discordance"])
    shares = {"before": float(theirs.mean()), "after": float(ours.mean())}
    return {"arms": f"{arm} - {other}", **pooled, **shares, "by_seed": by_seed}


def in_words(found: dict) -> str:
    """One line of a `contrast`."""
    return (
        f"{found['arms']}: {found['difference']:+.2f} points "
        f"[{found['wide_low']:+.2f}, {found['wide_high']:+.2f}] over {found['seeds']} seed{'s' * (found['seeds'] > 1)}"
    )


def overview(found: dict) -> str:
    """What `read_arms` found for a budgeted run, as text: cost, training problems, a line per model, the verdict.

    kept: the iteration whose checkpoint validation chose; `start` is the baseline, whose answers are then repeated.
    """
    metrics, curriculum = found["metrics"], found["parameters"]["curriculum"]
    cost, steps = metrics["cost"], metrics["plan"].get("curriculum_steps", curriculum["steps"])
    cot, *latent = (curriculum["batch_size"] * count for count in steps)
    stages = next(iter(metrics["curriculum"].values()))["stages"]
    lines = [
        f"{found['preset']}, on a {cost['device']}: {cost['minutes']:.0f} minutes, {cost['peak_memory_gib']:.1f} GiB",
        f"weights: {metrics['weights']['kind']}",
        f"training problems: chain of thought {cot} · latent stages {latent}",
        f"validation accuracy after each stage: { {stage: f'{accuracy:.1%}' for stage, accuracy in stages.items()} }",
        "",
        f"{'model':<19}{'right':>5}{'pass@1':>9}   {'95 % interval':<17}{'rollouts':>9}   {'says most':<11}{'kept':<7}"
        "difference to coconut",
    ]
    for row in [{"name": "chain of thought", "seed": 0, **metrics["cot"]}, *found["arms"]]:
        if "n" not in row:  # trained elsewhere
            continue
        change, curve = row.get("difference"), metrics["curves"].get(f"{row['name']}-s{row['seed']}", {})
        checks = curve.get("validation_accuracy")
        kept = checks["step"][int(np.argmax(checks["value"]))] if change and checks else ""
        interval = "[{:.2f}, {:.2f}] %".format(*(100 * bound for bound in row["interval"]))
        most = f"{row['commonest_answer'] or 'nothing'}: {row['commonest_share']:.0%}"
        gain = f"{change['points']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]" if change else ""
        lines.append(
            f"{row['name']} {row['seed']}".ljust(19)
            + f"{row['correct']:>5}{row['correct'] / row['n']:>9.2%}   {interval:<17}"
            f"{row.get('rollouts', 0):>9}   {most:<11}{'start' if kept == -1 else kept:<7}{gain}"
        )
    return "\n".join([*lines, "", f"verdict on the published gain: {metrics['verdict']}"])


def verdict_of(gain: dict, device: str, data: str = "gsm8k") -> str:
    """The verdict of a `contrast`, and what it does not cover: other seeds, where there are fewer than FEW_SEEDS.

    Synthetic problems and runs on a CPU, whose budget is no real one, get the rule's word in brackets.
    """
    if "skipped" in gain:
        return gain["skipped"] if device == "cuda" else f"{NOT_ON_GPU}; {gain['skipped']}"
    low, high = gain["wide_low"], gain["wide_high"]
    word = verdict(gain["difference"], low, high, target=PUBLISHED["points"])
    if low == high:  # no problem was answered differently: an interval of width 0 resolves nothing
        word = "not resolved"
    if gain["seeds"] < FEW_SEEDS:
        word += {1: ", over problems alone, with 1 seed", 2: ", over problems and no more than 2 seeds"}[gain["seeds"]]
    why = NOT_ON_GPU if device != "cuda" else "no GSM8K" if data == "word_problems" else ""
    return f"{why} (the rule's word for these numbers: {word})" if why else word


# ---------------------------------------------------------------- sections
def _seed_of(name: str) -> int:
    return int(name.rpartition("-s")[2])


def _base(name: str, names: list[str]) -> str:
    """The baseline that a run is compared with: that of its seed, or the only one."""
    own = f"coconut-s{_seed_of(name)}"
    return own if own in names else names[0]


def _row(name: str, outcomes: dict, folder: Path) -> dict:
    """One row of the table: test answers, the run's record, the paired difference to its baseline."""
    done, base = read_done(folder, name), _base(name, list(outcomes))
    row = {
        "name": name.rpartition("-s")[0],
        "seed": _seed_of(name),
        **greedy_score(folder, f"{name}.test"),
        "rollouts": 0,
    }
    kept = ("rollouts", "seconds", "validation_accuracy", "commit", "peak_memory_gib")
    row |= {key: done[key] for key in kept if key in done}
    metrics = folder / name / "metrics.jsonl"
    gaps = (
        [line["replay_gap"] for line in read_metrics(folder / name) if "replay_gap" in line] if metrics.exists() else []
    )
    if gaps:
        row |= {"replay_gap": max(gaps), "replay_gap_over_1e-5": sum(gap > 1e-5 for gap in gaps) / len(gaps)}
    if name != base:
        pair = paired_comparison(outcomes[name], outcomes[base], seed=0)
        kept = ("low", "high", "only_a", "only_b", "discordance", "p_value")
        row["difference"] = {"points": pair["difference"], **{key: pair[key] for key in kept}}
    return row


def _curves(run: Path) -> dict[str, dict]:
    """Each metric against its step, at most 200 points."""
    lines, curves = read_metrics(run), {}
    for name in CURVES:
        kept = [line for line in lines if name in line]
        kept = kept[:: max(1, len(kept) // 200)]
        if kept:
            curves[name] = {"step": [line["step"] for line in kept], "value": [line[name] for line in kept]}
    return curves


def _cost(folder: Path, names: list[str], budget: Budget) -> dict:
    """Time, memory and speed; rollouts per second of training count updates, validations and checkpoints."""
    done = {path.parent.name: read_done(folder, path.parent.name) for path in folder.glob("*/done.json")}
    spent = {name: max(seconds_spent(folder / name), 1e-9) for name in names if "rollouts" in done[name]}
    return {
        "budget_minutes": budget.minutes,
        "minutes": round(budget.spent() / 60, 1),
        "device": budget.device,
        "peak_memory_gib": round(budget.data["peak_memory_gib"], 2),
        "run_seconds": round(sum(record["seconds"] for record in done.values()), 1),  # trials included
        "all_in_rollouts_per_second": {name: round(done[name]["rollouts"] / spent[name], 2) for name in spent},
    }


def _same_weights(folder: Path, base: str, name: str) -> bool:
    """Did arm `none` leave every weight bit-identical? Its last state is compared, not its best."""
    before = load_file(folder / base / "best" / "model.safetensors")
    after = torch.load(folder / name / "state.pt", weights_only=True, map_location="cpu")["model"]
    return all(torch.equal(value, after[key]) for key, value in before.items())


def _transfer(folder: Path, names: list[str], plan: dict) -> dict:
    """Greedy scores on other benchmarks, {benchmark: {run: score}}."""
    rows = {}
    for key, limit in plan.items():
        if key.startswith("transfer_"):
            benchmark = key.removeprefix("transfer_")
            found = [name for name in names if answers_path(folder, f"{name}.{benchmark}").exists()]
            why = limit.removeprefix("skipped: ") if isinstance(limit, str) else "no time was left in the budget"
            rows[benchmark] = {n: greedy_score(folder, f"{n}.{benchmark}") for n in found} or {"skipped": why}
    return rows


def _samples(config, folder: Path, names: list[str], outcomes: dict, test: list[Problem], device: str) -> list[dict]:
    """Answers and decoded thoughts of the first baseline and its arm `shared`, where not both are wrong."""
    pair = (names[0], f"shared-s{_seed_of(names[0])}")
    if pair[1] not in names:
        return []
    before, after = (outcomes[name] for name in pair)
    kinds = {"became right": after > before, "became wrong": after < before, "stayed right": after * before > 0}
    change = {row: kind for kind, found in kinds.items() for row in np.flatnonzero(found)[:SAMPLES].tolist()}
    samples = [
        {"id": test[i].id, "question": test[i].question, "answer": test[i].answer, "change": kind}
        for i, kind in change.items()
    ]
    for name in pair if samples else ():
        text = read_answers(folder, f"{name}.test")["text"]
        model = load_model(folder / name / "best").place(device, config.precision)
        thoughts = decoded_thoughts(model, [test[i] for i in change])
        for sample, i, seen in zip(samples, change, thoughts, strict=True):
            sample[name] = {"text": text[i], "thoughts": seen}
    return samples


def _headline(outcomes: dict, baseline: dict, metrics: dict) -> str:
    gain, synthetic = metrics["gain"], metrics["data"] == "word_problems"
    text = f"{'rehearsal on synthetic word problems' if synthetic else 'GSM8K test'}, {baseline['n']} problems: "
    for name, row in (("chain of thought", metrics["cot"]), ("latent baseline", baseline)):
        if "n" in row:
            text += f"{', ' * text.endswith('%')}{name} {100 * row['correct'] / row['n']:.2f} %"
    if baseline["commonest_share"] > 0.2:
        text += f" (says {baseline['commonest_answer'] or 'no number'} to {baseline['commonest_share']:.0%})"
    if "skipped" not in gain:
        interval = f"[{gain['wide_low']:+.2f}, {gain['wide_high']:+.2f}]"
        text += f" → {100 * gain['after']:.2f} %, {gain['difference']:+.2f} {interval}"
    return text if synthetic else f"{text}; {metrics['verdict']}"
