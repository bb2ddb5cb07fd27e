"""Seconds and peak memory of several functions, on a machine that may have other load."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch


def measure(runs: dict[str, Callable], repeats: int, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds over interleaved rounds, and peak memory (GiB) of each run in the first round.

    With one thread on a CPU the seconds are CPU time, least affected by other load; else wall time.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def record(name: str) -> None:
        seconds[name].append(seconds_of(runs[name], device, clock))

    memory = {name: peak_memory(partial(record, name), device) for name in runs}
    for name in list(runs) * (repeats - 1):
        record(name)
    known = {name: gib for name, gib in memory.items() if gib is not None}
    return {name: statistics.median(values) for name, values in seconds.items()}, known


def seconds_of(run: Callable, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, the device idle before and after it: CUDA calls are asynchronous."""
    wait_for_device = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait_for_device()
    start = clock()
    run()
    wait_for_device()
    return clock() - start


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
    except OSError:  # not Linux
        run()
        return None
    before = _process_gib("VmRSS")
    run()
    return _process_gib("VmHWM") - before


def _process_gib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20
