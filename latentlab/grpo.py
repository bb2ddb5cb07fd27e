"""The gradient of one batch of rollouts, in micro-batches of groups: score -> loss -> backward.

A group whose advantages are all 0 adds nothing to the gradient without a KL term, so it is not
scored; denominators and means count it.

A memory budget is kept by measurement. The first micro-batch is the group with the most positions
alone, and every tensor that autograd saves in it is counted (autocast's copies of weights included,
an overestimate). No other group needs more, so the budget in bytes gives the number of groups per
micro-batch. The split depends on the rollouts only and is the same in every run.

Source: GRPO, arXiv 2402.03300. Deviation: the masks of the rollouts are replayed when scoring
(Dropout-GRPO, arXiv 2606.10184), so at the first update on a batch every ratio is 1 up to rounding.

Dimensions: R rows (rollouts), R' rows of a micro-batch, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from latentlab.config import Config
from latentlab.loss import grpo_loss, loss_denominator
from latentlab.model import LatentReasoner
from latentlab.rollouts import Rollouts, replay_gap


def policy_gradient(
    model: LatentReasoner,
    out: Rollouts,
    advantages: Float[Tensor, " R"],
    config: Config,
    *,
    reference: LatentReasoner | None = None,
    denominator: float | None = None,
    whole: bool = False,
) -> dict[str, float]:
    """Add the gradient of the GRPO loss to `.grad`, in micro-batches of groups; returns stats.

    reference: the model of the KL term (config.grpo.beta > 0). denominator: that of the whole batch
    (`loss_denominator`) if `out` is a part of it. whole: score groups of zero advantages too, as with
    a KL term; else they leave no gradient, and replay_gap and ratio_max_deviation are of the others.
    """
    g, k = config.grpo, out.num_generations
    names = ("epsilon", "epsilon_high", "beta", "loss_type", "importance_sampling_level")
    settings = {name: getattr(g, name) for name in names}
    if denominator is None:
        denominator = loss_denominator(out.token_mask, g.loss_type, model.max_new_tokens)
    advantages, shares = advantages.view(-1, k), []
    signal = (advantages != 0).any(1)  # [B]
    scored = torch.ones_like(signal) if whole or g.beta else signal
    groups = scored.nonzero()[:, 0].tolist()
    splitter = Splitter(model, out, groups, micro_batch=g.micro_batch, memory_gib=g.memory_gib)
    for places in splitter:
        part = out.take(places)
        with splitter.measured():
            logp = model.score(part, masks=part.masks)  # [R', A]; the masks are replayed
        with torch.no_grad():
            ref_logp = reference.score(part, masks=part.masks) if reference is not None and g.beta else None
        given = (logp, part.logp, advantages[places].flatten(), part.token_mask)
        loss, stats = grpo_loss(*given, ref_logp=ref_logp, denominator=denominator, **settings)
        loss.backward()
        tokens = int(part.token_mask.sum())
        if part.entropy is not None:
            stats["entropy"] = part.entropy.sum().item() / tokens
        shares.append((tokens, len(logp), {"loss": loss.item(), "replay_gap": replay_gap(logp, part), **stats}))
    if len(groups) < len(scored):
        rest = out.take((~scored).nonzero()[:, 0].tolist())
        tokens, stats = int(rest.token_mask.sum()), {"loss": 0.0, "replay_gap": 0.0}
        if rest.entropy is not None:
            stats["entropy"] = rest.entropy.sum().item() / tokens
        shares.append((tokens, len(rest.tokens), stats))
    return merge_stats(shares, g.importance_sampling_level)


def merge_stats(shares: Sequence[tuple[int, int, dict[str, float]]], level: str) -> dict[str, float]:
    """Stats of a batch from (answer tokens, rows, stats) of its parts: sum, maximum or mean.

    Means are over tokens; those of clipped ratios over rows, if `level` is "sequence". A part without
    a stat, whose groups had no signal, counts as 0.
    """
    merged = {}
    for name in dict.fromkeys(name for *_, stats in shares for name in stats):
        by_row = level == "sequence" and "clip_ratio" in name
        values = [(rows if by_row else tokens, stats.get(name, 0.0)) for tokens, rows, stats in shares]
        if name == "loss":
            merged[name] = sum(value for _, value in values)
        elif name in ("replay_gap", "ratio_max_deviation"):
            merged[name] = max(value for _, value in values)
        else:
            total = sum(count for count, _ in values)
            merged[name] = sum(count / total * value for count, value in values)
    return merged


class Splitter:
    """Micro-batches of some `groups` in `out`, as lists of problem indices, most positions first.

    micro_batch: groups per micro-batch at most, 0 for no limit. memory_gib: memory of a backward pass
    on top of weights, gradients and optimizer, 0 for no limit. A group is never split.
    """

    def __init__(
        self, model: LatentReasoner, out: Rollouts, groups: Sequence[int], *, micro_batch: int, memory_gib: float
    ):
        lengths, answers = out.prompt_valid.sum(1).tolist(), out.tokens.unflatten(0, (-1, out.num_generations))
        shared = out.masks is None and not model.same_passes  # equal answers are run once

        def positions(b: int) -> int:
            rows = len(answers[b].unique(dim=0)) if shared else out.num_generations
            return lengths[b] + rows * answers.shape[2]

        self.left = sorted(groups, key=lambda b: -positions(b))
        self.most = micro_batch or len(groups)
        self.size, self.budget = 1 if memory_gib else self.most, memory_gib * 2**30
        whole = (weight for weight in model.parameters() if type(weight.data) is Tensor)  # no shards (FSDP2)
        self.weights = {weight.untyped_storage().data_ptr() for weight in whole}
        # bytes of the gradients of logits and log-softmax, on top of the saved tensors
        self.logits = 2 * 4 * out.num_generations * out.tokens.shape[1] * model.lm.config.vocab_size

    def __iter__(self) -> Iterator[list[int]]:
        while self.left:
            places, self.left = self.left[: self.size], self.left[self.size :]
            yield places

    @contextmanager
    def measured(self):
        """Context of a micro-batch's forward pass; the first one sets the size of the others."""
        if not self.budget:
            yield
            return
        saved: dict[int, torch.UntypedStorage] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.weights:
                saved[storage.data_ptr()] = storage
            return tensor.detach()  # the tensor itself would keep its own graph alive

        with saved_tensors_hooks(count, lambda tensor: tensor):
            yield
        used = sum(storage.nbytes() for storage in saved.values())  # gathered weights are empty again
        self.size = max(1, min(self.most, int(self.budget / (used + self.logits))))
        self.budget = 0.0
