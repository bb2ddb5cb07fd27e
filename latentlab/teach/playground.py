"""Sliders over the thought table, and the way every live output of the lessons is shown.

A live output carries a static one, that of the default setting, for every place without a kernel:
papermill, the book, GitHub.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
from IPython.display import display

from latentlab.model import LatentReasoner
from latentlab.problems import Problem
from latentlab.teach.thoughts import ThoughtTable, show_thoughts


def live(draw: Callable[..., Any], **controls: widgets.Widget) -> None:
    """Display controls, and below them `draw(**values)`, drawn again at every change.

    draw returns an object that shows itself as HTML and as text, such as a ThoughtTable or a Table.
    """
    first = draw(**{name: control.value for name, control in controls.items()})
    shown = widgets.HTML(first._repr_html_())

    def update(_) -> None:
        shown.value = draw(**{name: control.value for name, control in controls.items()})._repr_html_()

    for control in controls.values():
        control.observe(update, "value")
    box = widgets.VBox([*controls.values(), shown])
    display({**box._repr_mimebundle_(), "text/html": shown.value, "text/plain": str(first)}, raw=True)


def playground(model: LatentReasoner, problems: Sequence[Problem]) -> None:
    """Move the mask rate, the seed, K and the answers' temperature of one problem, and read the thoughts."""

    def draw(problem: int, rate: float, seed: int, k: int, temperature: float) -> ThoughtTable:
        return show_thoughts(model, problems[problem], rate=rate, seed=seed, k=k, temperature=temperature)

    wide: dict[str, Any] = {"layout": {"width": "95%"}, "style": {"description_width": "110px"}}
    live(
        draw,
        problem=widgets.Dropdown(
            options=[(p.question, i) for i, p in enumerate(problems)], value=0, description="problem", **wide
        ),
        rate=widgets.FloatSlider(0.1, min=0.0, max=0.5, step=0.05, description="mask rate p", **wide),
        seed=widgets.IntSlider(0, min=0, max=31, description="seed", **wide),
        k=widgets.IntSlider(8, min=2, max=16, description="rollouts K", **wide),
        temperature=widgets.FloatSlider(0.0, min=0.0, max=2.0, step=0.1, description="temperature", **wide),
    )
