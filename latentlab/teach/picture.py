"""The thought table as a picture, for places that show no HTML."""

from __future__ import annotations

from textwrap import fill

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from latentlab.teach.thoughts import ThoughtTable

SHADES = {True: "#d3eee4", False: "#f7d9c4"}  # light variants of Okabe-Ito's green and vermillion


def draw_thoughts(table: ThoughtTable) -> Figure:
    """A row per train of thought; right values have a tick, wrong ones a cross and a frame."""
    columns = [
        "",
        *(f"thought {i}" for i in range(1, len(table.trains[0].thoughts) + 1)),
        "answer",
        "reward",
        "advantage",
    ]
    figure = Figure(figsize=(1.15 * len(columns) + 0.6, 0.36 * (len(table.trains) + 4)), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-0.6, len(columns) - 0.3), ylim=(len(table.trains) + 2.6, -1.6))
    ax.axis("off")
    ax.text(-0.45, -0.95, fill(table.question, 95), fontsize=9.5, va="center", weight="bold")
    for x, name in enumerate(columns):
        ax.text(x, 0, name, ha="center", va="center", fontsize=9, color="0.35")
    right_row = ["right", *table.results, table.answer]
    for x, text in enumerate(right_row):
        ax.text(x, 1, text, ha="center", va="center", fontsize=10, color="0.35" if x == 0 else "black", style="italic")
    for y, train in enumerate(table.trains, 2):
        ax.text(0, y, train.name, ha="center", va="center", fontsize=10)
        answer = None if train.reward is None else train.reward == 1
        for x, (text, right) in enumerate([*zip(train.thoughts, train.right, strict=True), (train.answer, answer)], 1):
            if right is not None:
                edge = "none" if right else "#b34700"
                box = FancyBboxPatch(
                    (x - 0.3, y - 0.32), 0.6, 0.64, boxstyle="round,pad=0.02", fc=SHADES[right], ec=edge
                )
                ax.add_patch(box)
            sign = "" if right is None else "✓ " if right else "✗ "
            ax.text(x, y, sign + text, ha="center", va="center", fontsize=10, weight=None if right else "bold")
        for x, value in ((len(columns) - 2, train.reward), (len(columns) - 1, train.advantage)):
            if value is not None:
                form = "{:+.2f}" if x == len(columns) - 1 else "{:g}"
                ax.text(x, y, form.format(value), ha="center", va="center", fontsize=10)
    ax.axhline(1.5, color="0.8", linewidth=0.8)
    ax.axhline(2.5, color="0.8", linewidth=0.8)
    ax.text(-0.45, len(table.trains) + 2.1, table.setting, fontsize=8.5, va="center", color="0.35")
    return figure
