"""Coconut checkpoints as others publish them, read into a plain causal LM and its tokenizer.

checkpoint_N: the official trainer's torch.save of a state dict, with keys `base_causallm.*`, and
`embedding.weight`, the input embedding once more. The embedding has three rows more than the base
model's tokenizer has tokens: <|start-latent|>, <|end-latent|>, <|latent|>, in this order. Config
and tokenizer come from the base model, a folder or a Hub id.

HF folder: config.json (model_type gpt2) with latent_id, latent_start_id, latent_end_id (negative:
not set), safetensors, and a tokenizer with the three tokens.

Neither records the number of thoughts or the answer length: `RECIPE` has those of the published
GSM8K checkpoints.
Sources of the layouts: facebookresearch/coconut, run.py and coconut.py;
ModalityDance/latent-tts-coconut.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TOKENS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")  # in the order of their rows in a state dict
CONFIG_IDS = ("latent_start_id", "latent_end_id", "latent_id")  # the config's names for the same three
BASE = "openai-community/gpt2"  # what the official GSM8K recipe starts from
RECIPE = {"num_thoughts": 6, "max_new_tokens": 64}  # 3 latent stages of 2 thoughts; 64 new tokens at test
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

    Raises ValueError with one line for a file that is no such state dict or does not fit the base
    model.
    """
    weights = _read(file)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds: missing files, no network
        raise FileNotFoundError(
            f"base model: could not get config and tokenizer of {base} for {file.name}; pass base=, a folder with both"
        ) from error
    tokenizer.add_tokens([token for token in TOKENS if token not in tokenizer.get_vocab()], special_tokens=True)
    embedding = next(weights[key] for key in weights if key.endswith(("wte.weight", "embed_tokens.weight")))
    if len(embedding) != len(tokenizer):
        raise ValueError(
            f"checkpoint {file.name}: got {len(embedding)} embedding rows, expected {len(tokenizer)} ({base} and three "
            "latent tokens); pass the base model it was trained from as base="
        )
    config.vocab_size = len(embedding)
    with torch.random.fork_rng(devices=[]):  # leaves the global generator as it was: all weights are overwritten
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    buffers = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # of older versions: not weights
    try:
        missing, unexpected = lm.load_state_dict(
            {key: value for key, value in weights.items() if not key.endswith(buffers)}, strict=False
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"checkpoint {file.name}: does not fit the base model {base} ({reason}); pass another base="
        ) from error
    lm.tie_weights()
    missing = [key for key in missing if key != "lm_head.weight" or not config.tie_word_embeddings]
    if missing or unexpected:
        raise ValueError(
            f"checkpoint {file.name}: got {len(unexpected)} unknown and {len(missing)} missing weights "
            f"({[*unexpected, *missing][0]}), expected those of {base}; pass another base="
        )
    return lm, tokenizer


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The language model's weights, without prefix; only tensors are unpickled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickles, which are refused in one line
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: not a zip, truncated, something other than tensors inside
        raise ValueError(
            f"checkpoint {file.name}: could not be read as a state dict ({type(error).__name__}); it is damaged or no "
            "torch.save of weights, use another"
        ) from error
    state = {key.removeprefix("module."): value for key, value in state.items()} if isinstance(state, dict) else {}
    weights = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    if not weights:
        raise ValueError(f"checkpoint {file.name}: got no key {PREFIX}*, expected a Coconut state dict; use another")
    return weights


def name_latent_tokens(config, tokenizer) -> bool:
    """Whether `config` is of a published HF folder; its tokenizer then gets the latent tokens.

    Tokens that the tokenizer lacks are added in the order of the config's ids. ValueError where the
    two disagree.
    """
    if not all(hasattr(config, key) for key in CONFIG_IDS):
        return False
    ids = {token: getattr(config, key) for token, key in zip(TOKENS, CONFIG_IDS, strict=True)}
    ids = {token: i for token, i in ids.items() if i >= 0}
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([t for t in sorted(ids, key=lambda t: ids[t]) if t not in vocabulary], special_tokens=True)
    got = {token: tokenizer.convert_tokens_to_ids(token) for token in ids}
    if got != ids:
        raise ValueError(
            f"checkpoint: got the latent tokens {got} in the tokenizer, expected the config's {ids}; use its tokenizer"
        )
    return True
