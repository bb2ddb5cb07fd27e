"""Memory of one GRPO step by number of processes: measured here, computed for larger models.

    python scripts/measure_memory.py [FOLDER]      default: the user's own result folder

For maintainers; three minutes. Writes `memory/memory.json`, from which a table of docs/scaling.md is
generated. Starts torchrun with 1, 2 and 3 processes that take two steps of a random Llama on CPU, and
reads the peak of their resident memory, beyond that before the model, while sampling and updating.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from latentlab.advantage import group_advantages
from latentlab.config import load_preset
from latentlab.data.word_problems import WORDS, word_problems
from latentlab.grpo import policy_gradient
from latentlab.model import LatentReasoner
from latentlab.pretrained.scratch import word_tokenizer
from latentlab.runtime import distributed
from latentlab.study import results
from latentlab.training import sharding
from latentlab.training.arms import sample_groups
from latentlab.training.steps import update

SIZES = (1, 2, 3)
FLOAT = 4  # bytes
PROBLEMS, ROLLOUTS, QUESTION, THOUGHTS, ANSWER = 4, 32, 64, 6, 64  # of the table, on one GPU


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    layers: int
    width: int
    keys: int  # width of all keys
    inner: int  # of the MLP
    vocabulary: int
    tied: bool = True

    @property
    def block(self) -> int:
        """Parameters of one block."""
        return 2 * self.width * (self.width + self.keys + 1) + 3 * self.width * self.inner

    @property
    def table(self) -> int:
        """Parameters of the embedding."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.table * (1 if self.tied else 2) + self.width

    def adapter(self, r: int) -> int:
        """Parameters of LoRA of rank r on all linear maps of all blocks."""
        maps = 2 * (2 * self.width) + 2 * (self.width + self.keys) + 3 * (self.width + self.inner)
        return self.layers * r * maps


MEASURED = Shape(12, 768, 768, 2048, 8192, tied=False)
MODELS = {
    "SmolLM2-135M": Shape(30, 576, 192, 1536, 49152),
    "SmolLM2-360M": Shape(32, 960, 320, 2560, 49152),
    "Llama-3.2-1B": Shape(16, 2048, 512, 8192, 128256),
    "Llama-3.2-3B": Shape(28, 3072, 1024, 8192, 128256),
    "Llama-3.1-8B": Shape(32, 4096, 1024, 14336, 128256, tied=False),
}


# -- computed -------------------------------------------------------------------------------------


def state(shape: Shape, n: int) -> dict[str, int]:
    """Bytes of weights, gradient, moments and gathered units on each of n processes, in float32.

    Sampling: n > 1 hold the whole weights beside their shard. Update: at most one embedding with two
    gradients (answer, question) and their sum is gathered, or a block, the next one and a gradient
    twice, beside an embedding's gradient.
    """
    p, table = shape.parameters * FLOAT, shape.table * FLOAT
    if n == 1:
        return {"sampling": 3 * p, "update": 4 * p}
    units = max(3 * table, 4 * shape.block * FLOAT + table) + shape.tied * table
    return {"sampling": p + 3 * p // n, "update": 4 * p // n + units}


def activations(shape: Shape) -> dict[str, int]:
    """Bytes beside the state, at the sizes of the table; the update takes one group at a time.

    Keys and values in float32; 34 bytes x width x layers a position (arXiv 2205.05198), logits thrice.
    """
    rows, positions = PROBLEMS * ROLLOUTS, THOUGHTS + 1 + ANSWER
    cache = rows * positions * 2 * shape.keys * shape.layers * FLOAT
    saved = (QUESTION + ROLLOUTS * positions) * 34 * shape.width * shape.layers
    return {"sampling": cache, "update": saved + 3 * FLOAT * ROLLOUTS * ANSWER * shape.vocabulary}


def peak(shape: Shape, n: int, lora: int = 0) -> float:
    """GB a GPU: the larger of sampling and update."""
    held = state(shape, n)
    if lora:
        adapter = 4 * FLOAT * shape.adapter(lora)
        held = dict.fromkeys(held, shape.parameters * FLOAT + adapter)
    return max(held[phase] + activations(shape)[phase] for phase in held) / 1e9


# -- measured -------------------------------------------------------------------------------------


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `reset`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def steps(s: Shape) -> dict[str, int]:
    """Two GRPO steps of a random model on all processes: peak bytes of this one, by phase."""
    config = load_preset("tiny")
    config = replace(config, grpo=replace(config.grpo, num_problems=6, num_generations=2, max_candidates=0))
    problems = word_problems("train", 12, seed=0, steps=2)
    tokenizer = word_tokenizer((*WORDS, *(f"w{i}" for i in range(s.vocabulary - len(WORDS) - 5))))
    heads = {"num_attention_heads": s.width // 64, "num_key_value_heads": s.keys // 64}
    sizes = {"hidden_size": s.width, "intermediate_size": s.inner, "num_hidden_layers": s.layers, **heads}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=s.vocabulary, **sizes, **ids, tie_word_embeddings=s.tied))
    assert sum(p.numel() for p in lm.parameters()) == s.parameters
    model = LatentReasoner(lm, tokenizer, num_thoughts=3, max_new_tokens=4)
    if distributed.size() > 1:
        sharding.shard(model, [config.grpo.mask.sites])
    optimizer, needed = torch.optim.AdamW(model.parameters(), lr=1e-5), {}
    for step in range(2):
        reset()
        with sharding.gathered(model):
            batch = sample_groups(model, problems, config, step, lambda text, problem: float(len(text) % 2))
        needed["sampling"] = resident("VmHWM")
        reset()
        advantages = group_advantages(batch.rewards, baseline="mean", scale="none")
        for out, places in batch.parts:
            policy_gradient(model, out, advantages[places].flatten().float(), config)
        update(model, optimizer, {}, step=step, max_grad_norm=1.0)
        needed["update"] = resident("VmHWM")
    return needed


def work(folder: Path) -> None:
    """The steps in one of the processes, first with a tiny model; rank 0 writes what the largest needed."""
    torch.set_num_threads(1)
    with distributed.joined("cpu"):
        steps(replace(MEASURED, layers=1, width=64, keys=64, inner=64))
        gc.collect()
        before = resident("VmRSS")
        everyone = distributed.gather(lambda: steps(MEASURED))
        largest = {phase: max(each[phase] for each in everyone) - before for phase in everyone[0]}
        if distributed.rank() == 0:
            folder.joinpath("needed.json").write_text(json.dumps(largest))


def start(n: int) -> dict[str, int]:
    """Bytes of the largest of n processes, by phase."""
    fixed = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed at once
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", __file__, "--work", folder]
        subprocess.run([sys.executable, *launch], env=os.environ | fixed, check=True)
        return json.loads(Path(folder, "needed.json").read_text())


def measure(folder: Path | None = None) -> Path:
    """Measure and compute; returns the path of the result."""
    started = time.time()
    measured = {str(n): {**start(n), "computed": state(MEASURED, n)} for n in SIZES}
    gap = max(abs(row[phase] / row["computed"][phase] - 1) for row in measured.values() for phase in row["computed"])
    models = {
        name: {"parameters": s.parameters, "full": peak(s, 1), "lora": peak(s, 1, lora=16)}
        | {f"fsdp{n}": peak(s, n) for n in (2, 4, 8)}
        for name, s in MODELS.items()
    }
    most = {n: max(row["sampling"], row["update"]) for n, row in measured.items()}
    share = {n: each / most["1"] for n, each in most.items()}
    falls = " -> ".join(f"{each / 2**20:.0f}" for each in most.values())
    return results.write_result(
        "memory",
        preset="memory",
        parameters={"parameters": MEASURED.parameters, "dtype": "float32", "lora_r": 16},
        metrics={"measured": measured, "largest_gap": gap, "share": share, "models": models},
        started=started,
        seconds=time.time() - started,
        directory=folder,
        question="How much memory does a process need, with weights, gradient and optimizer state in shards?",
        headline=f"A Llama of {MEASURED.parameters / 1e6:.0f}M weights on 1 -> 2 -> 3 processes: {falls} MiB a process",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    print(measure(asked.folder)) if asked.work is None else work(asked.work)
