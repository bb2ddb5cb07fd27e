"""`latentlab bench`: times everything, and works out the figures that docs/bench.md quotes.

All runs are interleaved in one process, so that other load slows all of them alike. Compare ratios
within one result, never seconds of two; for two versions of the library see against.py.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from latentlab.backbone import multiplies_bfloat16
from latentlab.bench import engine
from latentlab.bench.baselines import VARIANTS
from latentlab.bench.rows import TINY, tiny_rows
from latentlab.bench.timing import measure
from latentlab.config import flat
from latentlab.model import LatentReasoner
from latentlab.rollouts import replay_gap


def run_bench(
    shape: str, device: str = "cpu", *, num_problems: int = 4, num_generations: int = 16, repeats: int = 5, axes=None
) -> dict:
    """Time everything and print the figures; returns the arguments of `study.results.write_result`.

    `axes`: what is scaled, and its values; default engine.AXES. On CUDA matrix products are in
    bfloat16, and whole iterations of this shape are timed in place of preset tiny's.
    Raises ValueError for an unknown shape.
    """
    if shape not in engine.SHAPES:
        raise ValueError(f"shape: got {shape!r}, expected one of {', '.join(engine.SHAPES)}")
    parameters = {"shape": shape, "device": device, "num_problems": num_problems, "num_generations": num_generations}
    parameters |= {"repeats": repeats, "question": engine.QUESTION, "thoughts": engine.THOUGHTS}
    parameters |= {"answer": engine.ANSWER, "threads": torch.get_num_threads()}
    started, kind = time.time(), torch.device(device).type
    model, rows, half = engine.build(shape, device), num_problems * num_generations, max(1, num_problems // 2)
    runs = engine.timed_runs(model, num_problems, num_generations)
    if in_bfloat16 := kind == "cpu" and multiplies_bfloat16(kind):
        runs |= engine.bfloat16_runs(model, num_problems, num_generations)
    seconds, memory = measure(runs, repeats, device)
    seconds["official"] *= rows / engine.OFFICIAL_ROWS
    seconds["definition"] *= rows
    tricks, _ = measure(engine.trick_runs(model, half, num_generations), repeats, device)
    metrics = ratios(seconds, tricks, rows) | {"gradient_error": engine.gradient_error(model)}
    metrics["bfloat16"] = {"skipped": "needs a CPU with avx512_bf16 or AMX; on CUDA all of this is in bfloat16"}
    if in_bfloat16:
        metrics["bfloat16"] = bfloat16_figures(model, seconds)
    metrics |= {"peak_memory_gib": memory, "seconds": {**seconds, "tricks": tricks}}
    axes = axes or engine.AXES
    metrics["scaling"] = {name: engine.scaling(model, name, values, repeats, device) for name, values in axes.items()}
    if kind == "cuda":
        metrics["all_in"] = engine.whole_iterations(model)
    else:
        metrics["tiny"] = tiny_figures(repeats)
    print_figures(metrics)
    floors = metrics["floor_fraction"]
    headline = (
        f"{shape} shape on {kind}: {metrics['speedup_vs_official_scheme']:.0f} times the official scheme, "
        f"{metrics['speedup_vs_plain_batched']:.1f} times plain batching; rollout at {floors['rollout']:.0%}, "
        f"update at {floors['update']:.0%} of the floor"
    )
    name = kind if shape == "gpt2" else f"{kind}_{shape}"
    result = {"name": name, "preset": "bench", "parameters": parameters, "metrics": metrics, "started": started}
    return result | {"seconds": time.time() - started, "question": "How fast is the engine?", "headline": headline}


def ratios(s: dict[str, float], tricks: dict[str, float], rows: int) -> dict[str, Any]:
    """The named figures, from seconds; "tricks": how many times slower without each."""
    switched = ("prefix_per_row", *VARIANTS)
    without = {
        name: {n: tricks[f"{name}_{n}"] / tricks[name] for n in switched if f"{name}_{n}" in tricks}
        for name in ("rollout", "update")
    }
    without["rollout"]["rows_stay"] = tricks["rollout"] / tricks["rollout_ends_early"]
    without["rollout"]["thoughts_per_row"] = s["unmasked_per_row"] / s["unmasked"]
    return {
        "rollouts_per_second": rows / s["rollout"],
        "speedup_vs_official_scheme": s["official"] / s["rollout"],
        "speedup_vs_definition": s["definition"] / s["rollout"],
        "speedup_vs_plain_batched": s["plain"] / s["rollout"],
        "update_speedup_vs_plain": s["update_plain"] / s["update"],
        "floor_fraction": {"rollout": s["floor"] / s["rollout"], "update": s["update_floor"] / s["update"]},
        "mask_overhead": s["rollout"] / s["unmasked_per_row"] - 1,
        "mask_drawing_share": s["mask_drawing"] / s["rollout"],
        "tricks": without,
    }


def bfloat16_figures(model: LatentReasoner, s: dict[str, float]) -> dict[str, float]:
    """How many times faster bfloat16 products are, and the replay gap with and without them (nats)."""
    figures = {name: s[name] / s[f"{name}_bfloat16"] for name in ("rollout", "update")}
    for name, other in (("replay_gap", engine.in_bfloat16(model)), ("replay_gap_float32", model)):
        recorded = engine.sample(other, engine.questions(1), 16)
        figures[name] = replay_gap(engine.score(other, recorded), recorded)
    return figures


def tiny_figures(repeats: int) -> dict[str, dict[str, float]]:
    """CPU seconds of whole steps of preset tiny, and rollouts per second of its iterations."""
    seconds, _ = measure({name: make() for name, make in tiny_rows().items()}, repeats, "cpu")
    rows = TINY.grpo.num_problems * TINY.grpo.num_generations
    speeds = {arm: rows / seconds[f"iteration_{arm}"] for arm in ("temperature", "shared")}
    return {"seconds": seconds, "rollouts_per_second": speeds}


def print_figures(metrics: dict) -> None:
    """One line per measured number: its dotted path and value."""
    for path, value in flat(metrics).items():
        numbers = {f"{path}.{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {path: value}
        for name, number in numbers.items():
            if isinstance(number, float):
                print(f"{name:<44}{number:>12.4g}")
