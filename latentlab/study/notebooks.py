"""The notebooks in order through papermill, then RESULTS.md and the book.

    notebooks/NN_name.ipynb, notebooks/params/<preset>.yaml
    → <reports>/<preset>/NN_name.ipynb, beside the notebook's own NN_name.{json,png}, and book/

A notebook is finished when `.NN_name.done` holds the hash of everything it depends on: its source,
parameters, this package, pinned versions, shipped checkpoint, data folder and the results it names.
With a skipped section it also runs again when the Hub becomes reachable or unreachable. Output of
the kernel process itself goes to `.NN_name.log`.
"""

import ast
import hashlib
import json
import os
import re
import sys
import time
from functools import partialmethod
from pathlib import Path

import nbformat
import yaml
from jupyter_client import AsyncKernelManager

from latentlab.runtime import environment, files
from latentlab.runtime.environment import hub_answers
from latentlab.study import results, tables
from latentlab.study.book.build import build_book

PACKAGE = Path(__file__).parents[1]
NOTEBOOKS = "[0-9][0-9]_*.ipynb"
GPU_NOTEBOOKS = ("03", "04")  # that presets smol and paper can run
STARTUP_SECONDS = 600  # until a kernel that does not answer counts as dead


class StudyError(RuntimeError):
    """The study cannot start, or stopped; its text is one line: got, expected, remedy."""


class StudyUseError(StudyError):
    """The study was asked for something that cannot be run; nothing has run."""

    exit_code = 2


def run_study(preset: str, *, only: str | None = None, notebooks_dir=None, reports_dir=None) -> Path:
    """Run the unfinished notebooks of a preset, in the order of their names; return the book's first page.

    `only` is the beginning of a file name ("02"). The parameters of all notebooks are checked before
    any runs. Folders default to `notebooks` in the repository and the user's own result folder.
    Raises StudyError, and OSError if the result folder cannot be written.
    """
    notebooks_dir = Path(notebooks_dir or environment.repository_root() / "notebooks").resolve()
    reports = Path(reports_dir or results.reports_folder()).resolve()
    notebooks = sorted(notebooks_dir.glob(NOTEBOOKS))
    names = [path.stem for path in notebooks]
    if not notebooks:
        raise StudyUseError(f"no notebooks {NOTEBOOKS} in {notebooks_dir}; run in a clone of the repository")
    parameters = check_parameters(preset, notebooks, notebooks_dir / "params")
    chosen = [path for path in notebooks if path.stem.startswith(only or "")]
    if not chosen:
        raise StudyUseError(f"--only {only}: expected the beginning of one of {', '.join(names)}")
    if preset in ("smol", "paper") and any(path.stem[:2] not in GPU_NOTEBOOKS for path in chosen):
        need = "03 trains on a GPU, 04 reads the run; the others need smoke or tiny"
        raise StudyUseError(f"preset {preset}: {need}: --only 03, or --only 04")
    folder = reports / preset
    files.expect_writable(folder, 64 * 2**20)
    folder.mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(chosen, 1):
        _run_unless_finished(path, parameters[path.stem], folder, f"[{i}/{len(chosen)}] {path.stem}")
    tables.build_report(reports)
    page = build_book(folder / "book", [folder, results.published_folder() / "tiny"], notebooks_dir)
    print("report:", page)
    return page


# ---------------------------------------------------------------- parameters
def check_parameters(preset: str, notebooks: list[Path], folder: Path) -> dict[str, dict]:
    """{notebook: {parameter: value}} from `<folder>/<preset>.yaml`, each where it is declared.

    Raises StudyError for an unknown preset, unreadable YAML, an undeclared key or a wrong type.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if preset not in known:
        raise StudyUseError(f"got preset {preset!r}, expected one of {', '.join(known)}")
    path = f"params/{preset}.yaml"
    given = _read_yaml(folder / f"{preset}.yaml")
    if given.get("preset") != preset:
        raise StudyUseError(f"{path}: expected `preset: {preset}` and notebook switches, as `key: value`")
    declared = {notebook.stem: _declared(notebook) for notebook in notebooks}
    for key, value in given.items():
        defaults = {stem: values[key] for stem, values in declared.items() if key in values}
        if not defaults or (key == "preset" and len(defaults) < len(declared)):
            missing = next(stem for stem in declared if stem not in defaults)
            has = ", ".join(declared[missing])
            raise StudyUseError(f"{path}: no parameter {key!r} in {missing}; it has {has}")
        for stem, default in defaults.items():
            expected, found = type(default), type(value)
            if default is not None and found is not expected and (expected, found) != (float, int):
                trap = "; YAML reads 1e-4 as text: write 1.0e-4" if (expected, found) == (float, str) else ""
                got = f"got {value!r} ({found.__name__}), expected {expected.__name__}"
                raise StudyUseError(f"{path}: {key} of {stem}: {got}{trap}")
    return {stem: {key: given[key] for key in given if key in values} for stem, values in declared.items()}


def _read_yaml(path: Path) -> dict:
    expected = f"params/{path.name}: expected `key: value` lines"
    try:
        text = path.read_text(encoding="utf-8")
        values, nodes = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: not UTF-8, an invalid date
        raise StudyUseError(f"{expected}, no readable YAML: {_one_line(error)}; correct it") from None
    if not nodes or not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise StudyUseError(f"{expected}, got {str(values)[:80]!r}; correct it")
    if len(values) < len(nodes.value):
        raise StudyUseError(f"{expected}, a key is given twice; correct it")
    return values


def _declared(notebook: Path) -> dict:
    """{parameter: default value} of a notebook's parameters cell."""
    from papermill import inspect_notebook

    try:
        found = inspect_notebook(str(notebook))
        return {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}
    except Exception as error:  # papermill and nbformat raise many kinds on a damaged file
        what = "expected a cell tagged `parameters` with one `name = literal` a line"
        raise StudyUseError(f"{notebook.name}: {what}: {_one_line(error)}") from None


def _notebook_hash(notebook: Path, parameters: dict, reports: Path) -> str:
    """Hash of a notebook's source without outputs, its parameters and the files it depends on."""
    cells = [(c.cell_type, c.source) for c in nbformat.read(notebook, as_version=4).cells]
    code = "\n".join(source for kind, source in cells if kind == "code")
    data, root = os.environ.get("LATENTLAB_DATA", ""), environment.repository_root()
    digest = hashlib.sha256(json.dumps([cells, parameters, data]).encode())
    depends = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".toml")]
    depends += [path for path in (root / "data" / "checkpoints").rglob("*") if path.is_file()]
    found = [path for folder in (reports, results.published_folder()) for path in folder.glob("*/*.json")]
    depends += [
        path for path in found if path.stem != notebook.stem and re.search(rf'("|read_){re.escape(path.stem)}', code)
    ]
    for path in sorted([*depends, *root.glob("constraints.txt")]):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


# ---------------------------------------------------------------- running
def _run_unless_finished(path: Path, parameters: dict, folder: Path, label: str) -> None:
    executed, marker, result = (folder / n for n in (path.name, f".{path.stem}.done", f"{path.stem}.json"))
    state, there = _notebook_hash(path, parameters, folder.parent), all(p.is_file() for p in (marker, executed, result))
    if there and marker.read_text() == state + _reach(_skipped(result)):
        print(f"{label}: finished before, nothing it depends on has changed; to run it again delete {marker}")
        return
    marker.unlink(missing_ok=True)
    before, start = _identity(result), time.monotonic()
    print(f"{label}: running", flush=True)
    _execute(path, executed, parameters, folder.parent)
    strip_widgets(executed)
    if _identity(result) == before:
        raise StudyError(f"{path.stem}: ran, but wrote no {result}; its last section must call write_result")
    skipped = _skipped(result)
    files.write_atomically(marker, (state + _reach(skipped)).encode())  # last: marks a whole run
    print(f"{label}: done in {time.monotonic() - start:.0f} s{skipped}", flush=True)


def _skipped(result: Path) -> str:
    """The skipped sections of a result, each with its reason; "" without one."""
    found = results.load_result(result)
    return "".join(f"; skipped: {name} ({why})" for name, why in (tables.skipped_sections(found) if found else []))


def _reach(skipped: str) -> str:
    """What skipped sections may have waited for: can it be reached now?"""
    return f" Hub {hub_answers()}" if skipped else ""


def _identity(path: Path) -> tuple | None:
    """Changes whenever a file is replaced, even by equal content."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def _execute(path: Path, executed: Path, parameters: dict, reports: Path) -> None:
    """Run one notebook in its own folder; StudyError names notebook, cell and error."""
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError

    log = executed.with_name(f".{path.stem}.log")
    options = {"kernel_name": "python3", "cwd": str(path.parent), "start_timeout": STARTUP_SECONDS}
    options["progress_bar"] = sys.stderr.isatty() and os.environ.get("TQDM_DISABLE") != "1"
    try:
        with log.open("wb") as printed:
            options["kernel_manager_class"] = _kernels(reports, printed)
            papermill.execute_notebook(str(path), str(executed), parameters, **options)
    except papermill.PapermillExecutionError as error:
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        what = f"{error.ename}: {_one_line(error.evalue)}"
        raise StudyError(f"{path.stem}, cell [{error.exec_count}] `{first}`: {what}; all of it in {executed}") from None
    except (NoSuchKernel, DeadKernelError) as error:
        kernel = f"{sys.executable} -m ipykernel install --sys-prefix --name python3"
        got = f"got no living kernel python3 ({_one_line(error)}), expected that of this environment"
        raise StudyError(f"{path.stem}: {got}; run `{kernel}`, or see {log}") from error
    except Exception as error:  # a full disk, a notebook that is none
        raise StudyError(f"{path.stem}: {type(error).__name__}: {_one_line(error)}; see {log}") from error


def strip_widgets(path: Path) -> None:
    """Remove live widgets from an executed notebook, so that their static fallback shows.

    A widget view without its kernel shows as an error, and its state has random ids in every run.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    files.write_atomically(path, (nbformat.writes(notebook) + "\n").encode())


def _kernels(reports: Path, log) -> type:
    """A kernel manager class: kernels write results into `reports`, their processes print into `log`.

    When ipykernel shuts down, its main thread closes sockets that other threads may still be using;
    libzmq then sometimes aborts with `Assertion failed` on stderr. All cells have run by then.
    """
    variables = os.environ | {"LATENTLAB_REPORTS": str(reports), "TQDM_DISABLE": "1"}
    variables["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # a warning of the debugger
    variables.pop("MPLBACKEND", None)  # with Agg, notebooks would show no figures
    if data := variables.get("LATENTLAB_DATA"):
        variables["LATENTLAB_DATA"] = str(Path(data).resolve())  # kernels run in the notebooks' folder

    class Kernels(AsyncKernelManager):
        start_kernel = partialmethod(AsyncKernelManager.start_kernel, env=variables, stdout=log, stderr=log)

    return Kernels


def _one_line(text) -> str:
    return " ".join(str(text).split())[:300]
