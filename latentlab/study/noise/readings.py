"""What needs no training: noise at test time, where and when it acts, thoughts under masks.

plain-s0/readings/start.json   of the base; and one file per trained arm of the main contrast
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from latentlab.evaluation.agreement import majority_row
from latentlab.evaluation.thoughts import decode, right_thoughts
from latentlab.masks import Masks, MaskSpec, draw_masks, rollout_seeds
from latentlab.model import LatentReasoner
from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem, step_result
from latentlab.reward import exact_answer
from latentlab.rollouts import Rollouts, rollout
from latentlab.runtime.environment import commit
from latentlab.runtime.files import write_json
from latentlab.study.noise.plan import run_name
from latentlab.study.noise.unit import Base, is_made

KS = (1, 2, 4, 8, 16)
SAMPLES = 8  # problems whose thoughts are kept, repaired and broken ones


def make(base: Base, labels: Sequence[str]) -> None:
    """Read the base and the trained arms `labels`, unless that is done."""
    runs = {label: base.place / "main" / run_name(label) for label in labels}
    for label, run in {"start": base.place / "base", **runs}.items():
        target, asked = base.place / "readings" / f"{run_name(label)}.json", asdict(base.plan.readings)
        if not is_made(target, asked):
            found = read(load_model(run / "best"), base, asked["problems"], asked["rate"])
            about = {"base": base.name, "seed": base.seed, "label": label, "commit": commit()}
            write_json(target, {"made_for": asked, **about, **found})


def read(model: LatentReasoner, base: Base, problems: int, rate: float) -> dict:
    """All readings of one model on so many test problems."""
    test, size = base.data["test"][:problems], base.config.evaluate.batch_size
    mask = MaskSpec("shared", rate)
    kinds: dict[str, dict[str, Any]] = {
        "masks": {"mask": mask, "temperature": 0.0},
        "samples": {"mask": None, "temperature": 1.0},
        "both": {"mask": mask, "temperature": 1.0},
    }
    clean = _answers(model, test, 1, size, MaskSpec("none"))
    rows = [
        {"noise": name, **majority_row(model, test, k, batch_size=4 * size, **kind)}
        for name, kind in kinds.items()
        for k in KS
    ]
    return {
        "n": len(test),
        "clean": float(np.mean([row["right"] for row in clean])),
        "test_time": rows,
        "where": [
            {"where": name, "rate": rate, **_change(model, test, size, clean, spec, index)}
            for name, spec, index in _places(model, mask)
        ],
        **_thoughts(model, test, size, clean, mask),
    }


def _places(model: LatentReasoner, mask: MaskSpec) -> Iterator[tuple[str, MaskSpec, tuple[int, ...] | None]]:
    """(name, spec, index into the mask values behind the row) of one site, or one step, at a time."""
    everywhere = replace(mask, sites=("attention", "mlp", "embedding"))
    yield "attention and mlp, all steps", mask, None
    names = [
        f"{site}, layer {n // 2 + 1}" for n, site in enumerate(("attention", "mlp") * model.lm.config.num_hidden_layers)
    ]
    for site, name in enumerate([*names, "inputs of the steps"]):
        yield name, everywhere, (site,)
    for slot in range(1 + model.num_thoughts):
        yield (
            f"step {slot} ({'<start>' if slot == 0 else f'input thought {slot}'})",
            replace(mask, scheme="per_step"),
            (slot,),
        )


@torch.no_grad()
def _answers(model, problems: Sequence[Problem], k: int, size: int, spec: MaskSpec, index=None) -> list[dict]:
    """K greedy answers to each problem under masks that act at `index` alone: right, text, thoughts of each rollout."""
    rows: list[dict] = []
    for at in range(0, len(problems), max(1, size // k)):
        batch = problems[at : at + max(1, size // k)]
        seeds = rollout_seeds(0, 0, [p.id for p in batch], k)
        masks = draw_masks(spec, model, seeds, num_generations=k)
        if masks is not None and index is not None:
            values = torch.ones_like(masks.values)
            values[:, *index] = masks.values[:, *index]
            masks = Masks(values, masks.spec)
        out = rollout(model, batch, num_generations=k, masks=masks, temperature=0.0, run_seed=0, step=0, seeds=seeds)
        rows += _rows(model, out)
    return rows


def _rows(model: LatentReasoner, out: Rollouts) -> list[dict]:
    right = out.rewards(exact_answer).flatten().tolist()
    rows = zip(right, out.text, decode(model, out), out.seeds.tolist(), strict=True)
    return [{"right": bool(r), "text": text, "thoughts": thoughts, "seed": seed} for r, text, thoughts, seed in rows]


def _change(model, problems, size: int, clean: list[dict], spec: MaskSpec, index, k: int = 16) -> dict:
    """How masks change answers: right ones among all, repaired among wrong clean ones, broken among right ones."""
    rows = _answers(model, problems, k, 4 * size, spec, index)
    right = np.array([row["right"] for row in rows]).reshape(-1, k)
    before = np.array([row["right"] for row in clean])
    changed = [row["text"] != clean[i // k]["text"] for i, row in enumerate(rows)]
    count = right.sum(1)
    return {
        "mean": float(right.mean()),
        "changed": float(np.mean(changed)),
        "repaired": float(right[~before].mean()) if not before.all() else None,
        "broken": float(1 - right[before].mean()) if before.any() else None,
        "mixed": float(np.mean((count > 0) & (count < k))),
        "pass@k": float(np.mean(count > 0)),
    }


def _thoughts(model, problems, size: int, clean: list[dict], mask: MaskSpec, k: int = 16) -> dict:
    """Decoded thoughts of rollouts that a mask repaired or broke: how many equal their step's result, and samples.

    first_wrong, clean and masked: the share of rollouts whose first thought that is not its step's
    result is thought 1, 2, ..., or none.
    """
    rows, found = _answers(model, problems, k, 4 * size, mask), {}
    kinds = {"repaired": (False, True), "broken": (True, False)}
    for kind, (before, after) in kinds.items():
        places = [i for i, row in enumerate(rows) if (clean[i // k]["right"], row["right"]) == (before, after)]
        pairs = [(problems[i // k], clean[i // k], rows[i]) for i in places]
        first = list({problem.id: (problem, a, b) for problem, a, b in reversed(pairs)}.values())[::-1]
        samples = [
            {
                "id": problem.id,
                "question": problem.question,
                "results": [step_result(step) for step in problem.steps],
                "answer": problem.answer,
                "clean": {"text": a["text"], "thoughts": a["thoughts"]},
                "masked": {"text": b["text"], "thoughts": b["thoughts"], "seed": b["seed"]},
            }
            for problem, a, b in first[:SAMPLES]
        ]
        found[kind] = {
            "rollouts": len(places),
            "first_wrong_clean": _first_wrong(model, [(problem, a["thoughts"]) for problem, a, _ in pairs]),
            "first_wrong_masked": _first_wrong(model, [(problem, b["thoughts"]) for problem, _, b in pairs]),
            "samples": samples,
        }
    return found


def _first_wrong(model: LatentReasoner, rows: Sequence[tuple[Problem, Sequence[str]]]) -> dict[str, float]:
    """Shares of rollouts by their first thought that does not decode to its step's result."""
    places = []
    for problem, thoughts in rows:
        right = right_thoughts(model, thoughts, [step_result(step) for step in problem.steps])
        places.append(str(right.index(False) + 1) if False in right else "none")
    return {place: places.count(place) / len(places) for place in sorted(set(places))}
