"""How fast is the engine? Rollouts and updates against other ways to make them, and against the floor (baselines.py).

Random weights of the named shape; questions of exactly 48 tokens, 6 thoughts, answers of exactly 8 tokens, so that all
variants do equal work; K = 16 rollouts of each of 4 problems. Everything runs in one process, interleaved, so that a
busy machine slows all variants alike; a figure is a median of five rounds (timing.py: CPU time with one thread).
Compare ratios of one run, never seconds of two. `official` and `definition` are timed on a few rollouts and scaled.
"""

from __future__ import annotations

import itertools
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from latentlab.bench.baselines import VARIANTS, EarlyEnd, floor, official, plain
from latentlab.bench.timing import measure, wait
from latentlab.data.word_problems import WORDS
from latentlab.masks import MaskSpec, draw_masks
from latentlab.model import LatentReasoner
from latentlab.pretrained.scratch import word_tokenizer
from latentlab.problems import Problem
from latentlab.rollouts import Rollouts, rollout
from latentlab.runtime import files
from latentlab.study import results
from latentlab.study.figures import save_figure
from latentlab.verify.reference import naive_rollout

IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SHAPES = {
    "tiny": GPT2Config(vocab_size=128, n_layer=1, n_embd=128, n_head=4, n_positions=256, **NO_DROPOUT, **IDS),
    "gpt2": GPT2Config(**NO_DROPOUT, **IDS),  # GPT-2 small, vocabulary 50,257
    "smollm2": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, **IDS,
    ),
}  # fmt: skip
QUESTION, THOUGHTS, ANSWER = 48, 6, 8  # tokens of a prompt, <start> included; thoughts; answer tokens
SPEC = MaskSpec(rate=0.1)
OFFICIAL_ROWS, DEFINITION_ROWS = 2, 1  # rollouts of these that are timed
AXES = {
    "num_generations": (1, 2, 4, 8, 16, 32, 64), "question": (16, 32, 64, 128), "thoughts": (0, 3, 6, 12),
    "answer": (2, 4, 8, 16),
}  # fmt: skip


def run_bench(
    *, shape: str, device: str = "cpu", num_problems: int = 4, num_generations: int = 16, repeats: int = 5, axes=AXES
) -> dict:
    """Seconds, ratios, peak memory and scaling at `num_problems` x `num_generations` rollouts, as nested metrics.

    `axes` names what is scaled, and its values. On CUDA matrix products are in bfloat16, and whole iterations are timed
    too. Raises ValueError for an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape: got {shape!r}, expected one of {', '.join(SHAPES)}")
    model = build(shape, device)
    rollouts, updates, recorded = variants(model, num_problems, num_generations)
    draw = {"mask_drawing": lambda: draw_masks(SPEC, model, recorded.seeds)}
    seconds, memory = measure({**rollouts, **updates, **draw}, repeats, device)
    rows = num_problems * num_generations
    seconds["official"] *= rows / OFFICIAL_ROWS
    seconds["definition"] *= rows / DEFINITION_ROWS
    metrics = {**ratios(seconds, rows), "gradient_error": gradient_error(model)}
    metrics["peak_memory_gib"], metrics["seconds"] = memory, seconds
    metrics["scaling"] = {name: scale(model, name, values, repeats, device) for name, values in axes.items()}
    if device.startswith("cuda"):
        metrics["all_in"] = all_in(model)
    return metrics


def build(shape: str, device: str = "cpu") -> LatentReasoner:
    """A model of the named shape with random weights, in which no answer ends early."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(SHAPES[shape])
    model = LatentReasoner(lm, word_tokenizer(WORDS), num_thoughts=THOUGHTS, max_new_tokens=ANSWER)
    return never_ending(model.place(device, "bfloat16" if device.startswith("cuda") else "float32"))


def never_ending(model: LatentReasoner) -> LatentReasoner:
    """No token is eos, so that answers have max_new_tokens tokens."""
    model.eos_id = -1
    return model


def variant(model: LatentReasoner, kind: type = LatentReasoner, **settings) -> LatentReasoner:
    """The same weights in a model of another class, or with other numbers of thoughts or tokens."""
    sizes = {"num_thoughts": model.num_thoughts, "max_new_tokens": model.max_new_tokens, **settings}
    other = kind(model.lm, model.tokenizer, **sizes)
    other.autocast_dtype = model.autocast_dtype
    return other if kind is EarlyEnd else never_ending(other)


def questions(count: int, length: int = QUESTION) -> list[Problem]:
    """Problems whose prompts have `length` tokens, <start> included."""
    words = [word for word in WORDS if word.isalpha()]
    texts = (" ".join(itertools.islice(itertools.cycle(words), i, i + length - 2)) for i in range(count))
    return [Problem(f"bench-{i}", text, (), "1", "bench") for i, text in enumerate(texts)]


def roll(model: LatentReasoner, problems: list[Problem], k: int, masks=SPEC) -> Rollouts:
    """K rollouts of each problem at temperature 1."""
    return rollout(model, problems, num_generations=k, masks=masks, temperature=1.0, run_seed=0, step=0)


def update(model: LatentReasoner, recorded: Rollouts) -> None:
    """Forward and backward pass of an update; no optimizer."""
    model.zero_grad(set_to_none=True)
    model.score(recorded, masks=recorded.masks).sum().backward()


def variants(model: LatentReasoner, count: int, k: int) -> tuple[dict, dict, Rollouts]:
    """What is timed: rollouts by name, updates by name ("update" first), and the rollouts that updates score."""
    problems = questions(count)
    alone = [p for p in problems for _ in range(k)]  # each rollout a problem of its own: no prefix is shared
    recorded, unshared = roll(model, problems, k), roll(model, alone, 1)
    rows, prompts, seeds = count * k, unshared.prompt_ids, recorded.seeds.to(model.device)
    positions = count * (QUESTION - 1) + rows * (1 + THOUGHTS + ANSWER)
    others = {name: variant(model, kind) for name, kind in VARIANTS.items()}
    early = variant(model, EarlyEnd)

    def plain_update():
        model.zero_grad(set_to_none=True)
        plain(model, prompts, seeds, recorded.tokens).sum().backward()

    @torch.no_grad()
    def definition():
        for row in range(DEFINITION_ROWS):
            naive_rollout(
                model.lm, model.tokenizer, problems[0].question, thoughts=THOUGHTS, limit=ANSWER, temperature=1.0,
                seed=seeds[row : row + 1], mask=recorded.masks.values[row], spec=SPEC, tokens=recorded.tokens[row],
            )  # fmt: skip

    rollouts = {
        "rollout": lambda: roll(model, problems, k),
        "unmasked": lambda: roll(model, problems, k, None),
        "official": lambda: [official(model, prompts[:1]) for _ in range(OFFICIAL_ROWS)],
        "definition": definition,
        "plain": torch.no_grad()(lambda: plain(model, prompts, seeds)),
        "prefix_per_row": lambda: roll(model, alone, 1),
        **{name: lambda other=other: roll(other, problems, k) for name, other in others.items()},
        "ends_early": lambda: roll(early, problems, k),
        "floor": lambda: floor(model, rows, positions, ANSWER, update=False),
    }
    updates = {
        "update": lambda: update(model, recorded),
        "update_plain": plain_update,
        "update_prefix_per_row": lambda: update(model, unshared),
        **{
            f"update_{name}": lambda other=other: update(other, recorded)
            for name, other in others.items()
            if name != "cache_grown"  # with gradient nothing is written in place
        },
        "update_floor": lambda: floor(model, rows, positions, ANSWER, update=True),
    }
    return rollouts, updates, recorded


def ratios(seconds: dict[str, float], rows: int) -> dict:
    """The named figures, all from `seconds`; `tricks`: how many times slower without each."""
    s = seconds
    switched = ("prefix_per_row", *VARIANTS)
    return {
        "rollouts_per_second": rows / s["rollout"],
        "speedup_vs_official_scheme": s["official"] / s["rollout"],
        "speedup_vs_definition": s["definition"] / s["rollout"],
        "speedup_vs_plain_batched": s["plain"] / s["rollout"],
        "update_speedup_vs_plain": s["update_plain"] / s["update"],
        "update_speedup_prefix_only": s["update_prefix_per_row"] / s["update"],
        "floor_fraction": {"rollout": s["floor"] / s["rollout"], "update": s["update_floor"] / s["update"]},
        "mask_overhead": s["rollout"] / s["unmasked"] - 1,
        "mask_drawing_share": s["mask_drawing"] / s["rollout"],
        "tricks": {
            "rollout": {n: s[n] / s["rollout"] for n in switched} | {"rows_stay": s["rollout"] / s["ends_early"]},
            "update": {n: s[f"update_{n}"] / s["update"] for n in switched if f"update_{n}" in s},
        },
    }


def gradient_error(model: LatentReasoner) -> float:
    """Relative difference of the engine's gradient from that of plain transformers, on two rollouts."""
    recorded = roll(model, questions(1), 2, None)
    grads = []
    for logp in (
        lambda: model.score(recorded, masks=None),
        lambda: plain(model, recorded.prompt_ids.expand(2, -1), recorded.seeds, recorded.tokens),
    ):
        model.zero_grad(set_to_none=True)
        logp().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return ((grads[0] - grads[1]).norm() / grads[1].norm()).item()


def scale(model: LatentReasoner, axis: str, values: tuple[int, ...], repeats: int, device: str) -> dict:
    """Seconds of a rollout of one problem (K = 16 unless K is scaled) along an axis, and the line through it."""
    runs = {}
    for value in values:
        sizes = {"thoughts": {"num_thoughts": value}, "answer": {"max_new_tokens": value}}.get(axis, {})
        problems = questions(1, value if axis == "question" else QUESTION)
        k = value if axis == "num_generations" else 16
        runs[str(value)] = partial(roll, variant(model, **sizes), problems, k)
    seconds = list(measure(runs, repeats, device)[0].values())
    slope, intercept = statistics.linear_regression(values, seconds)
    r2 = statistics.correlation(values, seconds) ** 2
    return {"values": list(values), "seconds": seconds, "slope": slope, "intercept": intercept, "r2": r2}


def all_in(model: LatentReasoner, k: int = 32, most: int = 2**20) -> dict:
    """Whole iterations, rollout and update with AdamW, at ever more problems until memory or `most` rows end it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    found: dict = {"num_generations": k, "rows": [], "rollouts_per_second": []}
    count = 1
    try:
        while count * k <= most:
            for _ in range(3):  # the last of three counts
                wait(model.device.type)
                start = time.perf_counter()
                update(model, roll(model, questions(count), k))
                optimizer.step()
                wait(model.device.type)
                seconds = time.perf_counter() - start
            found["rows"].append(count * k)
            found["rollouts_per_second"].append(count * k / seconds)
            count *= 2
    except torch.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
    found |= {"best_rollouts_per_second": max(found["rollouts_per_second"]), "largest_rows": max(found["rows"])}
    try:
        found["utilisation_percent"] = torch.cuda.utilization()
    except (ModuleNotFoundError, RuntimeError, AssertionError):  # needs NVIDIA's library
        found["utilisation_percent"] = {"skipped": "torch.cuda.utilization needs the package nvidia-ml-py"}
    return found


def main(shape: str, device: str, json_path: Path | None = None) -> int:
    """Run the bench, print its table, write reports/bench/<device>.json (other shapes: <device>_<shape>) and figure."""
    started, kind = time.time(), torch.device(device).type
    name = kind if shape == "gpt2" else f"{kind}_{shape}"
    parameters = {"shape": shape, "device": device, "num_problems": 4, "num_generations": 16, "repeats": 5}
    metrics = run_bench(**parameters)
    for key, value in results.leaves(metrics):
        if isinstance(value, float):
            print(f"{key:<44}{value:>12.4g}")
    threads = torch.get_num_threads()
    path = results.write_result(
        name, preset="bench", metrics=metrics, started=started, seconds=time.time() - started,
        parameters={**parameters, "question": QUESTION, "thoughts": THOUGHTS, "answer": ANSWER, "threads": threads},
        question="How fast is the engine?",
        headline=f"{shape} shape on {kind}: {metrics['speedup_vs_official_scheme']:.0f} times the official scheme, "
        f"{metrics['speedup_vs_plain_batched']:.1f} times plain batching; rollout at "
        f"{metrics['floor_fraction']['rollout']:.0%}, update at {metrics['floor_fraction']['update']:.0%} of the floor",
    )  # fmt: skip
    draw(metrics["scaling"], name)
    if json_path:
        files.write_atomically(json_path, path.read_bytes())
    print("wrote", path)
    return 0


AXES = {"num_generations": "rollouts K", "question": "question tokens", "answer": "answer tokens"}


def draw(scaling: dict, name: str) -> None:
    """One panel per axis: measured seconds and the fitted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for axes, (axis, found) in zip(figure.subplots(1, len(scaling), squeeze=False)[0], scaling.items(), strict=True):
        values = found["values"]
        axes.plot(values, found["seconds"], "o", color="black")
        axes.plot(values, [found["intercept"] + found["slope"] * v for v in values], "-", color="0.5")
        axes.set_xlabel(AXES.get(axis, axis))
        axes.set_title(f"{1000 * found['slope']:.3g} ms each, R² {found['r2']:.3f}", fontsize=9)
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("seconds, one problem")
    save_figure(figure, name, "bench")
