"""Results: one JSON per notebook, figures from dicts, and the tables generated from them.

A result is `<reports>/<preset>/<name>.json`:

    {"schema_version": 1, "name": "01_deterministic_collapse", "preset": "tiny",
     "question": "...", "headline": "...",
     "parameters": {...},
     "metrics": {"none": {...}, "real": {"skipped": "no Hub", "last_measured": {...}}},
     "arms": [{"name": "shared", "seed": 0, "n": 4000, "correct": 3200, "interval": [0.787, 0.812],
               "difference": {"points": 4.1, "low": 3.2, "high": 5.0, "discordant": 310},
               "rollouts": ..., "seconds": ...}],
     "environment": {...}, "commit": "<sha>[-dirty]", "started": "<UTC>", "seconds": 61.2}

`interval` and `accuracy` are fractions, `difference` is in percentage points. Every key of an arm but `name` may be
missing. `<reports>` is LATENTLAB_REPORTS, else `reports` at the repository root.
"""

import html
import json
import math
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path

SCHEMA_VERSION = 1
PRESET_ORDER = ("tiny", "smol", "paper")
LEFT_OUT = ("smoke",)  # says only that everything runs: its numbers are no results
LINES = (("-", "o", "black"), ("--", "s", "0.35"), (":", "^", "black"), ("-.", "D", "0.35"), ("-", "v", "0.6"))


# ---------------------------------------------------------------- where things lie
def repository_root() -> Path:
    """The folder of pyproject.toml and this package; the current folder where the package is installed alone."""
    parent = Path(__file__).resolve().parent.parent
    return parent if (parent / "pyproject.toml").is_file() else Path.cwd()


def reports_folder() -> Path:
    """The folder results are written to: LATENTLAB_REPORTS, else `reports` at the repository root."""
    chosen = os.environ.get("LATENTLAB_REPORTS")
    return Path(chosen) if chosen else repository_root() / "reports"


def write_atomically(path: Path, data: bytes) -> Path:
    """Write `data` beside `path` and rename: a reader or a killed writer never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _path(name: str, preset: str, suffix: str, directory) -> Path:
    for label, text in (("name", name), ("preset", preset)):
        if not re.fullmatch(r"\w[\w-]*", str(text), re.ASCII):
            raise ValueError(f"{label}: got {text!r}, expected letters, digits, _ and -; it becomes a file name")
    return Path(directory or reports_folder()) / preset / f"{name}{suffix}"


# ---------------------------------------------------------------- one result
def environment(weights: dict | None = None) -> dict:
    """Versions, device and threads of this process; `weights` = {"source": ..., "sha256": ...} of loaded weights."""
    import torch  # only here: reading and plotting results needs no torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = None
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers}
    found |= {"device": device, "threads": torch.get_num_threads()}
    return found | ({"weights": weights} if weights else {})


_measured_environment = environment  # write_result has a parameter of the same name


def commit() -> str:
    """Commit of the repository, `-dirty` when anything but the results and the README differs; else "unknown"."""
    root = repository_root()
    if not (root / ".git").exists():
        return "unknown"

    def git(*arguments):
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # The study writes reports/ and README.md itself, so they say nothing about the code that ran.
        changed = git("status", "--porcelain", "--", ".", ":(exclude)reports", ":(exclude)README.md")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_result(
    name: str, *, preset: str, parameters: dict, metrics: dict, arms=(), started: float | str, seconds: float,
    question: str = "", headline: str = "", environment: dict | None = None, directory=None,
) -> Path:  # fmt: skip
    """Write `<reports>/<preset>/<name>.json` atomically and return its path.

    `metrics` may hold numbers, arrays and tensors. A section that could not run is `{"skipped": reason}`: the last
    measured one is then kept from the earlier file under "last_measured", with its date and commit.
    `started` is `time.time()` or ISO text, `seconds` the duration; `headline` one sentence with the result's numbers,
    `question` what the notebook asks: both appear in the README. Raises ValueError on NaN, inf and bad names.
    """
    path = _path(name, preset, ".json", directory)
    if not isinstance(started, str):
        started = datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds")
    result = {
        "schema_version": SCHEMA_VERSION, "name": name, "preset": preset, "question": question, "headline": headline,
        "parameters": parameters, "metrics": metrics, "arms": list(arms),
        "environment": environment or _measured_environment(), "commit": commit(), "started": started,
        "seconds": seconds,
    }  # fmt: skip
    result = json.loads(json.dumps(result, default=lambda value: value.tolist()))  # arrays and tensors become lists
    for where, value in _leaves(result):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'{name}: {where} is {value}, expected a finite number or a section {{"skipped": reason}}')
    try:
        earlier = read_result(name, preset, directory)
    except (FileNotFoundError, ValueError):
        earlier = {}
    stamp = {key: earlier.get(key) for key in ("started", "commit")}
    result["metrics"] = _keep_measured(result["metrics"], earlier.get("metrics"), stamp)
    return write_atomically(path, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())


def _keep_measured(new, old, stamp: dict):
    """`new` with the last measured version of each skipped section, taken from `old`."""
    if not isinstance(new, dict):
        return new
    old = old if isinstance(old, dict) else {}
    if "skipped" not in new:
        return {key: _keep_measured(value, old.get(key), stamp) for key, value in new.items()}
    last = old.get("last_measured") if "skipped" in old else {**stamp, "section": old} if old else None
    return {**new, "last_measured": last} if last else new


def read_result(name: str, preset: str, directory=None) -> dict:
    """A result by name, from `directory`, else from the result folder, else from the committed `reports`.

    Raises FileNotFoundError when there is none and ValueError when the file is no result, each in one line.
    """
    folders = [directory] if directory else [reports_folder(), repository_root() / "reports"]
    for folder in folders:
        path = _path(name, preset, ".json", folder)
        if path.is_file():
            result = _load(path)
            if result is None:
                raise ValueError(f"{path}: expected a result of schema {SCHEMA_VERSION}; delete it and run it again")
            return result
    raise FileNotFoundError(f"no result {preset}/{name}.json; run `latentlab study --preset {preset}` first")


def _load(path: Path) -> dict | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    shape = {"name": str, "preset": str, "parameters": dict, "metrics": dict, "arms": list, "environment": dict}
    good = isinstance(result, dict) and result.get("schema_version") == SCHEMA_VERSION
    return result if good and all(isinstance(result.get(key), kind) for key, kind in shape.items()) else None


def _leaves(value, where: str = ""):
    """Yield (dotted path, value) of every scalar in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


# ---------------------------------------------------------------- figures
def save_figure(figure, name: str, preset: str, directory=None) -> Path:
    """Save a matplotlib figure as `<reports>/<preset>/<name>.png`; equal figures give equal bytes."""
    from io import BytesIO

    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return write_atomically(_path(name, preset, ".png", directory), picture.getvalue())


def plot_arms(ax, arms: list[dict]) -> None:
    """Horizontal 95 % intervals, one line per arm, one marker per seed; differences where there are any."""
    value = "difference" if any(arm.get("difference") for arm in arms) else "accuracy"
    drawn = [(arm, _estimate(arm, value)) for arm in arms if _estimate(arm, value)]
    names = list(dict.fromkeys(arm["name"] for arm, _ in drawn))
    seeds = list(dict.fromkeys(arm.get("seed") for arm, _ in drawn))
    style = dict(zip(seeds, cycle(LINES), strict=False))
    for arm, (middle, low, high) in drawn:
        y = names.index(arm["name"]) + 0.5 * ((seeds.index(arm.get("seed")) + 0.5) / len(seeds) - 0.5)
        _, marker, grey = style[arm.get("seed")]
        ax.plot([low, high], [y, y], color=grey)
        ax.plot(middle, y, marker, color=grey, label=f"seed {arm.get('seed')}")
    if value == "difference":
        ax.axvline(0, color="0.6", linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    what = "paired difference to the baseline (points)" if value == "difference" else "pass@1 (%)"
    ax.set_xlabel(f"{what}, 95 % interval")
    labels = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    if len(seeds) > 1:
        ax.legend(labels.values(), labels.keys(), frameon=False)


def plot_curves(ax, curves: dict, *, xlabel: str, ylabel: str) -> None:
    """Lines from {label: (x, y)}, told apart by dash and marker, so that they survive greyscale."""
    for (label, (x, y)), (line, marker, grey) in zip(curves.items(), cycle(LINES), strict=False):
        ax.plot(x, y, line, marker=marker, markevery=max(1, len(x) // 8), color=grey, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)


def _estimate(arm: dict, value: str) -> tuple[float, float, float] | None:
    """(middle, low, high) in percentage points, or None where the arm does not have them; no interval: low = high."""
    if value == "difference":
        difference = arm.get("difference") or {}
        middle, low, high = (difference.get(key) for key in ("points", "low", "high"))
    else:
        middle = arm.get("accuracy", arm["correct"] / arm["n"] if arm.get("n") and "correct" in arm else None)
        bounds = arm.get("interval") or [None, None]
        low, high = bounds.values() if isinstance(bounds, dict) else bounds
        middle, low, high = (None if x is None else 100 * x for x in (middle, low, high))
    return None if middle is None else (middle, middle if low is None else low, middle if high is None else high)


# ---------------------------------------------------------------- generated text
def build_report(directory=None) -> Path:
    """Write RESULTS.md from every `*/*.json` of the result folder, and the marked blocks of the README beside it.

    Files that are no results are listed. Returns the path of RESULTS.md. The README changes only where it lies beside
    the result folder, so a temporary folder never touches the committed one.
    """
    folder = Path(directory or reports_folder())
    results, unknown = _collect(folder)
    for result in results:
        if result["name"] == "compare":
            _draw_compare(result, folder)
    readme = folder.parent / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        text = _replace_block(text, "notebooks", _notebook_table(results))
        text = _replace_block(text, "results", _readme_results(results, folder.name))
        write_atomically(readme, text.encode())
    parts = ["# Results", "Generated by `latentlab report` from the JSON files beside it: do not edit."]
    parts += [_section(result) for result in results]
    if unknown:
        parts += ["## Other files", "\n".join(f"- {_cell(path)}: not a result of this schema" for path in unknown)]
    return write_atomically(folder / "RESULTS.md", ("\n\n".join(part for part in parts if part) + "\n").encode())


def _collect(folder: Path) -> tuple[list[dict], list[str]]:
    """Results in the order (preset, name), and the relative paths of the JSON files that are none."""
    results, unknown = [], [path.name for path in sorted(folder.glob("*.json"))]
    for path in sorted(folder.glob("*/*.json")):
        result = _load(path)
        if result and (result["name"], result["preset"]) == (path.stem, path.parent.name):
            results.append(result)
        else:
            unknown.append(f"{path.parent.name}/{path.name}")
    results = [result for result in results if result["preset"] not in LEFT_OUT]
    rank = {preset: i for i, preset in enumerate(PRESET_ORDER)}
    return sorted(results, key=lambda r: (rank.get(r["preset"], len(rank)), r["preset"], r["name"])), unknown


def _draw_compare(result: dict, folder: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: drawing here changes no global state

    figure = Figure(figsize=(7, 4))
    plot_arms(figure.subplots(), result["arms"])
    save_figure(figure, result["name"], result["preset"], folder)


def _notebook_table(results: list[dict]) -> str:
    rows = []
    for result in sorted(results, key=lambda r: r["name"]):  # stable: presets stay in their order
        if re.match(r"\d\d_", result["name"]):
            link = f"[{result['name']}](notebooks/{result['name']}.ipynb)"
            row = [result.get("question"), result["preset"], result.get("seconds"), result["environment"].get("device")]
            rows.append([link, *map(_cell, row), _cell(result.get("headline"))])
    head = ["Notebook", "Question", "Preset", "Seconds", "Device", "Last result"]
    return _table(head, rows) if rows else "No results yet: run `make study`."


def _readme_results(results: list[dict], folder: str) -> str:
    parts = []
    for result in results:
        if result["name"] == "compare":
            picture = f"![Arms of preset {result['preset']}]({folder}/{result['preset']}/compare.png)"
            parts += [_cell(result.get("headline")), _arms_by_seed(result["arms"]), picture]
    parts.append(f"Every number with its command, commit, device and date: [RESULTS.md]({folder}/RESULTS.md).")
    return "\n\n".join(part for part in parts if part)


def _section(result: dict) -> str:
    """One result in RESULTS.md: headline, how it was made, arms, scalar metrics, skipped sections."""
    about = {key: result.get(key) for key in ("started", "seconds", "commit")} | result["parameters"]
    about |= dict(_leaves(result["environment"]))
    made = [f"{_cell(k)} {_cell(v)}" for k, v in about.items() if not isinstance(v, (dict, list))]
    link = f"[all of it]({result['preset']}/{result['name']}.json)"
    skipped, metrics = [], []
    for path, value in _leaves(result["metrics"]):
        if path.split(".")[-1] == "skipped":
            skipped.append([_cell(path.rpartition(".")[0]), _cell(value)])
        elif not re.search(r"\.\d+(\.|$)", path):  # lists are curves: in the JSON and in the figures
            metrics.append([_cell(path), _cell(value)])
    parts = [
        f"## {_cell(result['preset'])} · {_cell(result['name'])}",
        _cell(result.get("headline")),
        " · ".join([f"`{_command(result)}`", *made, link]),
        _arms_by_seed(result["arms"]) if result["name"] == "compare" else "",
        _arms_table(result["arms"]),
        _table(["Metric", "Value"], metrics) if metrics else "",
        _table(["Skipped", "Why"], skipped) if skipped else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _command(result: dict) -> str:
    """The command that makes this result."""
    name, preset = result["name"], result["preset"]
    notebook = re.match(r"(\d\d)_", name)
    verb = f"study --only {notebook[1]}" if notebook else f"sweep {name}"
    return f"latentlab {verb} --preset {preset}"


def _arms_by_seed(arms: list[dict]) -> str:
    """Arms × seeds: pass@1, and the paired difference to the baseline with its 95 % interval."""
    names, seeds = (list(dict.fromkeys(arm.get(key) for arm in arms)) for key in ("name", "seed"))
    rows = [
        [_cell(name)]
        + ["; ".join(_score(a) for a in arms if (a.get("name"), a.get("seed")) == (name, seed)) for seed in seeds]
        for name in names
    ]
    note = "pass@1 in %; after it the paired difference to the seed's baseline in points [95 % interval]"
    return _table(["Arm", *(f"Seed {_cell(seed)}" for seed in seeds)], rows) + f"\n\n{note}" if arms else ""


def _score(arm: dict) -> str:
    accuracy, difference = _estimate(arm, "accuracy"), _estimate(arm, "difference")
    parts = [f"{accuracy[0]:.1f}"] if accuracy else []
    if difference:
        parts.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*difference))
    return ", ".join(parts)


def _arms_table(arms: list[dict]) -> str:
    """One row per arm, one column per scalar key that any of them has."""
    flat = [dict(_leaves(arm)) for arm in arms]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    return _table([_cell(k) for k in keys], [[_cell(row.get(k)) for k in keys] for row in flat]) if arms else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _cell(value) -> str:
    """A value as one escaped Markdown table cell."""
    if isinstance(value, float):
        value = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    text = "" if value is None else " ".join(str(value).split())
    return html.escape(text, quote=False).replace("|", "\\|")


def _replace_block(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- name:begin -->` and `<!-- name:end -->` replaced, if it has them."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)
