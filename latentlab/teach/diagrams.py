"""Diagrams made by code, at slide size: the method, and shared against per-step masks.

method_diagram()     question → thoughts → answer under K masks, rewards, advantages, the same masks in the update
schemes_diagram()    rows: rollouts; columns: positions; bars: masks
"""

from __future__ import annotations

import random
import textwrap

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem
from latentlab.teach.thoughts import RIGHT, WRONG, show_thoughts

EXAMPLE = Problem(
    "ana",
    "Ana has 3 cards. She buys 6 more cards. She gives 4 cards away. She gets 3 for each. "
    "She gives 2 cards away. How many cards remain?",
    ("<<3+6=9>>", "<<9-4=5>>", "<<5*3=15>>", "<<15-2=13>>"),
    "13",
    "teach",
)
COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9")  # of masks: Okabe and Ito; green and vermillion are right, wrong
GREY, INK, FEATURES, SIDE = "#666666", "#222222", 8, 0.14  # features of a drawn mask, and their side


def method_diagram() -> Figure:
    """The method on one example: the thoughts, answers, rewards and advantages are the shipped model's."""
    table = show_thoughts(load_model("tiny"), EXAMPLE, rate=0.1, k=4, seed=1)
    figure, axes = _canvas(13.2, 5.4)
    for left, right, name in ((2.45, 8.95, "rollout"), (9.1, 10.75, "group"), (10.9, 13.1, "update")):
        _box(axes, left, 0.95, right - left, 4.3, "#f4f4f4")
        axes.text((left + right) / 2, 5.02, name, ha="center", va="center", weight="bold", size=13, color=INK)
    heads = {3.15: "mask $m_k$", 5.8: "thoughts $z_1 … z_4$", 8.35: "answer $y_k$", 9.5: "reward", 10.3: "advantage"}
    for x, text in {**heads, 11.6: "the same mask"}.items():
        axes.text(x, 4.62, text, ha="center", va="center", size=10.5, color=GREY)
    question = "\n".join(textwrap.wrap(table.question, 20))
    _box(axes, 0.1, 1.25, 1.9, 2.95, "white", INK)
    axes.text(1.05, 2.72, question, ha="center", va="center", size=10, linespacing=1.45, color=INK)
    for k, (train, colour) in enumerate(zip(table.trains[1:], COLOURS, strict=True)):
        y = 4.1 - 0.87 * k
        _arrow(axes, (2.0, 2.72), (2.58, y), colour)
        _mask(axes, 2.6, y, colour, seed=k)
        for i, (thought, is_right) in enumerate(zip(train.thoughts, train.right, strict=True)):
            x = 4.5 + 0.88 * i
            _arrow(axes, (x - (0.76 if i == 0 else 0.58), y), (x - 0.3, y), colour)
            _thought(axes, x, y, thought, RIGHT if is_right else WRONG)
        good = RIGHT if train.reward else WRONG
        _arrow(axes, (7.44, y), (8.0, y), colour)
        _box(axes, 8.02, y - 0.25, 0.68, 0.5, "white", good)
        axes.text(
            8.36, y, f"{train.answer} {'✓' if train.reward else '✗'}", ha="center", va="center", color=good, size=12
        )
        axes.text(9.5, y, f"{train.reward:g}", ha="center", va="center", size=13, color=INK)
        axes.text(10.3, y, f"{train.advantage:+.2f}", ha="center", va="center", size=13, color=good)
        _mask(axes, 11.02, y, colour, seed=k)
        _arrow(axes, (12.2, y), (12.5, 2.8 + 0.15 * (1.5 - k)), colour)
    axes.add_patch(Circle((12.78, 2.8), 0.27, facecolor="white", edgecolor=INK, linewidth=1.4))
    axes.text(12.78, 2.8, "θ", ha="center", va="center", size=15, color=INK)
    formula = r"$\nabla J \approx \frac{1}{K}\sum_k A_k\,\nabla\log\pi_\theta(y_k \mid x, m_k)$"
    axes.text(13.05, 0.5, formula, ha="right", va="center", size=14, color=INK)
    axes.text(2.5, 0.5, "filled: kept feature; empty: dropped.  ✓ right  ✗ wrong", va="center", size=10.5, color=GREY)
    return figure


def schemes_diagram() -> Figure:
    """Masks of four rollouts under the schemes shared and per_step, by position."""
    figure, axes = _canvas(13.2, 4.6)
    heads = ("start", "thought 1", "thought 2", "thought 3", "thought 4")
    for left, title in ((0.2, "shared: one mask per rollout, held"), (7.0, "per_step: a fresh mask at every step")):
        axes.text(left, 4.3, title, weight="bold", size=14, color=INK)
        for i, head in enumerate(heads):
            axes.text(left + 0.6 + 1.25 * i, 3.78, head, ha="center", size=10.5, color=GREY)
        for k, colour in enumerate(COLOURS):
            y = 3.3 - 0.75 * k
            held = left < 1
            for i in range(1 if held else len(heads)):
                _box(axes, left + 1.25 * i, y - 0.24, 6.2 if held else 1.2, 0.48, colour, alpha=0.16)
            for i in range(len(heads)):
                _mask(axes, left + 0.04 + 1.25 * i, y, colour, seed=k if held else 10 * k + i)
    axes.text(
        0.2, 0.42, "rows: rollouts 1 … 4; filled: kept feature, × 1/(1 − p); empty: dropped", size=10.5, color=GREY
    )
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose data coordinates are inches."""
    figure = plt.figure(figsize=(width, height), facecolor="white", layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge="none", alpha=1.0) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, style, facecolor=fill, edgecolor=edge, alpha=alpha, linewidth=1.4)
    )


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.6, shrinkA=0, shrinkB=0
        )
    )


def _thought(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.add_patch(
        Circle(
            (x, y), 0.28, facecolor="white", edgecolor=colour, linewidth=2, linestyle="-" if colour == RIGHT else "--"
        )
    )
    axes.text(
        x, y, text, ha="center", va="center", color=colour, size=12, weight="normal" if colour == RIGHT else "bold"
    )


def _mask(axes: Axes, x: float, y: float, colour: str, *, seed: int) -> None:
    """A mask as a bar of features, dropped ones empty."""
    dropped = random.Random(seed).sample(range(FEATURES), 3)
    for i in range(FEATURES):
        fill = "white" if i in dropped else colour
        axes.add_patch(
            Rectangle((x + SIDE * i, y - SIDE), SIDE, 2 * SIDE, facecolor=fill, edgecolor="white", linewidth=0.8)
        )
    size = (SIDE * FEATURES, 2 * SIDE)
    axes.add_patch(Rectangle((x, y - SIDE), *size, facecolor="none", edgecolor=colour, linewidth=1.2))
