"""What can be said about the committed notebooks without running them."""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
MIN_CHECKED, MAX_LINES, MAX_BYTES = 3, 25, 500 * 1024
# A path from the root of a disk: at least two parts, not the tail of a URL, a fraction, a MIME type or an HTML tag.
ABSOLUTE = re.compile(r"(?<![\w.)\]}<:/~*-])/[A-Za-z][\w.-]*/[\w.-]+|\b[A-Z]:\\\w+")

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks yet")


@pytest.fixture(params=NOTEBOOKS or [None], ids=lambda path: path.stem if path else "none")
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def texts(notebook):
    """Every text a reader sees: sources, streams, and the textual forms of outputs."""
    yield from (cell.source for cell in notebook.cells)
    for output in outputs(notebook):
        yield output.get("text", "")
        yield from (text for kind, text in output.get("data", {}).items() if kind in ("text/plain", "text/html"))


def test_format_and_kernel(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert all(cell.get("id") for cell in notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"


def test_one_parameters_cell_before_the_imports(notebook):
    assert len(tagged(notebook, "parameters")) == 1
    assert "parameters" in code(notebook)[0].metadata.get("tags", [])


def test_was_run_in_order_without_errors_or_warnings(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]


def test_names_no_path_of_a_machine(notebook):
    assert not [found.group() for text in texts(notebook) for found in ABSOLUTE.finditer(text)]


def test_carries_no_metadata_of_a_run(notebook):
    assert not {"papermill", "widgets"} & set(notebook.metadata)
    assert not [cell.id for cell in notebook.cells if {"papermill", "execution"} & set(cell.metadata)]
    assert not tagged(notebook, "injected-parameters")
    assert not tagged(notebook, "raises-exception")


def test_sizes(notebook, path):
    assert path.stat().st_size < MAX_BYTES
    assert not [cell.id for cell in code(notebook) if len(cell.source.splitlines()) > MAX_LINES]


def test_enough_outputs_are_checked(notebook):
    checked = [cell for cell in tagged(notebook, "nbval-check-output") if cell.outputs]
    assert len(checked) >= MIN_CHECKED


def test_ends_with_something_to_do(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.search(r"^#+ .*on your own", prose, re.IGNORECASE | re.MULTILINE)


def test_absolute_paths_are_told_from_other_slashes():
    for text in ("/home/user/x", "saved to '/var/data/a.json'", "C:\\Users"):
        assert ABSOLUTE.search(text), text
    for text in ("https://a.org/b/c", "reports/tiny/x.json", "image/png", "</td></tr>", "../a/b", "p/(1-p)", "`a/b/c`"):
        assert not ABSOLUTE.search(text), text
