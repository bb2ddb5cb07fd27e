"""Devices and data parallelism: joined processes, object gathers, gradient all-reduce.

A launcher (`torchrun`, or `accelerate launch`, which sets the same variables) starts N processes of
one command on one or several machines, and `joined` connects them: gloo on CPUs, nccl on GPUs.
Every process holds the whole model and takes its share of each batch of problems. Three rules make
the result independent of N, except for the rounding of sums:

    seeds      follow from (run seed, step, problem id, k), drawn for the batch before it is split
    decisions  (accepted groups, best checkpoint, stop) follow from numbers gathered on all
    gradients  are divided by the whole batch's denominator: one all-reduce per update adds them

Processes fail together: an error inside `gather` is raised on all of them with the same message.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
KINDS = (FileExistsError, FloatingPointError, OSError, ValueError)  # kept on other processes
EVERYWHERE = "raised on every process"  # the note on an error that all processes have raised


class LostProcess(RuntimeError):
    """Another process has ended, so that nothing can be gathered any more."""


def select_device(name: str) -> torch.device:
    """The device "auto" (CUDA if available), "cpu", "cuda" (the current one) or "cuda:1" (made current).

    Raises ValueError if it does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or index and not index.isdigit():
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:1")
    if kind == "cuda" and (count := torch.cuda.device_count()) <= int(index or 0):
        raise ValueError(f"device: got {name}, but torch sees {count} CUDA devices; use --device cpu")
    if index:
        torch.cuda.set_device(int(index))  # memory statistics and synchronization use the current device
    return torch.device(name)


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Join the processes of a launcher; an error inside is raised on all. ValueError: a bad launch."""
    _start(device)
    try:
        yield
        gather(lambda: None)  # an error of another process at its very end
    except Exception as error:
        _fail(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # a sharded model holds the group, and itself in cycles


def _start(device: str) -> None:
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) == 1:
        if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and "RANK" not in env:
            raise ValueError("accelerate launch: got --cpu, which starts one process; --multi_gpu starts all on CPUs")
        return
    if ":" in device:
        raise ValueError(f"--device: got {device} for {env['WORLD_SIZE']} processes, expected auto, cpu or cuda")
    # Imported before the process group exists: later, by transformers, its default arguments would
    # keep the group alive, whose gloo threads abort when they free a tensor at Python's exit.
    import torch.distributed.nn.functional

    if device == "cpu" or not torch.cuda.is_available():
        dist.init_process_group("gloo")
    else:
        torch.cuda.set_device(int(env["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")  # small objects by gloo, tensors by nccl


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's share: every N-th item, which is even for a batch cut short. May be empty."""
    return items[rank() :: size()]


def in_order(shards: Sequence[Sequence[T]]) -> list[T]:
    """The items whose shards these are, in rank order: the inverse of `shard`."""
    return [shards[i % len(shards)][i // len(shards)] for i in range(sum(map(len, shards)))]


def gather(work: Callable[[], T]) -> list[T]:
    """The results of `work` on every process, in rank order, on all of them; a barrier.

    If it raises on some, all raise: their own error, or else a copy of the first one.
    Raises LostProcess if a process is gone. Results are pickled, between processes of one run only.
    """
    if size() == 1:
        return [work()]
    try:
        result = work()
    except Exception as error:
        _fail(error)
    return [answer for answer, _ in _exchange((result, None))]


def raised_everywhere(error: BaseException) -> bool:
    """Whether every process has raised `error`, so that rank 0 alone should print it."""
    return EVERYWHERE in getattr(error, "__notes__", ())


def _fail(error: Exception) -> NoReturn:
    """Raise `error` here and on all processes, unless they have raised it or cannot be reached."""
    if size() > 1 and not raised_everywhere(error) and not isinstance(error, LostProcess):
        kind = next((kind for kind in KINDS if isinstance(error, kind)), RuntimeError)
        _exchange((None, (kind, str(error))), error)
    raise error


def _exchange(mine: tuple, error: Exception | None = None) -> list[tuple]:
    """The (result, failure) of every process; raises `error`, or else the first failure of any."""
    answers: list = [None] * size()
    _collective(dist.all_gather_object, answers, mine)
    failure = next((failure for _, failure in answers if failure), None)
    if failure:
        error = error or failure[0](failure[1])
        error.add_note(EVERYWHERE)
        raise error
    return answers


def on_main(work: Callable[[], None]) -> None:
    """Do `work` on rank 0 alone; the others wait, and fail with it."""
    gather(lambda: work() if rank() == 0 else None)


def check_same(**values) -> None:
    """Raise ValueError, on all processes, for a value that is not the same on every one."""
    everyone = gather(lambda: values)
    for name, value in everyone[0].items():
        odd = [i for i, other in enumerate(everyone) if other[name] != value]
        if odd:
            raise ValueError(
                f"processes: got another {name} on process {odd[0]} than on process 0, expected the same on all; give "
                "every machine the same files and library"
            )


@torch.no_grad()
def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each `.grad` by its sum over all processes, in one all-reduce, bit-identical on all.

    A process without rows counts as zeros; a parameter without a gradient anywhere keeps None.
    """
    if size() == 1:
        return
    parameters = list(parameters)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    present = grads[0].new_tensor([p.grad is not None for p in parameters])
    buffer = torch.cat([present, *(grad.flatten() for grad in grads)])
    _collective(dist.all_reduce, buffer)
    present, *sums = buffer.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, holders, total in zip(parameters, present.tolist(), sums, strict=True):
        parameter.grad = total.view_as(parameter) if holders else None


def _collective(operation: Callable, *arguments) -> None:
    try:
        operation(*arguments)
    except RuntimeError as error:
        raise LostProcess(
            f"process {rank()} of {size()}: lost another process ({str(error).splitlines()[0][:120]}), expected all "
            "to continue; read its last message (killed? out of memory?), then run the same command with --resume"
        ) from error
