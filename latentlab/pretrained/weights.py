"""Checks of a checkpoint: can its files be read, and does the model hold what they hold?

Every fault is one line that names the file or tensor. Nothing is repaired.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from latentlab.runtime.files import not_downloaded, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX)
OTHER_FORMATS = {  # pattern of file names: what such a folder holds, and what to do
    ADAPTER: ("an adapter", "merge it into its base model (peft: merge_and_unload) and save that"),
    "*.gguf": ("GGUF weights", "use the original model in safetensors"),
    "*.bin": ("weights as pickles, which are not read", "load them with transformers and call save_pretrained"),
}
RESAVE = "use another checkpoint, or the config.json and tokenizer of these weights"


def expect_readable(folder: Path) -> None:
    """Raise FileNotFoundError or ValueError, one line, unless `folder` holds a config and safetensors."""
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".safetensors", ".model") and file.is_file():
            with file.open("rb") as opened:
                page = not_downloaded(opened.read(200))
            if page:
                remedy = "run `git lfs pull` there" if "LFS" in page else "download the raw file"
                raise ValueError(f"{file}: got {page}, expected the file itself; {remedy}")
    weights = (folder / WEIGHTS).exists() or (folder / INDEX).exists()
    for pattern, (held, remedy) in OTHER_FORMATS.items():
        if any(folder.glob(pattern)) and (pattern == ADAPTER or not weights):
            raise ValueError(f"checkpoint {folder}: got {held}, expected {WEIGHTS}; {remedy}")
    if not weights or not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"checkpoint: got the folder {folder} without config.json and {WEIGHTS}, expected a saved model; "
            "name a folder written by `latentlab curriculum` or `latentlab grpo`"
        )
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "*vocab*", "*.model")):
        got = "got no tokenizer, expected tokenizer.json and tokenizer_config.json"
        raise FileNotFoundError(f"checkpoint {folder}: {got}; save the tokenizer of this model there")
    for path in map(folder.joinpath, OBJECTS):
        if path.exists():
            read_json(path, "what transformers writes", constants=True)


def expect_causal_lm(name: str, config: dict[str, Any]) -> None:
    """Raise ValueError, one line, unless `config`, the content of config.json, is of a float causal LM."""
    family = str(config.get("model_type"))
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[family], None) if family in CONFIG_MAPPING else None
    reason = ""
    if family not in CONFIG_MAPPING:
        reason = f"unknown to transformers {transformers.__version__}"
    elif model is None or config.get("is_encoder_decoder"):
        reason = "which is no decoder-only causal LM"
    if reason:
        raise ValueError(f"checkpoint {name}: got model_type {family}, {reason}; use a model such as GPT-2 or Llama")
    if quantised := config.get("quantization_config"):
        got = f"weights quantised by {dict(quantised).get('quant_method', 'an unnamed method')}"
        raise ValueError(f"checkpoint {name}: got {got}, expected float weights; use the model that is not quantised")
    for key in ("_attn_implementation", "attn_implementation"):  # the comparison at load runs it, in float32
        if (kind := config.get(key)) not in (None, "sdpa", "eager"):
            got = f"{key} {str(kind)[:40]} in config.json, expected sdpa, eager or none"
            raise ValueError(f"checkpoint {name}: got {got}; remove the entry")


def local_folder(name: str) -> Path:
    """The folder of that name, or that of a Hub id's files."""
    return Path(name if Path(name).is_dir() else snapshot_download(name, local_files_only=True))


def why_not_loaded(error: Exception, name: str) -> str | None:
    """What is wrong where transformers raised `error` on files that may be whole; None: they are not."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return "got custom code (auto_map), which is not run, expected classes of transformers; use another model"
    if isinstance(error, ImportError):
        return f"needs a package that is not installed ({reason[:200]}); install it"
    if "automatic conversion" in reason:  # of several tensors into one, such as those of experts
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
        parts = set(revert_weight_conversion(lm, lm.state_dict())).difference(lm.state_dict())
        if missing := sorted(parts.difference(key for key, _ in stored_tensors(local_folder(name)))):
            return _no_weights(missing)
        return f"got parts of a tensor whose shapes do not fit, expected those that config.json describes; {RESAVE}"
    return None


def _no_weights(missing: list[str], remedy: str = RESAVE) -> str:
    got = f"no weights for {missing[0]} ({len(missing)} missing)"
    return f"got {got}, expected all that config.json describes; {remedy}"


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of the single file and the shards in `folder`, one tensor in memory at a time."""
    names = {WEIGHTS} if (folder / WEIGHTS).exists() else set()
    if (folder / INDEX).exists():  # beside a single file: which one is meant?
        names |= set(read_json(folder / INDEX, "the list of shards", "weight_map")["weight_map"].values())
    for name in sorted(names):
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                yield key, file.get_tensor(key)


def expect_equal(
    lm, info: dict[str, Any], stored: Iterable[tuple[str, Tensor]], name: str, remedy: str = RESAVE
) -> None:
    """Raise ValueError, one line, unless `lm` holds the finite tensors `stored`, all of them and no others.

    info: transformers' `output_loading_info`. Keys that transformers itself ignores, and buffers of
    older versions, do not count. Values are compared bit for bit after the cast to the model's dtype.
    """
    buffers = {key for key, _ in lm.named_buffers()}
    unexpected = [k for k in sorted(info["unexpected_keys"]) if k not in buffers and not k.endswith(".masked_bias")]
    if shapes := sorted(info["mismatched_keys"]):
        key, got, expected = shapes[0]
        raise ValueError(f"checkpoint {name}: got {key} of shape {list(got)}, expected {list(expected)}; {remedy}")
    if missing := sorted(info["missing_keys"]):  # transformers initialises these at random
        raise ValueError(f"checkpoint {name}: {_no_weights(missing, remedy)}")
    if unexpected:
        got = f"weights that config.json does not describe, {unexpected[0]} ({len(unexpected)} in all)"
        raise ValueError(f"checkpoint {name}: got {got}, expected no others; {remedy}")
    held = revert_weight_conversion(lm, lm.state_dict())  # under the names of the file
    for key, tensor in stored:
        tensor = tensor.to(held[key].dtype if key in held else tensor.dtype)
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():  # faster than isfinite of every value
            raise ValueError(f"checkpoint {name}: got NaN or inf in {key}, expected finite weights; use another")
        if key in held and not torch.equal(tensor, held[key]):
            raise ValueError(f"checkpoint {name}: got two values of {key}, expected one; remove the wrong file")
