"""The Coconut curriculum: explicit steps become latent thoughts, one stage at a time.

    stage 0     question <start>             <end> step 1 ... step n ### answer   explicit steps
    stage k     question <start> z_1 .. z_kc <end> step k+1 ... step n ### answer  c thoughts a step
    last stage  question <start> z_1 .. z_Lc <end> ### answer                     no explicit step

Only the text after <end> carries loss; gradients flow through all thoughts. The optimizer is reset
at each stage. Source: Coconut, arXiv 2412.06769. Deviations: (1) an optional loss, of weight
`decode_weight`, for decoding each thought to the result of the step that it replaces (SIM-CoT,
arXiv 2509.20317); (2) optional masks in latent stages, so that the model tolerates them later;
(3) the last stage stops at a validation accuracy; (4) a learning-rate cosine per stage.
Controls: "pause" and "direct" have the same losses, steps and masks, but other thoughts or none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from latentlab.config import CONTROLS, Config
from latentlab.masks import draw_masks, rollout_seeds
from latentlab.model import LatentReasoner
from latentlab.pretrained.adapters import attach_adapter
from latentlab.problems import Problem, step_result
from latentlab.rollouts import encode_prompts, encode_texts, first_tokens
from latentlab.runtime import distributed
from latentlab.training import sharding
from latentlab.training.run import Problems, Run
from latentlab.training.steps import (
    batch_indices,
    progress_bar,
    set_learning_rate,
    show,
    trained,
    update,
    warmup_cosine,
)

IGNORE = -100  # a target without loss


def stage_text(problem: Problem, stage: int, latent_stages: int) -> str:
    """The target after <end> at `stage`: the steps that are not yet latent, then the answer."""
    steps = problem.steps[stage:] if stage < latent_stages else ()
    return "\n".join([*steps, f"### {problem.answer}"])


def encode_answers(tokenizer, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts plus eos, right-padded with eos: tokens [R, A] and which of them are real [R, A]."""
    rows = [[*row, tokenizer.eos_token_id] for row in encode_texts(tokenizer, texts)]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=tokenizer.eos_token_id)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def result_tokens(tokenizer, problems: Problems, thoughts: int, c_thought: int) -> torch.Tensor:
    """[R, L]: per thought, the first token of the result of the step it completes, or IGNORE."""
    targets = torch.full((len(problems), thoughts), IGNORE)
    results = [[step_result(step) for step in problem.steps[: thoughts // c_thought]] for problem in problems]
    tokens = first_tokens(tokenizer, chain.from_iterable(results))
    for row, texts in enumerate(results):
        for i, text in enumerate(texts):
            targets[row, (i + 1) * c_thought - 1] = tokens[text]
    return targets


def curriculum_gradient(
    model: LatentReasoner, problems: Problems, stage: int, config: Config, *, step: int
) -> dict[str, float]:
    """Add the gradient of one batch's loss at `stage` to `.grad`; returns the losses, in nats.

    loss/answer: cross-entropy per answer token; loss/decode: the same per decoded thought; loss:
    their weighted sum. The batch runs in parts of `micro_batch` problems of similar length, for
    little padding, and processes share it; all divide by the token counts of the whole batch.
    """
    c = config.curriculum
    texts = [stage_text(problem, stage, config.latent_stages) for problem in problems]
    tokens, token_mask = encode_answers(model.tokenizer, texts)
    decoded_thoughts = model.num_thoughts if c.decode_weight else 0  # without it a step needs no result
    targets = result_tokens(model.tokenizer, problems, decoded_thoughts, c.c_thought)
    counts = {"loss/answer": int(token_mask.sum())}
    if c.decode_weight and (decoded := int((targets != IGNORE).sum())):  # else no mean
        counts["loss/decode"] = decoded
    seeds = rollout_seeds(config.seed, step, [p.id for p in problems], 1)  # before any split
    order = list(range(len(problems)))
    if c.micro_batch:
        order.sort(key=lambda row: len(problems[row].question) + len(texts[row]))

    def part_losses(rows: list[int]) -> dict[str, torch.Tensor]:
        part, mask_seeds = [problems[row] for row in rows], seeds[rows] if stage else None
        sums = _summed_losses(model, part, tokens[rows], token_mask[rows], targets[rows], mask_seeds, config)
        losses = {name: sums[name] / count for name, count in counts.items()}
        return {"loss": losses["loss/answer"] + c.decode_weight * losses.get("loss/decode", 0.0), **losses}

    def backward() -> dict[str, float]:
        total, mine = dict.fromkeys(("loss", *counts), 0.0), distributed.shard(order)
        size = c.micro_batch or len(order)
        with sharding.in_step(model, lambda: 0 * part_losses(order[:1])["loss"]):
            for rows in (list(mine[at : at + size]) for at in range(0, len(mine), size)):
                losses = part_losses(rows)
                losses["loss"].backward()
                for name, value in losses.items():
                    total[name] += value.item()
        return total

    shares = distributed.gather(backward)
    return {name: sum(share[name] for share in shares) for name in shares[0]}


def _summed_losses(model, problems, tokens, token_mask, targets, seeds, config: Config) -> dict[str, torch.Tensor]:
    """The two losses of some problems, summed over tokens; no mask without seeds (stage 0)."""
    c, width = config.curriculum, int(token_mask.sum(1).max())
    tokens, token_mask = tokens[:, :width].to(model.device), token_mask[:, :width].to(model.device)
    masks = None
    if seeds is not None:
        slots = 1 + model.num_thoughts + (width if c.mask.scope == "all" else 0)
        masks = draw_masks(c.mask, model, seeds, num_slots=slots)
    hidden, thoughts = model.teacher_forced(
        *encode_prompts(model.tokenizer, problems, model.device), tokens, masks=masks
    )
    losses = {"loss/answer": cross_entropy(model.head(hidden[token_mask]), tokens[token_mask], reduction="sum")}
    if c.decode_weight and thoughts.shape[1]:
        logits, targets = model.head(thoughts).flatten(0, 1), targets.to(model.device).flatten()
        losses["loss/decode"] = cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return losses


def fit_curriculum(
    model: LatentReasoner,
    train: Problems,
    validation: Problems,
    config: Config,
    *,
    out: str | Path,
    last_stage: int | None = None,
    **options,
) -> dict:
    """Train through the stages, in place; the model ends with its best weights of the last stage.

    Returns the validation accuracy of each stage. After a `last_stage` before the final one the
    model keeps its weights, and a resumed call continues. out, options, errors: as of `fit_grpo`.
    """
    c = config.curriculum
    model.feedback = CONTROLS[c.control]
    attach_adapter(model, config)
    run = Run(Path(out), config, model, train, validation, loop="curriculum", **options)
    run.shard_models(model)
    reached = bisect_right(list(accumulate(c.steps)), run.progress.step)
    end = config.latent_stages if last_stage is None else last_stage
    with run.stop_on_signals():
        for stage in range(min(reached, end), end + 1):
            _fit_stage(run, stage)
    if end == config.latent_stages:
        run.load_best()
    return {"stages": run.progress.stages, "validation_accuracy": run.progress.best}


def _fit_stage(run: Run, stage: int) -> None:
    """One stage, or the rest of it, with its own optimizer."""
    model, train, config, c = run.model, run.train, run.config, run.config.curriculum
    last, stages = stage == config.latent_stages, run.progress.stages
    set_stage(model, config, stage, run.validation)
    optimizer = torch.optim.AdamW(trained(model), lr=c.learning_rate, betas=c.betas, weight_decay=c.weight_decay)
    total, offset = c.steps[stage], sum(c.steps[:stage])
    start = run.progress.step - offset
    run.restore(optimizer if start else None)
    bar = progress_bar(range(start, total), desc=f"{c.control} stage {stage}", initial=start, total=total)
    for i in bar:
        if last and run.progress.best >= c.stop_accuracy:
            break
        step = offset + i
        share = warmup_cosine(i, total=total, warmup=c.warmup_steps, final=c.final_lr_fraction)
        set_learning_rate(optimizer, c.learning_rate * share)
        batch = [train[j] for j in batch_indices(len(train), c.batch_size, seed=config.seed, step=step)]
        stats = curriculum_gradient(model, batch, stage, config, step=step)
        stats = update(model, optimizer, stats, step=step, max_grad_norm=c.max_grad_norm)
        record = {"step": step, "stage": stage, **stats}
        if i + 1 == total or (last and (i + 1) % c.eval_every == 0):
            accuracy = record["validation_accuracy"] = run.accuracy()
            stages[str(stage)] = max(accuracy, stages.get(str(stage), accuracy))
        show(bar, loss=stats["loss"], accuracy=next(reversed(stages.values()), None))
        run.end_step(optimizer, record, last=last and i + 1 == total, keep_best=last)


def set_stage(model: LatentReasoner, config: Config, stage: int, validation: Problems) -> None:
    """Set the number of thoughts and the answer length of `stage`."""
    model.num_thoughts = 0 if model.feedback == "none" else stage * config.curriculum.c_thought
    model.max_new_tokens = config.max_new_tokens
    if stage < config.latent_stages:
        texts = [stage_text(problem, stage, config.latent_stages) for problem in validation]
        model.max_new_tokens = encode_answers(model.tokenizer, texts)[0].shape[1]
