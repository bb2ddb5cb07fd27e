"""Several processes, one run: who am I, sums of gradients, gathers. One process pays nothing and imports nothing.

A launcher (`accelerate launch`, `torchrun`) starts N processes of the same command on one machine or several, and
`joined` makes them one run: gloo between CPUs, nccl between GPUs. Every process holds the whole model and takes its
share of each batch of problems. Three rules make N irrelevant to the result, but for the rounding of sums:

    seeds       follow from (run seed, step, problem id, k), drawn for the whole batch before it is split
    choices     (accepted groups, best checkpoint, stop) are made by all processes from the same gathered numbers
    gradients   are divided by the whole batch's denominator, so that they add up: one all-reduce an update

`gather` is also how processes fail together: an error in one is raised in all, with the same words, and rank 0 says it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
KINDS = (FileExistsError, FloatingPointError, OSError, ValueError)  # errors that keep their type on other processes


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Be one of the processes that a launcher started; what fails inside on one of them fails on all.

    Raises ValueError for a launch that cannot work.
    """
    _start(device)
    try:
        yield
        gather(lambda: None)  # an error of another process at its very end
    except Exception as error:
        _fail(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _start(device: str) -> None:
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) == 1:
        if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and "RANK" not in env:
            raise ValueError(
                "accelerate launch: got --cpu (or MULTI_CPU) for several processes, which starts a single one, "
                "expected --multi_gpu, which starts them on CPUs as well"
            )
        return
    if ":" in device:
        raise ValueError(f"--device: got {device} for {env['WORLD_SIZE']} processes, expected auto, cpu or cuda")
    # Before there is a process group: imported later (as transformers does), this module's default arguments would hold
    # the group beyond its end, with gloo's threads, which abort a process when they free a tensor while Python exits.
    import torch.distributed.nn.functional
    from accelerate import PartialState

    if device == "cpu" or not torch.cuda.is_available():
        PartialState(cpu=True)
    else:
        PartialState(backend="cuda:nccl,cpu:gloo")  # tensors over nccl, small objects over gloo


def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's share: every N-th item, so that a batch that is cut short stays even. May be empty."""
    return items[rank() :: size()]


def in_order(shards: Sequence[Sequence[T]]) -> list[T]:
    """The items whose shards these are, in rank order: the inverse of `shard`."""
    return [shards[i % len(shards)][i // len(shards)] for i in range(sum(map(len, shards)))]


def gather(work: Callable[[], T]) -> list[T]:
    """What `work` returns on each process, in rank order, on all of them, which wait for each other here.

    If it raises on some, all raise: those with an error of their own that one, the others the first rank's in its
    words. RuntimeError if a process is gone. What `work` returns travels by pickle, between processes of one run.
    """
    if size() == 1:
        return [work()]
    try:
        result = work()
    except Exception as error:
        _fail(error)
    return [answer for answer, _ in _exchange((result, None))]


def _fail(error: Exception) -> NoReturn:
    """Tell all processes of `error`, unless they know, and raise it."""
    if size() > 1 and not hasattr(error, "known_to_all"):
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
        error.known_to_all = True
        raise error
    return answers


def on_main(work: Callable[[], None]) -> None:
    """Do `work` on rank 0 alone; the others wait, and fail with it."""
    gather(lambda: work() if rank() == 0 else None)


def check_same(**values) -> None:
    """Raise ValueError, on all processes, for a value that is not the same on every one."""
    if size() == 1:
        return
    for name, held in zip(values, zip(*gather(lambda: tuple(values.values())), strict=True), strict=True):
        odd = next((i for i, value in enumerate(held) if value != held[0]), None)
        if odd is not None:
            raise ValueError(
                f"processes: got another {name} on process {odd} than on process 0, expected the same on all; "
                "give every machine the same files and the same library"
            )


@torch.no_grad()
def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each `.grad` by its sum over all processes, in one all-reduce; a process without rows has none.

    All processes end with the same bits. A parameter without a gradient anywhere keeps none.
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


def _collective(operation, *arguments) -> None:
    try:
        operation(*arguments)
    except RuntimeError as error:
        lost = RuntimeError(
            f"process {rank()} of {size()}: lost another one ({str(error).splitlines()[0][:120]}), expected all to go "
            "on; see what it said last (killed? out of memory?), then start the same command with --resume"
        )
        lost.known_to_all = False  # and nobody can be told
        raise lost from error
