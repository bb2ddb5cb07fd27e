"""GRPO on latent rollouts: rollout -> reward -> advantage -> loss, once per iteration.

Arms differ only in what makes the K rollouts of a group differ (config.arm_settings): nothing
(`none`), the sampled answer (`temperature`), one mask per rollout (`shared`), a fresh mask per
thought (`per_step`), one mask per rollout with greedy answers (`shared_greedy`: a heuristic, since
log pi of an argmax is no score function), masks in antithetic pairs (`antithetic`), Gaussian noise on
the inputs of the latent steps instead of a mask (`gaussian`). The reference arm `supervised` spends the same number of
sequences on cross-entropy of the right answer; each is another problem, so it sees K times as many.

Masks are drawn once, stored with the rollouts and replayed in the update; every iteration logs
`replay_gap`. All arms spend the same steps * num_problems * num_generations rollouts; an iteration
with dynamic sampling (`max_candidates`, see sample_groups) takes more, so there are fewer of them.

    metric                  meaning (TRL's names where TRL has one)
    rollouts                made so far, whether an update used them or not
    candidates, groups      problems rolled out in this iteration; those that the update used
    reward, reward_std      over candidates: mean reward; mean standard deviation within a group
    frac_reward_zero_std    share of candidates whose K rewards are equal: no signal there
    pass@k                  share of candidates with a reward above 0: collapsed ones without are failed
    replay_gap              max |re-scored - recorded| log-prob before the update, nats; 0 if none;
                            over groups with a signal, at validation steps over all kept groups
    loss, grad_norm         of the first update; the norm before clipping; 0 without any group
    entropy                 mean entropy of the distributions that kept tokens came from, nats
    kl, *clip_ratio*        see loss.py
    completions/mean_length answer tokens of all candidates, eos included
    validation_accuracy     greedy pass@1 of the clean model on the validation set
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from latentlab.advantage import group_advantages, group_diagnostics, is_collapsed
from latentlab.config import Config, arm_settings
from latentlab.grpo import merge_stats, policy_gradient
from latentlab.loss import loss_denominator
from latentlab.masks import rollout_seeds
from latentlab.model import LatentReasoner
from latentlab.pretrained.adapters import attach_adapter
from latentlab.reward import exact_answer
from latentlab.rollouts import Rollouts, rollout
from latentlab.runtime import distributed
from latentlab.training import sharding
from latentlab.training.curriculum import curriculum_gradient
from latentlab.training.run import Problems, Run
from latentlab.training.steps import (
    batch_indices,
    frozen_copy,
    progress_bar,
    set_learning_rate,
    show,
    trained,
    update,
)


def fit_grpo(
    model: LatentReasoner, train: Problems, validation: Problems, config: Config, *, out, reward=exact_answer, **options
) -> dict:
    """Train one arm, in place; the model ends with its best weights on the validation set.

    out: the run folder (str or Path). options: resume, shard, max_minutes,
    checkpoint_minutes and tensorboard of Run. A sharded model works inside `sharding.gathered` afterwards.
    Raises what Run does, Stopped if asked to stop, and FloatingPointError for a NaN.
    """
    g = config.grpo
    attach_adapter(model, config)
    run = Run(Path(out), config, model, train, validation, loop="grpo", **options)
    reference = frozen_copy(model) if g.beta else None
    run.shard_models(*filter(None, (model, reference)))
    optimizer = torch.optim.AdamW(trained(model), lr=g.learning_rate, weight_decay=g.weight_decay)
    run.restore(optimizer)
    progress, budget = run.progress, g.steps * g.num_problems * g.num_generations  # rollouts
    bar = progress_bar(total=budget, initial=progress.rollouts, desc=f"grpo {g.arm}", unit="rollout")
    with run.stop_on_signals(), bar:
        if run.new:
            run.end_step(optimizer, {"step": -1, "validation_accuracy": run.accuracy()})
        while progress.rollouts < budget:
            step, problems_left = progress.step, (budget - progress.rollouts) // g.num_generations
            set_learning_rate(optimizer, g.learning_rate * min(1.0, (step + 1) / max(1, g.warmup_steps)))
            stats = _iteration(model, reference, optimizer, train, config, step, reward, problems_left)
            progress.rollouts += int(stats.get("candidates", g.num_problems)) * g.num_generations
            record = {"step": step, "arm": g.arm, "rollouts": progress.rollouts, **stats}
            last = progress.rollouts == budget
            if last or (step + 1) % g.eval_every == 0:
                record["validation_accuracy"] = run.accuracy()
            run.end_step(optimizer, record, last=last)
            show(bar, reward=stats.get("reward"), collapsed=stats.get("frac_reward_zero_std"))
            bar.update(progress.rollouts - bar.n)
    run.load_best()
    return {"validation_accuracy": progress.best, "rollouts": progress.rollouts}


@dataclass(frozen=True)
class Sampled:
    """The groups that one iteration learns from, and the candidates that were tried to find them."""

    rewards: torch.Tensor  # [C, K] of all C candidates in data order, the same on every process
    lengths: torch.Tensor  # [C, K], tokens
    kept: list[int]  # the candidates that the update uses
    parts: list[tuple[Rollouts, list[int]]]  # those of this process, with their places among the candidates


def sample_groups(model, train, config: Config, step: int, reward, *, limit: int | None = None) -> Sampled:
    """Roll out the num_problems problems of `step`, over all processes.

    With `max_candidates` (DAPO's dynamic sampling) groups of equal rewards are skipped: candidates
    come in data order, num_problems at a time, until num_problems mixed groups are found or
    max_candidates (or `limit`) were tried. The first ones in that order are kept, for any number of
    processes, and the others dropped: a later step has another policy. There may be fewer, or none.
    """
    g, k = config.grpo, config.grpo.num_generations
    size = g.max_candidates or g.num_problems
    candidates = [train[i] for i in batch_indices(len(train), size, seed=config.seed, step=step)][:limit]
    seeds = rollout_seeds(config.seed, step, [p.id for p in candidates], k).view(-1, k)
    mask, temperature = arm_settings(g, g.arm)
    sampling: dict[str, Any] = {"masks": mask, "temperature": temperature, "run_seed": config.seed, "step": step}
    parts: list[tuple[Rollouts, list[int]]] = []

    def roll() -> list[tuple[list[float], list[int]]]:
        mine = list(distributed.shard(range(len(found), min(len(found) + g.num_problems, len(candidates)))))
        if not mine:  # fewer problems than processes
            return []
        out = rollout(model, [candidates[i] for i in mine], num_generations=k, seeds=seeds[mine].flatten(), **sampling)
        parts.append((out, mine))
        try:
            rewards = out.rewards(reward)  # [B, K]
        except ValueError as error:
            raise ValueError(f"grpo at step {step}, {error}") from error
        return list(zip(rewards.tolist(), out.token_mask.sum(1).view(-1, k).tolist(), strict=True))

    found: list[tuple[list[float], list[int]]] = []
    kept: list[int] = []
    while len(found) < len(candidates) and len(kept) < g.num_problems:
        found += distributed.in_order(distributed.gather(roll))
        rewards = torch.tensor([row for row, _ in found], dtype=torch.float64)
        mixed = (~is_collapsed(rewards)).nonzero()[:, 0].tolist() if g.max_candidates else range(len(found))
        kept = list(mixed)[: g.num_problems]
    places = [[b for b, i in enumerate(mine) if i in kept] for _, mine in parts]
    chosen = [(out.take(at), [mine[b] for b in at]) for (out, mine), at in zip(parts, places, strict=True) if at]
    return Sampled(rewards, torch.tensor([row for _, row in found]), kept, chosen)


def _iteration(model, reference, optimizer, train, config: Config, step: int, reward, limit: int) -> dict[str, float]:
    g = config.grpo
    if g.arm == "supervised":
        return _supervised_step(model, optimizer, train, config, step)
    with sharding.gathered(model):
        batch = sample_groups(model, train, config, step, reward, limit=limit)
    advantages = group_advantages(batch.rewards, baseline=g.baseline, scale=g.scale_rewards)
    lengths = batch.lengths[batch.kept].flatten()  # [R]
    record = {"candidates": len(batch.rewards), "groups": len(batch.kept), **group_diagnostics(batch.rewards)}
    record["completions/mean_length"] = batch.lengths.double().mean().item()
    if not batch.kept:  # an update on nothing would still move weights, by momentum and decay
        return {**record, "loss": 0.0, "replay_gap": 0.0, "grad_norm": 0.0}
    token_mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [R, A] of the whole batch
    denominator = loss_denominator(token_mask, g.loss_type, model.max_new_tokens)

    validated = len(batch.rewards) == limit or (step + 1) % g.eval_every == 0  # a validation follows
    whole = validated or not advantages[batch.kept].any()  # the optimizer steps on gradients of 0, as on any

    def backward() -> list[tuple[int, int, dict[str, float]]]:
        shares = []
        with sharding.in_step(model, lambda: _idle_loss(model, reference)):
            for out, places in batch.parts:
                part = advantages[places].flatten().to(out.logp)
                settings = {"reference": reference, "denominator": denominator, "whole": whole}
                stats = policy_gradient(model, out, part, config, **settings)
                shares.append((int(out.token_mask.sum()), len(out.tokens), stats))
        return shares

    for iteration in range(g.num_iterations):
        shares = [share for part in distributed.gather(backward) for share in part]
        stats = merge_stats(shares, g.importance_sampling_level)
        stats = update(model, optimizer, stats, step=step, max_grad_norm=g.max_grad_norm)
        record |= {} if iteration else stats  # of the first update
    return record


def _idle_loss(*models: LatentReasoner | None) -> torch.Tensor:
    """0, by the passes that scoring one micro-batch makes."""
    losses: list[torch.Tensor] = []
    for model in filter(None, models):
        with torch.set_grad_enabled(not losses):  # the first is trained, a second is the reference
            prompt = torch.full((1, 2), model.start_id, device=model.device)
            hidden, _ = model.teacher_forced(prompt, prompt > -1, prompt[:, 1:])
            losses.append(0 * model.head(hidden).sum())
    return losses[0]


def _supervised_step(model, optimizer, train, config: Config, step: int) -> dict[str, float]:
    g = config.grpo
    size = g.num_problems * g.num_generations
    problems = [train[i] for i in batch_indices(len(train), size, seed=config.seed, step=step)]
    plain = replace(config, curriculum=replace(config.curriculum, decode_weight=0.0))
    stats = curriculum_gradient(model, problems, config.latent_stages, plain, step=step)
    return update(model, optimizer, stats, step=step, max_grad_norm=g.max_grad_norm)
