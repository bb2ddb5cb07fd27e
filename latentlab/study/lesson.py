"""What a notebook needs around its argument: checked parameters, one figure style, one result file.

lesson = begin("00_tour", preset=preset, num_generations=num_generations)    # first cell
lesson.save(figure)                                                          # 00_tour.png
lesson.write(metrics, question="…", headline="…")                            # 00_tour.json
"""

from __future__ import annotations

import ast
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import torch

from latentlab.config import Config, load_preset
from latentlab.study.figures import save_figure
from latentlab.study.results import write_result

STYLE = Path(__file__).with_name("lesson.mplstyle")  # Okabe-Ito colours, direct labels, 200 dpi


class LessonError(ValueError):
    """A notebook cannot run like this; a notebook shows it as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython's protocol
        return [f"latentlab: {self}"]


@dataclass
class Lesson:
    """A running notebook: its name, parameters, preset and start."""

    name: str
    parameters: dict[str, Any]
    config: Config
    started: float

    def save(self, figure, suffix: str = "") -> Path:
        """Save a figure beside the result; suffix: "" for the notebook's main figure, else such as "_curves"."""
        return save_figure(figure, self.name + suffix, self.config.preset)

    def write(self, metrics: dict, *, question: str, headline: str, **more: Any) -> str:
        """Write the notebook's result file; returns where, as text. more: arms, environment."""
        seconds = time.time() - self.started
        about: dict[str, Any] = {"parameters": self.parameters, "started": self.started, "seconds": seconds}
        path = write_result(
            self.name, preset=self.config.preset, metrics=metrics, question=question, headline=headline, **about, **more
        )
        return f"{headline}\n({'/'.join(path.parts[-2:])})"


def begin(name: str, *, presets: Sequence[str] = ("smoke", "tiny"), **parameters: Any) -> Lesson:
    """Start a notebook: check its parameters, set one thread for small models and the figure style.

    parameters: all of the notebook's, by name, `preset` among them. presets: those it can run.
    Raises LessonError, one line, for another preset, and for a parameter that papermill injected and
    the notebook does not have.
    """
    started, preset = time.time(), parameters["preset"]
    if preset not in presets:
        raise LessonError(f"preset: got {preset!r}, expected one of {', '.join(presets)} for {name}; correct it")
    if unknown := [key for key in _injected() if key not in parameters]:
        raise LessonError(f"parameter: got {unknown[0]!r}, expected one of {', '.join(parameters)}; correct its name")
    if preset in ("smoke", "tiny"):
        torch.set_num_threads(1)  # two threads on a shared machine are several times slower
    matplotlib.style.use(STYLE)
    return Lesson(name, parameters, load_preset(preset), started)


def _injected() -> list[str]:
    """The names in the cell that papermill put behind the parameters; none outside of papermill."""
    try:
        cells = get_ipython().user_ns["In"]  # type: ignore[name-defined]  # IPython's builtin
    except NameError:
        return []
    found = [cell for cell in cells if cell.startswith("# Parameters\n")]
    nodes = [node for cell in found for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
    return [target.id for node in nodes for target in node.targets if isinstance(target, ast.Name)]
