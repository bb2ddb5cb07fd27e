"""lesson.py: a notebook's first and last cell."""

import builtins
import json
from types import SimpleNamespace

import matplotlib
import pytest
import torch

from latentlab.study.lesson import LessonError, begin


@pytest.fixture(autouse=True)
def _undo(monkeypatch):
    threads, style = torch.get_num_threads(), matplotlib.rcParams.copy()
    yield
    torch.set_num_threads(threads)
    matplotlib.rcParams.update(style)


def in_papermill(monkeypatch, *cells):
    shell = SimpleNamespace(user_ns={"In": list(cells)})
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)


def test_a_lesson_writes_its_result_and_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path))
    lesson = begin("00_tour", preset="smoke", k=3)
    assert torch.get_num_threads() == 1 and lesson.config.preset == "smoke"
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2])
    assert lesson.save(figure, "_curve") == tmp_path / "smoke" / "00_tour_curve.png"
    said = lesson.write({"x": 1.0}, question="q", headline="h")
    assert said == "h\n(smoke/00_tour.json)"
    result = json.loads((tmp_path / "smoke" / "00_tour.json").read_text())
    assert result["parameters"] == {"preset": "smoke", "k": 3} and result["metrics"] == {"x": 1.0}
    assert result["seconds"] >= 0


def test_a_preset_that_a_notebook_cannot_run_is_one_line():
    for preset in ("smol", "tyni"):
        with pytest.raises(
            LessonError, match=f"^preset: got '{preset}', expected one of smoke, tiny for 00_tour"
        ) as error:
            begin("00_tour", preset=preset)
        assert error.value._render_traceback_() == [f"latentlab: {error.value}"]
    assert begin("03_training", presets=("smol",), preset="smol").config.preset == "smol"


def test_a_misspelt_papermill_parameter_is_one_line(monkeypatch):
    in_papermill(monkeypatch, "preset = 'tiny'\niterations = 3", "# Parameters\npreset = 'smoke'\niteration = 4\n")
    with pytest.raises(LessonError, match="^parameter: got 'iteration', expected one of preset, iterations; correct"):
        begin("00_tour", preset="smoke", iterations=3)
    in_papermill(monkeypatch, "# Parameters\npreset = 'smoke'\niterations = 4\n")
    assert begin("00_tour", preset="smoke", iterations=4).parameters["iterations"] == 4
