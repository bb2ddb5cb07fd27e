"""Coconut checkpoints as others publish them, read into a plain causal LM and its tokenizer.

checkpoint_N: the official trainer's torch.save of a state dict, with keys `base_causallm.*`, and
`embedding.weight`, the input embedding once more: three rows more than the base model's tokenizer
has tokens, in the order of TOKENS. Config and tokenizer come from the base model.

HF folder: config.json (model_type gpt2) with latent_id, latent_start_id, latent_end_id (negative:
not set), safetensors, and a tokenizer with the three tokens.

Sources of the layouts: facebookresearch/coconut, run.py and coconut.py;
ModalityDance/latent-tts-coconut.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from latentlab.pretrained.weights import expect_causal_lm, expect_equal

TOKENS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")  # in the order of their rows in a state dict
CONFIG_IDS = ("latent_start_id", "latent_end_id", "latent_id")  # the config's names for the same three
BASE = "openai-community/gpt2"  # what the official GSM8K recipe starts from
RECIPE = {"num_thoughts": 6, "max_new_tokens": 64}  # of the published GSM8K checkpoints, which do not record them
PREFIX = "base_causallm."


def state_dict_file(name: str) -> Path | None:
    """The `checkpoint_N` state dict that `name` means: a file, or the one in a folder; else None.

    Raises ValueError for a folder with several.
    """
    path = Path(name)
    if path.is_file():
        return path
    files = [] if (path / "config.json").exists() else [f for f in sorted(path.glob("checkpoint_*")) if f.is_file()]
    if len(files) > 1:
        raise ValueError(f"checkpoint: got {len(files)} files in {path.name}, expected one; name one of them")
    return files[0] if files else None


def load_state_dict(file: Path, base: str):
    """(lm in float32, tokenizer) from a `checkpoint_N` file and the config and tokenizer of `base`.

    Raises ValueError, one line, for a file that is no such state dict or does not fit `base`.
    """
    tensors = _read(file)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds: missing files, no network
        got = f"could not get config and tokenizer of {base} for {file.name}"
        raise FileNotFoundError(f"base model: {got}; pass base=, a folder with both") from error
    expect_causal_lm(base, config.to_dict())
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    config.vocab_size = len(tokenizer)
    embedding = tensors.pop("embedding.weight", None)
    options = {"dtype": torch.float32, "output_loading_info": True}
    with torch.random.fork_rng(devices=[]):  # leaves the global generator as it was: all weights are overwritten
        load: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        lm, info = load.from_pretrained(
            None, config=config, state_dict=dict(tensors), ignore_mismatched_sizes=True, **options
        )
    remedy = f"{base} with three latent tokens does not fit, pass the base model it was trained from as base="
    expect_equal(lm, info, tensors.items(), file.name, remedy)
    if embedding is not None and not torch.equal(embedding.float(), lm.get_input_embeddings().weight):
        got = f"embedding.weight other than the input embedding {PREFIX}*"
        raise ValueError(f"checkpoint {file.name}: got {got}, expected a copy of it; use another")
    return lm, tokenizer


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The state dict, its keys without prefixes; only tensors are unpickled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickles, which are refused in one line
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: not a zip, truncated, something other than tensors inside
        got = f"could not be read as a state dict ({type(error).__name__})"
        raise ValueError(f"checkpoint {file.name}: {got}; it is damaged or no torch.save of weights") from error
    state = {key.removeprefix("module."): value for key, value in state.items()} if isinstance(state, dict) else {}
    if not any(key.startswith(PREFIX) for key in state):
        raise ValueError(f"checkpoint {file.name}: got no key {PREFIX}*, expected a Coconut state dict; use another")
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def name_latent_tokens(config, tokenizer) -> bool:
    """Whether `config` is of a published HF folder; its tokenizer then gets the latent tokens.

    Tokens that the tokenizer lacks are added in the order of the config's ids. ValueError where the
    two disagree.
    """
    if not all(hasattr(config, key) for key in CONFIG_IDS):
        return False
    given = {token: getattr(config, key) for token, key in zip(TOKENS, CONFIG_IDS, strict=True)}
    ids = {token: i for token, i in sorted(given.items(), key=lambda item: item[1]) if i >= 0}
    tokenizer.add_tokens(list(ids), special_tokens=True)
    got = {token: tokenizer.convert_tokens_to_ids(token) for token in ids}
    if got != ids:
        raise ValueError(f"checkpoint: got latent tokens {got}, expected the config's {ids}; use its own tokenizer")
    return True
