"""What one step of either loop needs: optimizer step, learning rate, batch order, progress line."""

from __future__ import annotations

import copy
import math
from typing import SupportsIndex

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from latentlab.masks import whole_number
from latentlab.model import LatentReasoner
from latentlab.runtime import distributed
from latentlab.training import sharding
from latentlab.training.checkpoint import expect_finite


def trained(model: LatentReasoner) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer step moves: all, or those of a LoRA adapter."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen_copy(model: LatentReasoner) -> LatentReasoner:
    """A copy that keeps the present policy: of what is trained; frozen weights, a LoRA base, are shared."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def update(model, optimizer: torch.optim.Optimizer, stats: dict, *, step: int, max_grad_norm: float) -> dict:
    """Sum `.grad` over processes, clip it, step the optimizer; returns `stats` with the norm before.

    Raises FloatingPointError before any weight moves if the norm or a number of `stats` is not finite.
    """
    if not sharding.is_sharded(model):  # FSDP2 has summed them
        distributed.sum_gradients(trained(model))
    norm = torch.nn.utils.clip_grad_norm_(trained(model), max_grad_norm)
    stats = {**stats, "grad_norm": (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()}
    expect_finite(stats, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return stats


def warmup_cosine(step: int, *, total: int, warmup: int, final: float) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then a cosine down to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def batch_indices(total: int, size: int, *, seed: SupportsIndex, step: SupportsIndex) -> list[int]:
    """The items, of `total`, in batch `step`: epochs of fresh permutations, from (seed, step)."""
    seed, step = whole_number("seed", seed), whole_number("step", step)
    epochs = range(step * size // total, ((step + 1) * size - 1) // total + 1)
    seeds = [seed * 1_000_003 + epoch for epoch in epochs]
    orders = [torch.randperm(total, generator=torch.Generator().manual_seed(s)) for s in seeds]
    first = step * size - epochs[0] * total
    return torch.cat(orders)[first : first + size].tolist()


def progress_bar(*arguments, **settings) -> tqdm:
    """tqdm on rank 0 alone; TQDM_DISABLE=1 switches it off."""
    return tqdm(*arguments, leave=False, **settings, **({"disable": True} if distributed.rank() else {}))


def show(bar: tqdm, **metrics: float | None) -> None:
    """Show metrics of the last step behind the bar's seconds left; None: not measured yet."""
    bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items() if value is not None}, refresh=False)
