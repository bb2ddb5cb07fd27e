"""Loading and saving models: weights, tokenizer and the settings of latent reasoning.

    load_model("tiny")             the checkpoint that comes with the library
    load_model(name_or_path)       a folder or Hub id: of latentlab, or any supported LM
    load_model("…/checkpoint_25")  a published Coconut checkpoint, either layout (coconut.py)
    load_model(adapter_folder)     the base that a LoRA adapter names, and the adapter (lora.py)
    model_from_config(config)      what a preset asks for
    save_model(model, folder)      safetensors + tokenizer + config + latentlab.json

Only safetensors are read, or tensors alone (`weights_only`): no pickle, no remote code.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from latentlab.config import Config
from latentlab.data.word_problems import WORDS
from latentlab.model import END, LATENT, START, LatentReasoner
from latentlab.pretrained import adapters, coconut, weights
from latentlab.pretrained.scratch import build_model
from latentlab.pretrained.selfcheck import check_backbone
from latentlab.rollouts import first_tokens
from latentlab.runtime.environment import TIMEOUT, hub_answers, repository_root
from latentlab.runtime.files import read_json

PACKAGED = Path(__file__).parent.parent / "checkpoints"  # in an installed wheel
CHECKPOINTS = PACKAGED if PACKAGED.is_dir() else repository_root() / "data" / "checkpoints"
STATE_FILE = "latentlab.json"
SETTINGS = {"num_thoughts": "int", "max_new_tokens": "int", "feedback": "str"}  # the contents of STATE_FILE
WRITTEN = f"{', '.join(SETTINGS)} as `save_model` writes them"
NATIVE_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "summary_first_dropout")
REMEDY = "connect to the Hub, or pass a folder that holds the model (python scripts/fetch_smollm2.py makes SmolLM2's)"


def model_from_config(config: Config, *, init_from: str | None = None, curriculum: bool = False) -> LatentReasoner:
    """The untrained model of a preset, or the checkpoint `init_from` (a folder or a Hub id).

    curriculum: a plain causal LM will do, with the preset's number of thoughts and answer length.
    """
    b = config.backbone
    settings: dict[str, Any] = {"num_thoughts": config.num_thoughts, "max_new_tokens": config.max_new_tokens}
    if init_from:
        return load_model(init_from, defaults=settings if curriculum else None)
    if b.name_or_path != "scratch":
        return load_model(b.name_or_path, **settings)
    shape = {"n_layer": b.n_layer, "n_embd": b.n_embd, "n_head": b.n_head, "n_positions": b.n_positions}
    return build_model(WORDS, seed=config.seed, **shape, **settings)


def load_model(
    name_or_path: str | Path, *, base: str = coconut.BASE, defaults: dict | None = None, **settings: Any
) -> LatentReasoner:
    """Load a model in float32: "tiny" (the shipped checkpoint), a folder or a Hub id.

    The run folder of a training run stands for its best/. The folder of an adapter that `save_model`
    wrote gives the base that it names with the adapter; a base with other weights is refused.
    settings: `num_thoughts`, `max_new_tokens` and `feedback` of `LatentReasoner`. A folder written
    by `save_model` has them, a published Coconut checkpoint takes its recipe's, other checkpoints
    need the first two; what is passed overrides what is stored.
    defaults: settings of a checkpoint that has none.
    base: the base model of a Coconut `checkpoint_N` state dict, a folder or a Hub id.

    Returns a model whose `provenance` has kind, name and sha256 of the weights.
    Raises FileNotFoundError (no such checkpoint, Hub not reachable) or ValueError (damaged or
    incomplete checkpoint, weights other than the config's or not finite, settings missing, backbone
    not supported), one line each.
    """
    name = str(shipped_checkpoint("tiny") if name_or_path == "tiny" else name_or_path)
    if Path(name, "metrics.jsonl").exists() and Path(name, "best").exists():
        name = os.path.join(name, "best")
    if _base_sha256(name):
        return _load_adapter(Path(name), {"base": base, **settings})
    _silence_transformers()
    state_dict = coconut.state_dict_file(name)
    lm, tokenizer = coconut.load_state_dict(state_dict, base) if state_dict else _load_pair(name)
    published = coconut.name_latent_tokens(lm.config, tokenizer) or state_dict
    lm.config.return_dict = True  # the engine reads outputs by name
    lm.name_or_path = os.path.abspath(name) if os.path.exists(name) else name
    settings = {**(coconut.RECIPE if published else defaults or {}), **_stored_settings(name), **settings}
    missing = [key for key in ("num_thoughts", "max_new_tokens") if key not in settings]
    if missing:
        raise ValueError(
            f"{name}: got a causal LM without {STATE_FILE}, expected one trained to think in latent steps; train it "
            f"with `latentlab curriculum --init-from {name}`, or pass {'= and '.join(missing)}= to load_model"
        )
    add_latent_tokens(lm, tokenizer)
    no_native_dropout(lm)
    model = LatentReasoner(lm, tokenizer, **settings)
    kind = "checkpoint_N state dict" if state_dict else "folder" if os.path.isdir(name) else "hub"
    if (made := Path(name, "PROVENANCE.json")).is_file() and not state_dict:  # as its maker describes them
        with suppress(ValueError, OSError):  # a user's own file of that name
            kind = stated if isinstance(stated := read_json(made, "their source").get("kind"), str) else kind
    model.provenance = {"kind": kind, "name": Path(name).name, **weights_hash(state_dict or name)}
    check_backbone(model)
    return model


def _base_sha256(name: str) -> str | None:
    """The hash of the base's weights that an adapter folder of `save_model` names; None for other checkpoints."""
    path = Path(name, STATE_FILE)
    return read_json(path, WRITTEN).get("base_sha256") if path.exists() else None


def _load_adapter(folder: Path, settings: dict) -> LatentReasoner:
    """The base that the adapter in `folder` names, with the adapter."""
    lora = adapters.lora()
    base = read_json(folder / weights.ADAPTER, "what peft writes", "base_model_name_or_path")["base_model_name_or_path"]
    remedy = f"restore it, or write its new place into {weights.ADAPTER} as base_model_name_or_path"
    try:
        model = load_model(base, **{**_stored_settings(str(folder)), **settings})
    except FileNotFoundError as error:
        got = f"got no base model {base} ({error})"
        raise FileNotFoundError(f"adapter {folder}: {got}, expected the one it was trained on; {remedy}") from error
    found, expected = model.provenance.get("sha256"), _base_sha256(str(folder))
    if found != expected:
        raise ValueError(f"adapter {folder}: got a base {base} with weights {found}, expected {expected}; {remedy}")
    lora.load(model, folder)
    model.provenance = {"kind": "adapter", "name": folder.name, **weights_hash(folder), "base_sha256": expected}
    return model


def _silence_transformers() -> None:  # its loading bars and config warnings would appear in the notebooks
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


def _load_pair(name: str) -> tuple[Any, Any]:
    """(lm, tokenizer) from a folder or a Hub id."""
    if os.path.isdir(name):
        weights.expect_readable(Path(name))
    elif os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"checkpoint: got {name}, which is no folder, expected a checkpoint folder or a Hub id")
    elif not hub_answers():
        raise FileNotFoundError(
            f"Hub: got no answer for {name} within {TIMEOUT:g} s, and no folder has that name; {REMEDY}"
        )
    options = {"dtype": torch.float32, "use_safetensors": True}
    try:
        raw, _ = PretrainedConfig.get_config_dict(name)
        weights.expect_causal_lm(name, raw)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # None would ask the user
        load: Any = AutoModelForCausalLM.from_pretrained
        report = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported, and refused below
        lm, info = load(name, **options, **report, trust_remote_code=False)
        weights.expect_equal(lm, info, weights.stored_tensors(weights.local_folder(name)), name)
    except Exception as error:  # transformers raises many kinds: missing files, damaged files, no network
        if str(error).startswith("checkpoint "):
            raise
        if why := weights.why_not_loaded(error, name):
            raise ValueError(f"checkpoint {name}: {why}") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if os.path.isdir(name):
            damage = f"could not be read ({reason}); it is damaged or incomplete, use another"
            raise ValueError(f"checkpoint {name}: {damage}") from error
        raise FileNotFoundError(f"Hub: could not get {name} ({reason}); {REMEDY}") from error
    return lm, tokenizer


def _stored_settings(name: str) -> dict:
    """The contents of STATE_FILE, in a folder or on the Hub; {} for a foreign checkpoint."""
    path = Path(name, STATE_FILE)
    if not os.path.exists(name):
        path = Path(cached_file(name, STATE_FILE, _raise_exceptions_for_missing_entries=False) or path)
    if not path.exists():
        return {}
    stored = read_json(path, WRITTEN)
    stored.pop("base_sha256", None)
    least = {"num_thoughts": 0, "max_new_tokens": 1}
    if any(type(v).__name__ != SETTINGS.get(k) or (k in least and v < least[k]) for k, v in stored.items()):
        raise ValueError(f"{path}: got {str(stored)[:80]}, expected {WRITTEN}; restore the file")
    return stored


def add_latent_tokens(lm, tokenizer) -> None:
    """Make START, LATENT, END single special tokens, with ids that no other token has.

    Tokens that were there keep their rows. New rows, also those of special tokens that the weights
    lack (Gemma-3's text models: "<image_soft_token>"), start as that of "<<", as in Coconut's code;
    where "<<" is several pieces (SentencePiece: "▁", "<", "<"), as that of the first that is not
    blank.
    """
    if lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight:
        lm.config.tie_word_embeddings = False  # a file with a head of its own, whatever its config says
    old = tokenizer.get_vocab()
    used, rows = set(old.values()), lm.get_input_embeddings().weight.shape[0]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    without_row = {i for i in used if i >= rows}
    needed = (START, LATENT, END, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    if without_row - special.difference(old.get(token) for token in needed):
        got = f"{max(used) + 1} tokens for {rows} embedding rows"
        raise ValueError(f"tokenizer: got {got}, expected the tokenizer of these weights; restore its files")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: got no eos token, expected one, which ends answers; use another, or set its eos_token"
        )
    first = first_tokens(tokenizer, ["<<"])["<<"]
    if len(used) <= max(used) and tokenizer.is_fast:
        _number_after_gaps(tokenizer, max(used) + 1)
    tokens = {"extra_special_tokens": [START, LATENT, END]}
    tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
    new = [tokenizer.convert_tokens_to_ids(token) for token in (START, LATENT, END) if token not in old]
    if used.intersection(new):
        raise ValueError(
            "tokenizer: got ids with gaps, expected free ids after the last; use one with a tokenizer.json"
        )
    new += without_row
    if max(new, default=0) >= rows:
        lm.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    with torch.no_grad():
        for embedding in (lm.get_input_embeddings(), lm.get_output_embeddings()):  # may be tied
            for parameter in embedding.parameters():  # a head may have a bias
                parameter[new] = parameter[first].clone()


def _number_after_gaps(tokenizer, start: int) -> None:
    """Give new latent tokens the ids from `start` on: tokenizers counts tokens, over ids in use."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    new = [token for token in (START, LATENT, END) if token not in tokenizer.get_vocab()]
    if isinstance(state["model"]["vocab"], dict):  # a list (Unigram) has no gaps, at most a piece twice
        state["model"]["vocab"] |= {token: start + i for i, token in enumerate(new)}
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def no_native_dropout(lm) -> None:
    """Set every dropout of the backbone to 0: masks are values, and nothing else may be random."""
    for name in NATIVE_DROPOUT:
        if getattr(lm.config, name, None):
            setattr(lm.config, name, 0.0)
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def save_model(model: LatentReasoner, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write `model` into `folder`: what plain transformers loads, plus latentlab.json.

    Of a base with an adapter the adapter alone, as peft loads it, with the hash of the base's weights.
    state_dict: the whole weights, where the model holds only shards of them.
    Raises FileExistsError if a model is there already, or a file.
    """
    _silence_transformers()
    folder = Path(folder)
    held = [folder] if folder.is_file() else [*folder.glob("config.json"), *folder.glob("*.safetensors")]
    if held:
        raise FileExistsError(f"save_model: got {folder}, where {held[0].name} is, expected a new folder; use another")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(model, name) for name in SETTINGS}
    if adapters.adapted(model):
        adapters.lora().save(model, folder)
        settings["base_sha256"] = model.provenance["base_sha256"]
    else:
        model.lm.save_pretrained(folder, state_dict=state_dict)
    model.tokenizer.save_pretrained(folder)
    (folder / STATE_FILE).write_text(json.dumps(settings, indent=1) + "\n")


def shipped_checkpoint(preset: str) -> Path:
    """The folder of a preset's shipped checkpoint (smoke: tiny's); FileNotFoundError if it has none."""
    folder = CHECKPOINTS / {"smoke": "tiny"}.get(preset, preset)
    if not folder.exists():
        remedy = f"train one with `latentlab curriculum --preset {preset}` and pass its run folder"
        raise FileNotFoundError(f"checkpoint: got no {folder}, expected a model for preset {preset}; {remedy}")
    return folder


def weights_hash(name: str | Path) -> dict[str, str]:
    """{"sha256": …} of a file, or of the safetensors of a folder or cached Hub id; else {}."""
    if not os.path.exists(name):
        try:
            name = snapshot_download(str(name), local_files_only=True)
        except Exception:  # not in the cache, or not an id: huggingface_hub raises many kinds
            return {}
    files = [Path(name)] if Path(name).is_file() else sorted(Path(name).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return {"sha256": digest.hexdigest()} if files else {}
