"""Seconds and peak memory of several functions, on a machine that may have other load."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def measure(runs: dict[str, Callable], repeats: int, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds over interleaved rounds, and peak memory (GiB) of each run in the first round.

    With one thread on a CPU the seconds are CPU time, least affected by other load; else wall time.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def timed(name: str) -> None:
        wait(device)
        start = clock()
        runs[name]()
        wait(device)
        seconds[name].append(clock() - start)

    memory = {name: peak_memory(lambda name=name: timed(name), device) for name in runs}
    for name in list(runs) * (repeats - 1):
        timed(name)
    known = {name: gib for name, gib in memory.items() if gib is not None}
    return {name: statistics.median(values) for name, values in seconds.items()}, known


def peak_memory(run: Callable, device: str) -> float | None:
    """Peak memory of `run` beyond what was held before, GiB; None if the system has no measure."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**30
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
    except OSError:  # not Linux
        run()
        return None
    run()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    """A size of this process in GiB, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def wait(device: str) -> None:
    """Wait until the device is idle: CUDA calls are asynchronous."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
