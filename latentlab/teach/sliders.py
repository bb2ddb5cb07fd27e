"""Sliders of the notebooks: live where there is a front end, else the default setting as static text.

mixed_groups()    K and pass rate → the share of groups that teach, and whether leave-one-out helps
"""

from __future__ import annotations

import math

import ipywidgets

from latentlab.teach.playground import live
from latentlab.teach.table import Table


def mixed_groups(k: int = 8, pass_rate: float = 0.7) -> None:
    """Sliders K and pass rate q: the share of mixed groups, and the variance ratio of leave-one-out."""
    style = {"description_width": "8em"}
    live(
        mixed_table,
        k=ipywidgets.IntSlider(k, 2, 64, description="rollouts K", style=style),
        pass_rate=ipywidgets.FloatSlider(
            pass_rate, min=0.01, max=0.99, step=0.01, description="pass rate q", style=style
        ),
    )


def mixed_table(k: int, pass_rate: float) -> Table:
    """The content of `mixed_groups` at one setting."""
    mixed, ratio, limit = mixed_share(k, pass_rate), variance_ratio(k, pass_rate), 2 * (k - 2) / (3 * k - 5)
    verdict = "lowers" if ratio < 1 else "raises"
    rows = [
        ("mixed groups, 1 − qᴷ − (1 − q)ᴷ", f"{mixed:.1%}", "█" * round(30 * mixed)),
        ("all K right, qᴷ: nothing to learn", f"{pass_rate**k:.1%}", "█" * round(30 * pass_rate**k)),
        (
            "all K wrong, (1 − q)ᴷ: nothing to learn",
            f"{(1 - pass_rate) ** k:.1%}",
            "█" * round(30 * (1 - pass_rate) ** k),
        ),
        ("variance, leave-one-out / no baseline", f"{ratio:.2f}", f"it {verdict} the variance"),
    ]
    return Table(
        ("", "", ""),
        rows,
        f"K = {k}, q = {pass_rate:.2f}. One logit: leave-one-out helps below q = 2(K − 2)/(3K − 5) = {limit:.2f}.",
    )


def mixed_share(k: int, pass_rate: float) -> float:
    """The share of groups of K in which some rollouts are right and some wrong, at pass rate q."""
    return 1 - pass_rate**k - (1 - pass_rate) ** k


def variance_ratio(k: int, pass_rate: float) -> float:
    """Variance of a group's gradient with leave-one-out, divided by that without a baseline, for one logit.

    With c right rollouts of K the two gradients are c (K − c) / (K (K − 1)) and c (1 − q) / K; c is binomial.
    """
    q, mean = pass_rate, pass_rate * (1 - pass_rate)  # both estimators have the mean σ'(θ) = q (1 − q)
    chances = [math.comb(k, c) * q**c * (1 - q) ** (k - c) for c in range(k + 1)]
    with_baseline = sum(p * (c * (k - c) / (k * (k - 1)) - mean) ** 2 for c, p in enumerate(chances))
    return with_baseline / ((1 - q) ** 2 * mean / k)
