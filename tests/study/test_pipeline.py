"""The pipeline on two toy notebooks: order, resume, reruns, failures in one line, checks before anything runs."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from latentlab.study import notebooks as study
from latentlab.study.book.build import build_book
from latentlab.study.notebooks import StudyError, check_parameters, run_study

FIRST, SECOND = "00_first", "01_second"
WRITE = """from pathlib import Path
from latentlab.study.results import write_result
with open("log.txt", "a") as log:
    log.write("{name}\\n")
write_result("{name}", preset=preset, parameters={{"rate": rate}}, metrics={{"rate": rate}}, headline="<b>rate {name}",
             started=0.0, seconds=1.0, environment={{"device": "cpu"}})"""


def make(folder, name, *code, parameters='preset = "toy"  # which numbers\nrate = 0.1  # share of zeros'):
    cells = [new_markdown_cell("# Toy"), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source) for source in (*code, WRITE.format(name=name))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")


def give(folder, **parameters):
    (folder / "params").mkdir(exist_ok=True)
    (folder / "params" / "toy.yaml").write_text(yaml.safe_dump({"preset": "toy", **parameters}))


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    make(folder, FIRST)
    make(folder, SECOND)
    give(folder)
    return folder


@pytest.fixture(autouse=True)
def no_book(monkeypatch):
    monkeypatch.setattr(study, "build_book", lambda out, *_: out / "index.html")  # it takes seconds


def run(notebooks, **options):
    """Run the study; return the names of the notebooks that really ran, in order."""
    log = notebooks / "log.txt"
    log.unlink(missing_ok=True)
    run_study("toy", notebooks_dir=notebooks, reports_dir=notebooks.parent / "reports", **options)
    return log.read_text().split() if log.exists() else []


@pytest.mark.slow
def test_runs_in_order_writes_the_book_and_skips_what_is_finished(notebooks, capfd, monkeypatch):
    stub = study.build_book
    monkeypatch.setattr(study, "build_book", build_book)
    evil = "<script>alert(1)</script>"
    make(notebooks, FIRST, f"print('{evil}')")
    assert run(notebooks) == [FIRST, SECOND]
    folder = notebooks.parent / "reports" / "toy"
    for name in (FIRST, SECOND):
        assert all((folder / f"{name}{suffix}").is_file() for suffix in (".ipynb", ".json"))
    page = (folder / "book" / "notebooks" / f"{FIRST}.html").read_text()
    assert "<h1>Toy" in page and "&lt;script&gt;" in page and evil not in page
    index = (folder / "book" / "index.html").read_text()
    assert "&lt;b&gt;rate" in index and "<b>rate" not in index
    assert (folder.parent / "RESULTS.md").is_file()
    out, err = capfd.readouterr()
    assert out.rstrip().endswith("book/index.html")
    assert err == ""  # no kernel, debugger or converter noise reaches a user

    monkeypatch.setattr(study, "build_book", stub)
    assert run(notebooks) == []
    assert capfd.readouterr().out.count("finished before") == 2

    (folder / f"{FIRST}.json").unlink()  # a lost result is made again
    assert run(notebooks) == [FIRST]
    assert run(notebooks, only="01") == []


@pytest.mark.slow
def test_what_a_kernel_prints_as_it_ends_is_in_a_log_and_nowhere_else(notebooks, capfd):
    """libzmq at times prints a line on the process's own stderr and aborts as ipykernel ends."""
    ends = "import atexit, os\natexit.register(lambda: (os.write(2, b'Assertion failed: toy\\n'), os.abort()))"
    make(notebooks, FIRST, ends)
    assert run(notebooks, only="00") == [FIRST]
    assert capfd.readouterr().err == ""
    assert "Assertion failed: toy\n" in (notebooks.parent / "reports" / "toy" / f".{FIRST}.log").read_text()

    make(notebooks, FIRST, "import os\nos.write(2, b'gone\\n')\nos._exit(1)")
    with pytest.raises(
        StudyError,
        match=rf"^00_first: got no living kernel .*; run `.* -m ipykernel install .*, or see .*\.{FIRST}\.log$",
    ):
        run(notebooks, only="00")
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_only_and_exactly_what_changed_runs_again(notebooks, monkeypatch):
    assert run(notebooks, only="01") == [SECOND]
    give(notebooks, rate=0.25)
    assert run(notebooks) == [FIRST, SECOND]
    result = json.loads((notebooks.parent / "reports" / "toy" / f"{SECOND}.json").read_text())
    assert result["metrics"]["rate"] == 0.25

    make(notebooks, SECOND, "changed = True")
    assert run(notebooks) == [SECOND]


@pytest.fixture
def quick(monkeypatch):
    """Cells run in this process: for what does not depend on kernels."""

    def execute(path, executed, parameters, reports):
        monkeypatch.setenv("LATENTLAB_REPORTS", str(reports))
        monkeypatch.chdir(path.parent)
        notebook, names = nbformat.read(path, as_version=4), {}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
                names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
        nbformat.write(notebook, executed)

    monkeypatch.setattr(study, "_execute", execute)


@pytest.mark.parametrize("name", ["problems.py", "study/tables.py", "presets/new.toml"])
def test_a_changed_package_reruns_everything(notebooks, monkeypatch, quick, name):
    package = notebooks.parent / "latentlab"
    shutil.copytree(study.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(study, "PACKAGE", package)
    assert run(notebooks) == [FIRST, SECOND]
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "problems.pyc").write_text("no source")
    assert run(notebooks) == []
    with open(package / name, "a") as file:
        file.write("# changed\n")
    assert run(notebooks) == [FIRST, SECOND]


@pytest.mark.slow
def test_a_failure_names_notebook_cell_and_error_and_resumes_there(notebooks, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    make(notebooks, SECOND, "\nimport os\nassert os.environ['MPLBACKEND'] != 'Agg'\n1 / 0")
    expected = r"01_second, cell \[\d\] `import os`: ZeroDivisionError: division by zero; all of it in"
    with pytest.raises(StudyError, match=expected) as error:
        run(notebooks)
    assert "\n" not in str(error.value)
    make(notebooks, SECOND)
    assert run(notebooks) == [SECOND]


@pytest.mark.slow
def test_a_pipeline_killed_in_notebook_03_resumes_there(tmp_path, monkeypatch, record_property):
    """SIGKILL of the study while a cell of 03 runs: 02 is not run again, 03 is, from its start."""
    folder, names = tmp_path / "notebooks", ["02_c", "03_d", "04_e"]
    folder.mkdir()
    # The killed study's kernel outlives it by a moment; it waits for another file, so it never
    # writes.
    wait = (
        "import os, time\nopen('begun', 'w').close()\nwhile not os.path.exists(os.environ['GO']):\n    time.sleep(0.1)"
    )
    for name in names:
        make(folder, name, *([wait] if name == "03_d" else []))
    give(folder)
    code = "import sys; from latentlab.study.notebooks import run_study\n"
    code += "run_study('toy', notebooks_dir=sys.argv[1], reports_dir=sys.argv[2])"
    root = str(Path(study.__file__).parents[2])
    command = [sys.executable, "-c", code, folder, tmp_path / "reports"]
    killed = subprocess.Popen(command, cwd=root, env={**os.environ, "GO": "never"})
    while not (folder / "begun").exists():
        assert killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    log = folder / "log.txt"
    assert log.read_text().split() == names[:1]
    monkeypatch.setenv("GO", str(folder))
    resumed = run(folder)
    assert resumed == names[1:]
    assert run(folder) == []
    again = len({names[0]} & set(resumed))
    record_property("pipeline", {"killed_in": "03", "resumed_at": resumed[0][:2], "finished_and_run_again": again})


def test_a_skipped_section_is_named_and_tried_again_when_what_it_waited_for_comes_back(
    notebooks, monkeypatch, quick, capsys
):
    reach = {"hub": False}
    monkeypatch.setattr(study, "hub_answers", lambda: reach["hub"])
    make(notebooks, SECOND)
    path = notebooks / f"{SECOND}.ipynb"
    path.write_text(
        path.read_text().replace('metrics={\\"rate\\": rate}', 'metrics={\\"real\\": {\\"skipped\\": \\"no Hub\\"}}')
    )
    assert run(notebooks) == [FIRST, SECOND]
    assert "skipped: real (no Hub)\n" in capsys.readouterr().out
    assert run(notebooks) == []
    for name in reach:
        reach[name] = True
        assert run(notebooks) == [SECOND]
        assert run(notebooks) == []


HOSTILE = """'"; import os; os.system("touch pwned") # \\ \n {{}} $(touch pwned) `touch pwned`"""


def test_a_parameter_is_a_value_and_never_code(notebooks):
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    make(notebooks, FIRST, parameters='preset = "toy"\nrate = "x"')
    (notebooks / f"{SECOND}.ipynb").unlink()
    give(notebooks, rate=HOSTILE)
    (path,) = notebooks.glob("*.ipynb")
    given = check_parameters("toy", [path], notebooks / "params")[FIRST]
    cells = parameterize_notebook(load_notebook_node(str(path)), given).cells
    (injected,) = [cell.source for cell in cells if "injected-parameters" in cell.metadata.tags]
    body = ast.parse(injected).body
    assert all(isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant) for line in body)
    assert {line.targets[0].id: line.value.value for line in body} == {"preset": "toy", "rate": HOSTILE}


def test_a_notebook_depends_on_the_results_its_code_names(notebooks, tmp_path, monkeypatch):
    """Own and published ones, of any preset; and on the data folder."""
    make(notebooks, SECOND, 'read_result("arms", preset)')
    monkeypatch.setattr(study.results, "published_folder", lambda: tmp_path / "published")
    hashes = {FIRST: [], SECOND: []}
    for path, text in (("reports/x", "{}"), ("reports/x", "{ }"), ("published/y", "{}"), ("published/y", "{ }")):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        (tmp_path / path / "arms.json").write_text(text)
        for name, found in hashes.items():
            found.append(study._notebook_hash(notebooks / f"{name}.ipynb", {}, tmp_path / "reports"))
    assert (len(set(hashes[FIRST])), len(set(hashes[SECOND]))) == (1, 4)
    monkeypatch.setenv("LATENTLAB_DATA", str(tmp_path))
    assert study._notebook_hash(notebooks / f"{FIRST}.ipynb", {}, tmp_path / "reports") not in hashes[FIRST]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("preset: toy\nrats: 0.2", "no parameter 'rats' in 00_first; it has preset, rate"),
        ("preset: toy\nrate: 1e-4", "got '1e-4' .str., expected float; YAML reads 1e-4 as text: write 1.0e-4"),
        ("preset: toy\nrate: true", "got True .bool., expected float"),
        ("preset: tiny", "expected `preset: toy`"),
        ("- toy", "expected `key: value` lines"),
        ("preset: [toy", "no readable YAML"),
        ("preset: toy\nrate: 0.2\nrate: 0.3", "a key is given twice"),
        ("preset: toy\n1: 2", "expected `key: value` lines"),
        ("", "expected `key: value` lines"),
        ("!!python/object/apply:os.system ['touch pwned']", "no readable YAML"),
    ],
)
def test_wrong_parameters_stop_the_study_before_anything_runs(notebooks, given, message):
    (notebooks / "params" / "toy.yaml").write_text(given)
    with pytest.raises(StudyError, match=message) as error:
        run(notebooks)
    assert "\n" not in str(error.value)
    assert not (notebooks / "log.txt").exists()
    assert not (notebooks.parent / "reports").exists()


def test_unknown_preset_unknown_notebook_and_no_notebooks(notebooks, tmp_path):
    with pytest.raises(StudyError, match="got preset 'huge', expected one of toy"):
        run_study("huge", notebooks_dir=notebooks, reports_dir=tmp_path / "r")
    with pytest.raises(StudyError, match="--only 07: expected the beginning of one of 00_first, 01_second"):
        run(notebooks, only="07")
    for preset in ("smol", "paper"):  # they ship no checkpoint
        with pytest.raises(StudyError, match=f"^preset {preset}: 03 trains on a GPU, 04 reads .* --only 04"):
            run_study(preset, reports_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()
    with pytest.raises(StudyError, match="no notebooks"):
        run_study("toy", notebooks_dir=tmp_path / "none", reports_dir=tmp_path / "r")


def test_a_switch_goes_only_to_the_notebooks_that_declare_it(notebooks):
    make(notebooks, SECOND, parameters='preset = "toy"\nrate = 0.1\nlive = True  # train here')
    give(notebooks, live=False)
    given = check_parameters("toy", sorted(notebooks.glob(study.NOTEBOOKS)), notebooks / "params")
    assert given == {FIRST: {"preset": "toy"}, SECOND: {"preset": "toy", "live": False}}


def test_parameters_must_be_literals(notebooks):
    make(notebooks, SECOND, parameters='preset = "toy"\nrate = max(0, 1)')
    with pytest.raises(StudyError, match="01_second.ipynb: expected a cell tagged `parameters`"):
        run(notebooks)
