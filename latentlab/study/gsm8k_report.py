"""What a finished `sweep reproduce` says: small files that need no weights.

<reports>/<preset>[-cpu]/reproduce.json            arms, paired differences, verdict, cost, transfer, curves
<reports>/<preset>[-cpu]/reproduce_outcomes.npz    right or wrong for every test problem and model
<reports>/<preset>[-cpu]/reproduce_samples.json    problems that flipped and some that did not, thoughts decoded
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from latentlab.config import Config, to_dict
from latentlab.evaluation.statistics import (
    FEW_SEEDS,
    arm_comparison,
    detectable_difference,
    paired_comparison,
    pass_at_k,
    power_at,
    verdict,
    wilson_interval,
)
from latentlab.evaluation.thoughts import decoded_thoughts
from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem, answers_match, extract_answer
from latentlab.reward import majority_vote
from latentlab.runtime import environment, files
from latentlab.runtime.devices import select_device
from latentlab.study import results
from latentlab.training.run import read_metrics, seconds_spent

PUBLISHED = {"baseline": 27.29, "after": 29.01, "points": 1.72}  # arXiv 2606.10184, GPT-2, GSM8K test
SAMPLES = 10  # problems of each kind (became right, became wrong, stayed right) whose answers and thoughts are kept
CURVES = ("reward", "frac_reward_zero_std", "replay_gap", "kl", "validation_accuracy")
NOT_ON_GPU = "not run on a GPU"


def write_report(
    config: Config, folder: Path, names: list[str], test: list[Problem], *, cot: str | None, device: str, weights: dict,
    started: float, plan: dict, minutes: float, budget_minutes: float, peak_memory_gib: float, commits: list[str],
) -> Path:  # fmt: skip
    """Write the three files from the answers in `folder`; `names`: the baseline, then "<arm>-s<seed>"."""
    preset = config.preset if device == "cuda" else f"{config.preset}-cpu"
    outcomes = {name: _right(folder, f"{name}.gsm8k") for name in (*([cot] if cot else []), *names)}
    results.write_outcomes(results.reports_folder() / preset / "reproduce_outcomes.npz", outcomes)
    samples = _samples(config, folder, names, outcomes, test, device)
    text = json.dumps(samples, indent=1, ensure_ascii=False) + "\n"
    files.write_atomically(results.reports_folder() / preset / "reproduce_samples.json", text.encode())
    gain, contrast = (_pooled(outcomes, names, *pair) for pair in (("shared", "coconut"), ("shared", "temperature")))
    metrics = {
        "data": config.data.name,
        "published": PUBLISHED,
        "cot": _row(folder, f"{cot}.gsm8k", test) if cot else {"skipped": "the baseline was trained elsewhere"},
        "baseline": _row(folder, f"{names[0]}.gsm8k", test),
        "stages_validation": json.loads((folder / names[0] / "done.json").read_text())["stages"],
        "gain": gain,
        "main_contrast": contrast,
        "verdict": verdict_of(gain, device, config.data.name),
        "sampled": {name: _sampled(folder, name) for name in names if _exists(folder, f"{name}.sampled")},
        "transfer": _transfer(folder, names, plan),
        "curves": {name: _curves(folder / name) for name in names if (folder / name / "metrics.jsonl").exists()},
        "cost": {
            "budget_minutes": budget_minutes, "minutes": round(minutes, 1), "device": device,
            "peak_memory_gib": round(peak_memory_gib, 2),
            "all_in_rollouts_per_second": {name: _rollout_rate(folder / name) for name in names[1:]},
        },
        "plan": plan,
        "commits": commits,  # of every process that took part; the result's own is that which wrote it
        "weights": weights,
    }  # fmt: skip
    return results.write_result(
        "reproduce", preset=preset, parameters=to_dict(config), metrics=metrics,
        arms=[_arm(name, outcomes, folder, test) for name in names], started=started, seconds=60 * minutes,
        environment=environment.environment(weights, device=device),
        question="Does the mask lift latent reasoning on GSM8K?",
        headline=_headline(outcomes, names, metrics),
    )  # fmt: skip


def read_reproduce(*presets: str) -> dict | None:
    """The first of these presets' results that is there, with `outcomes` {run: [n] of 0/1} and `samples`; or None."""
    for preset in presets:
        found = results.find_result("reproduce", preset)
        if found:
            samples = json.loads((found["folder"] / "reproduce_samples.json").read_text())
            outcomes = results.read_outcomes(found["folder"] / "reproduce_outcomes.npz")
            return {**found, "outcomes": outcomes, "samples": samples}
    return None


def overview(found: dict) -> str:
    """What `read_reproduce` found, as text: cost, training problems, a line per model, the verdict.

    kept: the iteration whose checkpoint validation chose; `start` is the baseline, whose answers are then repeated.
    """
    metrics, curriculum = found["metrics"], found["parameters"]["curriculum"]
    cost, steps = metrics["cost"], metrics["plan"].get("curriculum_steps", curriculum["steps"])
    cot, *latent = (curriculum["batch_size"] * count for count in steps)
    stages = {stage: f"{accuracy:.1%}" for stage, accuracy in metrics["stages_validation"].items()}
    lines = [
        f"{found['preset']}, on a {cost['device']}: {cost['minutes']:.0f} minutes, {cost['peak_memory_gib']:.1f} GiB",
        f"weights: {metrics['weights']['kind']}",
        f"training problems: chain of thought {cot} · latent stages {latent}",
        f"validation accuracy after each stage: {stages}",
        "",
        f"{'model':<19}{'right':>5}{'pass@1':>9}   {'95 % interval':<17}{'rollouts':>9}   {'says most':<11}{'kept':<7}"
        "difference to coconut",
    ]
    for row in [{"name": "chain of thought", "seed": 0, **metrics["cot"]}, *found["arms"]]:
        if "n" not in row:  # trained elsewhere
            continue
        name, (low, high), change = f"{row['name']} {row['seed']}", row["interval"], row.get("difference")
        curve = metrics["curves"].get(f"{row['name']}-s{row['seed']}", {}).get("validation_accuracy")
        kept = curve["step"][int(np.argmax(curve["value"]))] if change and curve else ""
        interval, most = (
            f"[{100 * low:.2f}, {100 * high:.2f}] %",
            f"{row['commonest_answer'] or 'nothing'}: {row['commonest_share']:.0%}",
        )
        gain = f"{change['points']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}]" if change else ""
        lines.append(
            f"{name:<19}{row['correct']:>5}{row['correct'] / row['n']:>9.2%}   {interval:<17}"
            f"{row.get('rollouts', 0):>9}   {most:<11}{'start' if kept == -1 else kept:<7}{gain}"
        )
    return "\n".join([*lines, "", f"verdict on the published gain: {metrics['verdict']}"])


def verdict_of(gain: dict, device: str, data: str = "gsm8k") -> str:
    """The verdict of the comparison, and what it does not cover: other seeds, where there are few (FEW_SEEDS).

    Synthetic problems, and a CPU, whose budget is no budget, get the rule's word beside it.
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


def _exists(folder: Path, name: str) -> bool:
    return (folder / "answers" / f"{name}.json").exists()


def _answers(folder: Path, name: str) -> dict:
    return json.loads((folder / "answers" / f"{name}.json").read_text())


def _right(folder: Path, name: str) -> np.ndarray:
    return np.array(_answers(folder, name)["correct"])[:, 0]  # [n]


def _row(folder: Path, name: str, problems: list[Problem]) -> dict:
    """Greedy answers: right by both grading rules, interval, the commonest answer and its share, when and how long.

    A model that says one number to many questions has learned the format, and is right by chance.
    """
    found = _answers(folder, name)
    n, correct = len(found["ids"]), int(np.sum(found["correct"]))
    row = {"n": n, "correct": correct, "interval": list(wilson_interval(correct, n))}
    commonest, times = Counter(extract_answer(text) for text in found["text"]).most_common(1)[0]
    row |= {"commonest_answer": commonest, "commonest_share": times / n}
    answers = {problem.id: problem.answer for problem in problems}
    if answers:  # the problems are at hand
        pairs = zip(found["ids"], found["text"], strict=True)
        row["correct_string_rule"] = sum(answers_match(extract_answer(t), answers[i], "string") for i, t in pairs)
    return {**row, "seconds": found["seconds"], "evaluated_at": found["at"]}


def _arm(name: str, outcomes: dict, folder: Path, test: list[Problem]) -> dict:
    arm, _, seed = name.rpartition("-s")
    done = json.loads((folder / name / "done.json").read_text())
    row = {"name": arm, "seed": int(seed), **_row(folder, f"{name}.gsm8k", test)}
    row |= {"rollouts": done.get("rollouts", 0), "validation_accuracy": done["validation_accuracy"]}
    row["training_seconds"] = round(seconds_spent(folder / name), 1)
    if arm != "coconut":
        pair = paired_comparison(outcomes[name], outcomes["coconut-s0"], seed=0)
        kept = ("low", "high", "only_a", "only_b", "discordance", "p_value")
        row["difference"] = {"points": pair["difference"], **{key: pair[key] for key in kept}}
    return row


def _pooled(outcomes: dict, names: list[str], arm: str, other: str) -> dict:
    """`arm` minus `other` over the seeds of the arms; the baseline is one run, so its seed does not vary."""
    seeds = [name.rpartition("-s")[2] for name in names if name.startswith(f"{arm}-s")]
    if not seeds:
        return {"skipped": f"arm {arm} was not trained: no time was left in the budget"}
    ours = np.stack([outcomes[f"{arm}-s{seed}"] for seed in seeds])
    theirs = np.stack([outcomes[f"{other}-s{'0' if other == 'coconut' else seed}"] for seed in seeds])
    pooled = arm_comparison(ours, theirs, seed=0)
    pooled |= {"arms": f"{arm} - {other}", "before": float(theirs.mean()), "after": float(ours.mean())}
    for row in pooled["per_seed"]:
        if PUBLISHED["points"] <= 100 * row["discordance"]:
            row["power_at_published_gain"] = power_at(PUBLISHED["points"], row["n"], row["discordance"])
            with suppress(ValueError):  # too few problems to detect any difference
                row["detectable_points"] = detectable_difference(row["n"], row["discordance"])
    return pooled


def _sampled(folder: Path, name: str) -> dict:
    """The policy that GRPO optimises: average, pass@k and majority of K answers under its noise."""
    found = _answers(folder, f"{name}.sampled")
    correct = np.array(found["correct"])  # [n, K]
    n, k = correct.shape
    texts = [found["text"][i * k : (i + 1) * k] for i in range(n)]
    votes = [majority_vote(group) for group in texts]
    right = [  # the vote is right if a right answer says the same
        any(c and majority_vote([t]) == vote for c, t in zip(row, group, strict=True))
        for row, group, vote in zip(correct, texts, votes, strict=True)
    ]
    return {
        "n": n, "K": k, "mean": float(correct.mean()), "majority": float(np.mean(right)),
        "pass@k": {str(j): float(pass_at_k(correct.sum(1), k, j).mean()) for j in range(1, k + 1)},
        "seconds": found["seconds"],
    }  # fmt: skip


def _transfer(folder: Path, names: list[str], plan: dict) -> dict:
    rows = {}
    for key, limit in plan.items():
        if key.startswith("transfer_"):
            benchmark = key.removeprefix("transfer_")
            found = {n: _row(folder, f"{n}.{benchmark}", []) for n in names if _exists(folder, f"{n}.{benchmark}")}
            why = limit if isinstance(limit, str) else "no time was left in the budget"
            rows[benchmark] = found or {"skipped": why.removeprefix("skipped: ")}
    return rows


def _curves(run: Path) -> dict[str, dict]:
    """Each metric against its step, at most 200 points."""
    lines = read_metrics(run)
    curves = {}
    for name in CURVES:
        kept = [line for line in lines if name in line]
        kept = kept[:: max(1, len(kept) // 200)]
        if kept:
            curves[name] = {"step": [line["step"] for line in kept], "value": [line[name] for line in kept]}
    return curves


def _rollout_rate(run: Path) -> float:
    """Rollouts by seconds of training: updates, validations and checkpoints included."""
    done = json.loads((run / "done.json").read_text())
    return round(done["rollouts"] / max(seconds_spent(run), 1e-9), 2)


def _samples(
    config: Config, folder: Path, names: list[str], outcomes: dict, test: list[Problem], device: str
) -> list[dict]:
    """Answers and decoded thoughts of the baseline and arm `shared`, first seed, where not both are wrong."""
    arm = next((name for name in names if name.startswith("shared-s")), None)
    if arm is None:
        return []
    before, after = outcomes["coconut-s0"], outcomes[arm]
    kinds = {"became right": after > before, "became wrong": after < before, "stayed right": after * before > 0}
    change = {row: kind for kind, found in kinds.items() for row in np.flatnonzero(found)[:SAMPLES].tolist()}
    rows = list(change)
    if not rows:
        return []
    problems, seen = [test[row] for row in rows], {}
    for name in ("coconut-s0", arm):
        said = _answers(folder, f"{name}.gsm8k")["text"]
        model = load_model(folder / name / "best").place(select_device(device), config.precision)
        seen[name] = [
            {"text": said[row], "thoughts": thoughts}
            for row, thoughts in zip(rows, decoded_thoughts(model, problems), strict=True)
        ]
    return [
        {
            "id": problem.id, "question": problem.question, "answer": problem.answer,
            "change": change[row], **{name: found[i] for name, found in seen.items()},
        }
        for i, (row, problem) in enumerate(zip(rows, problems, strict=True))
    ]  # fmt: skip


def _headline(outcomes: dict, names: list[str], metrics: dict) -> str:
    base, gain = outcomes["coconut-s0"], metrics["gain"]
    cot = "" if "skipped" in metrics["cot"] else f"chain of thought {_percent(metrics['cot'])}, "
    data = "rehearsal on synthetic word problems" if metrics["data"] == "word_problems" else "GSM8K test"
    text = f"{data}, {len(base)} problems: {cot}latent baseline {100 * base.mean():.2f} %"
    if (share := metrics["baseline"]["commonest_share"]) > 0.2:
        text += f" (says {metrics['baseline']['commonest_answer'] or 'no number'} to {share:.0%})"
    if "skipped" not in gain:
        interval = f"[{gain['wide_low']:+.2f}, {gain['wide_high']:+.2f}]"
        text += f" → {100 * gain['after']:.2f} %, {gain['difference']:+.2f} {interval}"
    return text if metrics["data"] == "word_problems" else f"{text}; {metrics['verdict']}"


def _percent(row: dict) -> str:
    return f"{100 * row['correct'] / row['n']:.2f} %"
