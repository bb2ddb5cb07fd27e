"""The pipeline on two toy notebooks: order, resume, reruns, failures in one line, checks before anything runs."""

import json

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from latentlab import study
from latentlab.study import StudyError, check_parameters, run_study

FIRST, SECOND = "00_first", "01_second"
WRITE = """from pathlib import Path
from latentlab.report import write_result
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


def run(notebooks, **options):
    """Run the study; return the names of the notebooks that really ran, in order."""
    log = notebooks / "log.txt"
    log.unlink(missing_ok=True)
    run_study("toy", notebooks_dir=notebooks, reports_dir=notebooks.parent / "reports", **options)
    return log.read_text().split() if log.exists() else []


@pytest.mark.slow
def test_runs_in_order_writes_pages_and_skips_what_is_finished(notebooks, capfd):
    evil = "<script>alert(1)</script>"
    make(notebooks, FIRST, f"from IPython.display import HTML, display\ndisplay(HTML('{evil}'))\nprint('{evil}')")
    assert run(notebooks) == [FIRST, SECOND]
    folder = notebooks.parent / "reports" / "toy"
    for name in (FIRST, SECOND):
        assert all((folder / f"{name}{suffix}").is_file() for suffix in (".ipynb", ".html", ".json"))
    page = (folder / f"{FIRST}.html").read_text()
    assert '<h1 id="Toy">' in page and "&lt;script&gt;" in page and evil not in page
    index = (folder / "index.html").read_text()
    assert "&lt;b&gt;rate" in index and "<b>" not in index
    assert (folder.parent / "RESULTS.md").is_file()
    out, err = capfd.readouterr()
    assert out.rstrip().endswith("index.html")
    assert err == ""  # no kernel, debugger or converter noise reaches a user

    assert run(notebooks) == []
    assert capfd.readouterr().out.count("finished before") == 2

    (folder / f"{FIRST}.json").unlink()  # a lost result is made again
    assert run(notebooks) == [FIRST]
    assert run(notebooks, only="01") == []


@pytest.mark.slow
def test_only_and_exactly_what_changed_runs_again(notebooks, monkeypatch):
    assert run(notebooks, only="01") == [SECOND]
    give(notebooks, rate=0.25)
    assert run(notebooks) == [FIRST, SECOND]
    result = json.loads((notebooks.parent / "reports" / "toy" / f"{SECOND}.json").read_text())
    assert result["metrics"]["rate"] == 0.25

    make(notebooks, SECOND, "changed = True")
    assert run(notebooks) == [SECOND]
    monkeypatch.setattr(study, "library_hash", lambda: "another library")
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


def test_a_notebook_depends_on_the_results_its_code_names(notebooks, tmp_path):
    make(notebooks, SECOND, 'read_result("compare", preset)')
    hashes = {}
    for text in ("{}", "{ }"):
        (tmp_path / "compare.json").write_text(text)
        for name in (FIRST, SECOND):
            state = study._notebook_hash(notebooks / f"{name}.ipynb", {}, tmp_path, "library")
            hashes.setdefault(name, set()).add(state)
    assert (len(hashes[FIRST]), len(hashes[SECOND])) == (1, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("preset: toy\nrats: 0.2", "no parameter 'rats' in 00_first; it has preset, rate"),
        ("preset: toy\nrate: 1e-4", "got '1e-4' .str., expected float; YAML reads 1e-4 as text: write 1.0e-4"),
        ("preset: toy\nrate: true", "got True .bool., expected float"),
        ("preset: tiny", "expected `preset: toy`"),
        ("- toy", "expected `preset: toy`"),
        ("preset: [toy", "no readable YAML"),
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
