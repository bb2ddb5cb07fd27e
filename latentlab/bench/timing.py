"""Seconds and peak memory of several ways to do one thing, on a machine that others may be using too."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def measure(runs: dict[str, Callable], repeats: int, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds over interleaved rounds, and the peak memory (GiB) of each run, read in the first round.

    With one thread on a CPU these are seconds of CPU time, which other processes stretch least; else of the clock.
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
    for _ in range(repeats - 1):
        for name in runs:
            timed(name)
    known = {name: gib for name, gib in memory.items() if gib is not None}
    return {name: statistics.median(values) for name, values in seconds.items()}, known


def peak_memory(run: Callable, device: str) -> float | None:
    """Most GiB that `run` holds on top of what was held before; None where the system does not tell."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
    except OSError:  # no Linux
        run()
        return None
    run()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    """A size of this process in GiB, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def wait(device: str) -> None:
    """Until the device has done all it was told to: CUDA answers before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
