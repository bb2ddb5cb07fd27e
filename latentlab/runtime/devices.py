"""Choosing the device that a command computes on."""

import torch


def select_device(name: str) -> torch.device:
    """The device `name`: "auto" (CUDA if available), "cpu", "cuda" (the current one) or "cuda:1" (made current).

    Raises ValueError if it does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or index and not index.isdigit():
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:1")
    if kind == "cuda" and torch.cuda.device_count() <= int(index or 0):
        raise ValueError(
            f"device: got {name}, but torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    if index:
        torch.cuda.set_device(int(index))  # memory statistics and synchronization use the current device
    return torch.device(name)
