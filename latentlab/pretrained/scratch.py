"""A small GPT-2 from scratch, with a tokenizer of one token a word."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from latentlab.masks import whole_number
from latentlab.model import END, LATENT, START, LatentReasoner


def word_tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, whole number, mark and newline, in the order given."""
    vocab = {text: i for i, text in enumerate(("<eos>", "<unk>", START, LATENT, END, *words))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pattern = Regex(r"\n|<<|>>|###|<\|[a-z-]+\|>|\d+|[A-Za-z]+|[^\sA-Za-z\d]")
    core.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": [START, LATENT, END]})
    return tokenizer


def build_model(
    words: tuple[str, ...],
    *,
    n_layer: int,
    n_embd: int,
    n_head: int,
    n_positions: int,
    seed: SupportsIndex,
    **settings: Any,
) -> LatentReasoner:
    """A GPT-2 of the given shape with a word tokenizer; weights depend on `seed` alone.

    settings: `num_thoughts`, `max_new_tokens` and `feedback` of `LatentReasoner`.
    """
    seed, tokenizer = whole_number("seed", seed), word_tokenizer(words)
    shape: dict[str, Any] = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "n_positions": n_positions}
    shape |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    shape |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config = GPT2Config(vocab_size=len(tokenizer), activation_function="gelu_pytorch_tanh", **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = GPT2LMHeadModel(config)
    model = LatentReasoner(lm, tokenizer, **settings)
    model.provenance = {"kind": "from scratch", "seed": seed}
    return model
