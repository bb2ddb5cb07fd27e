"""Pre-flight checks: do problems and config fit the model's context, vocabulary and mask sites?"""

from __future__ import annotations

import sys

import torch

from latentlab.backbone import multiplies_bfloat16
from latentlab.config import CONTROLS, Config
from latentlab.model import LatentReasoner
from latentlab.problems import step_result
from latentlab.rollouts import control_tokens, encode_texts, prompt_rows
from latentlab.runtime import distributed
from latentlab.training.curriculum import stage_text
from latentlab.training.run import Problems

LONGEST = 1000  # the problems with the longest text are tokenized: all of 60,000 take seconds


def say_precision(config: Config, device: torch.device) -> None:
    """Print, on stderr, what precision "auto" is on `device`."""
    if config.precision == "auto" and distributed.rank() == 0:
        chosen = "bfloat16" if multiplies_bfloat16(device) else "float32"
        print(f"precision auto: {chosen} products on this {device.type}", file=sys.stderr)


def expect_together(model: LatentReasoner, problems: Problems, config: Config, *, curriculum: bool = False) -> None:
    """Raise ValueError if problems exceed the context or the vocabulary, or masks lack their sites.

    curriculum: check the answers of its stages, and that every step to be decoded has a result.
    """
    c = config.curriculum
    spec = c.mask if curriculum else config.grpo.mask
    model.num_sites(spec.sites)
    names = model.tokenizer.convert_ids_to_tokens([*control_tokens(model.tokenizer)])
    starts = {name[:2] for name in names}  # few, where a tokenizer has a thousand reserved tokens

    def held(text: str) -> bool:
        return any(start in text for start in starts) and any(name in text for name in names)

    def checked(texts: list[str]) -> list[str]:  # the longest, and those that may hold a control token
        texts.sort(key=len, reverse=True)
        return texts[:LONGEST] + [text for text in texts[LONGEST:] if held(text)]

    prompts = prompt_rows(model.tokenizer, checked([p.question for p in problems]))
    unknown = sum(row.count(model.tokenizer.unk_token_id) for row in prompts) / max(1, sum(map(len, prompts)))
    if unknown > 0.5 and model.tokenizer.unk_token_id != model.eos_id:
        got = f"got {unknown:.0%} unknown words in the questions, expected a model of such text"
        raise ValueError(f"tokenizer: {got}; use another checkpoint or data set")
    prompt = max(map(len, prompts), default=0)
    if not curriculum:
        return model.check_length(prompt, model.max_new_tokens)
    for stage in (0, config.latent_stages):  # the longest text, the most thoughts
        texts = checked([stage_text(p, stage, config.latent_stages) for p in problems])
        answer = 1 + max(map(len, encode_texts(model.tokenizer, texts)))
        thoughts = stage * c.c_thought if CONTROLS[c.control] != "none" else 0
        model.check_length(prompt, answer + thoughts - model.num_thoughts)
    for problem in problems if c.decode_weight else ():
        for step in problem.steps:
            try:
                step_result(step)
            except ValueError as error:
                raise ValueError(f"problem {problem.id}: {error}, or set curriculum.decode_weight to 0") from None
