"""GRPO on latent rollouts: rollout -> reward -> advantage -> loss, once per iteration.

One class of arms differs only in what makes the K rollouts of a group differ (config.arm_settings): nothing (`none`),
the sampled answer (`temperature`), one mask per rollout (`shared`), a fresh mask per thought (`per_step`), one mask per
rollout and greedy answers (`shared_greedy`: a heuristic, since log pi of an argmax is no score function). The reference
`supervised` spends the same number of sequences on cross-entropy of the right answer instead: each one a different
problem, so it sees K times as many.

Masks are drawn once, stored with the rollouts and replayed in the update; `replay_gap` is logged at every iteration.
All arms spend the same steps * num_problems * num_generations rollouts; with `max_candidates` (dynamic sampling, see
sample_groups) an iteration may take more of them, and the run has fewer iterations.

    metric                  meaning (TRL's names where TRL has one)
    rollouts                made so far, whether an update took them or not
    candidates, groups      problems rolled out in this iteration; those that the update took
    reward, reward_std      over candidates: mean reward; mean of the standard deviation within a group
    frac_reward_zero_std    share of candidates whose K rewards are equal: nothing to learn there
    replay_gap              max |re-scored - recorded| log-prob before the update, nats; 0 where there was none
    loss, grad_norm         of the first update of the iteration; the norm before clipping; 0 without any group
    entropy                 mean entropy of the distributions that the tokens of updated groups were sampled from, nats
    kl, clip_ratio/*        see loss.py
    completions/mean_length answer tokens of all candidates, eos included
    validation_accuracy     greedy pass@1 of the clean model on the validation set
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from latentlab.advantage import group_advantages, group_diagnostics, is_collapsed
from latentlab.config import Config, arm_settings
from latentlab.evaluation.accuracy import evaluate
from latentlab.grpo import merge_stats, policy_gradient
from latentlab.loss import loss_denominator
from latentlab.masks import rollout_seeds
from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.reward import exact_answer
from latentlab.rollouts import Rollouts, rollout
from latentlab.runtime import distributed
from latentlab.training.checkpoint import expect_finite
from latentlab.training.curriculum import curriculum_gradient
from latentlab.training.run import Run, batch_indices, progress_bar, set_learning_rate, update


def fit_grpo(
    model: LatentReasoner,
    train: Sequence[Problem],
    validation: Sequence[Problem],
    config: Config,
    *,
    out: str,
    resume: bool = False,
    reward=exact_answer,
    max_minutes: float = 0.0,
    checkpoint_minutes: float = 10.0,
) -> dict:
    """Train one arm, in place; the model ends with the weights that were best on the validation set.

    The run folder `out` gets metrics.jsonl, state.pt and best/. Raises what Run does, ValueError for empty data,
    Stopped if the run was asked to stop, FloatingPointError for a NaN (the last good checkpoint is kept).
    """
    if not train or not validation:
        raise ValueError(f"data: got {len(train)} training and {len(validation)} validation problems, expected both")
    g = config.grpo
    reference = copy.deepcopy(model).requires_grad_(False) if g.beta else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=g.learning_rate, weight_decay=g.weight_decay)
    run = Run(
        out, config, model, loop="grpo", problems=(*train, *validation), resume=resume, max_minutes=max_minutes,
        checkpoint_minutes=checkpoint_minutes,
    )  # fmt: skip
    run.restore(model, optimizer)
    progress, budget = run.progress, g.steps * g.num_problems * g.num_generations  # rollouts, equal for all arms
    with run, progress_bar(total=budget, initial=progress.rollouts, desc=f"grpo {g.arm}", unit="rollout") as bar:
        if run.new:
            run.end_step(model, optimizer, {"step": -1, "validation_accuracy": _accuracy(model, validation, config)})
        while progress.rollouts < budget:
            step, left = progress.step, (budget - progress.rollouts) // g.num_generations  # problems
            set_learning_rate(optimizer, g.learning_rate * min(1.0, (step + 1) / max(1, g.warmup_steps)))
            if g.arm == "supervised":
                stats = _supervised_step(model, optimizer, train, config, step)
            else:
                stats = _grpo_step(model, reference, optimizer, train, config, step, reward, left)
            spent = stats.get("candidates", g.num_problems) * g.num_generations
            progress.rollouts += spent
            record = {"step": step, "arm": g.arm, "rollouts": progress.rollouts, **stats}
            last = progress.rollouts == budget
            if last or (step + 1) % g.eval_every == 0:
                record["validation_accuracy"] = _accuracy(model, validation, config)
            run.end_step(model, optimizer, record, last=last)
            bar.update(spent)
    run.load_best(model)
    return {"validation_accuracy": progress.best, "rollouts": progress.rollouts}


def _accuracy(model, validation, config: Config) -> float:
    return evaluate(model, validation, batch_size=config.evaluate.batch_size).accuracy


@dataclass(frozen=True)
class Sampled:
    """The groups that one iteration learns from, and what it took to find them.

    rewards, lengths: [C, K] of all C candidates that were rolled out, in data order, the same on every process; kept:
    which of them the update takes; parts: the kept ones that this process holds, as rollouts and their places.
    """

    rewards: torch.Tensor
    lengths: torch.Tensor
    kept: list[int]
    parts: list[tuple[Rollouts, list[int]]]


def sample_groups(model, train, config: Config, step: int, reward, *, limit: int | None = None) -> Sampled:
    """Roll out the problems of `step`, over all processes: num_problems of them, whatever their rewards.

    With `max_candidates` (DAPO's dynamic sampling) groups of equal rewards are passed over and further problems are
    tried: candidates come in data order, num_problems at a time, until num_problems mixed groups are found or
    max_candidates (or `limit`) were tried. Kept are the first mixed ones in that order, so the number of processes does
    not matter to them. Mixed groups beyond are dropped, never kept for a later step, whose policy is another: staleness
    0. Fewer than num_problems, even none, is what there is.
    """
    g, k = config.grpo, config.grpo.num_generations
    size = g.max_candidates or g.num_problems
    candidates = [train[i] for i in batch_indices(len(train), size, seed=config.seed, step=step)][:limit]
    seeds = rollout_seeds(config.seed, step, [p.id for p in candidates], k).view(-1, k)  # before anything is split
    mask, temperature = arm_settings(g, g.arm)
    parts: list[tuple[Rollouts, list[int]]] = []

    def roll() -> list[tuple[list[float], list[int]]]:
        mine = list(distributed.shard(range(len(found), min(len(found) + g.num_problems, len(candidates)))))
        if not mine:  # fewer problems than processes
            return []
        out = rollout(
            model, [candidates[i] for i in mine], num_generations=k, masks=mask, temperature=temperature,
            run_seed=config.seed, step=step, seeds=seeds[mine].flatten(),
        )  # fmt: skip
        parts.append((out, mine))
        rewards = out.rewards(reward)  # [B, K]
        sums = zip(out.problems, rewards.sum(1).tolist(), strict=True)
        expect_finite({f"reward of {p.id}": total for p, total in sums}, step, "correct the reward function")
        return list(zip(rewards.tolist(), out.token_mask.sum(1).view(-1, k).tolist(), strict=True))

    found: list[tuple[list[float], list[int]]] = []
    kept: list[int] = []
    while len(found) < len(candidates) and len(kept) < g.num_problems:
        found += distributed.in_order(distributed.gather(roll))
        rewards = torch.tensor([row for row, _ in found], dtype=torch.float64)
        mixed = (~is_collapsed(rewards)).nonzero()[:, 0].tolist() if g.max_candidates else range(len(found))
        kept = list(mixed)[: g.num_problems]
    chosen = [(out, mine, [b for b, i in enumerate(mine) if i in kept]) for out, mine in parts]
    return Sampled(
        rewards=rewards,
        lengths=torch.tensor([row for _, row in found]),
        kept=kept,
        parts=[(out.take(places), [mine[b] for b in places]) for out, mine, places in chosen if places],
    )


def _grpo_step(model, reference, optimizer, train, config: Config, step: int, reward, limit: int) -> dict[str, float]:
    """One batch of rollouts and its updates; returns the metrics of this iteration."""
    g = config.grpo
    batch = sample_groups(model, train, config, step, reward, limit=limit)
    advantages = group_advantages(batch.rewards, baseline=g.baseline, scale=g.scale_rewards)  # [C, K]
    lengths = batch.lengths[batch.kept].flatten()  # [R]
    record = {
        "candidates": len(batch.rewards), "groups": len(batch.kept), **group_diagnostics(batch.rewards),
        "completions/mean_length": batch.lengths.double().mean().item(),
    }  # fmt: skip
    if not batch.kept:  # an update on nothing would still move weights, by momentum and decay
        return {**record, "loss": 0.0, "replay_gap": 0.0, "grad_norm": 0.0}
    token_mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [R, A] of the whole batch
    denominator = loss_denominator(token_mask, g.loss_type, model.max_new_tokens)

    def backward() -> list[tuple[int, dict[str, float]]]:
        shares = []
        for out, places in batch.parts:
            part = advantages[places].flatten().to(out.logp)
            stats = policy_gradient(model, out, part, config, reference=reference, denominator=denominator)
            shares.append((int(out.token_mask.sum()), stats))
        return shares

    for iteration in range(g.num_iterations):
        stats = merge_stats([share for shares in distributed.gather(backward) for share in shares])
        stats = update(model, optimizer, stats, step=step, max_grad_norm=g.max_grad_norm)
        if iteration == 0:
            record |= stats
    return record


def _supervised_step(model, optimizer, train, config: Config, step: int) -> dict[str, float]:
    """The reference arm: cross-entropy of right answers on as many sequences as the other arms roll out."""
    g = config.grpo
    size = g.num_problems * g.num_generations
    problems = [train[i] for i in batch_indices(len(train), size, seed=config.seed, step=step)]
    plain = replace(config, curriculum=replace(config.curriculum, decode_weight=0.0))  # answers alone: no step's result
    stats = curriculum_gradient(model, problems, config.latent_stages, plain, step=step)
    return update(model, optimizer, stats, step=step, max_grad_norm=g.max_grad_norm)
