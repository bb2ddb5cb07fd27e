"""loop.py: metrics line by line, checkpoints whole or not at all, data order as a function."""

import dataclasses
import json

import pytest
import torch

from latentlab.config import to_dict
from latentlab.loop import Run, batch_indices, read_metrics, set_learning_rate, warmup_cosine


def test_metrics_stand_in_the_file_as_soon_as_they_are_logged(tmp_path, config):
    run = Run(tmp_path / "run", config(), loop="grpo")
    for step in range(3):
        run.log({"step": step, "loss": 0.5})
        assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(step + 1))
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == to_dict(config())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_stops_the_run_and_leaves_no_line(tmp_path, config, value):
    run = Run(tmp_path, config(), loop="grpo")
    run.log({"step": 0, "loss": 1.0})
    with pytest.raises(FloatingPointError, match="^grad_norm: got .* at step 1, expected a finite number") as error:
        run.log({"step": 1, "loss": 1.0, "grad_norm": value})
    assert "\n" not in str(error.value)
    assert len(read_metrics(tmp_path)) == 1


def test_resuming_drops_the_lines_behind_the_checkpoint_again_and_again(tmp_path, config):
    run = Run(tmp_path, config(), loop="grpo")
    for step in (0, 1):
        run.log({"step": step})
    run.save(weight=torch.tensor([1.5]), next_step=2)
    run.log({"step": 2, "note": "after the checkpoint"})
    for end in (3, 4):
        run = Run(tmp_path, config(), loop="grpo", resume=True)
        assert torch.equal(run.state["weight"], torch.tensor([1.5])) and run.state["next_step"] == end - 1
        assert [line["step"] for line in read_metrics(tmp_path)] == list(range(end - 1))
        run.log({"step": end - 1})
        run.save(weight=torch.tensor([1.5]), next_step=end)
        run.log({"step": end, "note": "lost again"})


def test_a_used_folder_is_refused_and_left_alone(tmp_path, config):
    Run(tmp_path, config(), loop="grpo").log({"step": 0})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="^run folder: got .* holds a run already; pass --resume"):
        Run(tmp_path, config(), loop="grpo")
    with pytest.raises(ValueError, match=r"^resume: got grpo\.mask\.rate=0\.25, expected 0\.1 "):
        Run(tmp_path, config(grpo={"mask": {"rate": 0.25}}), loop="grpo", resume=True)
    with pytest.raises(ValueError, match=r"^resume: got seed=1, expected 0 "):
        Run(tmp_path, dataclasses.replace(config(), seed=1), loop="grpo", resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02cos\nsystem\n(S'touch payload'\ntR."])
def test_a_damaged_or_foreign_state_is_one_line_and_runs_nothing(tmp_path, config, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Run(tmp_path / "run", config(), loop="grpo")
    (tmp_path / "run" / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match="^resume: could not read .*state.pt") as error:
        Run(tmp_path / "run", config(), loop="grpo", resume=True)
    assert "\n" not in str(error.value) and not (tmp_path / "payload").exists()


def test_a_run_of_the_other_loop_is_one_line(tmp_path, config):
    Run(tmp_path, config(), loop="curriculum").save(next_stage=1)
    with pytest.raises(
        ValueError, match="^resume: got a run of loop curriculum in .*, expected grpo; use another --out"
    ):
        Run(tmp_path, config(), loop="grpo", resume=True)


def test_a_failing_save_leaves_the_last_checkpoint(tmp_path, config, monkeypatch):
    run = Run(tmp_path, config(), loop="grpo")
    run.save(next_step=1)

    def half(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as broken, pytest.raises(OSError):
        broken.setattr(torch, "save", half)
        run.save(next_step=2)
    assert Run(tmp_path, config(), loop="grpo", resume=True).state["next_step"] == 1


class FakeModel:
    def __init__(self, text, fails=False):
        self.text, self.fails = text, fails

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "weights").write_text(self.text)
        if self.fails:
            raise OSError("no space left on device")


def test_best_is_replaced_whole_or_not_at_all(tmp_path, config):
    run = Run(tmp_path, config(), loop="grpo")
    run.save_best(FakeModel("one"))
    run.save_best(FakeModel("two"))
    with pytest.raises(OSError):
        run.save_best(FakeModel("three", fails=True))
    assert (tmp_path / "best" / "weights").read_text() == "two"
    run.save_best(FakeModel("four"))  # the leftover of the failure is no obstacle
    assert (tmp_path / "best" / "weights").read_text() == "four"
    assert not (tmp_path / "best.old").exists() and not (tmp_path / "best.partial").exists()


def test_a_kill_between_the_two_renames_loses_no_best(tmp_path, config):
    Run(tmp_path, config(), loop="grpo").save_best(FakeModel("one"))
    (tmp_path / "best").rename(tmp_path / "best.old")
    Run(tmp_path, config(), loop="grpo", resume=True)
    assert (tmp_path / "best" / "weights").read_text() == "one"


@pytest.mark.parametrize(("total", "size"), [(10, 3), (4, 10), (7, 7)])
def test_batches_are_epochs_of_permutations_and_a_function_of_the_step(total, size):
    picked = [i for step in range(20) for i in batch_indices(total, size, seed=3, step=step)]
    epochs = [picked[i : i + total] for i in range(0, 20 * size - total + 1, total)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert batch_indices(total, size, seed=3, step=5) == picked[5 * size : 6 * size]
    assert batch_indices(total, size, seed=4, step=5) != picked[5 * size : 6 * size]


def test_the_learning_rate_rises_then_falls_to_its_share():
    shares = [warmup_cosine(i, total=100, warmup=10, final=0.1) for i in range(101)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1.0 and shares[55] == pytest.approx(0.55) and shares[100] == pytest.approx(0.1)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert warmup_cosine(0, total=5, warmup=0, final=0.0) == 1.0


def test_the_learning_rate_reaches_every_group():
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))]},
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 3.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
