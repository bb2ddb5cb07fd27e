"""RESULTS.md and the marked blocks of README.md and docs/*.md, generated from result files.

A block is the text between `<!-- name:begin -->` and `<!-- name:end -->`, for the names in BLOCKS;
its template is templates/<name>.md.j2.
"""

import html
import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from latentlab.config import changed_words
from latentlab.pretrained.loading import load_model
from latentlab.runtime import environment
from latentlab.runtime.files import write_atomically
from latentlab.study.figures import draw_arms, estimate, save_figure
from latentlab.study.noise.figures import draw
from latentlab.study.results import leaves, load_result, published_folder, reports_folder
from latentlab.teach.picture import draw_thoughts
from latentlab.teach.thoughts import example

DRAW = {"arms": draw_arms, **dict.fromkeys(("bases", "map", "long", "readings"), draw)}
PRESET_ORDER = ("tiny", "smol-cpu", "smol-cuda", "paper-cuda")
BLOCKS = re.compile(
    r"(<!-- (notebooks|results|cost|bench|intervals|lora|memory|noise):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL
)


def build_report(folder: Path | None = None) -> Path:
    """Write RESULTS.md and sweeps' figures in a result folder, by default the user's own.

    Returns the path of RESULTS.md, which also names JSON files that are not results.
    """
    folder = folder or reports_folder()
    results, unknown = collect(folder)
    for result in results:
        if result["name"] in DRAW and not is_budgeted(result):
            DRAW[result["name"]](result, folder)
    return write_atomically(folder / "RESULTS.md", render("report.md", results=results, unknown=unknown).encode())


def publish() -> Path:
    """Copy the user's own results into `reports/published`, then `refresh_pages`."""
    own, published = reports_folder(), published_folder()
    for preset in {result["preset"] for result in collect(own)[0]}:
        for path in (own / preset).glob("[!.]*"):
            if path.suffix in (".json", ".npz", ".png"):
                write_atomically(published / preset / path.name, path.read_bytes())
    save_figure(draw_thoughts(example(load_model("tiny"))), "thoughts", "tiny", published)
    return refresh_pages(environment.repository_root())


def refresh_pages(root: Path) -> Path:
    """Regenerate the marked blocks of README.md and docs/*.md in the repository `root`.

    Regenerates the published RESULTS.md as well, and returns its path.
    """
    report = build_report(root / "reports" / "published")
    results, _ = collect(report.parent)
    for page in (root / "README.md", *root.glob("docs/*.md")):
        text = fill_blocks(page.read_text(encoding="utf-8"), results, "" if page.parent == root else "../")
        write_atomically(page, text.encode())
    return report


def fill_blocks(text: str, results: list[dict], root: str) -> str:
    """`text` with its marked blocks generated; `root`: relative path to the repository's root."""
    return BLOCKS.sub(lambda block: block[1] + render(f"{block[2]}.md", results=results, root=root) + block[3], text)


def collect(folder: Path) -> tuple[list[dict], list[str]]:
    """The results of a folder by (preset, name), and the relative paths of other JSON files.

    Preset smoke and budgeted runs on synthetic problems show only that everything runs:
    their numbers are not reported.
    """
    results, unknown = [], []
    for path in (*sorted(folder.glob("*.json")), *sorted(folder.glob("*/*.json"))):
        result, preset = load_result(path), "" if path.parent == folder else path.parent.name
        plain = re.fullmatch(r"\w[\w-]*", path.stem + preset, re.ASCII)  # safe in a link
        if result and plain and (result["name"], result["preset"]) == (path.stem, preset):
            rehearsal = is_budgeted(result) and result["metrics"].get("data") == "word_problems"
            results += [] if rehearsal or preset == "smoke" else [result]
        elif preset != "published" and not path.stem.endswith("_samples"):
            unknown.append(path.relative_to(folder).as_posix())
    rank = {preset: i for i, preset in enumerate(PRESET_ORDER)}
    return sorted(results, key=lambda r: (rank.get(r["preset"], len(rank)), r["preset"], r["name"])), unknown


def is_budgeted(result: dict) -> bool:
    """Whether a result is that of a run inside a time budget (`latentlab reproduce`)."""
    return result["name"] == "arms" and dict(leaves(result["metrics"])).get("cost.budget_minutes") is not None


# ---------------------------------------------------------------- what templates use
def render(template: str, **values) -> str:
    """The text of a template. All inserted values are escaped by `cell`, blank lines are merged."""
    text = TEMPLATES.get_template(f"{template}.j2").render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def cell(value) -> Markup:
    """A value as text that is safe in Markdown tables and HTML pages.

    It may quote models and data: HTML, column separators, code, links and references are escaped.
    """
    if isinstance(value, Markup):
        return value
    if isinstance(value, float):
        value = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    text = "" if value is None else " ".join(str(value).split())
    text = html.escape(text, quote=False).replace("|", "&#124;").replace("`", "&#96;")
    return Markup(text.replace("](", "]&#40;").replace("][", "]&#91;").replace("]:", "]&#58;"))


def table(head: list, rows: list[list]) -> Markup:
    """A Markdown table, empty without rows."""
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return Markup("\n".join("| " + " | ".join(map(cell, row)) + " |" for row in lines))


def arms_by_seed(arms: list[dict]) -> Markup:
    """Arms × seeds: pass@1, and the paired difference to the baseline with its 95 % interval."""
    names, seeds = (list(dict.fromkeys(arm.get(key) for arm in arms)) for key in ("name", "seed"))
    found: dict = {name: {seed: [] for seed in seeds} for name in names}
    for arm in arms:
        accuracy, difference = estimate(arm, "accuracy"), estimate(arm, "difference")
        parts = [f"{accuracy[0]:.1f}"] if accuracy else []
        parts += ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*difference)] if difference else []
        found[arm["name"]][arm.get("seed")].append(", ".join(parts))
    rows = [[name, *("; ".join(scores) for scores in row.values())] for name, row in found.items()]
    note = "pass@1 in %; after it the paired difference to the seed's baseline in points [95 % interval]"
    grid = table(["Arm", *(Markup(f"Seed {cell(seed)}") for seed in seeds)], rows)
    return grid + Markup(f"\n\n{note}") if arms else grid


def arms_table(arms: list[dict]) -> Markup:
    """One row per arm, one column per scalar key that any of them has."""
    flat = [dict(leaves(arm)) for arm in arms]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    return table(keys, [[row.get(key) for key in keys] for row in flat])


def verdict_table(rates: dict[str, dict]) -> Markup:
    """How often studies of this size say each verdict, one row per true difference (points)."""
    head = ["Verdicts of such studies, if the true difference (points) is", *next(iter(rates.values()), {})]
    return table(head, [[true, *(f"{share:.1%}" for share in row.values())] for true, row in rates.items()])


def provenance(result: dict) -> dict:
    """When, for how long, from which commit, with which parameters and where a result was made."""
    about = {key: result.get(key) for key in ("started", "seconds", "commit")} | result["parameters"]
    about |= dict(leaves(result["environment"]))
    return {key: value for key, value in about.items() if not isinstance(value, (dict, list))}


def scalar_metrics(result: dict, but=()) -> list[tuple]:
    """(name, value) of the scalar metrics; lists are curves, left to the JSON and the figures."""
    found = leaves({key: value for key, value in result["metrics"].items() if key not in but})
    left_out = re.compile(r"\.\d+(\.|$)|(^|\.)skipped$")
    return [(k, v) for k, v in found if v is not None and not left_out.search(k)]


def skipped_sections(result: dict) -> list[tuple]:
    """(section, reason) of the sections of a result that could not run."""
    return [(k.rpartition(".")[0], v) for k, v in leaves(result["metrics"]) if k.split(".")[-1] == "skipped"]


def command(result: dict) -> str:
    """The command that makes a result."""
    name, preset, parameters = result["name"], result["preset"], result["parameters"]
    if not preset:
        return f"make {name}"
    if "rule" in parameters:  # one of the study of noise
        return "latentlab sweep --plan noise"
    if name == preset:
        return f"python scripts/measure_{ {'perturb': 'copies'}.get(name, name) }.py"
    if preset == "bench":
        words = [f"--{key} {parameters[key]}" for key in ("shape", "device", "threads", "pairs") if key in parameters]
        return " ".join(["latentlab bench", *(["--against FOLDER"] if "against" in parameters else []), *words])
    notebook = re.match(r"(\d\d)_", name)
    verb = f"study --only {notebook[1]}" if notebook else "reproduce" if is_budgeted(result) else "sweep"
    words = [f"latentlab {verb} --preset {preset.removesuffix('-cpu').removesuffix('-cuda')}"]
    if is_budgeted(result):
        words.append(f"--budget-minutes {result['metrics']['cost']['budget_minutes']:g}")
    if preset.endswith("-cpu"):
        words.append(f"--device cpu --threads {result['environment']['threads']}")
    planned = ("curriculum.steps", "curriculum.warmup_steps")  # by the budget
    return " ".join([*words, *(changed_words(parameters, but=planned) if "grpo" in parameters else [])])


LOADER = jinja2.PackageLoader("latentlab.study")
TEMPLATES = jinja2.Environment(loader=LOADER, extensions=["jinja2.ext.do"], autoescape=True, finalize=cell)
TEMPLATES.trim_blocks = TEMPLATES.lstrip_blocks = True
TEMPLATES.globals |= {f.__name__: f for f in (arms_by_seed, arms_table, command, provenance, table)}
TEMPLATES.globals |= {f.__name__: f for f in (scalar_metrics, skipped_sections, verdict_table)}
TEMPLATES.tests["budgeted"] = is_budgeted
