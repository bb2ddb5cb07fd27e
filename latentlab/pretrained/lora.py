"""LoRA by peft: the weights of the base stay as they are, small matrices beside its linear maps train.

    y = W x + alpha / r * B A x       A [r, in] is random at the start, B [out, r] is zero; no dropout

The rows of the three latent tokens train as well, in the head too where it is tied. peft puts its
layers into the transformers model in place: `lm` keeps its class, and masks multiply the sum of
both terms. adapters.py imports this module where it is needed: peft is an extra.

Source: LoRA, arXiv 2106.09685. Deviation from peft: `LatentRows`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from latentlab.backbone import decoder_layers
from latentlab.config import LoRAConfig
from latentlab.model import LatentReasoner

WEIGHTS, NAME = "adapter_model.safetensors", "default"  # NAME: peft's, of the one adapter
PREFIX = "base_model.model."  # of the keys in peft's files


class LatentRows(TrainableTokensLayer):
    """peft's layer without its copy of the whole embedding table in each call."""

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args, **kwargs) -> Tensor:
        """Token ids [*n] -> embeddings [*n, D]; in a tied head hidden states [*n, D] -> logits [*n, V]."""
        rows, ids, layer = self.trainable_tokens_delta[NAME], self.token_indices[NAME], self.base_layer
        out = layer(x)
        if isinstance(layer, nn.Linear):
            logits = nn.functional.linear(x, rows, None if layer.bias is None else layer.bias[ids])
            for i, column in zip(ids, logits.unbind(-1), strict=True):
                out[..., i] = column
            return out
        scale = self._get_embed_scale()
        for i, row in zip(ids, rows if scale is None else rows * scale, strict=True):
            out = torch.where((x == i)[..., None], row, out)
        return out


def attach(model: LatentReasoner, lora: LoRAConfig, *, seed: int) -> None:
    """Put a new adapter into `model`, in place, or confirm that the one it has is as `lora` says.

    Raises ValueError, one line: unknown targets, other settings than the adapter's, a base that is
    in no file.
    """
    maps = {
        name.removesuffix(".base_layer").rpartition(".")[2]: type(module)
        for name, module in decoder_layers(model.lm).named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name
    }
    if unknown := sorted(set(lora.targets).difference(maps)):
        raise ValueError(f"lora.targets: got {unknown[0]}, expected some of {', '.join(sorted(maps))}; correct it")
    asked: dict[str, Any] = {"r": lora.r, "alpha": lora.alpha, "targets": sorted(set(lora.targets or maps))}
    if held := getattr(model.lm, "peft_config", None):
        stored = {"r": held[NAME].r, "alpha": held[NAME].lora_alpha, "targets": held[NAME].target_modules}
        for name, value in asked.items():
            if value != stored[name]:
                expected = f"{stored[name]} as in the adapter that the model has"
                raise ValueError(
                    f"lora.{name}: got {value}, expected {expected}; set it so, or merge the adapter first"
                )
        return
    if "sha256" not in model.provenance:
        got = f"got {lora.r} for weights that are in no file, expected a saved base model"
        raise ValueError(f"lora.r: {got}; pass --init-from or backbone.name_or_path, or set lora.r to 0")
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=asked["targets"],
        fan_in_fan_out=Conv1D in maps.values(),
        trainable_token_indices=[model.start_id, model.latent_id, model.end_id],
        base_model_name_or_path=model.lm.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, settings)
    model.provenance |= {"base_sha256": model.provenance["sha256"]}


def _inject(model: LatentReasoner, settings: Any) -> None:
    peft.inject_adapter_in_model(settings, model.lm)
    settings.target_modules = sorted(settings.target_modules)  # a set: its order in the file would differ by process
    for module in model.lm.modules():
        if isinstance(module, TrainableTokensLayer):
            module.__class__ = LatentRows
    model._branches.clear()  # masks act on the new layers
    model.eval()


def tensors(model: LatentReasoner) -> dict[str, Tensor]:
    """The adapter's weights under the names of peft's files, not copied."""
    held = peft.get_peft_model_state_dict(model.lm, save_embedding_layers=False)
    return {PREFIX + name: value for name, value in held.items()}


def save(model: LatentReasoner, folder: Path) -> None:
    """Write the adapter alone, as peft reads it."""
    held = {name: value.contiguous() for name, value in tensors(model).items()}
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    model.lm.peft_config[NAME].save_pretrained(folder)


def load(model: LatentReasoner, folder: Path) -> None:
    """Put the adapter in `folder` into `model`, the base that it was trained on. Raises ValueError, one line."""
    try:
        _inject(model, peft.LoraConfig.from_pretrained(str(folder)))
    except Exception as error:  # peft raises many kinds
        got = f"could not use adapter_config.json ({type(error).__name__})"
        raise ValueError(f"adapter {folder}: {got}, expected it as peft wrote it; restore it") from error
    read(model, folder)


@torch.no_grad()
def read(model: LatentReasoner, folder: Path) -> None:
    """Read the weights in `folder` into the adapter that `model` has. Raises ValueError, one line."""
    try:
        stored, held = load_file(folder / WEIGHTS), tensors(model)
        if stored.keys() != held.keys() or any(stored[name].shape != held[name].shape for name in held):
            raise ValueError("other tensors than its adapter_config.json describes")
        if not all(torch.isfinite(value).all() for value in stored.values()):
            raise ValueError("NaN or inf")
    except Exception as error:  # safetensors raises a kind of its own
        reason = str(error).splitlines()[0][:160]
        raise ValueError(
            f"adapter {folder}: could not read {WEIGHTS} ({reason}), expected it whole; use another"
        ) from error
    for name, value in held.items():
        value.copy_(stored[name])


def merge(model: LatentReasoner) -> LatentReasoner:
    """Add the adapter to the weights, in place: returns `model`, a plain one, which `save_model` writes whole."""
    for name, module in list(model.lm.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.lm.set_submodule(name, module.get_base_layer())
        elif isinstance(module, TrainableTokensWrapper):
            model.lm.set_submodule(name, module.unload_and_optionally_merge_module(True, False, None))
    del model.lm.peft_config
    model._branches.clear()
    model.requires_grad_(True)
    model.provenance = {"kind": "merged adapter"}
    return model
