"""TensorBoard events of a run (`--tensorboard`): the numbers of metrics.jsonl, by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Events:
    """Writes runs/NAME/tensorboard. first: the next step; earlier events from there on are dropped.

    Raises ModuleNotFoundError without the package tensorboard.
    """

    def __init__(self, folder: Path, *, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(folder / "tensorboard", purge_step=first)

    def write(self, record: dict) -> None:
        """Write the numbers of a step's record, under their names there."""
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()
