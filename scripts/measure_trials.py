"""What was tried and is not used: float32 suffix attention and torch.compile; the cost of sampling.

    python scripts/measure_trials.py    5 minutes on one thread; writes reports/trials/trials.json

suffix_float32: suffix attention in float32 instead of float64 (attention.py). compile: an iteration of
preset tiny with the backbone, or only its MLPs, under `torch.compile`. choose: milliseconds of the
choice of one token in 64 rows at GPT-2's vocabulary.
"""

import os
import time
from functools import partial
from typing import Any

import torch

from latentlab import attention
from latentlab.bench import engine, rows
from latentlab.bench.timing import measure
from latentlab.data.datasets import load
from latentlab.model import LatentReasoner
from latentlab.pretrained.loading import load_model
from latentlab.rollouts import choose, replay_gap
from latentlab.study.results import write_result

REPEATS, ARM_ITERATIONS = 5, 150


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children, such as a compiler."""
    return sum(os.times()[:4])


def in_float32(run):
    """`run` with suffix attention as wide as the model."""

    def patched():
        wide, attention._wide = attention._wide, lambda keys, values: (keys, values)
        try:
            return run()
        finally:
            attention._wide = wide

    return patched


def suffix_float32(model: LatentReasoner, problems, k: int) -> dict[str, float]:
    """How many times as fast, and the replay gaps (nats) in float32 and float64."""
    sample = partial(engine.sample, model, problems, k)
    runs, gaps = {}, {}
    for name, patch in (("float32", in_float32), ("float64", lambda run: run)):
        recorded = patch(sample)()
        score = partial(engine.score, model, recorded)
        runs[f"rollout_{name}"], runs[f"update_{name}"] = patch(sample), patch(partial(engine.update, model, score))
        gaps[f"replay_gap_{name}"] = replay_gap(patch(score)(), recorded)
    s, _ = measure(runs, REPEATS, "cpu")
    return {name: s[f"{name}_float64"] / s[f"{name}_float32"] for name in ("rollout", "update")} | gaps


def compiled(parts) -> dict[str, Any]:
    """An iteration of arm shared with `parts(model)` compiled, and what an arm saves in all."""
    train, plain = load(rows.TINY.data, "train"), rows._model_and_optimizer

    def with_compiled_parts():
        model, optimizer = plain()
        model.branches(rows.TINY.grpo.mask.sites)  # found by hooks, which a compiled module does not call
        for part in parts(model):
            part.compile(dynamic=True)
        return model, optimizer

    eager = rows._iteration("shared", train)
    rows._model_and_optimizer = with_compiled_parts
    run = rows._iteration("shared", train)
    rows._model_and_optimizer = plain
    seconds = []
    for _ in range(30):  # later ones recompile nothing
        start = cpu_seconds()
        try:
            run()
        except FloatingPointError as error:
            return {"skipped": f"compiled, it computes something else: {error}"}
        seconds.append(cpu_seconds() - start)
    steady, _ = measure({"eager": eager, "compiled": run}, 2 * REPEATS, "cpu")
    compiling, saved = sum(s - steady["compiled"] for s in seconds), steady["eager"] - steady["compiled"]
    found = {"speedup": steady["eager"] / steady["compiled"], "compile_seconds": compiling}
    return found | {"saved_in_an_arm_seconds": ARM_ITERATIONS * saved - compiling}


def choosing(rows: int = 64, vocabulary: int = 50257) -> dict[str, float]:
    """Milliseconds of the choice of one token per row, and of log-softmax beside it."""
    logits, seeds = torch.randn(rows, vocabulary), torch.arange(rows)
    runs = {"choose": lambda: choose(torch.log_softmax(logits, -1), seeds, 0)}
    runs["log_softmax"] = lambda: torch.log_softmax(logits, -1)
    s, _ = measure(runs, 20, "cpu")
    return {"choose_ms": 1000 * (s["choose"] - s["log_softmax"]), "log_softmax_ms": 1000 * s["log_softmax"]}


def main() -> None:
    torch.set_num_threads(1)
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # else a module keeps the masks it was compiled with
    torch._dynamo.config.recompile_limit = 64
    started, metrics = time.time(), {}
    tiny, words = load_model("tiny"), load(rows.TINY.data, "train")[:32]
    metrics["suffix_float32"] = {
        "tiny": suffix_float32(tiny, words, 16),
        "gpt2": suffix_float32(engine.build("gpt2"), engine.questions(2), 8),
    }
    metrics["compile"] = {
        "backbone": compiled(lambda model: [model.lm.base_model]),
        "mlp": compiled(lambda model: [block.mlp for block in model.lm.base_model.h]),
    }
    metrics["choose"] = choosing()
    suffix, saved = metrics["suffix_float32"]["tiny"], metrics["compile"]["mlp"]["saved_in_an_arm_seconds"]
    headline = (
        f"float32 suffix attention makes an update of preset tiny {suffix['update']:.2f} times as fast, replay gap "
        f"{suffix['replay_gap_float32']:.1g} nats; compiled MLPs save {saved:.0f} s in {ARM_ITERATIONS} iterations"
    )
    result = {"preset": "trials", "parameters": {"threads": 1, "repeats": REPEATS}, "metrics": metrics}
    question = "What does not pay?"
    result |= {"started": started, "seconds": time.time() - started, "question": question, "headline": headline}
    print("wrote", write_result("trials", **result))


if __name__ == "__main__":
    main()
