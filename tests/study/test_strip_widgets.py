"""notebooks.py: live widgets are removed from an executed notebook, their static fallback stays."""

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from latentlab.study.notebooks import strip_widgets


def test_the_fallback_stays_and_the_rest_of_the_file_is_as_it_was(tmp_path):
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}}
    shown = new_output("display_data", {**view, "text/html": "<b>default</b>", "text/plain": "default"})
    printed = new_output("stream", name="stdout", text="a line")
    notebook = new_notebook(cells=[new_markdown_cell("# title"), new_code_cell("show()", outputs=[shown, printed])])
    path, expected = tmp_path / "notebook.ipynb", nbformat.from_dict(notebook)
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {"0": {}}}}
    nbformat.write(notebook, path)
    strip_widgets(path)
    del expected.cells[1].outputs[0].data["application/vnd.jupyter.widget-view+json"]
    expected.metadata.pop("widgets", None)
    assert nbformat.read(path, as_version=4) == expected
