"""bench/: every figure comes from its own seconds, all variants make the same rollouts, bad shapes are one line."""

import json
from functools import partial

import pytest
import torch
from transformers import GPT2Config

from latentlab.backbone import multiplies_bfloat16
from latentlab.bench import against, baselines, engine, rows, run, timing
from latentlab.cli import main
from latentlab.config import flat
from latentlab.masks import MaskSpec
from latentlab.rollouts import encode_prompts
from latentlab.training import arms
from tests.conftest import sharpen, small_config


@pytest.fixture
def toy(monkeypatch):
    """A shape of a few thousand weights."""
    shape = GPT2Config(
        vocab_size=128, n_layer=2, n_embd=16, n_head=2, n_positions=96, **engine.NO_DROPOUT, **engine.IDS
    )
    monkeypatch.setitem(engine.SHAPES, "toy", shape)


@pytest.fixture
def model(toy):
    return sharpen(engine.build("toy")).double()


@pytest.fixture
def tiny(monkeypatch):
    """Whole steps of a few problems."""
    config = small_config(data={"steps": 4}, curriculum={"steps": [1, 1, 1, 1, 1]})
    monkeypatch.setattr(rows, "TINY", config)
    monkeypatch.setattr(run, "TINY", config)


def test_figures_are_those_of_the_seconds(toy, tiny):
    axes = {"num_generations": (1, 2, 3), "thoughts": (0, 1, 2)}
    found = run.run_bench("toy", num_problems=2, num_generations=2, repeats=1, axes=axes)["metrics"]
    s, tricks = found["seconds"], found["seconds"]["tricks"]
    assert all(value > 0 for value in flat(s).values())
    assert found["rollouts_per_second"] == pytest.approx(4 / s["rollout"])
    assert found["speedup_vs_official_scheme"] == pytest.approx(s["official"] / s["rollout"])
    assert found["update_speedup_vs_plain"] == pytest.approx(s["update_plain"] / s["update"])
    assert found["floor_fraction"]["update"] == pytest.approx(s["update_floor"] / s["update"])
    assert found["mask_overhead"] == pytest.approx(s["rollout"] / s["unmasked_per_row"] - 1)
    saved = found["tricks"]
    assert saved["update"]["prefix_per_row"] == pytest.approx(tricks["update_prefix_per_row"] / tricks["update"])
    assert saved["rollout"]["rows_stay"] == pytest.approx(tricks["rollout"] / tricks["rollout_ends_early"])
    assert saved["rollout"]["thoughts_per_row"] == pytest.approx(s["unmasked_per_row"] / s["unmasked"])
    assert set(saved["rollout"]) == {"prefix_per_row", *baselines.VARIANTS, "rows_stay", "thoughts_per_row"}
    assert set(saved["update"]) == {"prefix_per_row", *baselines.VARIANTS} - {"cache_grown"}
    assert found["gradient_error"] < 1e-5
    speeds, steps = found["tiny"]["rollouts_per_second"], found["tiny"]["seconds"]
    assert speeds == {arm: pytest.approx(12 / steps[f"iteration_{arm}"]) for arm in ("temperature", "shared")}
    if multiplies_bfloat16("cpu"):
        assert found["bfloat16"]["update"] == pytest.approx(s["update"] / s["update_bfloat16"])
        assert found["bfloat16"]["replay_gap_float32"] < 1e-5 and found["bfloat16"]["replay_gap"] < 0.1
    for axis, line in found["scaling"].items():
        middle = sum(line["values"]) / 3 * line["slope"] + line["intercept"]
        assert middle == pytest.approx(sum(line["seconds"]) / 3) and 0 <= line["r2"] <= 1 and axis in axes


def test_whole_steps_are_those_of_the_training_loops(tiny):
    """An iteration and a curriculum step move weights; validation and rollouts answer all their problems."""
    made = {name: make() for name, make in rows.tiny_rows().items()}
    assert [name for name in made if "stage" in name] == [f"curriculum_stage_{stage}" for stage in range(5)]
    for name in ("iteration_shared", "iteration_temperature", "curriculum_stage_0", "curriculum_stage_4"):
        assert made[name]()["grad_norm"] > 0, name
    assert made["iteration_shared"]()["candidates"] == 3
    assert len(made["validation"]().problems) == 6 and made["rollout_shared"]().tokens.shape[0] == 12
    assert made["rollout_shared"]().masks is not None and made["rollout_temperature"]().masks is None


@pytest.mark.parametrize("name", baselines.VARIANTS)
def test_a_variant_makes_the_engines_rollouts_and_gradients(model, name):
    """Only the way there differs: tokens, log-probs and the gradient are those of the engine."""
    problems = engine.questions(3, 12)
    other = engine.variant(model, baselines.VARIANTS[name])
    for spec in (MaskSpec(rate=0.3), MaskSpec("per_step", 0.3, scope="all"), None):
        ours, theirs = (engine.sample(m, problems, 3, spec) for m in (model, other))
        assert torch.equal(ours.tokens, theirs.tokens) and ours.tokens.shape == (9, engine.ANSWER)
        torch.testing.assert_close(ours.logp, theirs.logp, rtol=0, atol=1e-11)
        grads = []
        for m in (model, other):
            engine.update(m, partial(engine.score, m, ours))
            grads.append([p.grad.clone() for p in m.parameters()])
        torch.testing.assert_close(*grads, rtol=0, atol=1e-9)


def test_the_baselines_make_the_engines_rollouts(model):
    """The official scheme's greedy answers, and plain batching's sampled ones, are those of the engine, unmasked."""
    problems = engine.questions(2, 12)
    prompts, _ = encode_prompts(model.tokenizer, problems, "cpu")
    sampled = engine.sample(model, problems, 3, None)
    logp = baselines.plain(model, prompts.repeat_interleave(3, 0), sampled.seeds)
    torch.testing.assert_close(logp.detach(), sampled.logp, rtol=0, atol=1e-11)
    forced = baselines.plain(model, prompts.repeat_interleave(3, 0), sampled.seeds, sampled.tokens)
    torch.testing.assert_close(forced.detach(), sampled.logp, rtol=0, atol=1e-11)
    greedy = engine.rollout(model, problems, num_generations=1, masks=None, temperature=0.0, run_seed=0, step=0)
    assert [baselines.official(model, prompt[None]) for prompt in prompts] == greedy.tokens.tolist()


def test_prompts_have_the_length_they_are_said_to_have(model):
    for length in (2, 16, 128):
        assert encode_prompts(model.tokenizer, engine.questions(3, length), "cpu")[1].sum(1).tolist() == [length] * 3


def test_answers_that_end_early_leave_the_batch(model):
    early = engine.variant(model, baselines.EarlyEnd)
    lengths = engine.sample(early, engine.questions(4, 12), 16).token_mask.sum(1).double()
    assert 2 < lengths.mean() < 6 and lengths.max() == engine.ANSWER  # (1 - 0.75**8) / 0.25 = 3.6 on average


def test_whole_iterations_end_at_the_limit(model):
    found = engine.whole_iterations(model.float(), 2, most=8)
    assert found["rows"] == [2, 4, 8] and found["largest_rows"] == 8
    assert found["best_rollouts_per_second"] == max(found["rollouts_per_second"]) > 0


def test_runs_are_interleaved():
    calls = []
    seconds, memory = timing.measure({name: lambda name=name: calls.append(name) for name in "ab"}, 2, "cpu")
    assert calls == list("ab" * 2)
    assert set(seconds) == {"a", "b"} and set(memory) <= {"a", "b"}


@pytest.mark.skipif(timing.peak_memory(lambda: None, "cpu") is None, reason="this system does not tell")
def test_peak_memory_is_what_a_run_holds():
    assert timing.peak_memory(lambda: torch.ones(2**26).sum(), "cpu") == pytest.approx(0.25, abs=0.05)
    assert timing.peak_memory(lambda: None, "cpu") < 0.05


def test_the_result_and_its_copy_are_written(toy, tiny, tmp_path, monkeypatch, capsys):
    """On a CPU without instructions for bfloat16, which is said in place of its rows."""
    monkeypatch.setattr(run, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path))
    small = {"num_problems": 1, "num_generations": 2, "repeats": 1, "axes": {"answer": (1, 2)}}
    monkeypatch.setattr(run, "run_bench", partial(run.run_bench, **small))
    monkeypatch.setitem(engine.SHAPES, "tiny", engine.SHAPES["toy"])
    assert main(["bench", "--shape", "tiny", "--json", str(tmp_path / "copy.json")]) == 0
    written = json.loads((tmp_path / "bench" / "cpu_tiny.json").read_text())
    assert written == json.loads((tmp_path / "copy.json").read_text())
    assert "avx512_bf16" in written["metrics"]["bfloat16"]["skipped"]
    assert written["parameters"]["threads"] == 1 and "times the official scheme" in written["headline"]
    table = capsys.readouterr().out
    assert (tmp_path / "bench" / "cpu_tiny.png").exists()
    assert "speedup_vs_definition  " in table and "scaling.answer.seconds.1  " in table


def test_a_bad_shape_is_one_line():
    with pytest.raises(ValueError, match="expected one of tiny, gpt2, smollm2"):
        run.run_bench("huge")


# -- two checkouts --------------------------------------------------------------------------------


def measured(seconds, digest="", gradient=1.0, left_out=()):
    """What rows.py prints for a row "a" and a row "b"."""
    outcomes = {name: {"hash": digest, "gradient": gradient} for name in seconds}
    return {"seconds": seconds, "outcomes": outcomes, "left_out": dict.fromkeys(left_out, "why")}


def test_ratios_are_paired():
    """Each pair at its own speed of the machine: the ratio is 2 in all of them."""
    here = [measured({"a": 1.0 * load, "b": 1.0}) for load in (1, 2, 5)]
    there = [measured({"a": 2.0 * load}, "other", 1.5, ["b"]) for load in (1, 2, 5)]
    found = against.compare(here, there)
    assert set(found["rows"]) == {"a"} and found["left_out"] == {"b": "why"} and found["different"] == ["a"]
    row = found["rows"]["a"]
    assert row["speedup"] == row["low"] == row["high"] == 2 and (row["seconds_here"], row["seconds_there"]) == (2, 4)
    assert row["gradient_difference"] == pytest.approx(1 / 3)


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like another checkout."""
    (tmp_path / "other" / "latentlab").mkdir(parents=True)
    (tmp_path / "other" / "latentlab" / "__init__.py").touch()
    (tmp_path / "other" / "torch.py").touch()  # imported in place of torch, in less time
    return tmp_path / "other"


def test_checkouts_are_timed_in_turn(checkout, monkeypatch, tmp_path, capsys):
    order = []

    def fake(folder, shape):
        order.append("there" if folder == checkout else "here")
        return measured({"a": 1.0 if order[-1] == "here" else 3.0})

    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path))
    monkeypatch.setattr(against, "time_rows", fake)
    assert main(["bench", "--against", str(checkout), "--shape", "tiny", "--pairs", "3"]) == 0
    assert order == ["there", "here", "here", "there", "there", "here"]
    written = json.loads((tmp_path / "bench" / "against_tiny.json").read_text())
    assert written["metrics"]["rows"]["a"]["speedup"] == 3 and "are equal" in written["headline"]
    assert "3.00 times as fast" in capsys.readouterr().out


def test_a_row_that_fails_here_ends_the_comparison(checkout, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path))
    monkeypatch.setattr(against, "time_rows", lambda *_: measured({}, left_out=["a"]))
    assert main(["bench", "--against", str(checkout)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "latentlab: bench: a: why"


def test_a_folder_that_is_no_checkout_is_one_line(tmp_path, checkout, capsys):
    with pytest.raises(ValueError, match="against: got .*, expected a checkout of this project; make one"):
        against.run_against(tmp_path, "tiny")
    with pytest.raises(ValueError, match='against: got "?ModuleNotFoundError: .*use a later commit'):
        against.run_against(checkout, "tiny")
    for words, message in (["nowhere"], "got nowhere"), ([str(checkout), "--device", "cuda"], "got --device cuda"):
        assert main(["bench", "--against", *words]) == 2
        assert capsys.readouterr().err.startswith(f"latentlab: against: {message}, expected")


def test_rows_of_another_version_are_left_out_with_their_reason(toy, tiny, monkeypatch, capsys):
    monkeypatch.setattr(rows, "CALLS", {"tiny": 1, "shape": 1})
    monkeypatch.delattr(arms, "_iteration")
    rows.main("toy")
    found = json.loads(capsys.readouterr().out)
    assert set(found["left_out"]) == {"iteration_temperature", "iteration_shared"}
    assert "no attribute '_iteration'" in found["left_out"]["iteration_shared"]
    assert set(found["seconds"]) == set(found["outcomes"]) > {"validation", "toy_update_masked"}
    assert found["outcomes"]["toy_update_masked"]["gradient"] > 0 < found["seconds"]["validation"]


def test_equal_rollouts_have_equal_hashes(model):
    """Of tokens and rewards: not of what lies behind the end of an answer."""
    problems = engine.questions(2, 12)
    first, again = (engine.sample(model, problems, 2) for _ in range(2))
    again.tokens[1, -1], again.token_mask[1, -1] = 3, False
    first.token_mask[1, -1] = False
    assert rows.outcome(first) == rows.outcome(again)
    again.tokens[1, 0] += 1
    assert rows.outcome(first) != rows.outcome(again)
