"""The pipeline: notebooks 00, 01, … in order through papermill, one HTML each, an index, the report.

    notebooks/NN_name.ipynb + params/<preset>.yaml  →  <reports>/<preset>/NN_name.{ipynb,html} beside the notebook's own
    NN_name.json and .png, then index.html and RESULTS.md

A notebook is finished when `.NN_name.done` beside its executed copy holds the hash of everything it depends on:
its source, its parameters, the modules of this library that it imports, directly or through others, the presets that it
names, the versions, the shipped data, and the results of others that it reads. One with a skipped section runs again
once the Hub or the package index can be reached, or no longer can.
"""

import ast
import hashlib
import html
import json
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import nbformat
import yaml

from latentlab.runtime import environment, files
from latentlab.runtime.hub import hub_answers
from latentlab.study import results, tables

PACKAGE = Path(__file__).parents[1]

NOTEBOOKS = "[0-9][0-9]_*.ipynb"
SAFE_OUTPUTS = {"text/plain", "image/png"}
# Log level 50: "running over TCP without encryption" and an interrupt at the end are not for users; errors show.
KERNEL_ARGUMENTS = ["--IPKernelApp.log_level=50"]


class StudyError(RuntimeError):
    """The study cannot start or stopped; its text is one line: what, expected, remedy."""


def run_study(preset: str, *, only: str | None = None, notebooks_dir=None, reports_dir=None) -> Path:
    """Run the notebooks of a preset that are not finished, in the order of their file names; return index.html.

    `only` is the beginning of a file name ("02"). Parameters of all notebooks are checked before any runs.
    Folders default to `notebooks` at the repository root and the result folder. Raises StudyError.
    """
    notebooks_dir = Path(notebooks_dir or environment.repository_root() / "notebooks").resolve()
    reports = Path(reports_dir or results.reports_folder()).resolve()
    notebooks = sorted(notebooks_dir.glob(NOTEBOOKS))
    if not notebooks:
        raise StudyError(f"no notebooks {NOTEBOOKS} in {notebooks_dir}; run in a clone of the repository")
    parameters = check_parameters(preset, notebooks, notebooks_dir / "params")
    chosen = [path for path in notebooks if path.stem.startswith(only or "")]
    if not chosen:
        raise StudyError(f"--only {only}: expected the beginning of one of {', '.join(p.stem for p in notebooks)}")
    if preset in ("smol", "paper") and any(path.stem[:2] < "04" for path in chosen):
        raise StudyError(f"preset {preset}: notebooks 00-03 need smoke or tiny; 04 reads a finished run: --only 04")
    folder = reports / preset
    files.expect_writable(folder, 64 * 2**20)
    folder.mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(chosen, 1):
        _run_unless_finished(path, parameters[path.stem], folder, f"[{i}/{len(chosen)}] {path.stem}")
    index = _write_index(preset, notebooks, folder)
    tables.build_report(reports)
    if preset not in tables.LEFT_OUT and (reports.parent / "README.md").is_file():
        print(f"updated: README.md and {reports.name}/; `git checkout README.md {reports.name}` restores them")
    print(f"report: {index}")
    return index


# ---------------------------------------------------------------- parameters
def check_parameters(preset: str, notebooks: list[Path], folder: Path) -> dict[str, dict]:
    """{notebook: the parameters it declares} from `<folder>/<preset>.yaml`, with every key and type checked.

    Raises StudyError on an unknown preset, unreadable YAML, a key that no notebook declares, or a wrong type.
    """
    path = folder / f"{preset}.yaml"
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if preset not in known:
        raise StudyError(f"got preset {preset!r}, expected one of {', '.join(known)}")
    try:
        given = _read_yaml(path)
    except ValueError as error:
        raise StudyError(f"params/{error}") from None
    if given.get("preset") != preset:
        raise StudyError(f"params/{path.name}: expected `preset: {preset}` and notebook switches, as `key: value`")
    declared = {notebook.stem: _declared(notebook) for notebook in notebooks}
    for key, value in given.items():
        defaults = {stem: values[key] for stem, values in declared.items() if key in values}
        if not defaults or (key == "preset" and len(defaults) < len(notebooks)):
            missing = next(stem for stem in declared if stem not in defaults)
            has = ", ".join(declared[missing])
            raise StudyError(f"params/{path.name}: no parameter {key!r} in {missing}; it has {has}")
        for stem, default in defaults.items():
            _check_type(f"params/{path.name}: {key} of {stem}", value, default)
    return {stem: {key: value for key, value in given.items() if key in values} for stem, values in declared.items()}


class _OnceLoader(yaml.SafeLoader):
    """A key given twice is refused: plain YAML keeps the last one and says nothing."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands there twice", node.start_mark)
        return mapping


def _read_yaml(path: Path) -> dict:
    """The keys and values of a YAML file. Raises ValueError with one line for anything else."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)  # a SafeLoader: data only, no objects
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:  # ValueError: a date that is none
        raise ValueError(f"{path.name}: no readable YAML: {' '.join(str(error).split())[:300]}; correct it") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path.name}: got {str(values)[:80]!r}, expected `key: value` lines; correct or restore it")
    return values


def _declared(notebook: Path) -> dict:
    """{parameter: default value} of a notebook's parameters cell."""
    from papermill import inspect_notebook

    try:
        found = inspect_notebook(str(notebook))
        return {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}
    except Exception as error:  # papermill and nbformat raise many kinds on a damaged file
        raise StudyError(
            f"{notebook.name}: expected a cell tagged `parameters` with one `name = literal` a line: {_one_line(error)}"
        ) from None


def _check_type(where: str, value, default) -> None:
    expected = type(default)
    if default is None or type(value) is expected or (expected is float and type(value) is int):
        return
    trap = "; YAML reads 1e-4 as text: write 1.0e-4" if expected is float and isinstance(value, str) else ""
    raise StudyError(f"{where}: got {value!r} ({type(value).__name__}), expected {expected.__name__}{trap}")


# ---------------------------------------------------------------- what a notebook depends on
def _notebook_hash(notebook: Path, parameters: dict, folder: Path) -> str:
    """Hash of a notebook's source (not its outputs), parameters, the files it depends on, and the results it names."""
    cells = [(c.cell_type, c.source) for c in nbformat.read(notebook, as_version=4).cells]
    code = [source for kind, source in cells if kind == "code"]
    named = "\n".join([*code, *map(str, parameters.values())])
    read = [p for p in sorted(folder.glob("*.json")) if p.stem != notebook.stem and p.stem in named]
    results = [(p.stem, p.read_text(encoding="utf-8")) for p in read]
    data = os.environ.get("LATENTLAB_DATA", "")  # a section skipped for want of data runs again
    files = sorted((p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in _files(code, named))
    return hashlib.sha256(json.dumps([cells, parameters, data, files, results]).encode()).hexdigest()


def _files(code: list[str], named: str) -> list[Path]:
    """The files that these cells depend on: modules, presets that `named` names, constraints, shipped checkpoints."""
    root = environment.repository_root()
    files = [PACKAGE / f"{name}.py" for name in _modules(code)]
    files += [p for p in (PACKAGE / "presets").glob("*.yaml") if re.search(rf"\b{re.escape(p.stem)}\b", named)]
    files += [p for kind in ("*.safetensors", "*.json") for p in (root / "data" / "checkpoints").rglob(kind)]
    return [path for path in (*files, root / "constraints.txt") if path.is_file()]


def _modules(code: list[str]) -> set[str]:
    """Modules of this package that the cells import, and those that these import; all where a cell is no Python."""
    everything = {path.stem for path in PACKAGE.glob("*.py")}
    try:
        waiting = set().union(*map(_imported, code))
        found = set()
        while waiting:
            found |= waiting
            texts = [(PACKAGE / f"{name}.py").read_text(encoding="utf-8") for name in waiting & everything]
            waiting = (set().union(*map(_imported, texts)) & everything) - found
        return found
    except SyntaxError:  # a magic
        return everything


def _imported(code: str) -> set[str]:
    """Names imported from this package anywhere in some code."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("latentlab.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "latentlab":
            names |= {f"latentlab.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latentlab."):
            names.add(node.module)
    return {name.split(".")[1] for name in names}


def _reach(result: Path) -> str:
    """What a skipped section of a result may have waited for: can it be reached now? "" without such a section."""
    return f" Hub {hub_answers()}" if _skipped(result) else ""


def _skipped(result: Path) -> list[str]:
    """The skipped sections of a result, each with its reason."""
    leaves = results.leaves((results.load_result(result) or {}).get("metrics", {}))
    return [f"{path.rpartition('.')[0]} ({why})" for path, why in leaves if path.split(".")[-1] == "skipped"]


# ---------------------------------------------------------------- running
def _run_unless_finished(path: Path, parameters: dict, folder: Path, label: str) -> None:
    executed, marker, result = (folder / n for n in (path.name, f".{path.stem}.done", f"{path.stem}.json"))
    state, there = _notebook_hash(path, parameters, folder), all(p.is_file() for p in (marker, executed, result))
    if there and marker.read_bytes() == (state + _reach(result)).encode():
        print(f"{label}: finished before, nothing it depends on has changed; to run it again delete {marker}")
        return
    marker.unlink(missing_ok=True)
    before = _identity(result)
    print(f"{label}: running", flush=True)
    start = time.monotonic()
    _execute(path, executed, parameters, folder.parent)
    if _identity(result) == before:
        raise StudyError(f"{path.stem}: ran, but wrote no {result}; its last section must call write_result")
    _write_html(executed)
    files.write_atomically(
        marker, (state + _reach(result)).encode()
    )  # last: whatever is killed before this line runs again
    skipped = "; skipped: ".join(["", *_skipped(result)])
    print(f"{label}: done in {time.monotonic() - start:.0f} s{skipped}", flush=True)


def _identity(path: Path) -> tuple | None:
    """Changes whenever a file is replaced, even by equal content."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def _execute(path: Path, executed: Path, parameters: dict, reports: Path) -> None:
    """Run one notebook in its own folder; StudyError names notebook, cell and error."""
    import papermill

    bar = sys.stderr.isatty() and os.environ.get("TQDM_DISABLE") != "1"
    try:
        with _kernel_environment(reports):
            papermill.execute_notebook(
                str(path), str(executed), parameters, kernel_name="python3", cwd=str(path.parent),
                progress_bar=bar, extra_arguments=KERNEL_ARGUMENTS,
            )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        what = f"{error.ename}: {_one_line(error.evalue)}"
        raise StudyError(f"{path.stem}, cell [{error.exec_count}] `{first}`: {what}; all of it in {executed}") from None
    except Exception as error:  # a dead kernel, no kernel, a full disk: one line like every other failure
        raise StudyError(f"{path.stem}: {type(error).__name__}: {_one_line(error)}") from error


@contextmanager
def _kernel_environment(reports: Path):
    """What kernels inherit while this is open: the result folder, data, no bars, no debugger notes, no MPLBACKEND."""
    before = dict(os.environ)
    os.environ |= {"LATENTLAB_REPORTS": str(reports), "TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    if data := before.get("LATENTLAB_DATA"):
        os.environ["LATENTLAB_DATA"] = str(Path(data).resolve())  # kernels run in the notebooks' folder
    os.environ.pop("MPLBACKEND", None)  # with Agg the figures vanish and the run still succeeds
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _one_line(text) -> str:
    return " ".join(str(text).split())[:300]


# ---------------------------------------------------------------- pages
def _write_html(executed: Path) -> None:
    """The executed copy as one page. Outputs may quote models and data sets: only text and pictures pass."""
    from nbconvert import HTMLExporter

    notebook = nbformat.read(executed, as_version=4)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output):
        output.data = {kind: value for kind, value in output.data.items() if kind in SAFE_OUTPUTS}
    exporter = HTMLExporter()
    exporter.log.setLevel("ERROR")  # it asks for alternative texts
    page, _ = exporter.from_notebook_node(notebook)
    files.write_atomically(executed.with_suffix(".html"), page.encode())


def _write_index(preset: str, notebooks: list[Path], folder: Path) -> Path:
    """A page that links what exists, with seconds and headline of each result."""
    rows = []
    for path in notebooks:
        try:
            result = results.read_result(path.stem, preset, folder.parent)
        except (FileNotFoundError, ValueError):
            result = {}
        name = html.escape(path.stem)
        link = f'<a href="{quote(path.stem)}.html">{name}</a>' if (folder / f"{path.stem}.html").is_file() else name
        texts = [result.get(key, "") for key in ("question", "seconds", "headline")]
        texts[1] = f"{float(texts[1] or 0):.0f}" if result else "not run"
        rows.append(f"<tr><td>{link}</td>" + "".join(f"<td>{html.escape(str(text))}</td>" for text in texts) + "</tr>")
    title = f"latentlab, preset {html.escape(preset)}"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><h1>{title}</h1><table>'
        f"<tr><th>Notebook</th><th>Question</th><th>Seconds</th><th>Result</th></tr>{''.join(rows)}</table></html>\n"
    )
    return files.write_atomically(folder / "index.html", page.encode())
