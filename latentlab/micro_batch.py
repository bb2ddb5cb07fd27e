"""Micro-batches of an update: whole groups, questions of like length together, as many at once as memory allows.

What a backward pass holds is measured, not modelled: the first micro-batch is the group with the longest question, by
itself, and every tensor that autograd saves in it is counted (autocast's copies of weights too, which errs on the safe
side). No other group takes more, so a budget of bytes says how many of them go together. The same rollouts are split in
the same way in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks

from latentlab.model import LatentReasoner
from latentlab.rollout import Rollouts


class Splitter:
    """Hands out the places of `out`'s groups, longest question first, until all are taken.

    micro_batch: groups at once, 0 for all; memory_gib: GiB that a backward pass may hold on top of weights, gradients
    and optimizer, 0 for no limit. A single group is never split.
    """

    def __init__(self, model: LatentReasoner, out: Rollouts, *, micro_batch: int, memory_gib: float):
        lengths = out.prompt_valid.sum(1).tolist()
        self.left = sorted(range(len(lengths)), key=lambda b: -lengths[b])
        self.most = micro_batch or len(lengths)
        self.size, self.budget = 1 if memory_gib else self.most, memory_gib * 2**30
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        # the gradient of the logits, and of their log-softmax, on top of what is saved
        self.logits = 2 * 4 * out.num_generations * out.tokens.shape[1] * model.lm.config.vocab_size

    def __iter__(self) -> Iterator[list[int]]:
        while self.left:
            places, self.left = self.left[: self.size], self.left[self.size :]
            yield places

    @contextmanager
    def measured(self):
        """Around the forward pass of a micro-batch: the first one decides the size of the others."""
        if not self.budget:
            yield
            return
        saved: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # not the tensor itself: it would hold the graph that holds it

        with saved_tensors_hooks(count, lambda tensor: tensor):
            yield
        self.size = max(1, min(self.most, int(self.budget / (sum(saved.values()) + self.logits))))
        self.budget = 0.0
