"""TensorBoard events beside metrics.jsonl, and the progress line."""

import sys

import pytest
import tqdm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentlab.cli import main
from latentlab.training import steps
from latentlab.training.arms import fit_grpo
from latentlab.training.curriculum import fit_curriculum
from latentlab.training.run import read_metrics
from tests.conftest import tiny_gpt2
from tests.training.test_run import end, start  # noqa: F401  # a fixture


def events(folder):
    """{metric: [(step, value), ...]} as TensorBoard shows them."""
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def expected(folder):
    """The same from metrics.jsonl; events are float32."""
    found = {}
    for record in read_metrics(folder):
        for name, value in record.items():
            if name not in ("step", "arm"):
                found.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_events_are_the_metrics_after_a_resume_too(tmp_path, config, word_sets):
    """Steps behind the checkpoint are run again, and shown once."""
    folder, settings = tmp_path / "run", config()
    fit_grpo(tiny_gpt2(), *word_sets, settings, out=folder, tensorboard=True)
    shown = events(folder)
    assert shown == expected(folder) and {"reward", "grad_norm", "validation_accuracy"} < set(shown)
    assert [step for step, _ in shown["validation_accuracy"]] == [-1, 1, 3]


def test_events_behind_the_checkpoint_are_dropped(tmp_path, start):  # noqa: F811
    run = start(options={"tensorboard": True})
    end(run, 0, loss=1.0, validation_accuracy=0.5)  # saved
    end(run, 1, loss=2.0)
    run = start(resume=True, options={"tensorboard": True})
    end(run, 1, loss=3.0)
    assert events(tmp_path / "run")["loss"] == [(0, 1.0), (1, 3.0)]


def test_without_a_checkpoint_all_events_are_dropped(tmp_path, start):  # noqa: F811
    start(options={"tensorboard": True}).log({"step": -1, "validation_accuracy": 0.25})
    start(resume=True, options={"tensorboard": True}).log({"step": -1, "validation_accuracy": 0.5})
    assert events(tmp_path / "run") == {"validation_accuracy": [(-1, 0.5)]}


def test_no_events_unless_asked_for(tmp_path, start):  # noqa: F811
    start().log({"step": 0, "loss": 1.0})
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_package_is_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["grpo", "--preset", "tiny", "--out", str(tmp_path / "run"), "--tensorboard"]) == 1
    said = capsys.readouterr().err.strip()
    assert said == "latentlab: got no package tensorboard, expected it installed; pip install 'latentlab[tensorboard]'"
    assert not any(tmp_path.glob("run/*"))


@pytest.mark.parametrize(
    "fit, shown", [(fit_grpo, ("reward=0.", "collapsed=")), (fit_curriculum, ("loss=", "accuracy="))]
)
def test_the_progress_line_shows_metrics_and_seconds_left(tmp_path, config, word_sets, monkeypatch, capsys, fit, shown):
    lines = lambda *a, **k: tqdm.tqdm(*a, **{**k, "disable": False, "mininterval": 0, "ncols": 120})  # noqa: E731
    monkeypatch.setattr(steps, "tqdm", lines)
    fit(tiny_gpt2(), *word_sets, config(), out=tmp_path / "run")
    last = capsys.readouterr().err.split("\r")
    assert any(all(word in line for word in (*shown, "<00:")) for line in last), last
