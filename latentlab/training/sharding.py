"""FSDP2: weights, gradient and optimizer state in shards of equal size, one on each process.

    update    every unit (a block, the embedding, the head, the rest) is gathered for each of its
              passes, forward and backward; after a backward pass its gradient is summed into shards
    sampling  `gathered`: all units once, for a whole batch of rollouts. Rows end at different
              times, and gathering the model again for every token would be slow

Collectives must match on all processes. Sampling has none, so that shares of problems may be uneven
or empty; in an update `in_step` makes up for different numbers of micro-batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from latentlab.backbone import decoder_layers
from latentlab.model import LatentReasoner
from latentlab.runtime import distributed
from latentlab.runtime.distributed import LostProcess


class _AddNow(torch.autograd.Function):
    """The identity on a parameter, whose backward adds to its `.grad` at once.

    Autograd itself waits for the passes of all thoughts, with the whole gradient unsharded.
    """

    @staticmethod
    def forward(ctx, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:  # type: ignore[override]  # of any number of tensors
        p = ctx.parameter
        p.grad = grad if p.grad is None else p.grad + grad


def shard(model: LatentReasoner, sites: Iterable[tuple[str, ...]]) -> None:
    """Shard `model` in place; it is the same on all processes. sites: of the masks it will run under.

    Under bfloat16 autocast, blocks are gathered in bfloat16 and gradients summed in float32.
    """
    for names in sites:
        model.branches(names)  # found by passes of the whole model, and kept
    lm: Any = model.lm
    mesh = init_device_mesh(model.device.type, (distributed.size(),))
    mesh._pg_registry.clear()  # caches of DTensor keep the mesh, which must not keep the process group
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # no caller changes it in place
    half = MixedPrecisionPolicy(model.autocast_dtype, torch.float32, cast_forward_inputs=False)
    embedding, head, layers = lm.get_input_embeddings(), lm.get_output_embeddings(), [*decoder_layers(lm)]
    tied = head.weight is embedding.weight
    if tied:
        embedding.add_module("head", head)  # so that `fully_shard` finds both
    units: list[Any] = [*layers, embedding, lm.base_model, *([] if tied else [head])]
    hooked: set[nn.Module] = set()
    for unit in units:
        policy = half if model.autocast_dtype and unit in layers else MixedPrecisionPolicy()
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)  # losses are divided by the denominator of the whole batch
        unit.set_force_sum_reduction_for_comms(True)
    for unit in units:
        for leaf in set(unit.modules()) - hooked:
            _hook(leaf, unit)
        hooked |= set(unit.modules())
    if tied:
        del embedding.head
        _gather_for(head, embedding)
    else:
        embedding.set_unshard_in_backward(False)  # its gradient needs no weights
    model.same_passes = True
    with torch.no_grad(), model.autocast():
        lm.base_model(torch.tensor([[model.start_id]], device=model.device))  # the root runs first


def _hook(leaf: nn.Module, unit: FSDPModule) -> None:
    """Add gradients at once, and gather `unit` before any backward pass of `leaf`.

    FSDP2 gathers before the gradient of a unit's output. Of the question's pass the last block's
    output is not used, only its keys and values.
    """

    def before(module: nn.Module, args) -> None:
        for name, p in module._parameters.items():
            if isinstance(p, nn.Parameter) and p.requires_grad and torch.is_grad_enabled():
                module._parameters[name] = _AddNow.apply(p)

    def after(module: nn.Module, args, output) -> None:
        for out in output if isinstance(output, tuple) else (output,):
            if isinstance(out, Tensor) and out.requires_grad:
                out.register_hook(lambda grad: unit.unshard())

    if leaf._parameters:
        leaf.register_forward_pre_hook(before)
        leaf.register_forward_hook(after)


def _gather_for(head: nn.Module, embedding: Any) -> None:
    """Gather the embedding for the passes of a head that shares its weight."""
    opened: list[bool] = []

    def before(*_) -> None:
        opened.append(isinstance(embedding.weight, DTensor))
        embedding.unshard()

    def after(*_) -> None:
        if opened.pop():
            embedding.reshard()

    head.register_forward_pre_hook(before, prepend=True)
    head.register_forward_hook(after)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return any(isinstance(p, DTensor) for p in model.parameters())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds the whole model, and passes without gradient need no other."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with _not_shared():
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


@contextmanager
def in_step(model: LatentReasoner, idle: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, processes score and back-propagate in step; those without work left do so with `idle`.

    idle: a loss of 0 that runs the same modules in the same order.
    """
    if not is_sharded(model):
        yield
        return

    def any_left(mine: bool) -> bool:
        flag = torch.tensor(int(mine))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def announced(*args, **settings):
        any_left(True)
        return LatentReasoner.teacher_forced(model, *args, **settings)

    with _not_shared():
        model.teacher_forced = announced  # type: ignore[method-assign]
        try:
            yield
        finally:
            del model.teacher_forced
        while any_left(False):
            idle().backward()


@contextmanager
def _not_shared() -> Iterator[None]:
    """Raise LostProcess for an error in the middle of a pass: the others wait for it, and cannot be told."""
    try:
        yield
    except Exception as error:
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        remedy = "read the first message of any process, then run the same command with --resume"
        raise LostProcess(f"process {distributed.rank()} of {distributed.size()}: {text}; {remedy}") from error


def whole_weights(lm: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model, whole and on the CPU of rank 0; elsewhere it is empty."""
    whole: dict[str, Tensor] = {}
    tied = dict(lm.named_parameters(remove_duplicate=False)).keys() - dict(lm.named_parameters()).keys()
    for name, tensor in lm.state_dict().items():
        if name in tied:
            continue
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if distributed.rank() == 0:
            whole[name] = tensor.cpu()
    return whole


@torch.no_grad()
def load_whole(lm: nn.Module, source: nn.Module) -> None:
    """Copy the weights of a whole model into a sharded one of its kind."""
    pairs: Iterator[tuple[Any, Any]] = zip(lm.parameters(), source.parameters(), strict=True)
    for mine, whole in pairs:
        whole = whole.to(mine.device)
        mine.copy_(distribute_tensor(whole, mine.device_mesh, mine.placements, src_data_rank=None))
