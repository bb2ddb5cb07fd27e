"""LoRA adapters: does a model have one, should it get one, make it part of the weights.

All that needs peft, an extra of the package, is in lora.py, which is imported at first use.
"""

from __future__ import annotations

from typing import Any

from latentlab.config import Config
from latentlab.model import LatentReasoner


def lora() -> Any:
    """The module lora.py. Raises ImportError, one line, where peft is not installed."""
    try:
        from latentlab.pretrained import lora
    except ModuleNotFoundError as error:
        missing = f"got no package {error.name}, expected it for LoRA"
        raise ImportError(f"lora: {missing}; pip install 'latentlab[lora]'") from error
    return lora


def adapted(model: LatentReasoner) -> bool:
    """Whether `model` is a base with a LoRA adapter."""
    return hasattr(model.lm, "peft_config")


def attach_adapter(model: LatentReasoner, config: Config) -> None:
    """Before training: give `model` the adapter of `config.lora`, in place, if r > 0 and it has none.

    An adapter that it has is trained further. Raises ValueError or ImportError, one line.
    """
    if config.lora.r or adapted(model):
        lora().attach(model, config.lora, seed=config.seed)


def merge_adapter(model: LatentReasoner) -> LatentReasoner:
    """Add a LoRA adapter to the weights of its base, in place: a plain model, which is returned.

    Raises ValueError for a model without an adapter.
    """
    if not adapted(model):
        raise ValueError("merge_adapter: got a model without a LoRA adapter, expected one; save it as it is")
    return lora().merge(model)
