"""run.py, steps.py, checkpoint.py: metrics line by line, atomic checkpoints, one line for what does not fit."""

import json
import os
import shutil
import signal
import threading
from collections import namedtuple

import pytest
import torch

from latentlab.cli import main
from latentlab.config import to_dict
from latentlab.pretrained.loading import model_from_config, save_model
from latentlab.problems import Problem
from latentlab.training import arms, checkpoint, curriculum
from latentlab.training import run as run_module
from latentlab.training.arms import fit_grpo
from latentlab.training.checkpoint import expect_finite
from latentlab.training.curriculum import fit_curriculum
from latentlab.training.run import SLACK, Run, Stopped, read_metrics, seconds_spent
from latentlab.training.steps import batch_indices, set_learning_rate, warmup_cosine
from tests.conftest import tiny_gpt2
from tests.reliability.kills import FILES, distinct_words, same


@pytest.fixture
def start(tmp_path, config):
    """start(resume=True, grpo={...}): a Run in tmp_path/run with its optimizer as an attribute."""

    def make(*, loop="grpo", problems=("a", "b"), model=None, options=None, **changes):
        resume = changes.pop("resume", False)
        model = model or tiny_gpt2()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train, validation = ([Problem(name, "", (), "1", "")] for name in problems)
        options = {"loop": loop, "resume": resume, **(options or {})}
        run = Run(tmp_path / "run", config(**changes), model, train, validation, **options)
        run.optimizer = optimizer
        return run

    return make


def end(run, step, **record):
    run.end_step(run.optimizer, {"step": step, **record})


def content(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- lines ----------------------------------------------------------------------------------------------------------


def test_metrics_stand_in_the_file_as_soon_as_they_are_logged(tmp_path, config, start):
    run = start()
    for step in range(3):
        run.log({"step": step, "loss": 0.5})
        assert read_metrics(tmp_path / "run") == [{"step": i, "loss": 0.5} for i in range(step + 1)]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == to_dict(config())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_stops_the_run_and_leaves_no_line(tmp_path, start, value):
    run = start()
    run.log({"step": 0, "loss": 1.0})
    with pytest.raises(FloatingPointError, match="^grad_norm: got .* at step 1, expected a finite number") as error:
        run.log({"step": 1, "loss": 1.0, "grad_norm": value})
    assert "\n" not in str(error.value)
    assert len(read_metrics(tmp_path / "run")) == 1


def test_resuming_drops_the_lines_behind_the_checkpoint_again_and_again(tmp_path, start):
    run = start(options={"checkpoint_minutes": 0})
    for step in (0, 1):
        end(run, step)
    run.log({"step": 2, "note": "after the checkpoint"})
    for step in (2, 3):
        run = start(resume=True, options={"checkpoint_minutes": 0})
        assert run.progress.step == step
        assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(step))
        end(run, step)
        run.log({"step": step + 1, "note": "lost again"})


def test_a_line_that_a_kill_cut_off_is_left_out_and_mended(tmp_path, start):
    run = start(options={"checkpoint_minutes": 0})
    end(run, 0)
    for name in ("metrics", "timing"):
        with open(tmp_path / "run" / f"{name}.jsonl", "a") as lines:
            lines.write('{"step": 1, "sec')
    assert read_metrics(tmp_path / "run") == [{"step": 0}] and seconds_spent(tmp_path / "run") > 0
    end(start(resume=True), 1)
    for name, steps in (("metrics", [0, 1]), ("timing", [-1, 0, 0, 1])):  # a line where a process begins
        lines = (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps


def test_seconds_of_all_processes_are_added(tmp_path, start):
    start()
    clock = (0.0, 10.0, 20.0, 0.0, 25.0, 300.0)  # two processes, each from 0
    lines = [json.dumps({"step": i, "seconds": seconds}) + "\n" for i, seconds in enumerate(clock)]
    (tmp_path / "run" / "timing.jsonl").write_text("".join(lines))
    start(resume=True)  # no checkpoint: the metrics start again, the time is spent all the same
    assert seconds_spent(tmp_path / "run") == 320 and seconds_spent(tmp_path) == 0


# -- what does not belong together ----------------------------------------------------------------------------------


def test_a_used_folder_is_refused_and_left_alone(tmp_path, start):
    end(start(), 0)
    before = content(tmp_path)
    with pytest.raises(
        FileExistsError, match="^run folder: got .* holds config.json already, expected a new folder; pass --resume"
    ):
        start()
    assert content(tmp_path) == before


def other(model, **provenance):
    model.provenance = {**model.provenance, **provenance}
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grpo": {"mask": {"rate": 0.25}}}, r"grpo\.mask\.rate=0\.25, expected 0\.1 .*; use another --out"),
        ({"seed": 1}, r"seed=1, expected 0 .*; use another --out"),
        ({"loop": "curriculum"}, "loop='curriculum', expected 'grpo' .*; use another --out"),
        ({"problems": ("a", "c")}, "problems='.*', expected '.*' .*; restore the data"),
        ({"model": "other"}, r"init_from\.seed=5, expected 0 .*; name the checkpoint that the run began with"),
        ({"threads": 2}, "threads=2, expected 1 as in the checkpoint; pass --threads 1"),
    ],
)
def test_what_differs_from_the_checkpoint_is_named_and_nothing_touched(tmp_path, start, monkeypatch, changes, message):
    run = start(options={"checkpoint_minutes": 0})
    end(run, 0)
    run.log({"step": 1})
    before = content(tmp_path)
    if changes.pop("threads", None):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if "model" in changes:
        changes["model"] = other(tiny_gpt2(), seed=5)
    with pytest.raises(ValueError, match=f"^resume: got {message}") as error:
        start(resume=True, **changes)
    assert "\n" not in str(error.value) and content(tmp_path) == before


def test_another_version_of_the_code_is_said_and_allowed(start, monkeypatch, capsys):
    end(start(options={"checkpoint_minutes": 0}), 0)
    start(resume=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(checkpoint, "commit", lambda: "0123")
    assert start(resume=True).progress.step == 1
    assert "made with commit " in (said := capsys.readouterr().err) and "(now 0123)" in said and said.count("\n") == 1


def damage(state, kind):
    """The bytes of state.pt, spoiled."""
    whole = state.read_bytes()
    if kind == "flipped":  # in the middle of a weight: torch would load it
        at = whole.index(next(iter(torch.load(state)["model"].values()))[0].numpy().tobytes())
        return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    cut = {"empty": b"", "half": whole[: len(whole) // 2], "text": b"PK\x03\x04 not an archive"}
    return cut.get(kind, b"\x80\x02cos\nsystem\n(S'touch payload'\ntR.")


@pytest.mark.parametrize("kind", ["empty", "half", "text", "payload", "flipped"])
def test_a_damaged_or_foreign_state_is_one_line_and_runs_nothing(tmp_path, start, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    end(start(options={"checkpoint_minutes": 0}), 0)
    state = tmp_path / "run" / "state.pt"
    state.write_bytes(damage(state, kind))
    before = content(tmp_path)
    with pytest.raises(ValueError, match="^resume: could not read .*state.pt .*; restore it, or start again") as error:
        start(resume=True)
    assert "\n" not in str(error.value) and content(tmp_path) == before  # no file named payload either


KEYS = ("metrics_offset", "metrics_sha256", "best_sha256", "identity", "made_with")


@pytest.mark.parametrize("kind", ["list", "foreign", "shape", "missing weight", "optimizer", "progress", *KEYS])
def test_a_state_of_another_shape_is_one_line(tmp_path, start, kind):
    end(start(options={"checkpoint_minutes": 0}), 0)
    state = torch.load(tmp_path / "run" / "state.pt")
    if kind == "shape":
        state["model"]["transformer.wpe.weight"] = torch.zeros(3)
    elif kind == "missing weight":
        del state["model"]["transformer.wpe.weight"]
    elif kind == "optimizer":
        state["optimizer"] = {"state": {}, "param_groups": []}
    elif kind == "progress":
        state["progress"] = {"steps": 3}
    elif kind in KEYS:
        del state[kind]
    torch.save({"list": [1], "foreign": {"weights": 1}}.get(kind, state), tmp_path / "run" / "state.pt")
    with pytest.raises(ValueError, match="^resume: could not read .*state.pt") as error:
        run = start(resume=True)
        run.restore(run.optimizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_config_is_one_line(tmp_path, start, damage):
    start()
    (tmp_path / "run" / "config.json").write_bytes(damage)
    with pytest.raises(ValueError, match="^resume: could not read .*config.json .*; restore it, or start again"):
        start(resume=True)


def test_a_run_that_has_no_checkpoint_yet_resumes_with_its_own_config_only(tmp_path, start):
    start()
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "seed": 5}))
    with pytest.raises(
        ValueError, match="^resume: got seed=0, expected 5 as in the run's config.json; use another --out"
    ):
        start(resume=True)


def test_a_checkpoint_without_its_config_is_never_started_over(tmp_path, start):
    end(start(options={"checkpoint_minutes": 0}), 0)
    (tmp_path / "run" / "config.json").unlink()
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match="holds state.pt already"):
        start()
    said = "^resume: got .*state.pt without config.json, expected both, .*; restore it, or use another"
    with pytest.raises(ValueError, match=said):
        start(resume=True)
    assert content(tmp_path) == before


def test_metrics_shorter_than_the_checkpoint_counted_are_one_line(tmp_path, start):
    end(start(options={"checkpoint_minutes": 0}), 0)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"^resume: got 0 bytes of .*metrics.jsonl, expected the 12 "):
        start(resume=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "timing.jsonl", "best", "best.old", "best.9.partial", "state.pt.9.partial"]
)
def test_files_of_someone_else_are_refused_and_left_alone(tmp_path, start, name, resume):
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    if name.startswith("best"):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"mine")
    else:
        path.write_text("mine\n")
    before = content(tmp_path)
    with pytest.raises(
        FileExistsError, match=f"^run folder: got .* holds {name} but no config.json, .*use another --out"
    ):
        start(resume=resume)
    assert content(tmp_path) == before


def test_a_partial_file_of_another_program_stays(tmp_path, start):
    (tmp_path / "run").mkdir()
    for name in ("download.partial", "config.json.9.partial"):
        (tmp_path / "run" / name).write_text("half")
    start()
    assert (tmp_path / "run" / "download.partial").read_text() == "half"
    assert not (tmp_path / "run" / "config.json.9.partial").exists()


@pytest.fixture
def saved(tmp_path, start):
    """The folder of a run with a checkpoint after step 0, best/ included."""
    end(start(), 0, validation_accuracy=0.5)
    return tmp_path / "run"


def same_size(folder):
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.7"))


def of_another_run(folder):
    shutil.rmtree(folder / "best", ignore_errors=True)
    save_model(tiny_gpt2(seed=1), folder / "best")


def cut(folder):
    os.truncate(folder / "best" / "model.safetensors", 100)


REPLACED = {
    "metrics of the same size": (same_size, r"metrics.jsonl, expected the \d+ that the checkpoint counted, unchanged"),
    "metrics missing": (lambda f: (f / "metrics.jsonl").unlink(), "got 0 bytes of .*metrics.jsonl"),
    "best of another run": (of_another_run, "best: got other content, expected the weights that state.pt names"),
    "best cut": (cut, "best: got other content"),
    "best missing": (lambda f: shutil.rmtree(f / "best"), "best: got no such folder"),
    "best a file": (lambda f: (shutil.rmtree(f / "best"), (f / "best").write_text("x")), "best: got other content"),
    "best without settings": (lambda f: (f / "best" / "latentlab.json").unlink(), "best: got other content"),
    "timing of text": (
        lambda f: (f / "timing.jsonl").write_text("a\n"),
        r"could not read .*timing.jsonl \(JSONDecodeError",
    ),
    "timing of numbers": (lambda f: (f / "timing.jsonl").write_text("1\n"), "could not read .*timing.jsonl"),
    "timing in words": (
        lambda f: (f / "timing.jsonl").write_text('{"seconds": "1"}\n'),
        "could not read .*timing.jsonl",
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), "got .*state.pt without config.json, expected both"),
    "no state.pt": (lambda f: (f / "state.pt").unlink(), None),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_resumed_run_takes_only_its_own_files(saved, start, what):
    change, said = REPLACED[what]
    if said is None:  # a kill before the first state.pt leaves the same: started over
        change(saved)
        assert start(resume=True).new and not (saved / "best").exists()
        return
    change(saved)
    before = content(saved)
    with pytest.raises(ValueError, match=f"^resume: .*{said}.*restore it, or") as error:
        start(resume=True)
    assert "\n" not in str(error.value) and content(saved) == before


def test_files_that_a_user_adds_to_best_are_left_alone(saved, start):
    for name in ("notes.json", "PROVENANCE.json", "eval.safetensors"):
        (saved / "best" / name).write_text("[1]")
    assert not start(resume=True).new and (saved / "best" / "notes.json").read_text() == "[1]"


def test_a_lost_state_is_no_new_run(saved, start):
    end(start(resume=True), 1, validation_accuracy=0.25)
    (saved / "state.pt").unlink()
    before = content(saved)
    with pytest.raises(ValueError, match="^resume: got .*metrics.jsonl without state.pt, expected both; restore it"):
        start(resume=True)
    assert content(saved) == before


def test_weights_of_someone_else_beside_a_young_run_stay(tmp_path, start):
    end(start(options={"checkpoint_minutes": 0}), 0)
    of_another_run(tmp_path / "run")
    for remove in ((), ("state.pt",)):
        for name in remove:
            (tmp_path / "run" / name).unlink()
        before = content(tmp_path)
        with pytest.raises(ValueError, match="^resume: .*best: got weights that are not of this run, expected none"):
            start(resume=True)
        assert content(tmp_path) == before


# -- whole or not at all --------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["state", "weights", "fsync", "replace", "metrics"])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, start, monkeypatch, where):
    run = start()
    end(run, 0, validation_accuracy=0.5)
    before = content(tmp_path / "run" / "best")

    def half(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")  # torch's own words

    with monkeypatch.context() as broken, pytest.raises(OSError, match="^run: could not write .*disk space") as error:
        if where == "state":
            broken.setattr(torch, "save", half)
        elif where == "metrics":
            broken.setattr("builtins.open", full)
        else:
            owner, name = {"weights": (run_module, "save_model"), "fsync": (os, "fsync")}.get(where, (os, "replace"))
            broken.setattr(owner, name, full)
        end(run, 1, validation_accuracy=0.75)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("*.partial"))  # room for what is left
    again = start(resume=True)
    assert (again.progress.step, again.progress.best, again.progress.best_step) == (1, 0.5, 0)
    assert content(tmp_path / "run" / "best") == before
    again.restore(again.optimizer)
    end(again, 1, validation_accuracy=0.75)
    assert start(resume=True).progress.best == 0.75


@pytest.mark.parametrize("known", [False, True])
def test_of_two_best_folders_the_one_that_the_checkpoint_knows_counts(tmp_path, start, monkeypatch, known):
    """Killed before state.pt knew of the new best/, or after, before best.old/ was removed."""
    run = start()
    end(run, 0, validation_accuracy=0.5)
    with torch.no_grad():
        run.model.lm.transformer.ln_f.weight.add_(1.0)
    run.progress.step, run.progress.best, run.progress.best_step = 2, 0.75, 1
    run.save_best()
    if known:
        monkeypatch.setattr(shutil, "rmtree", lambda *a, **kw: None)
        run.save(run.optimizer)
        monkeypatch.undo()
    assert (tmp_path / "run" / "best.old").exists()
    again = start(resume=True)
    assert again.progress.best == (0.75 if known else 0.5)
    assert not (tmp_path / "run" / "best.old").exists()
    again.load_best()
    weight = again.model.lm.transformer.ln_f.weight
    assert torch.equal(weight, torch.full_like(weight, 2.0 if known else 1.0))


@pytest.mark.parametrize("folders", [("best.old",), ("best.old", "best.1.partial"), ("best.old", "best.half")])
def test_a_kill_in_the_midst_of_replacing_best_loses_none(tmp_path, start, folders):
    run = start()
    end(run, 0, validation_accuracy=0.5)
    best = tmp_path / "run" / "best"
    before = content(best)
    best.rename(tmp_path / "run" / "best.old")
    for name in folders[1:]:  # what was being written or removed
        folder = tmp_path / "run" / name.replace(".half", "")
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    run = start(resume=True)
    assert content(best) == before
    end(run, 1, validation_accuracy=0.75)
    assert run.progress.best == 0.75 and sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES


def test_a_nan_among_weights_or_moments_is_never_saved(tmp_path, start):
    run = start(options={"checkpoint_minutes": 0})
    end(run, 0)
    before = content(tmp_path)
    with torch.no_grad():
        run.model.lm.transformer.wte.weight[7, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^weights\.transformer\.wte\.weight: got nan at step 1, expected"):
        run.progress.step = 2
        run.save(run.optimizer)
    with pytest.raises(FloatingPointError, match=r"^weights\.transformer\.wte\.weight: got nan at step 1"):
        run.save_best()
    assert content(tmp_path) == before
    with pytest.raises(
        FloatingPointError, match="step -1, .*; nothing of this step is saved; use other weights to start"
    ):
        expect_finite({"loss": float("nan")}, -1)
    with pytest.raises(FloatingPointError, match="^optimizer.0.exp_avg: got nan at step 4"):
        expect_finite({"optimizer": {0: {"step": torch.tensor(1.0), "exp_avg": torch.tensor([float("inf")])}}}, 4)


@pytest.mark.parametrize(("spare", "enough"), [(0, True), (-1, False)])
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, start, monkeypatch, spare, enough):
    weights = sum(4 * p.numel() for p in tiny_gpt2().parameters())
    usage = namedtuple("usage", "total used free")(0, 0, 9 * weights + SLACK + spare)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if enough:
        start()
    else:
        with pytest.raises(OSError, match="17 MiB free, expected 18 for what will be written: "):
            start()
    assert (tmp_path / "run").exists() is enough


def test_the_slack_holds_what_a_run_writes_beside_weights(tmp_path, start):
    run = start(options={"checkpoint_minutes": 0})
    end(run, 0, validation_accuracy=0.5)
    beside = sum(len(text) for path, text in content(tmp_path).items() if not path.endswith((".safetensors", ".pt")))
    assert 0 < 100 * beside < SLACK < 2**26
    assert len(repr(run)) < 200  # not the weights


def test_files_of_a_checkpoint_are_on_the_disk_before_they_have_their_name(tmp_path, start, monkeypatch):
    """The order of calls: every byte is flushed, then the rename, then the folder; metrics before the state."""
    run, calls = start(), []
    fsync, replace = os.fsync, os.replace
    name = lambda number: os.path.relpath(os.readlink(f"/proc/self/fd/{number}"), tmp_path / "run")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append(name(number)), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"-> {os.path.basename(b)}"), replace(a, b)))
    run.save(run.optimizer)
    assert calls == ["metrics.jsonl", f"state.pt.{os.getpid()}.partial", "-> state.pt", "."]
    calls.clear()
    run.save_best()
    assert calls[-2:] == ["-> best", "."]
    partial = f"best.{os.getpid()}.partial"
    assert {partial, f"{partial}/model.safetensors", f"{partial}/validation.json"} <= set(calls[:-2])


# -- stops ----------------------------------------------------------------------------------------------------------

RUNS = {
    "curriculum": (fit_curriculum, {}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    "grpo": (fit_grpo, {"reward": distinct_words}, [-1, 0, 1, 2, 3]),
}
MODULES = {"curriculum": curriculum, "grpo": arms}


@pytest.fixture
def fit(config, word_sets, tmp_path):
    """fit("grpo", "folder", ...): a short run with its model."""

    def call(loop, folder, **options):
        model = model_from_config(config())
        function, extra, _ = RUNS[loop]
        return model, function(model, *word_sets, config(), out=tmp_path / folder, **extra, **options)

    return call


def expect_same_runs(a, b):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert same(*(torch.load(path / "state.pt") for path in (a, b)))
    assert (a / "best" / "model.safetensors").read_bytes() == (b / "best" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("loop", RUNS)
def test_a_run_of_one_step_a_process_equals_one_in_one_go(fit, tmp_path, loop):
    """--max-minutes ends each process after a step: within every stage, at its end, before the first validation."""
    model, expected = fit(loop, "whole")
    for step in RUNS[loop][2]:
        if step == RUNS[loop][2][-1]:
            resumed, summary = fit(loop, "run", resume=True, max_minutes=1e-9)  # the last step: the run is done
        else:
            where = "before the first step" if step < 0 else f"after step {step}"
            with pytest.raises(
                Stopped, match=f"^stopped by --max-minutes 1e-09 {where}, .*run the same command with --resume"
            ):
                fit(loop, "run", resume=True, max_minutes=1e-9)
    assert summary == expected and same(model.lm.state_dict(), resumed.lm.state_dict())
    expect_same_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("loop", RUNS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(fit, tmp_path, monkeypatch, capsys, loop, number):
    fit(loop, "whole")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    update, calls = arms.update, [0]

    def signalled(*args, **options):
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(number)
        return update(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"^stopped by {number.name} after step 1"):
        patch.setattr(MODULES[loop], "update", signalled)
        fit(loop, "run")
    assert calls == [2] and torch.load(tmp_path / "run" / "state.pt")["progress"]["step"] == 2
    assert f"{number.name}: finishing the step, then saving" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    fit(loop, "run", resume=True)
    expect_same_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("loop", RUNS)
def test_a_signal_in_the_last_step_counts_and_resuming_only_ends_the_run(fit, tmp_path, monkeypatch, loop):
    """Its sender means what would come next as well: the next arm of a study, say."""
    _, expected = fit(loop, "whole")
    update, calls = arms.update, [0]

    def signalled(*args, **options):
        calls[0] += 1
        if calls[0] == 1 + RUNS[loop][2][-1]:
            signal.raise_signal(signal.SIGTERM)
        return update(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="^stopped by SIGTERM after step"):
        patch.setattr(MODULES[loop], "update", signalled)
        fit(loop, "run")
    _, summary = fit(loop, "run", resume=True)
    assert summary == expected
    expect_same_runs(tmp_path / "whole", tmp_path / "run")


def test_a_second_interrupt_aborts_at_once(fit, tmp_path, monkeypatch):
    def twice(*_, **__):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(arms, "update", twice)
        fit("grpo", "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    fit("grpo", "run", resume=True)
    fit("grpo", "whole")
    expect_same_runs(tmp_path / "whole", tmp_path / "run")


def test_outside_the_main_thread_a_run_works_and_leaves_signals_alone(fit):
    results = []
    thread = threading.Thread(target=lambda: results.append(fit("grpo", "run")[1]))
    thread.start()
    thread.join()
    assert results == [fit("grpo", "main")[1]]


def test_checkpoints_are_written_when_their_time_has_come(fit, tmp_path, monkeypatch):
    saved, save = [], Run.save
    monkeypatch.setattr(Run, "save", lambda run, *a: (saved.append(run.progress.step), save(run, *a)))
    fit("curriculum", "rarely")
    assert saved == [3, 5, 7, 9]  # its validations
    saved.clear()
    fit("curriculum", "often", checkpoint_minutes=0)
    assert saved == list(range(1, 10))
    expect_same_runs(tmp_path / "rarely", tmp_path / "often")


def test_the_command_line_ends_with_code_75_and_goes_on(tmp_path, capfd, monkeypatch):
    save_model(tiny_gpt2(), tmp_path / "model")
    words = ["grpo", "--preset", "smoke", "--init-from", tmp_path / "model", "--out", tmp_path / "run"]
    words += ["--data.validation-size", 4, "--data.steps", 2]
    words += ["--grpo.steps", 2, "--grpo.num-problems", 2, "--grpo.num-generations", 2]
    words = list(map(str, words))
    assert main([*words, "--max-minutes", "1e-9"]) == 75
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("latentlab: stopped by --max-minutes 1e-09 before the first step, ")
    assert err.count("\n") == 1 and main([*words, "--resume"]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [-1, 0, 1]
    monkeypatch.setattr(arms, "fit_grpo", lambda *a, **kw: signal.raise_signal(signal.SIGINT))
    assert main(words) == 130
    assert capfd.readouterr().err.startswith("latentlab: aborted; ")


# -- functions of the step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "size"), [(10, 3), (4, 10), (7, 7)])
def test_batches_are_epochs_of_permutations_and_a_function_of_the_step(total, size):
    picked = [i for step in range(20) for i in batch_indices(total, size, seed=3, step=step)]
    epochs = [picked[i : i + total] for i in range(0, 20 * size - total + 1, total)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert batch_indices(total, size, seed=3, step=5) == picked[5 * size : 6 * size]
    assert batch_indices(total, size, seed=4, step=5) != picked[5 * size : 6 * size]
    for at, epoch in enumerate(epochs):  # every seed has a million epochs of its own
        assert epoch == torch.randperm(total, generator=torch.Generator().manual_seed(3 * 1_000_003 + at)).tolist()


def test_the_learning_rate_rises_then_falls_to_its_share():
    shares = [warmup_cosine(i, total=100, warmup=10, final=0.1) for i in range(101)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1.0 and shares[55] == pytest.approx(0.55) and shares[100] == pytest.approx(0.1)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert warmup_cosine(0, total=5, warmup=0, final=0.0) == 1.0


def test_the_learning_rate_reaches_every_group():
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 3.0}], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_run_of_an_older_version_lacks_a_setting():
    with pytest.raises(ValueError, match="^resume: got the setting grpo.level, which its config.json lacks, expected"):
        checkpoint.expect_same({"grpo": {}}, {"grpo": {"level": "token"}}, "its config.json")
    with pytest.raises(ValueError, match="^resume: got grpo.level=None, expected 'token' as in its config.json"):
        checkpoint.expect_same({"grpo": {"level": "token"}}, {"grpo": {}}, "its config.json")


def test_weights_that_the_user_froze_are_saved_too():
    model = tiny_gpt2()
    model.lm.get_input_embeddings().requires_grad_(False)
    assert checkpoint.trained_state(model).keys() == model.lm.state_dict().keys()


def test_a_run_resumes_with_the_precision_that_auto_was(config, word_sets, tmp_path):
    c = config(precision="auto")
    first, second = (model_from_config(c).place("cpu", precision) for precision in ("float32", "bfloat16"))
    Run(tmp_path / "run", c, first, *word_sets, loop="grpo").end_step(
        torch.optim.SGD(first.parameters(), lr=0.1), {"step": -1, "validation_accuracy": 0.0}
    )
    with pytest.raises(
        ValueError, match="^resume: got products='torch.bfloat16', expected 'torch.float32' as in the ch"
    ):
        Run(tmp_path / "run", c, second, *word_sets, loop="grpo", resume=True)


def test_a_sharded_state_is_settled_after_a_kill_between_two_renames(tmp_path):
    def make(*names):
        shutil.rmtree(tmp_path, ignore_errors=True)
        for name in names:
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "from").write_text(name)

    for names, left in ((["state.old"], "state.old"), (["state", "state.old"], "state"), (["state"], "state")):
        make(*names)
        assert checkpoint.state_path(tmp_path, True) == tmp_path / left
        checkpoint.settle_state(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["state"]
        assert (tmp_path / "state" / "from").read_text() == left


def test_a_run_goes_on_with_shards_as_it_began(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(
        ValueError, match="^resume: got .*/state, expected .*/state.pt; pass --shard, under torchrun, or"
    ):
        checkpoint.expect_state(tmp_path, False)
    checkpoint.expect_state(tmp_path, True)
    (tmp_path / "state").rmdir()
    (tmp_path / "state.pt").touch()
    with pytest.raises(ValueError, match="^resume: got .*/state.pt, expected .*/state; drop --shard, or use another"):
        checkpoint.expect_state(tmp_path, True)
    checkpoint.expect_state(tmp_path, False)


def test_shards_of_other_sizes_are_damaged(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    for sizes in ({"a.safetensors": 4}, {}, {"a.safetensors": 5, "b.safetensors": 1}, None):
        (tmp_path / checkpoint.FACTS).write_text(json.dumps({"sizes": sizes}))
        with pytest.raises(ValueError, match=r"^resume: could not read .* \(ValueError\), expected it as this version"):
            checkpoint.read_state(tmp_path, {})
    (tmp_path / checkpoint.FACTS).write_text(json.dumps({"sizes": {"a.safetensors": 5}}))
    with pytest.raises(ValueError, match=r"\(KeyError\)"):  # of the right sizes, but without facts
        checkpoint.read_state(tmp_path, {})
