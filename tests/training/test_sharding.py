"""sharding.py: shards on N processes do what the whole model does on one, and no error leaves a process waiting."""

import io
import os
import shutil
from contextlib import redirect_stderr
from dataclasses import replace
from unittest.mock import patch

import pytest
from safetensors.torch import load_file

from latentlab import cli
from latentlab.model import LatentReasoner
from latentlab.pretrained.loading import load_model
from latentlab.runtime import distributed
from latentlab.training import arms, sharding
from latentlab.training.arms import _iteration, fit_grpo
from latentlab.training.run import Stopped, read_metrics
from tests.conftest import sharpen
from tests.reliability.processes import (
    CONFIG,
    TRAIN,
    VALIDATION,
    Recorder,
    first_digit,
    flat,
    measure_rollouts,
    measure_training,
    tiny_llama,
    together,
)
from tests.training.test_distributed import SMALL, assert_alike, complain, die, reward_that_calls, terminate

SHARDED = {"make": tiny_llama, "shard": True, "sizes": (1, 2)}
FEW = replace(CONFIG, grpo=replace(CONFIG.grpo, num_problems=4, max_candidates=5))


def test_rollouts_and_weights_after_20_float64_steps_are_those_of_one_process(tmp_path):
    for name, run in measure_rollouts(tmp_path / "rollouts", **SHARDED).items():
        assert run["accepted"] == 32 and run["differing"] == 0 and run["same_choice"], name
    for name, run in measure_training(tmp_path / "training", config=FEW, **SHARDED).items():
        assert run["steps"] >= 20 and run["weights"] < 1e-9 and run["metrics"] < 1e-9, name
        assert run["between_processes"] == 0, name


# -- passes that differ between processes ---------------------------------------------------------------------------


def gradient(**grpo):
    """The gradient of one step of four rollouts for each of two problems, from a Llama with a tied head."""
    model = sharpen(tiny_llama(tied=True)).double()
    model.same_passes = True  # as with shards: the norms of Llama round sums to float32
    settings = {"num_problems": 2, "max_candidates": 0, "max_grad_norm": 1e9, "epsilon_high": 0.2}
    config = replace(CONFIG, grpo=replace(CONFIG.grpo, **settings, **grpo))
    reference = sharpen(tiny_llama(tied=True), 3.0).double().requires_grad_(False) if config.grpo.beta else None
    if distributed.size() > 1:
        for each in filter(None, (model, reference)):
            sharding.shard(each, [config.grpo.mask.sites])
    recorder = Recorder(model)
    record = _iteration(model, reference, recorder, TRAIN, config, 3, first_digit, None)
    return recorder.gradient, record


def gradients():
    splits = [{"micro_batch": 1, "beta": 0.1}, {"memory_gib": 1e-5}, {"arm": "supervised"}]
    return [gradient(**split) for split in [{"arm": "temperature"}, *splits]]


def test_a_process_without_a_problem_and_every_number_of_micro_batches(tmp_path):
    (one,), *more = (together(n, gradients, tmp_path / f"{n}") for n in (1, 2, 3))
    for rank in [rank for ranks in more for rank in ranks]:
        for (whole, record), (got, stats) in zip(one, rank, strict=True):
            assert abs(got - whole).max() < 1e-12 < abs(whole).max()
            assert stats == pytest.approx(record, abs=1e-12)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def fit(out, on_rank_1=None, at=0, **options):
    """A run of five steps; on_rank_1, at: see `reward_that_calls`."""
    reward = reward_that_calls(on_rank_1, at)
    model = sharpen(tiny_llama()).double()
    options = {"shard": distributed.size() > 1, **options}
    with redirect_stderr(io.StringIO()) as said:
        summary = fit_grpo(model, TRAIN, VALIDATION, SMALL, out=out, reward=reward, **options)
    return summary, flat(model.parameters()), said.getvalue()


def contents(folder):
    """The bytes of all lines, and of all tensors in state/ and best/."""
    tensors = {
        path.name: load_file(path) for name in ("state", "best") for path in folder.glob(f"{name}/*.safetensors")
    }
    bits = {(name, key): x.numpy().tobytes() for name, held in tensors.items() for key, x in held.items()}
    return (folder / "metrics.jsonl").read_bytes(), bits


def test_a_killed_run_goes_on_bit_for_bit_and_with_any_number_of_processes(tmp_path):
    whole, run, other = (tmp_path / name for name in ("whole", "run", "other"))
    summary = together(2, fit, tmp_path / "2", out=whole)
    errors = together(2, fit, tmp_path / "killed", out=run, on_rank_1=die, at=20)
    assert errors[1] is None and str(errors[0]).startswith("process 0 of 2: lost another process")
    stopped = together(2, fit, tmp_path / "stopped", out=run, resume=True, on_rank_1=terminate, at=10)
    assert [type(error) for error in stopped] == [Stopped] * 2
    shutil.copytree(run, other)
    (run / "state").rename(run / "state.old")  # killed between the two renames of a new state,
    (run / "state.shards.partial").mkdir()  # and while one was written
    resumed = together(2, fit, tmp_path / "resumed", out=run, resume=True)
    assert contents(run) == contents(whole) and sorted(os.listdir(run)) == sorted(os.listdir(whole))
    elsewhere = together(3, fit, tmp_path / "3", out=other, resume=True)
    assert elsewhere[0][2] == "resume: the checkpoint was made with processes 2 (now 3); last digits may differ\n"
    assert_alike(other, whole, 1e-9)
    best = flat(load_model(whole / "best").double().parameters())  # in float32
    for result in (*summary, *resumed, *elsewhere):
        assert result[0] == summary[0][0]
        assert abs(result[1] - best).max() < 1e-6 < abs(best).max()


def damaged(out):
    """A finished run that is resumed: with a shard that was cut, with one that is missing, and unsharded."""
    fit(out)
    shard = min((out / "state").glob("*.safetensors"))
    errors = []
    for spoil in (lambda: os.truncate(shard, 1000), lambda: shard.unlink()):
        distributed.on_main(spoil)
        for options in ({}, {"shard": False}):
            try:
                fit(out, resume=True, **options)
            except ValueError as error:
                errors.append(str(error))
    return errors


def test_a_damaged_or_foreign_state_is_one_line(tmp_path):
    for cut, unsharded, missing, _ in together(2, damaged, tmp_path / "2", out=tmp_path / "run"):
        assert cut == missing
        assert cut.startswith(f"resume: could not read {tmp_path}/run/state (ValueError), expected it as this version")
        assert unsharded.startswith(f"resume: got {tmp_path}/run/state, expected {tmp_path}/run/state.pt; pass --shard")


# -- failing --------------------------------------------------------------------------------------------------------


def test_what_fails_on_one_process_fails_on_all(tmp_path):
    errors = together(3, fit, tmp_path / "3", out=tmp_path / "run", on_rank_1=complain, at=10)
    assert [(type(error), str(error)) for error in errors] == [(ValueError, "grpo at step 2, reward: got no sense")] * 3


def fit_without_memory(out):
    def head(self, hidden):
        raise RuntimeError("out of memory: 2 GiB")

    if distributed.rank() == 1:
        arms.policy_gradient = patch.object(LatentReasoner, "head", head)(arms.policy_gradient)  # in this process alone
    return fit(out)


def test_an_error_in_the_middle_of_a_pass_leaves_no_process_waiting(tmp_path):
    errors = together(3, fit_without_memory, tmp_path / "3", out=tmp_path / "run")
    assert [type(error) for error in errors] == [distributed.LostProcess] * 3
    assert "process 1 of 3: out of memory: 2 GiB; read the first message" in str(errors[1])


def test_one_process_has_nobody_to_share_with(tmp_path, capsys):
    assert cli.main(["grpo", "--preset", "smoke", "--shard", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(
        "latentlab: --shard: got one process, expected several to split the model"
    )
    assert not (tmp_path / "run").exists()


# -- precision ------------------------------------------------------------------------------------------------------


def fit_in_bfloat16(out):
    model = sharpen(tiny_llama()).place("cpu", "bfloat16")
    fit_grpo(model, TRAIN, VALIDATION, SMALL, out=out, reward=first_digit, shard=distributed.size() > 1)
    return {str(p.dtype) for p in model.parameters()}, read_metrics(out)


def test_bfloat16_gathers_blocks_in_it_and_keeps_float32(tmp_path):
    (one,), two = (together(n, fit_in_bfloat16, tmp_path / f"{n}", out=tmp_path / f"run{n}") for n in (1, 2))
    for dtypes, lines in two:
        assert dtypes == {"torch.float32"}
        assert lines[1]["grad_norm"] == pytest.approx(one[1][1]["grad_norm"], rel=0.1)
        assert 0 <= lines[1]["replay_gap"] < 0.1
