"""GRPO on latent rollouts: rollout -> reward -> advantage -> loss, once per iteration.

One class of arms differs only in what makes the K rollouts of a group differ (config.arm_settings): nothing (`none`),
the sampled answer (`temperature`), one mask per rollout (`shared`), a fresh mask per thought (`per_step`), one mask per
rollout and greedy answers (`shared_greedy`: a heuristic, since log pi of an argmax is no score function). The reference
`supervised` spends the same number of sequences on cross-entropy of the right answer instead: each one a different
problem, so it sees K times as many.

Masks are drawn once, stored with the rollouts and replayed in the update; `replay_gap` is logged at every iteration.

    metric                  meaning (TRL's names where TRL has one)
    reward, reward_std      mean reward; mean over groups of the standard deviation within a group
    frac_reward_zero_std    share of groups whose K rewards are equal: nothing to learn there
    replay_gap              max |re-scored - recorded| log-prob before the update, nats
    loss, grad_norm         of the first update of the iteration; the norm before clipping
    kl, clip_ratio/*        see loss.py
    completions/mean_length answer tokens, eos included
    validation_accuracy     greedy pass@1 of the clean model on the validation set
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from latentlab.advantage import group_advantages, group_diagnostics
from latentlab.checkpoint import expect_finite
from latentlab.config import Config, arm_settings
from latentlab.curriculum import curriculum_gradient
from latentlab.evaluate import evaluate
from latentlab.loop import Run, batch_indices, set_learning_rate, update
from latentlab.loss import grpo_loss, loss_denominator
from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.reward import exact_answer
from latentlab.rollout import Rollouts, replay_gap, rollout


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
    with run:
        if run.new:
            run.end_step(model, optimizer, {"step": -1, "validation_accuracy": _accuracy(model, validation, config)})
        start = run.progress.step
        for step in tqdm(range(start, g.steps), desc=f"grpo {g.arm}", initial=start, total=g.steps, leave=False):
            set_learning_rate(optimizer, g.learning_rate * min(1.0, (step + 1) / max(1, g.warmup_steps)))
            if g.arm == "supervised":
                stats = _supervised_step(model, optimizer, train, config, step)
            else:
                stats = _grpo_step(model, reference, optimizer, train, config, step, reward)
            record = {"step": step, "arm": g.arm, "rollouts": (step + 1) * g.num_problems * g.num_generations, **stats}
            last = step + 1 == g.steps
            if last or (step + 1) % g.eval_every == 0:
                record["validation_accuracy"] = _accuracy(model, validation, config)
            run.end_step(model, optimizer, record, last=last)
    run.load_best(model)
    return {"validation_accuracy": run.progress.best, "rollouts": g.steps * g.num_problems * g.num_generations}


def _accuracy(model, validation, config: Config) -> float:
    return evaluate(model, validation, batch_size=config.evaluate.batch_size).accuracy


def _grpo_step(model, reference, optimizer, train, config: Config, step: int, reward) -> dict[str, float]:
    """One batch of rollouts and its updates; returns the metrics of this iteration."""
    g = config.grpo
    problems = [train[i] for i in batch_indices(len(train), g.num_problems, seed=config.seed, step=step)]
    mask, temperature = arm_settings(g, g.arm)
    out = rollout(
        model, problems, num_generations=g.num_generations, masks=mask, temperature=temperature,
        run_seed=config.seed, step=step,
    )  # fmt: skip
    rewards = out.rewards(reward)  # [B, K]
    sums = zip(problems, rewards.sum(1).tolist(), strict=True)
    expect_finite({f"reward of {problem.id}": total for problem, total in sums}, step, "correct the reward function")
    record = {**group_diagnostics(rewards), "completions/mean_length": out.token_mask.sum(1).float().mean().item()}
    advantages = group_advantages(rewards, baseline=g.baseline, scale=g.scale_rewards).flatten().to(out.logp)  # [R]
    for iteration in range(g.num_iterations):
        stats = policy_gradient(model, out, advantages, config, reference=reference)
        stats = update(model, optimizer, stats, step=step, max_grad_norm=g.max_grad_norm)
        if iteration == 0:
            record |= stats
    return record


def policy_gradient(
    model: LatentReasoner, out: Rollouts, advantages: torch.Tensor, config: Config, *, reference=None
) -> dict[str, float]:
    """Add the gradient of the GRPO loss to `.grad`, in micro-batches of whole groups; advantages [R]. Returns stats."""
    g, k = config.grpo, out.num_generations
    denominator = loss_denominator(out.token_mask, g.loss_type, model.max_new_tokens)
    size = g.micro_batch or len(out.problems)
    total = {"loss": 0.0, "replay_gap": 0.0}
    for start in range(0, len(out.problems), size):
        part = out.take(slice(start, start + size))
        logp = model.score(part, masks=part.masks)  # [R', A]: the masks are replayed
        ref_logp = None
        if g.beta:
            with torch.no_grad():
                ref_logp = reference.score(part, masks=part.masks)
        loss, stats = grpo_loss(
            logp, part.logp, advantages[start * k : (start + size) * k], part.token_mask, epsilon=g.epsilon,
            epsilon_high=g.epsilon_high, beta=g.beta, ref_logp=ref_logp, loss_type=g.loss_type, denominator=denominator,
        )  # fmt: skip
        loss.backward()
        share = part.token_mask.sum().item() / out.token_mask.sum().item()
        total["loss"] += loss.item()
        total["replay_gap"] = max(total["replay_gap"], replay_gap(logp, part))
        total["ratio_max_deviation"] = max(total.get("ratio_max_deviation", 0.0), stats.pop("ratio_max_deviation"))
        for name, value in stats.items():
            total[name] = total.get(name, 0.0) + share * value
    return total


def _supervised_step(model, optimizer, train, config: Config, step: int) -> dict[str, float]:
    """The reference arm: cross-entropy of right answers on as many sequences as the other arms roll out."""
    g = config.grpo
    size = g.num_problems * g.num_generations
    problems = [train[i] for i in batch_indices(len(train), size, seed=config.seed, step=step)]
    plain = replace(config, curriculum=replace(config.curriculum, decode_weight=0.0))  # answers alone: no step's result
    stats = curriculum_gradient(model, problems, config.latent_stages, plain, step=step)
    return update(model, optimizer, stats, step=step, max_grad_norm=g.max_grad_norm)
