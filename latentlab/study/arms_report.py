"""The report of an experiment, made from its small files: done.json, metrics.jsonl and answers/.

    <reports>/<preset>/arms.json            arms, paired differences, verdict, curves, cost
    <reports>/<preset>/arms_outcomes.npz    right or wrong for every test problem and model
    <reports>/<preset>/arms_samples.json    changed and unchanged answers, with decoded thoughts

<preset> is smol-cpu or smol-cuda for a budgeted run. Models are loaded only
to decode thoughts, and nothing is chosen here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from latentlab.config import Config, to_dict
from latentlab.evaluation import statistics
from latentlab.evaluation.thoughts import decoded_thoughts
from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem
from latentlab.runtime.environment import environment
from latentlab.runtime.files import write_atomically
from latentlab.study import results
from latentlab.study.answers import deployments, greedy_score, stored
from latentlab.study.budget import Budget
from latentlab.study.launch import read_done
from latentlab.study.tables import table
from latentlab.training.run import read_metrics, seconds_spent

PUBLISHED = {"baseline": 27.29, "after": 29.01, "points": 1.72}  # arXiv 2606.10184, GPT-2, GSM8K test
SAMPLES = 10  # problems of each kind (became right, became wrong, stayed right) whose answers and thoughts are kept
CURVES = ("reward", "frac_reward_zero_std", "replay_gap", "kl", "validation_accuracy")
RECORDED = ("rollouts", "seconds", "validation_accuracy", "commit", "peak_memory_gib")  # of done.json
NOT_ON_GPU = "not run on a GPU"


def write_report(
    config: Config, folder: Path, names: list[str], test: list[Problem], budget: Budget, *, tuning: dict, weights: dict
) -> Path:
    """Write the three files for the runs `names` of `folder`, which have answered all of `test`.

    tuning: chosen settings and trials. weights: provenance of the model that baselines start from.
    """
    device = budget.device
    order = config.sweep.seeds.index
    names = sorted(names, key=lambda name: order(_seed(name)))  # of each seed: baseline, controls, arms
    own = {name: f"coconut-s{_seed(name)}" for name in names}
    bases = {name: base if base in names else names[0] for name, base in own.items()}  # else: the only baseline
    cot = f"cot-s{_seed(names[0])}"
    answers = stored(folder, [cot, *names], "test")
    outcomes = {name: np.array(found["correct"])[:, 0] for name, found in answers.items()}
    done = {path.parent.name: read_done(folder, path.parent.name) for path in folder.glob("*/done.json")}
    lines = {name: read_metrics(folder / name) for name in names if (folder / name / "metrics.jsonl").exists()}
    arms = []
    for name in names:
        row = {"name": name.rpartition("-s")[0], "seed": _seed(name), **greedy_score(answers[name]), "rollouts": 0}
        row |= {key: done[name][key] for key in RECORDED if key in done[name]}
        arms.append(row | _replay_gaps(lines.get(name, [])) | _difference(outcomes, name, bases[name]))
    seeds = [_seed(name) for name in names if name.startswith("shared-s")]
    gain = contrast(outcomes, "shared", "coconut", seeds)
    metrics = {
        "data": config.data.name,
        "published": PUBLISHED,
        "gain": gain,
        "main_contrast": contrast(outcomes, "shared", "temperature", seeds),
        "verdict": verdict_of(gain, device, config.data.name),
        "verdict_rates": verdict_rates(gain),
        "curriculum": {n: {k: done[n][k] for k in ("stages", "seconds")} for n in names if "stages" in done[n]},
        **tuning,
        "curves": {name: _curves(found) for name, found in lines.items()},
        "deployments": {n: deployments(answers[n], found) for n, found in stored(folder, names, "sampled").items()},
        "swapped_thoughts": {
            name: {key: value for key, value in found.items() if key != "asked"}
            for name, found in stored(folder, names, "swapped").items()
        },
        "weights_unchanged": {n: _same_weights(folder, bases[n], n) for n in names if n.startswith("none-s")},
        "cost": _cost(folder, done, budget),
        "plan": budget.data["plan"],
        "transfer": _transfer(folder, names, budget.data["plan"]),
        "commits": budget.data["commits"],  # of all processes that took part; the result's own wrote it
        "weights": weights,
    }
    always = ("curves", "deployments", "transfer") if budget.planned else ("curves",)  # what notebook 04 reads
    metrics = {key: section for key, section in metrics.items() if section != {} or key in always}
    if budget.planned:
        elsewhere = {"skipped": "the baseline was trained elsewhere"}
        metrics["cot"] = greedy_score(answers[cot]) if cot in answers else elsewhere
    preset = f"{config.preset}-{device}" if budget.planned else config.preset  # beside a sweep's result
    results.write_outcomes(results.result_path("arms_outcomes", preset, ".npz"), outcomes)
    samples = json.dumps(_samples(config, folder, names, answers, test, device), indent=1, ensure_ascii=False)
    write_atomically(results.result_path("arms_samples", preset, ".json"), f"{samples}\n".encode())
    about: dict[str, Any] = {"parameters": to_dict(config), "environment": environment(weights, device=device)}
    about |= {"question": "Which arm helps, at equal rollouts?", "started": budget.data["started"]}
    headline = _headline(arms[0], metrics) if budget.planned else in_words(metrics["main_contrast"])
    return results.write_result(
        "arms", preset=preset, metrics=metrics, arms=arms, headline=headline, seconds=budget.spent(), **about
    )


# ---------------------------------------------------------------- reading a report
def read_arms(*presets: str) -> dict | None:
    """The first of these presets' results that exists, with `outcomes` and `samples`; or None."""
    found = next(filter(None, (results.find_result("arms", preset) for preset in presets)), None)
    if found:
        samples = found["folder"] / "arms_samples.json"
        found["samples"] = json.loads(samples.read_text()) if samples.exists() else []
        found["outcomes"] = results.read_outcomes(found["folder"] / "arms_outcomes.npz")
    return found


def contrast(outcomes: dict, arm: str, other: str, seeds: Sequence[int]) -> dict:
    """The `arm_comparison` of two arms over seeds, and of each; outcomes: {run: [n] of 0/1}.

    before, after: shares of right answers of `other` and `arm`. A seed without a run of `other` is
    compared with the first seed's: a shared baseline.
    """
    if not seeds:
        return {"skipped": f"arm {arm} was not trained: no time was left in the budget"}
    ours = np.stack([outcomes[f"{arm}-s{seed}"] for seed in seeds])
    theirs = np.stack([outcomes.get(f"{other}-s{seed}", outcomes[f"{other}-s{seeds[0]}"]) for seed in seeds])
    pooled = statistics.arm_comparison(ours, theirs)
    by_seed = dict(zip(map(str, seeds), pooled.pop("per_seed"), strict=True))
    for row in by_seed.values():
        if PUBLISHED["points"] <= 100 * row["discordance"]:
            row["power_at_published_gain"] = statistics.power_at(PUBLISHED["points"], row["n"], row["discordance"])
            with suppress(ValueError):  # too few problems to detect any difference
                row["detectable_points"] = statistics.detectable_difference(row["n"], row["discordance"])
    shares = {"before": float(theirs.mean()), "after": float(ours.mean())}
    return {"arms": f"{arm} - {other}", **pooled, **shares, "by_seed": by_seed}


def in_words(found: dict) -> str:
    """One line of a `contrast`."""
    seeds = f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}"
    return f"{found['arms']}: {found['difference']:+.2f} points {_interval(found)} over {seeds}"


def overview(found: dict) -> str:
    """A budgeted run that `read_arms` found, as text: cost, training, a row per model, verdict.

    kept: the iteration whose checkpoint validation chose; `start`: the baseline's own weights.
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
    ]
    head = ["model", "right", "pass@1", "95 % interval", "rollouts", "says most", "kept", "difference to coconut"]
    rows = []
    for row in [{"name": "chain of thought", "seed": 0, **metrics["cot"]}, *found["arms"]]:
        if "n" not in row:  # trained elsewhere
            continue
        change, curves = row.get("difference"), metrics["curves"].get(f"{row['name']}-s{row['seed']}", {})
        checks = curves.get("validation_accuracy")
        kept = checks["step"][int(np.argmax(checks["value"]))] if change and checks else ""
        accuracy, low, high = (f"{100 * share:.2f}" for share in (row["correct"] / row["n"], *row["interval"]))
        most = f"{row['commonest_answer'] or 'nothing'}: {row['commonest_share']:.0%}"
        gain = f"{change['points']:+.2f} {_interval(change)}" if change else ""
        cells = (row["correct"], f"{accuracy} %", f"[{low}, {high}]", row.get("rollouts", 0), most)
        rows.append([f"{row['name']} {row['seed']}", *map(str, cells), "start" if kept == -1 else str(kept), gain])
    lines += [table(head, rows), "", f"verdict on the published gain: {metrics['verdict']}"]
    for true, rates in metrics.get("verdict_rates", {}).items():
        said = ", ".join(f"{word} {rate:.1%}" for word, rate in rates.items())
        lines.append(f"how often such a study says so if the true difference is {true} points: {said}")
    return "\n".join(lines)


def verdict_of(gain: dict, device: str, data: str = "gsm8k") -> str:
    """The verdict of a `contrast`, and what it does not cover: other seeds, if there is only one.

    For synthetic problems and runs on a CPU the rule's word is only quoted, in brackets.
    """
    if "skipped" in gain:
        return gain["skipped"] if device == "cuda" else f"{NOT_ON_GPU}; {gain['skipped']}"
    bounds, unchanged = (gain["difference"], gain["low"], gain["high"]), gain["discordance"] == 0  # nothing was learnt
    word = "not resolved" if unchanged else statistics.verdict(*bounds, target=PUBLISHED["points"])
    if gain["seeds"] == 1:
        word += ", over problems alone, with 1 seed"
    why = NOT_ON_GPU if device != "cuda" else "no GSM8K" if data == "word_problems" else ""
    return f"{why} (the rule's word for these numbers: {word})" if why else word


def verdict_rates(gain: dict) -> dict[str, dict]:
    """{true difference in points: {word: probability}} of the verdict on a `contrast`.

    For no difference and for the published gain, in studies as large, with the discordance and the
    spread between seeds found here (one seed: none). Empty if fewer problems than the gain differ.
    """
    if "skipped" in gain or 100 * gain["discordance"] < PUBLISHED["points"]:
        return {}
    study = {key: gain[key] for key in ("n", "discordance", "seeds", "seed_effect_sd", "shared") if key in gain}
    return {f"{true:g}": statistics.verdict_rates(true, **study) for true in (0.0, PUBLISHED["points"])}


# ---------------------------------------------------------------- sections
def _seed(name: str) -> int:
    return int(name.rpartition("-s")[2])


def _interval(found: dict) -> str:
    return f"[{found['low']:+.2f}, {found['high']:+.2f}]"


def _difference(outcomes: dict, name: str, base: str) -> dict:
    if name == base:
        return {}
    pair: dict = statistics.paired_comparison(outcomes[name], outcomes[base])
    pair.pop("n")  # in the row already
    return {"difference": {"points": pair.pop("difference"), **pair}}


def _replay_gaps(lines: list[dict]) -> dict:
    gaps = np.array([line["replay_gap"] for line in lines if "replay_gap" in line])
    return {"replay_gap": gaps.max(), "replay_gap_over_1e-5": np.mean(gaps > 1e-5)} if gaps.size else {}


def _curves(lines: list[dict]) -> dict[str, dict]:
    """Each metric against its step, thinned to fewer than 400 points."""
    found = {name: [line for line in lines if name in line] for name in CURVES}
    kept = {name: rows[:: max(1, len(rows) // 200)] for name, rows in found.items() if rows}
    return {
        name: {"step": [row["step"] for row in rows], "value": [row[name] for row in rows]}
        for name, rows in kept.items()
    }


def _cost(folder: Path, done: dict, budget: Budget) -> dict:
    """Time, memory, speed: rollouts per second with updates, validations and checkpoints."""
    rollouts = {name: record["rollouts"] for name, record in done.items() if "rollouts" in record}
    rates = {name: round(count / max(seconds_spent(folder / name), 1e-9), 2) for name, count in rollouts.items()}
    return {
        "budget_minutes": budget.minutes,
        "minutes": round(budget.spent() / 60, 1),
        "device": budget.device,
        "peak_memory_gib": round(budget.data["peak_memory_gib"], 2),
        "run_seconds": round(sum(record["seconds"] for record in done.values()), 1),
        "all_in_rollouts_per_second": rates,
    }


def _same_weights(folder: Path, base: str, name: str) -> bool:
    """Did arm `none` leave every weight bit-identical? Its last state is compared, not its best."""
    before = load_file(folder / base / "best" / "model.safetensors")
    after = torch.load(folder / name / "state.pt", weights_only=True, map_location="cpu")["model"]
    return all(torch.equal(value, after[key]) for key, value in before.items())


def _transfer(folder: Path, names: list[str], plan: dict) -> dict:
    """Greedy scores on other benchmarks, {benchmark: {run: score}}."""
    rows: dict[str, dict] = {}
    for key, limit in plan.items():
        if key.startswith("transfer_"):
            benchmark = key.removeprefix("transfer_")
            why = limit.removeprefix("skipped: ") if isinstance(limit, str) else "no time was left in the budget"
            scores: dict = {name: greedy_score(found) for name, found in stored(folder, names, benchmark).items()}
            rows[benchmark] = scores or {"skipped": why}
    return rows


def _samples(config, folder: Path, names: list[str], answers: dict, test: list[Problem], device: str) -> list[dict]:
    """Answers and decoded thoughts of the first baseline and arm `shared`, unless both fail."""
    pair = (names[0], f"shared-s{_seed(names[0])}")
    if pair[1] not in names:
        return []
    before, after = (np.array(answers[name]["correct"])[:, 0] for name in pair)
    kinds = {"became right": after > before, "became wrong": after < before, "stayed right": after * before > 0}
    change = {row: kind for kind, found in kinds.items() for row in np.flatnonzero(found)[:SAMPLES].tolist()}
    chosen = [test[i] for i in change]
    samples: list[dict] = [{"id": p.id, "question": p.question, "answer": p.answer} for p in chosen]
    for name in pair if chosen else ():
        model = load_model(folder / name / "best").place(device, config.precision)
        for sample, i, thoughts in zip(samples, change, decoded_thoughts(model, chosen), strict=True):
            sample |= {"change": change[i], name: {"text": answers[name]["text"][i], "thoughts": thoughts}}
    return samples


def _headline(baseline: dict, metrics: dict) -> str:
    gain, synthetic = metrics["gain"], metrics["data"] == "word_problems"
    rows = {"chain of thought": metrics["cot"], "latent baseline": baseline}
    shares = [f"{name} {100 * row['correct'] / row['n']:.2f} %" for name, row in rows.items() if "n" in row]
    text = "rehearsal on synthetic word problems" if synthetic else "GSM8K test"
    text += f", {baseline['n']} problems: {', '.join(shares)}"
    if baseline["commonest_share"] > 0.2:
        text += f" (says {baseline['commonest_answer'] or 'no number'} to {baseline['commonest_share']:.0%})"
    if "skipped" not in gain:
        text += f" → {100 * gain['after']:.2f} %, {gain['difference']:+.2f} {_interval(gain)}"
    return text if synthetic else f"{text}; {metrics['verdict']}"
