"""Run a function in N processes that talk over gloo."""

import multiprocessing
import pickle
from pathlib import Path

import torch
import torch.distributed as dist


def together(size: int, function, folder: Path, **settings) -> list:
    """`function(**settings)` in `size` processes: what each returned or raised, by rank; None if it died."""
    context = multiprocessing.get_context("forkserver")  # its server imports torch once and never runs it
    context.set_forkserver_preload(["latentlab.grpo", "conftest"])
    folder.mkdir()
    jobs = [context.Process(target=_member, args=(rank, size, function, folder, settings)) for rank in range(size)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    files = [folder / f"{rank}.pkl" for rank in range(size)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _member(rank, size, function, folder, settings) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        result = function(**settings)
    except Exception as error:
        result = error
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
