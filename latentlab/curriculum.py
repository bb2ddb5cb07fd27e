"""The Coconut curriculum: explicit steps become latent thoughts, one stage at a time.

    stage 0      question  <start>             <end>  step 1 ... step n  ### answer      explicit chain of thought
    stage k      question  <start> z_1 ... z_kc <end>  step k+1 ... step n  ### answer   c thoughts per replaced step
    last stage   question  <start> z_1 ... z_Lc <end>  ### answer                        no explicit step is left

Only the text after <end> carries loss; gradients flow through all thoughts. The optimizer is reset at each stage.
Source: Coconut, arXiv 2412.06769. Deviations: (1) optional loss of decoding each thought to the result of the step that
it replaces (SIM-CoT, arXiv 2509.20317), weight `decode_weight`; (2) shared masks may be worn during latent stages, so
that the model tolerates them later; (3) the last stage stops at a validation accuracy; (4) a learning-rate cosine per
stage.
Controls: "pause" and "direct" take the same losses, steps and masks; only what is fed back differs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from latentlab import parallel
from latentlab.config import CONTROLS, Config
from latentlab.evaluate import evaluate
from latentlab.loop import Run, batch_indices, set_learning_rate, warmup_cosine
from latentlab.masks import draw_masks, rollout_seeds
from latentlab.model import LatentReasoner
from latentlab.problems import Problem, step_result
from latentlab.rollout import encode_prompts

IGNORE = -100  # a target without loss


def stage_text(problem: Problem, stage: int, latent_stages: int) -> str:
    """What the model must say after <end> at `stage`: the steps not yet latent, then the answer."""
    steps = problem.steps[stage:] if stage < latent_stages else ()
    return "\n".join([*steps, f"### {problem.answer}"])


def encode_answers(tokenizer, texts: Sequence[str], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts plus eos, right-padded with eos: tokens [R, A] and which of them are real [R, A]."""
    rows = [row + [tokenizer.eos_token_id] for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows], device=device)
    token_mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=device)
    return tokens, token_mask


def result_tokens(tokenizer, problems: Sequence[Problem], thoughts: int, c_thought: int, device) -> torch.Tensor:
    """For each thought, the first token of the result of the step it completes, else IGNORE: [R, L]."""
    targets = torch.full((len(problems), thoughts), IGNORE, dtype=torch.long)
    for row, problem in enumerate(problems):
        for i, step in enumerate(problem.steps[: thoughts // c_thought]):
            first = tokenizer(step_result(step), add_special_tokens=False)["input_ids"][0]
            targets[row, (i + 1) * c_thought - 1] = first
    return targets.to(device)


def curriculum_loss(
    model: LatentReasoner, problems: Sequence[Problem], stage: int, config: Config, *, step: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy per answer token (nats) of one batch at `stage`, plus the thought-decoding loss: (loss, stats).

    Each of several processes computes its share of the problems, divided by the whole batch's tokens: shares add up.
    """
    c = config.curriculum
    texts = [stage_text(problem, stage, config.latent_stages) for problem in problems]
    tokens, token_mask = encode_answers(model.tokenizer, texts, model.device)
    targets = result_tokens(model.tokenizer, problems, model.num_thoughts, c.c_thought, model.device)
    count, decoded = token_mask.sum(), (targets != IGNORE).sum()
    names = ("loss/answer", "loss/decode") if c.decode_weight and decoded else ("loss/answer",)
    whole = (*encode_prompts(model.tokenizer, problems, model.device), tokens, token_mask, targets)
    prompt_ids, prompt_valid, tokens, token_mask, targets = map(parallel.shard, whole)
    if not len(tokens):  # fewer problems than processes
        return torch.zeros((), requires_grad=True), dict.fromkeys(names, 0.0)
    masks = None
    if stage > 0:
        seeds = parallel.shard(rollout_seeds(config.seed, step, [p.id for p in problems], 1))
        slots = 1 + model.num_thoughts + (tokens.shape[1] if c.mask.scope == "all" else 0)
        masks = draw_masks(c.mask, model, seeds, num_slots=slots)
    hidden, thoughts = model.teacher_forced(prompt_ids, prompt_valid, tokens, masks=masks)
    losses = [cross_entropy(model.head(hidden[token_mask]), tokens[token_mask], reduction="sum") / count]
    if len(names) > 1:
        logits = model.head(thoughts).flatten(0, 1)
        losses.append(cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum") / decoded)
    stats = {name: loss.item() for name, loss in zip(names, losses, strict=True)}
    return losses[0] + c.decode_weight * sum(losses[1:]), stats


def curriculum_gradient(
    model: LatentReasoner, problems: Sequence[Problem], stage: int, config: Config, *, step: int
) -> dict[str, float]:
    """Add the gradient of `curriculum_loss` of the whole batch to `.grad`, on every process; returns loss and stats."""

    def backward() -> dict[str, float]:
        loss, stats = curriculum_loss(model, problems, stage, config, step=step)
        loss.backward()
        return {"loss": loss.item(), **stats}

    shares = parallel.gather(backward)
    parallel.sum_gradients(model.parameters())
    return {name: sum(share[name] for share in shares) for name in shares[0]}


def fit_curriculum(
    model: LatentReasoner,
    train: Sequence[Problem],
    validation: Sequence[Problem],
    config: Config,
    *,
    out: str,
    resume: bool = False,
    first_stage: int = 0,
) -> dict:
    """Train through the stages, in place: the model ends with its best weights, and each stage's accuracy is returned.

    The run folder `out` gets metrics.jsonl, state.pt after every stage, and best/: the last stage's checkpoint with the
    best validation accuracy. Raises ValueError for empty data, FileExistsError for a used folder.
    """
    if not train or not validation:
        raise ValueError(f"data: got {len(train)} training and {len(validation)} validation problems, expected both")
    c = config.curriculum
    model.feedback = CONTROLS[c.control]
    run = Run(out, config, loop="curriculum", resume=resume)
    stages: dict[str, float] = {}
    if run.state:
        first_stage, stages = run.state["next_stage"], run.state["stages"]
        model.lm.load_state_dict(run.state["model"])
    best = stages.get(str(config.latent_stages), -1.0)
    for stage in range(first_stage, config.latent_stages + 1):
        accuracy = best = _fit_stage(model, train, validation, config, stage, run)
        stages[str(stage)] = accuracy
        run.save(model=model.lm.state_dict(), next_stage=stage + 1, stages=stages)
    run.load_best(model)
    return {"stages": stages, "validation_accuracy": best}


def _fit_stage(model, train, validation, config: Config, stage: int, run: Run) -> float:
    """One stage with a fresh optimizer: the validation accuracy it ends with (the last stage: its best)."""
    c, last = config.curriculum, stage == config.latent_stages
    set_stage(model, config, stage, validation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.learning_rate, betas=c.betas, weight_decay=c.weight_decay)
    total, offset = c.steps[stage], sum(c.steps[:stage])
    best = -1.0
    for i in tqdm(range(total), desc=f"{c.control} stage {stage}", leave=False):
        share = warmup_cosine(i, total=total, warmup=c.warmup_steps, final=c.final_lr_fraction)
        set_learning_rate(optimizer, c.learning_rate * share)
        batch = [train[j] for j in batch_indices(len(train), c.batch_size, seed=config.seed, step=offset + i)]
        loss, stats = curriculum_loss(model, batch, stage, config, step=offset + i)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record = {"step": offset + i, "stage": stage, "loss": loss.item(), **stats, "grad_norm": norm}
        if i + 1 == total or (last and (i + 1) % c.eval_every == 0):
            record["validation_accuracy"] = evaluate(model, validation, batch_size=config.evaluate.batch_size).accuracy
        run.log(record)
        accuracy = record.get("validation_accuracy", -1.0)
        if last and accuracy > best:
            run.save_best(model)
        best = max(best, accuracy)
        if last and best >= c.stop_accuracy:
            break
    return best


def set_stage(model: LatentReasoner, config: Config, stage: int, validation: Sequence[Problem]) -> None:
    """Give the model the number of thoughts and the answer length of `stage`."""
    model.num_thoughts = 0 if model.feedback == "none" else stage * config.curriculum.c_thought
    model.max_new_tokens = config.max_new_tokens
    if stage < config.latent_stages:
        texts = [stage_text(problem, stage, config.latent_stages) for problem in validation]
        model.max_new_tokens = encode_answers(model.tokenizer, texts, "cpu")[0].shape[1]
