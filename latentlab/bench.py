"""How fast is the engine? Rollouts and updates against the plain definition and without the shared question prefix.

All variants answer the same problems under the same masks, interleaved in one process; each figure is a median over
`repeats`. The definition (reference.py: one rollout at a time, nothing cached) is timed on a few rollouts and scaled.
Timings of shared machines are noisy: compare ratios of one run, never seconds of two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from latentlab import report
from latentlab.masks import MaskSpec, draw_masks, rollout_seeds
from latentlab.model import LatentReasoner
from latentlab.reference import naive_rollout
from latentlab.rollout import rollout
from latentlab.word_problems import WORDS, word_problems

SHAPES = {
    "tiny": {"n_layer": 1, "n_embd": 128, "n_head": 4},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},
}
SPEC = MaskSpec(rate=0.1)
DEFINITION_ROWS = 4  # rollouts of the definition that are timed


def run_bench(
    *, shape: str, device: str = "cpu", num_problems: int = 4, num_generations: int = 16, repeats: int = 5
) -> dict[str, float]:
    """Seconds and ratios at `num_problems` x `num_generations` rollouts; 6 thoughts, up to 8 answer tokens.

    Weights are random. Raises ValueError for an unknown shape or device.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape: got {shape!r}, expected one of {', '.join(SHAPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, but torch sees none; use --device cpu")
    model = LatentReasoner.build(WORDS, **SHAPES[shape], n_positions=128, num_thoughts=6, max_new_tokens=8, seed=0)
    model = model.to(device)
    problems = word_problems("train", num_problems, seed=0)
    seeds = rollout_seeds(0, 0, [p.id for p in problems], num_generations)
    masks = draw_masks(SPEC, model, seeds)
    rows = len(seeds)

    def engine(k: int = num_generations):
        # k = 1: each rollout is a problem of its own, so that no prefix is shared
        batch = problems if k > 1 else [p for p in problems for _ in range(num_generations)]
        return rollout(model, batch, num_generations=k, masks=masks, temperature=1.0, run_seed=0, step=0)

    def definition():
        for row in range(DEFINITION_ROWS):
            naive_rollout(
                model.lm, model.tokenizer, problems[0].question, thoughts=6, limit=8, temperature=1.0,
                seed=seeds[row : row + 1].to(device), mask=masks.values[row], spec=SPEC,
            )  # fmt: skip

    def update(recorded):
        model.zero_grad(set_to_none=True)
        model.score(recorded, masks=recorded.masks).sum().backward()

    shared, unshared = engine(), engine(1)
    timed = median_seconds(
        {
            "rollout": engine,
            "rollout_unshared_prefix": lambda: engine(1),
            "definition": torch.no_grad()(definition),
            "update": lambda: update(shared),
            "update_unshared_prefix": lambda: update(unshared),
            "mask_drawing": lambda: draw_masks(SPEC, model, seeds),
        },
        repeats,
        device,
    )
    timed["definition"] *= rows / DEFINITION_ROWS
    return {
        "rollouts_per_second": rows / timed["rollout"],
        "speedup_vs_definition": timed["definition"] / timed["rollout"],
        "speedup_prefix": timed["rollout_unshared_prefix"] / timed["rollout"],
        "update_speedup_prefix": timed["update_unshared_prefix"] / timed["update"],
        "mask_drawing_share": timed["mask_drawing"] / timed["rollout"],
        **{f"seconds.{name}": seconds for name, seconds in timed.items()},
    }


def median_seconds(variants: dict[str, Callable], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each variant over interleaved repeats, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(shape: str, device: str) -> int:
    """Run the bench, print its table, write reports/bench/<device>_<shape>.json."""
    started = time.time()
    parameters = {"shape": shape, "device": device, "num_problems": 4, "num_generations": 16, "repeats": 5}
    metrics = run_bench(**parameters)
    for name, value in metrics.items():
        print(f"{name:<34}{value:>12.4g}")
    print("wrote", report.write_result(
        f"{device}_{shape}", preset="bench", parameters=parameters, metrics=metrics, started=started,
        seconds=time.time() - started, question="How fast is the engine?",
        headline=f"{shape} shape on {device}: {metrics['speedup_vs_definition']:.0f} x the definition's speed",
    ))  # fmt: skip
    return 0
