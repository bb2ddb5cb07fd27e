"""What the engine asks of a `transformers` causal LM and its device: mask sites, precision, logits.

A mask multiplies what an attention or MLP branch adds to the residual stream. Families differ in
where that is: the output of the branch's last linear map, of the whole branch (mixtures of experts),
or of a norm behind it (Gemma-2, OLMo-2). Each layer is run under masks to find out.

Dimensions: D width, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import BaseModelOutput

from latentlab.masks import perturbed

SUPPORTED = "use a family that docs/backbones.md lists as supported"
ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}  # of a config's layer_types
ROLES = {"attention": ("att",), "mlp": ("mlp", "feed_forward", "ffn", "moe", "fc")}  # parts of child names


def branch_outputs(lm: nn.Module, sites: tuple[str, ...]) -> list[nn.Module]:
    """The modules whose outputs are what the branches in `sites` add to the residual stream.

    Layer by layer: the linear map that a branch runs last, else the whole branch, else the norm
    behind it: the first that `_gaps` confirms. Raises ValueError if there is none.
    """
    words = [site for site in sites if site != "embedding"]
    layers = _layer_calls(lm) if words else []
    return [branches[word] for layer, call in layers for branches in [_find(lm, layer, call)] for word in words]


def branch_gaps(lm: nn.Module) -> tuple[float, float]:
    """How far masks are from multiplying what attention and MLP branches add, relative; 0 is exact."""
    gaps = [_gaps(call, list(_find(lm, layer, call).values())) for layer, call in _layer_calls(lm)]
    attention, mlp = torch.tensor(gaps).amax(0).tolist()
    return attention, mlp


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the first ModuleList whose members all have an attention and an MLP child."""
    if others := sorted(set(getattr(getattr(lm, "config", None), "layer_types", None) or ATTENTION) - ATTENTION):
        got = f"{type(lm).__name__} with layers of type {', '.join(others)}"
        raise ValueError(f"backbone: got {got}, expected layers of softmax attention alone; {SUPPORTED}")
    for module in lm.modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if all(_branch(layer, site) for layer in module for site in ROLES):
            return module
    raise ValueError(
        f"backbone: got {type(lm).__name__}, expected blocks with an attention and an mlp child; {SUPPORTED}"
    )


def fuse_gelu(lm: nn.Module) -> None:
    """Let PyTorch's kernel compute GPT-2's "gelu_new", which transformers writes out in Python.

    The same function up to rounding; each of its intermediate tensors was as large as the MLP's.
    """
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _branch(layer: nn.Module, site: str) -> list[nn.Module]:
    """The children of `layer` named after `site` that have a weight matrix somewhere."""
    named = [child for name, child in layer.named_children() if any(word in name for word in ROLES[site])]
    return [child for child in named if any(_is_map(module) for module in child.modules())]


def _is_map(module: nn.Module) -> bool:  # Linear, Conv1D
    return getattr(module, "weight", torch.empty(0)).dim() == 2


@torch.no_grad()
def _layer_calls(lm: Any) -> list[tuple[nn.Module, Callable[[], Tensor]]]:
    """Each decoder layer, and a function: what it adds to random inputs [1, 3, D]."""
    calls: list[tuple[nn.Module, Callable[[], Tensor]]] = []
    generator = torch.Generator().manual_seed(0)

    def record(layer, args, kwargs):
        x = torch.randn(args[0].shape, generator=generator).to(args[0]) / 100  # small: out - x keeps its digits

        @torch.no_grad()
        def call() -> Tensor:
            out = layer(x, *args[1:], **kwargs)
            return (out[0] if isinstance(out, tuple) else out) - x

        calls.append((layer, call))

    with ExitStack() as hooks:
        for layer in decoder_layers(lm):
            hooks.enter_context(layer.register_forward_pre_hook(record, with_kwargs=True))
        table = lm.get_input_embeddings().weight  # vectors: among ids, a pad token's would be warned about
        lm(inputs_embeds=table[None, :3], use_cache=False)
    return calls


def _find(lm: nn.Module, layer: nn.Module, call: Callable[[], Tensor]) -> dict[str, nn.Module]:
    """The modules of one layer that masks on "attention" and on "mlp" multiply."""
    shapes: dict[nn.Module, torch.Size | None] = {}  # of the outputs, in the order of execution
    with ExitStack() as hooks:
        for module in layer.modules():
            hook = lambda m, _, out: shapes.update({m: getattr(out, "shape", None)})  # noqa: E731
            hooks.enter_context(module.register_forward_hook(hook))
        stream = call().shape
    children = [module for module in shapes if module in set(layer.children())]
    candidates = []
    for site in ROLES:
        branch = [child for child in children if child in _branch(layer, site)][-1]
        last = [module for module in shapes if module in set(branch.modules()) and _is_map(module)][-1]
        behind = children[children.index(branch) + 1 :][:1]
        candidates.append([module for module in (last, branch, *behind) if shapes[module] == stream])
    eps = torch.finfo(next(lm.parameters()).dtype).eps
    for attention, mlp in product(*candidates):
        if not any(gap > eps**0.5 for gap in _gaps(call, [attention, mlp])):  # NaN weights are no other family
            return {"attention": attention, "mlp": mlp}
    raise ValueError(
        f"backbone: got {type(lm).__name__}, expected layers that add an attention and an mlp branch to the residual "
        f"stream, so that masks can multiply what is added; {SUPPORTED}"
    )


def _gaps(call: Callable[[], Tensor], modules: list[nn.Module]) -> list[float]:
    """For each of two modules: the error of masks on it, relative to what its branch adds.

    With the other module at 0 the layer must add f * a under mask f, where it adds a under ones;
    with both at 0 it must add nothing.
    """
    shape, gaps = call().shape, []
    f = torch.randint(2, shape, generator=torch.Generator().manual_seed(1)).to(call())
    for module, other in (modules, modules[::-1]):

        def added(factor: Tensor, module=module, other=other) -> Tensor:
            with perturbed([module, other], torch.stack([factor, torch.zeros_like(f)], 2), shape[1]):
                return call()

        alone, masked, nothing = (added(factor) for factor in (torch.ones_like(f), f, torch.zeros_like(f)))
        error = torch.maximum((masked - f * alone).abs().max(), nothing.abs().max())
        gaps.append(float(error / alone.abs().max()))
    return gaps


# -- precision ------------------------------------------------------------------------------------


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether the device has instructions for bfloat16 products: avx512_bf16 or AMX on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# -- logits and length ----------------------------------------------------------------------------

COMPARED = 512  # windows up to here are exceeded by the comparison at load (pretrained/selfcheck.py)


def own_logits(lm, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
    """Logits by the model's own forward, scales and caps included, for given last hidden states."""
    output = _Output(last_hidden_state=hidden.reshape(1, -1, hidden.shape[-1]))
    twin = copy(lm)  # shares all modules but the base model, which is not run
    twin._modules = lm._modules | {lm.base_model_prefix: lambda *_, **__: output}
    return twin(use_cache=False).logits.view(*hidden.shape[:-1], -1)


class _Output(BaseModelOutput):
    """Every other field of a base model's output, which differ by family, is None."""

    def __getattr__(self, _):
        return None


def window_names(owner) -> list[str]:
    """The attributes of a config or module that are sizes of attention windows or chunks, in positions."""
    named = {name: size for name, size in vars(owner).items() if "window" in name or "chunk" in name}
    return [name for name, size in named.items() if type(size) is int and size > 0]


def window_sizes(config) -> list[int]:
    """The sizes of attention windows and chunks that a config names, in positions."""
    return [vars(config)[name] for name in window_names(config)]


def longest_sequence(config) -> int:
    """Positions up to which the engine is compared: a long window, or the switch of "longrope", ends it."""
    rope = getattr(config, "rope_parameters", None) or {}
    switch = [rope["original_max_position_embeddings"]] if rope.get("rope_type") == "longrope" else []
    return min([config.max_position_embeddings, *(w for w in window_sizes(config) if w > COMPARED), *switch])
