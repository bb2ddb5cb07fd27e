"""One process against several that talk over gloo: `make reliability` writes its section of
reports/reliability.json.

    rollouts     32 problems: tokens, seeds and accepted groups, with and without dynamic sampling
    gradients    one step in float32: of both loops, relative to one process and to the unsplit batch
    training     20 steps in float64: weights and metrics of both loops
    sharding     rollouts and training again, of a Llama whose weights are shared out (FSDP2)

test_distributed.py runs the same functions and holds the figures to their bounds.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # before the imports

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from latentlab.data.word_problems import WORDS, word_problems
from latentlab.model import LatentReasoner
from latentlab.pretrained.scratch import word_tokenizer
from latentlab.runtime import distributed
from latentlab.study import results
from latentlab.training import sharding
from latentlab.training.arms import _iteration, fit_grpo, sample_groups
from latentlab.training.curriculum import curriculum_gradient, fit_curriculum, set_stage
from latentlab.training.run import Run, read_metrics
from tests.conftest import sharpen, small_config, tiny_gpt2
from tests.reliability.kills import write_sections

SIZES = (1, 2, 3)
TRAIN, VALIDATION = (word_problems(split, n, seed=0, steps=2) for split, n in (("train", 40), ("validation", 10)))
CONFIG = small_config(
    curriculum={"steps": [6, 6, 8], "batch_size": 8, "mask": {"rate": 0.2}, "decode_weight": 0.5, "eval_every": 4},
    # 40 candidates a step, so the budget of 25 * 32 groups is spent in 20 steps
    grpo={"steps": 25, "num_problems": 32, "num_generations": 4, "max_candidates": 40, "num_iterations": 1}
    | {"learning_rate": 1e-3, "mask": {"rate": 0.3}, "eval_every": 10},
)


def first_digit(text, problem):
    """A reward that makes random models' groups differ, but not all of them."""
    return float(problem.answer[0] in text)


# ---------------------------------------------------------------- N processes
def together(size, function, folder, **settings):
    """`function(**settings)` in `size` processes: what each returned or raised, by rank; None where it died."""
    folder.mkdir(parents=True)
    if size == 1:
        return [function(**settings)]
    context = multiprocessing.get_context("forkserver")  # its server imports torch once and never runs it
    context.set_forkserver_preload(["latentlab.training.arms", "pytest", "transformers.models.llama"])
    jobs = [context.Process(target=_member, args=(rank, size, function, folder, settings)) for rank in range(size)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    files = [folder / f"{rank}.pkl" for rank in range(size)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _member(rank, size, function, folder, settings):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        result = function(**settings)
    except Exception as error:
        result = error
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


# ---------------------------------------------------------------- what is compared
def tiny_llama(tied=False, **shape):
    """A Llama of two layers with grouped-query attention and two thoughts."""
    tokenizer = word_tokenizer(WORDS)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | shape
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied}
    shape |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    return LatentReasoner(lm, tokenizer, num_thoughts=2, max_new_tokens=5)


def rollouts(max_candidates, make=tiny_gpt2, shard=False):
    """Tokens and seeds of every accepted group by its place in the data, with the rewards of all candidates."""
    config = replace(CONFIG, grpo=replace(CONFIG.grpo, max_candidates=max_candidates))
    model = sharpen(make()).double()
    if shard:
        sharding.shard(model, [config.grpo.mask.sites])
    with sharding.gathered(model):
        batch = sample_groups(model, TRAIN, config, 3, first_digit)

    def mine():
        k = config.grpo.num_generations
        found = {}
        for out, places in batch.parts:
            tokens = [row[mask].tolist() for row, mask in zip(out.tokens, out.token_mask, strict=True)]
            rows = list(zip(out.seeds.tolist(), tokens, out.text, strict=True))
            found |= {place: rows[b * k : (b + 1) * k] for b, place in enumerate(places)}
        return found

    shares = distributed.gather(mine)
    groups = {place: group for share in shares for place, group in share.items()}
    return {
        "kept": batch.kept,
        "groups": dict(sorted(groups.items())),
        "rewards": batch.rewards.tolist(),
        "lengths": batch.lengths.tolist(),
        "shares": [len(share) for share in shares],
    }


class Recorder:
    """An optimizer that keeps the gradient and moves nothing."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.gradient = flat(p.grad for p in self.model.parameters())

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)


def gradient(loop, dtype, micro_batch=0, max_candidates=0, num_problems=32, **grpo):
    """The gradient of one step, flat, and the step's metrics."""
    model = sharpen(tiny_gpt2()).to(dtype)
    recorder = Recorder(model)
    if loop == "grpo":
        settings = {"num_problems": num_problems, "max_candidates": max_candidates, **grpo}
        settings |= {
            "micro_batch": micro_batch,
            "num_iterations": 1,
            "beta": 0.0,
            "max_grad_norm": 1e9,
            "epsilon_high": 0.2,
        }
        config = replace(CONFIG, grpo=replace(CONFIG.grpo, **settings))
        record = _iteration(model, None, recorder, TRAIN, config, 3, first_digit, None)
    else:
        config = replace(CONFIG, curriculum=replace(CONFIG.curriculum, micro_batch=micro_batch))
        set_stage(model, config, 1, VALIDATION)
        record = curriculum_gradient(model, TRAIN[:num_problems], 1, config, step=3)
        distributed.sum_gradients(model.parameters())
        recorder.step()
    return recorder.gradient, record


def one_layer():
    return tiny_gpt2(n_layer=1)


def train(loop, out, make=one_layer, config=CONFIG, **options):
    """20 steps in float64: the weights that the last one left on this process, and the metrics."""
    model = sharpen(make()).double()
    with patch.object(Run, "load_best"):  # leaves the last weights in place
        if loop == "grpo":
            fit_grpo(model, TRAIN, VALIDATION, config, out=out, reward=first_digit, **options)
        else:
            fit_curriculum(model, TRAIN, VALIDATION, config, out=out, **options)
    return flat(model.parameters()), read_metrics(out)


def flat(tensors):
    """All tensors in one vector, with those of sharded ones whole."""
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in tensors]
    return torch.cat([x.detach().flatten() for x in whole]).numpy()


# ---------------------------------------------------------------- the figures
def measure_rollouts(folder, make=tiny_gpt2, shard=False, sizes=SIZES):
    """How many of 32 problems' groups differ in tokens, seeds, text or acceptance from those of one process."""
    figures = {}
    for name, candidates in (("any group", 0), ("mixed groups", 64)):
        settings = {"max_candidates": candidates, "make": make}
        runs = [together(n, rollouts, folder / f"{candidates}-{n}", shard=shard and n > 1, **settings) for n in sizes]
        one = runs[0][0]
        others = [run for ranks in runs[1:] for run in ranks]
        figures[name] = {
            "candidates": len(one["rewards"]),
            "accepted": len(one["kept"]),
            "differing": sum(run["groups"].get(p) != group for run in others for p, group in one["groups"].items()),
            "same_choice": all(run[key] == one[key] for run in others for key in ("kept", "rewards", "lengths")),
            "groups_per_process": [ranks[0]["shares"] for ranks in runs],
        }
    return figures


def measure_gradients(folder):
    """Largest distance of a one-step float32 gradient from that of one process and one batch, relative to its norm."""
    figures = {}
    for loop in ("grpo", "curriculum"):
        settings = {"loop": loop, "dtype": torch.float32}
        (whole, _), *_ = together(1, gradient, folder / loop, **settings)
        for n, micro_batch in ((2, 0), (3, 0), (1, 5), (2, 5)):
            ranks = together(n, gradient, folder / f"{loop}-{n}-{micro_batch}", micro_batch=micro_batch, **settings)
            distance = max(float(((g - whole) ** 2).sum() ** 0.5 / (whole**2).sum() ** 0.5) for g, _ in ranks)
            figures[f"{loop}, processes {n}, micro_batch {micro_batch or 'whole'}"] = distance
    return figures


def measure_training(folder, make=one_layer, shard=False, sizes=SIZES, config=CONFIG):
    """Largest difference of a weight after 20 float64 steps, to one process and between processes, and of a metric."""
    figures = {}
    for loop in ("grpo", "curriculum"):
        settings = {"loop": loop, "make": make, "config": config}
        places = {n: {"folder": folder / f"{loop}-{n}", "out": folder / f"{loop}-run-{n}"} for n in sizes}
        runs = [together(n, train, **places[n], shard=shard and n > 1, **settings) for n in sizes]
        one, lines = runs[0][0]
        others = [ranks for run in runs[1:] for ranks in run]
        figures[loop] = {
            "steps": sum(line["step"] >= 0 for line in lines),
            "largest_weight": float(abs(one).max()),
            "weights": max(float(abs(weights - one).max()) for weights, _ in others),
            "between_processes": max(float(abs(w - run[0][0]).max()) for run in runs for w, _ in run),
            "metrics": max(
                abs(value - line[key])
                for _, rows in others
                for row, line in zip(rows, lines, strict=True)
                for key, value in row.items()
                if key != "arm"
            ),
        }
    return figures


def measure_sharding(folder):
    """Rollouts and training of shards on two and three processes against the whole model on one."""
    settings = {"make": tiny_llama, "shard": True}
    return {
        "rollouts": measure_rollouts(folder / "rollouts", **settings),
        "training": measure_training(folder / "training", **settings),
    }


MEASURES = {"rollouts": measure_rollouts, "gradients": measure_gradients, "training": measure_training}
MEASURES |= {"sharding": measure_sharding}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=results.reports_folder() / "reliability.json")
    path, started = parser.parse_args().json, time.time()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        section = {name: measure(Path(folder) / name) for name, measure in MEASURES.items()}
    write_sections({"processes": {"sizes": SIZES, **section}}, path=path, started=started)
    print(path, json.dumps(section, indent=1))


if __name__ == "__main__":
    main()
