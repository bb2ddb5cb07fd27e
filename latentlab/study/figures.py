"""Figures of results: legible in greyscale, equal bytes for equal results."""

from io import BytesIO
from itertools import cycle
from pathlib import Path

from latentlab.runtime.files import write_atomically
from latentlab.study.results import result_path
from latentlab.training.run import read_metrics

LINES = (("-", "o", "black"), ("--", "s", "0.35"), (":", "^", "black"), ("-.", "D", "0.35"), ("-", "v", "0.6"))
BENCH_AXES = {"num_generations": "rollouts K", "question": "question tokens", "answer": "answer tokens"}


def save_figure(figure, name: str, preset: str, directory=None) -> Path:
    """Save a figure as `<reports>/<preset>/<name>.png`; equal figures give equal bytes."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return write_atomically(result_path(name, preset, ".png", directory), picture.getvalue())


def draw_arms(result: dict, folder: Path) -> Path:
    """Draw the trained arms of a result, next to its file in the result folder `folder`."""
    from matplotlib.figure import Figure  # no pyplot: drawing changes no global state

    figure = Figure(figsize=(7, 4))
    plot_arms(figure.subplots(), [arm for arm in result["arms"] if arm.get("rollouts", 1)])  # controls have none
    return save_figure(figure, result["name"], result["preset"], folder)


def draw_bench(result: dict, folder: Path) -> Path:
    """Draw a bench result, one panel per axis: measured seconds and the fitted line."""
    from matplotlib.figure import Figure

    scaling = result["metrics"]["scaling"]
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for axes, (axis, found) in zip(figure.subplots(1, len(scaling), squeeze=False)[0], scaling.items(), strict=True):
        values = found["values"]
        axes.plot(values, found["seconds"], "o", color="black")
        axes.plot(values, [found["intercept"] + found["slope"] * v for v in values], "-", color="0.5")
        axes.set_xlabel(BENCH_AXES.get(axis, axis))
        axes.set_title(f"{1000 * found['slope']:.3g} ms each, R² {found['r2']:.3f}", fontsize=9)
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("seconds, one problem")
    return save_figure(figure, result["name"], result["preset"], folder)


RUN_PANELS = {  # what `draw_run` shows of metrics.jsonl: name -> label
    "validation_accuracy": "validation accuracy",
    "reward": "mean reward of the rollouts",
    "frac_reward_zero_std": "share of groups without a signal",
    "entropy": "entropy of the answers, nats a token",
    "loss/answer": "cross-entropy of right answers, nats a token",
}


def draw_run(run: Path) -> Path:
    """Draw the metrics of a training run against its steps: `plot.png` in its folder.

    Noisy metrics are averaged over windows of a fiftieth of the run. Raises FileNotFoundError, one
    line, where there are no metrics.
    """
    from matplotlib.figure import Figure

    if not (run / "metrics.jsonl").is_file():
        raise FileNotFoundError(
            f"plot: got no {run / 'metrics.jsonl'}, expected the folder of a training run; correct it"
        )
    lines = read_metrics(run)
    shown = {name: [line for line in lines if name in line] for name in RUN_PANELS}
    shown = {name: rows for name, rows in shown.items() if rows}
    if not shown:
        raise ValueError(f"plot: got no metric in {run / 'metrics.jsonl'}, expected a step at least; let the run go on")
    figure = Figure(figsize=(3.4 * len(shown), 3), layout="constrained")
    for ax, (name, rows) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        size = 1 if name == "validation_accuracy" else max(1, len(rows) // 50)
        parts = [rows[at : at + size] for at in range(0, len(rows), size)]
        values = [sum(row[name] for row in part) / len(part) for part in parts]
        ax.plot([part[-1]["step"] for part in parts], values, "-o", color="black", markersize=3)
        ax.set(xlabel="step", title=RUN_PANELS[name])
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
    return write_atomically(run / "plot.png", picture.getvalue())


def plot_arms(ax, arms: list[dict]) -> None:
    """Horizontal 95 % intervals, one line per arm, one marker per seed.

    Draws differences to the baseline where any arm has one, else accuracies.
    """
    value = "difference" if any(arm.get("difference") for arm in arms) else "accuracy"
    drawn = [(arm["name"], arm.get("seed"), found) for arm in arms if (found := estimate(arm, value))]
    names, seeds = (list(dict.fromkeys(row[i] for row in drawn)) for i in (0, 1))
    for name, seed, (middle, low, high) in drawn:
        i = seeds.index(seed)
        y, (_, marker, grey) = names.index(name) + 0.5 * ((i + 0.5) / len(seeds) - 0.5), LINES[i % len(LINES)]
        ax.plot([low, high], [y, y], color=grey)
        ax.plot(middle, y, marker, color=grey, label=f"seed {seed}")
    what = "pass@1 (%)"
    if value == "difference":
        what = "paired difference to the baseline (points)"
        ax.axvline(0, color="0.6", linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel(f"{what}, 95 % interval")
    labels = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    if len(seeds) > 1:
        ax.legend(labels.values(), labels.keys(), frameon=False)


def plot_curves(ax, curves: dict, *, xlabel: str, ylabel: str) -> None:
    """Lines from {label: (x, y)}, distinguished by dash and marker."""
    for (label, (x, y)), (line, marker, grey) in zip(curves.items(), cycle(LINES), strict=False):
        ax.plot(x, y, line, marker=marker, markevery=max(1, len(x) // 8), color=grey, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)


def estimate(arm: dict, value: str) -> tuple[float, float, float] | None:
    """(middle, low, high) of an arm's "accuracy" or "difference", in percentage points.

    None where the arm has no such value; without an interval, low and high equal the middle.
    """
    if value == "difference":
        middle, low, high = ((arm.get("difference") or {}).get(key) for key in ("points", "low", "high"))
    else:
        share = arm.get("accuracy", arm["correct"] / arm["n"] if arm.get("n") and "correct" in arm else None)
        fractions = (share, *(arm.get("interval") or (None, None)))
        middle, low, high = (None if x is None else 100 * x for x in fractions)
    return None if middle is None else (middle, middle if low is None else low, middle if high is None else high)
