"""LoRA against full training on SmolLM2-135M: what is trained, stored, held in memory, and CPU seconds.

    python scripts/measure_lora.py [FOLDER]      default: the user's own result folder

Six GRPO iterations of each kind on one CPU thread, in a process of its own; needs the model of
scripts/fetch_smollm2.py and GSM8K (data/README.md). Writes `lora/lora.json` into FOLDER.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from latentlab.config import GRPOConfig, LoRAConfig, load_preset
from latentlab.data import datasets
from latentlab.pretrained import load_model
from latentlab.runtime.environment import peak_memory_gib, repository_root
from latentlab.study import results
from latentlab.training.arms import fit_grpo
from latentlab.training.run import read_metrics
from latentlab.training.steps import trained

MODEL = repository_root() / "data" / "downloads" / "smollm2"
RANKS, BETAS, STEPS = (0, 16), (0.0, 0.02), 6
GRPO = GRPOConfig(steps=STEPS, num_problems=2, num_generations=8, micro_batch=1, learning_rate=1e-4, eval_every=STEPS)


def measure_one(r: int, beta: float) -> dict:
    """A run of rank `r` (0: all weights): bytes, CPU seconds an iteration, the process's peak memory in GiB."""
    torch.set_num_threads(1)
    config = replace(load_preset("smol"), precision="float32", lora=LoRAConfig(r=r), grpo=replace(GRPO, beta=beta))
    model = load_model(MODEL, num_thoughts=config.num_thoughts, max_new_tokens=config.max_new_tokens)
    train, validation = datasets.gsm8k("train")[:64], datasets.gsm8k("validation")[:2]
    clock: list[float] = []

    def reward(text: str, problem) -> float:  # an untrained model's answers earn it by chance: all weights move
        clock.append(time.process_time())
        return float(len(text) % 2)

    with tempfile.TemporaryDirectory() as folder:
        fit_grpo(model, train, validation, config, out=folder, reward=reward)
        lines = read_metrics(folder)[1:]
        state = torch.load(Path(folder, "state.pt"), weights_only=True)["optimizer"]["state"]
        weights = sum(path.stat().st_size for path in Path(folder, "best").glob("*.safetensors"))
    moments = [value for slot in state.values() for value in slot.values()]
    return {
        "trained": sum(p.numel() for p in trained(model)),
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in trained(model)),
        "optimizer_bytes": sum(value.numel() * value.element_size() for value in moments),
        "best_bytes": weights,
        "cpu_seconds": statistics.median(
            b - a for a, b in pairwise(clock[:: GRPO.num_problems * GRPO.num_generations])
        ),
        "peak_memory_gib": peak_memory_gib(),
        "replay_gap": max(line["replay_gap"] for line in lines),
        "grad_norm": lines[0]["grad_norm"],
    }


def measure(folder: Path | None = None) -> Path:
    """Measure all kinds and return the path of the result file."""
    started, metrics = time.time(), {}
    spawn = multiprocessing.get_context("spawn")
    for beta in BETAS:
        for r in RANKS:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # peak memory is a process's
                found = pool.submit(measure_one, r, beta).result()
            metrics[(f"LoRA r {r}" if r else "full") + (f", KL {beta:g}" if beta else "")] = found
            print(r, beta, found, flush=True)
    full, lora = metrics["full"], metrics[f"LoRA r {RANKS[-1]}"]
    headline = (
        f"SmolLM2-135M, LoRA of rank {RANKS[-1]} on all linear maps: {lora['trained'] / full['trained']:.1%} of the "
        f"weights are trained, best/ takes {lora['best_bytes'] / 1e6:.0f} MB, not {full['best_bytes'] / 1e6:.0f}, the "
        f"process {lora['peak_memory_gib']:.2f} GiB at its peak, not {full['peak_memory_gib']:.2f}"
    )
    parameters = {name: getattr(GRPO, name) for name in ("steps", "num_problems", "num_generations", "micro_batch")}
    source = load_model(MODEL, num_thoughts=1, max_new_tokens=1).provenance
    return results.write_result(
        "lora",
        preset="lora",
        question="What does LoRA save on SmolLM2-135M?",
        headline=headline,
        parameters=parameters | {"weights": source["kind"], "sha256": source["sha256"]},
        metrics=metrics,
        started=started,
        seconds=time.time() - started,
        directory=folder,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    measure(parser.parse_args().folder)
