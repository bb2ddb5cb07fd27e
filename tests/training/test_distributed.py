"""distributed.py: N processes do what one does, fail together, stop together; what N may change is rounding."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentlab import cli
from latentlab.evaluation.accuracy import evaluate
from latentlab.loss import LOSS_TYPES
from latentlab.runtime import distributed, files
from latentlab.training.arms import fit_grpo, sample_groups
from latentlab.training.run import Stopped, read_metrics
from tests.conftest import sharpen, tiny_gpt2
from tests.reliability.processes import CONFIG, MEASURES, TRAIN, VALIDATION, first_digit, gradient, together

SMALL = replace(
    CONFIG, grpo=replace(CONFIG.grpo, num_problems=4, max_candidates=0, num_iterations=2, steps=5, eval_every=2)
)

# -- what one process does ------------------------------------------------------------------------------------------


def test_rollouts_and_accepted_groups_are_those_of_one_process(tmp_path):
    for name, run in MEASURES["rollouts"](tmp_path).items():
        assert run["accepted"] == 32 and run["differing"] == 0 and run["same_choice"], name
        assert [sum(shares) for shares in run["groups_per_process"]] == [32, 32, 32]
        assert all(min(shares) > 0 for shares in run["groups_per_process"])


def test_float32_gradients_are_those_of_one_process_and_one_batch(tmp_path):
    for name, distance in MEASURES["gradients"](tmp_path).items():
        assert 0 < distance < 1e-5, name


def test_after_20_float64_steps_so_are_weights_and_metrics(tmp_path):
    for name, run in MEASURES["training"](tmp_path).items():
        assert run["steps"] == 20 and run["weights"] < 1e-9 and run["metrics"] < 1e-9, name
        assert run["between_processes"] == 0, name


def gradients_of_two_problems():
    settings = {"loop": "grpo", "dtype": torch.float64, "num_problems": 2}
    variants = [{"loss_type": name} for name in LOSS_TYPES]
    variants += [{"scale_rewards": "batch"}, {"importance_sampling_level": "sequence"}]
    return [gradient(**settings, **variant) for variant in variants]


def test_a_process_without_a_group_and_every_denominator(tmp_path):
    (one,), three = (together(n, gradients_of_two_problems, tmp_path / f"{n}") for n in (1, 3))
    for rank in three:
        for (whole, record), (got, stats) in zip(one, rank, strict=True):
            assert abs(got - whole).max() < 1e-12 < abs(whole).max()
            assert stats == pytest.approx(record, abs=1e-12)


def assert_alike(folder, other, bound):
    """Equal metrics, line by line, within `bound`."""
    for line, expected in zip(read_metrics(folder), read_metrics(other), strict=True):
        assert line.pop("arm", "") == expected.pop("arm", "")
        assert line == pytest.approx(expected, rel=bound, abs=bound)


def accuracies():
    result = evaluate(sharpen(tiny_gpt2()), VALIDATION, batch_size=3, num_generations=2, temperature=1.0, run_seed=1)
    return result.correct.tolist(), result.text, [p.id for p in result.problems]


def test_an_evaluation_is_the_same_on_every_process_bit_for_bit(tmp_path):
    (one,), three = together(1, accuracies, tmp_path / "1"), together(3, accuracies, tmp_path / "3")
    assert three == [one] * 3 and len(one[1]) == 20


def test_shares_are_even_and_in_order(monkeypatch):
    items = list(range(11))
    shares = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "size", lambda: 4)
        shares.append(distributed.shard(items))
    assert [len(share) for share in shares] == [3, 3, 3, 2]
    assert distributed.in_order(shares) == items
    assert distributed.in_order([[0], [], []]) == [0]


# -- dynamic sampling -----------------------------------------------------------------------------------------------


def test_arms_get_equal_rollouts_however_many_groups_are_mixed(tmp_path):
    """A budget of 5 * 4 * 4 rollouts: 9 candidates a step, 8 in the third; no mixed group, no update."""
    config = replace(SMALL, grpo=replace(SMALL.grpo, max_candidates=9, weight_decay=0.1, eval_every=1))
    finals = {}
    for name, reward in (("all", first_digit), ("none", lambda text, problem: 1.0)):
        model = sharpen(tiny_gpt2())
        before = model.lm.transformer.ln_f.weight.clone()
        summary = fit_grpo(model, TRAIN, VALIDATION, config, out=tmp_path / name, reward=reward)
        lines = read_metrics(tmp_path / name)[1:]
        assert summary["rollouts"] == lines[-1]["rollouts"] == 80
        assert [line["rollouts"] for line in lines] == np.cumsum([4 * line["candidates"] for line in lines]).tolist()
        finals[name] = torch.load(tmp_path / name / "state.pt", weights_only=True)["model"]["transformer.ln_f.weight"]
        assert torch.equal(finals[name], before) is (name == "none")
    assert [line["candidates"] for line in lines] == [9, 9, 2]
    assert {(line["groups"], line["frac_reward_zero_std"], line["grad_norm"]) for line in lines} == {(0, 1.0, 0.0)}


def test_batch_scaling_takes_all_candidates_also_those_that_are_dropped():
    settings = {"loop": "grpo", "dtype": torch.float64, "num_problems": 4, "max_candidates": 9}
    config = replace(CONFIG, grpo=replace(CONFIG.grpo, num_problems=4, max_candidates=9))
    batch = sample_groups(sharpen(tiny_gpt2()).double(), TRAIN, config, 3, first_digit)
    assert len(batch.kept) < len(batch.rewards)
    (plain, _), (scaled, _) = (gradient(**settings, scale_rewards=scale) for scale in ("none", "batch"))
    assert plain.any() and scaled == pytest.approx(plain / (batch.rewards.std().item() + 1e-4), rel=1e-9, abs=1e-15)


# -- failing and stopping -------------------------------------------------------------------------------------------


def reward_that_calls(on_rank_1, at):
    """`first_digit`, which calls `on_rank_1` on that process at its `at`-th call."""
    calls = [0]

    def reward(text, problem):
        calls[0] += 1
        if on_rank_1 and distributed.rank() == 1 and calls[0] == at:
            on_rank_1()
        return first_digit(text, problem)

    return reward


def fit(out, on_rank_1=None, at=0, resume=False):
    """A run of five steps; on_rank_1, at: see `reward_that_calls`."""
    reward = reward_that_calls(on_rank_1, at)
    return fit_grpo(sharpen(tiny_gpt2()).double(), TRAIN, VALIDATION, SMALL, out=out, reward=reward, resume=resume)


def complain():
    raise ValueError("reward: got no sense")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def die():
    os._exit(9)


def test_what_fails_on_one_process_fails_on_all_in_the_same_words(tmp_path):
    errors = together(3, fit, tmp_path / "3", out=tmp_path / "run", on_rank_1=complain, at=10)
    assert [(type(error), str(error)) for error in errors] == [(ValueError, "grpo at step 2, reward: got no sense")] * 3
    assert all(map(distributed.raised_everywhere, errors))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [-1, 0, 1]


def fit_without_space(out):
    def full(path):
        raise OSError("No space left on device")

    files.flush = full  # in this process alone
    return fit(out)


def test_only_rank_0_writes_and_its_failure_is_everyones(tmp_path):
    errors = together(2, fit_without_space, tmp_path / "2", out=tmp_path / "run")
    assert {type(error) for error in errors} == {OSError} and len({str(error) for error in errors}) == 1
    assert "No space left on device" in str(errors[0])


def test_a_process_that_is_gone_ends_the_others_with_one_line(tmp_path):
    errors = together(2, fit, tmp_path / "2", out=tmp_path / "run", on_rank_1=die, at=20)
    assert errors[1] is None and isinstance(errors[0], RuntimeError)
    assert str(errors[0]).startswith("process 0 of 2: lost another process") and "\n" not in str(errors[0])


def test_a_signal_to_one_stops_all_at_the_same_step_and_any_number_goes_on(tmp_path):
    stopped = together(3, fit, tmp_path / "3", out=tmp_path / "run", on_rank_1=terminate, at=10)
    assert [type(error) for error in stopped] == [Stopped] * 3
    assert len({str(error) for error in stopped}) == 1 and "stopped by SIGTERM after step 2" in str(stopped[0])
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [-1, 0, 1, 2]
    (whole,) = together(1, fit, tmp_path / "1", out=tmp_path / "whole")
    assert together(2, fit, tmp_path / "2", out=tmp_path / "run", resume=True) == [whole] * 2
    assert_alike(tmp_path / "run", tmp_path / "whole", 1e-9)


def other_problems():
    distributed.check_same(problems=[p.id for p in TRAIN[: 2 + distributed.rank() // 2]])


def test_other_files_on_one_machine_are_one_line(tmp_path):
    errors = together(3, other_problems, tmp_path / "3")
    assert [str(error) for error in errors] == [str(errors[0])] * 3
    assert str(errors[0]).startswith("processes: got another problems on process 2 than on process 0, expected")


def test_a_launch_that_cannot_work_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for argv, message in (
        (["grpo", "--device", "cuda:1"], "--device: got cuda:1 for 2 processes, expected auto, cpu or cuda"),
        (["sweep"], "sweep: got 2 processes, expected one"),
        (
            ["grpo", "--grpo.arm", "nonsense"],
            "grpo: invalid choice 'nonsense' for argument '--grpo.arm'. Expected one of",
        ),
    ):
        assert cli.main(argv) == 2
        assert capsys.readouterr().err.startswith(f"latentlab: {message}")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["grpo", "--grpo.arm", "nonsense"]) == 2
    assert capsys.readouterr().err == ""  # rank 0 says it
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert cli.main(["grpo"]) == 2
    assert capsys.readouterr().err.startswith("latentlab: accelerate launch: got --cpu")


# -- as users start it ----------------------------------------------------------------------------------------------


ENDING = """
import sys
from pathlib import Path
from latentlab import cli
code = cli.main(sys.argv[1:])
threads = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
sys.exit(code or next(("left at the end: " + name for name in threads if "gloo" in name), 0))
"""


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc_per_node 2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched_processes_make_the_run_of_one_and_end_their_threads(tmp_path, capsys, launcher):
    module, *options = LAUNCHERS[launcher].split()
    pytest.importorskip(module.partition(".")[0])  # accelerate comes with the extra dev
    (tmp_path / "ending.py").write_text(ENDING)
    words = ["grpo", "--preset", "smoke", "--grpo.steps", "2", "--grpo.max-candidates", "8", "--device", "cpu"]
    launch = [sys.executable, "-m", module, *options, str(tmp_path / "ending.py"), *words]
    launch += ["--out", str(tmp_path / "two"), *(["--shard"] if launcher == "accelerate" else [])]
    done = subprocess.run(launch, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
    summary = json.loads(done.stdout)  # one line: rank 0's
    varying = {"out": 0, "peak_memory_gib": 0}
    assert summary | varying == json.loads(capsys.readouterr().out) | varying
    assert_alike(tmp_path / "two", tmp_path / "one", 1e-4)  # float32
