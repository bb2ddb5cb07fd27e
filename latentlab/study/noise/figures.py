"""One figure per result of the study: forest of contrasts, map, long runs on two axes, reliability."""

from __future__ import annotations

from pathlib import Path

from latentlab.study.figures import plot_curves, save_figure

FOREST = {  # what the forest shows of the contrasts of bases.json, in this order
    "equal_rollouts": "equal rollouts",
    "equal_seconds": "equal CPU seconds",
    "equal_rollouts_fresh": "equal rollouts, not in the pilot",
    "equal_seconds_fresh": "equal CPU seconds, not in the pilot",
    "per_step_shared": "equal rollouts",
    "antithetic_shared": "equal rollouts",
    "shared_greedy_shared": "equal rollouts",
    "gaussian_shared": "equal rollouts",
    "gaussian_temperature": "equal rollouts",
    "supervised_once_shared": "equal labels",
    "supervised_passes_shared": "equal sequences",
}


def draw(result: dict, folder: Path) -> Path:
    """Draw the figure of bases.json, map.json, long.json or readings.json next to it, in the result folder `folder`."""
    from matplotlib.figure import Figure  # no pyplot: drawing changes no global state

    m, name = result["metrics"], result["name"]
    if name == "bases":
        figure = Figure(figsize=(8, 0.8 + 0.45 * sum(key in m["contrasts"] for key in FOREST)))
        plot_forest(figure.subplots(), m["contrasts"])
    elif name == "map":
        figure = Figure(figsize=(1.8 + 0.9 * len(m["bases"][0]["gains"]), 1.6 + 0.55 * len(m["bases"])))
        plot_map(figure.subplots(), m["bases"])
    elif name == "long":
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        plot_long(figure.subplots(1, 2, sharey=True), m["curves"])
    else:
        figure = Figure(figsize=(4.5, 4), layout="constrained")
        plot_reliability(figure.subplots(), m["start"]["test_time"])
    return save_figure(figure, name, result["preset"], folder)


def plot_forest(ax, contrasts: dict[str, dict]) -> None:
    """Contrasts in points with their 95 % intervals, one row each; small marks are single bases."""
    rows = [(key, contrasts[key]) for key in FOREST if key in contrasts]
    for y, (_, row) in enumerate(rows):
        ax.plot(row["by_seed"], [y] * len(row["by_seed"]), "|", color="0.7", markersize=9)
        ax.plot([row["low"], row["high"]], [y, y], "-", color="black", marker="")
        ax.plot(row["difference"], y, "o", color="black")
    ax.axvline(0, color="0.6", linewidth=0.8)
    names = [f"{r['arm']} − {r['other']}\n{FOREST[k]}, {r['seeds']} bases" for k, r in rows]
    ax.set_yticks(range(len(rows)), names, fontsize=9)
    ax.invert_yaxis()
    ax.set_xlabel("difference of test pass@1, points; 95 % interval over bases and problems")


def plot_map(ax, bases: list[dict]) -> None:
    """What training under each noise adds on fresh problems, points: bases from uncertain to confident × noise.

    Darker is more; the best of a row is bold.
    """
    labels = list(bases[0]["gains"])
    gains = [[row["gains"][label]["difference"] for label in labels] for row in bases]
    ax.imshow(
        gains, cmap="Greys", aspect="auto", vmin=min(0.0, *map(min, gains)), vmax=max(1.0, 2 * max(map(max, gains)))
    )
    for y, row in enumerate(gains):
        for x, gain in enumerate(row):
            ax.text(
                x, y, f"{gain:+.1f}", ha="center", va="center", fontsize=9, weight="bold" if gain == max(row) else None
            )
    names = [
        f"{r['base'].replace('_', ' ')}\n{r['entropy']:.2f} nats, {100 * r['accuracy']:.0f} % right" for r in bases
    ]
    ax.set_yticks(range(len(bases)), names, fontsize=8)
    ax.set_xticks(range(len(labels)), [label.replace(" ", "\n").replace("_", "\n") for label in labels], fontsize=8)
    ax.set_title("Points gained on fresh problems (bold: most of a row)", fontsize=9)


def plot_long(axes, curves: dict[str, dict]) -> None:
    """Validation accuracy against rollouts (left) and CPU seconds (right), one line per arm."""
    for ax, (name, label) in zip(axes, (("rollouts", "rollouts"), ("cpu_seconds", "CPU seconds")), strict=True):
        lines = {arm: (c[name][1:], [100 * a for a in c["validation_accuracy"][1:]]) for arm, c in curves.items()}
        plot_curves(ax, lines, xlabel=label, ylabel="validation pass@1 (%)" if name == "rollouts" else "")
        ax.set_xscale("log")


def plot_reliability(ax, rows: list[dict], k: int = 16) -> None:
    """How often the majority of k answers is right, by the share of answers that agree with it."""
    ax.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
    lines = {
        f"{row['noise']}, AUROC {row['auroc']:.2f}": tuple(
            [x[key] for x in row["reliability"]] for key in ("agreement", "accuracy")
        )
        for row in rows
        if row["k"] == k and row["auroc"] is not None
    }
    plot_curves(ax, lines, xlabel=f"share of {k} answers that agree", ylabel="share of majorities that are right")
