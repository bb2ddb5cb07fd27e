"""Where masks act: the outputs of residual branches, found by their role, scaled by hooks that last for one pass.

Letters: R rows, T positions of a pass, S sites, D width.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def branch_outputs(lm: nn.Module, sites: tuple[str, ...]) -> list[nn.Module]:
    """The modules that a mask on `sites` scales, layer by layer; site "embedding" is no module's output."""
    return [branch_output(layer, site) for layer in decoder_layers(lm) for site in sites if site != "embedding"]


@contextmanager
def scaled(modules: list[nn.Module], factors: torch.Tensor | None, count: int):
    """While inside, the first `count` positions of module s's output are scaled by factors[:, :, s].

    factors: [R, 1 or count, S, D]; not looked at without modules.
    """
    handles = []
    for s, module in enumerate(modules):
        hook = lambda _, __, out, f=factors[:, :, s]: scale_first(out, f, count)  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def scale_first(out: torch.Tensor, factors: torch.Tensor, count: int) -> torch.Tensor:
    """Multiply the first `count` positions of out [R, T, D] by factors [R, 1 or count, D]."""
    if count == out.shape[1]:
        return out * factors
    return torch.cat([out[:, :count] * factors, out[:, count:]], 1)


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The stack of decoder blocks: the first ModuleList whose members each have an attention and an MLP child."""
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and module and _children(module[0], "att") and _children(module[0], "mlp"):
            return module
    raise ValueError(
        f"backbone: got {type(lm).__name__}, expected blocks with an attention and an mlp child (GPT-2, Llama)"
    )


def branch_output(layer: nn.Module, site: str) -> nn.Module:
    """The last linear map of a block's attention or MLP branch: what is added to the residual stream."""
    branch = _children(layer, "att" if site == "attention" else "mlp")[0]
    return [m for m in branch.modules() if isinstance(m, (nn.Linear, Conv1D))][-1]


def _children(layer: nn.Module, word: str) -> list[nn.Module]:
    """Child modules named after a role that hold a linear map (`post_attention_layernorm` is none)."""
    return [
        child for name, child in layer.named_children()
        if word in name and any(isinstance(m, (nn.Linear, Conv1D)) for m in child.modules())
    ]  # fmt: skip
