"""bench/: every figure comes from its own seconds, all variants make the same rollouts, bad shapes are one line."""

import json
from functools import partial

import pytest
import torch
from transformers import GPT2Config

from latentlab.bench import baselines, engine, timing
from latentlab.cli import main
from latentlab.masks import MaskSpec
from latentlab.rollouts import encode_prompts
from tests.conftest import sharpen


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


def test_figures_are_those_of_the_seconds(toy):
    axes = {"num_generations": (1, 2, 3), "thoughts": (0, 1, 2)}
    found = engine.run_bench("toy", num_problems=2, num_generations=2, repeats=1, axes=axes)["metrics"]
    s = found["seconds"]
    assert all(value > 0 for value in s.values())
    assert found["rollouts_per_second"] == pytest.approx(4 / s["rollout"])
    assert found["speedup_vs_official_scheme"] == pytest.approx(s["official"] / s["rollout"])
    assert found["update_speedup_vs_plain"] == pytest.approx(s["update_plain"] / s["update"])
    assert found["update_speedup_prefix_only"] == pytest.approx(s["update_prefix_per_row"] / s["update"])
    assert found["floor_fraction"]["update"] == pytest.approx(s["update_floor"] / s["update"])
    assert found["mask_overhead"] == pytest.approx(s["rollout"] / s["unmasked"] - 1)
    assert set(found["tricks"]["rollout"]) == {"prefix_per_row", *baselines.VARIANTS, "rows_stay"}
    assert set(found["tricks"]["update"]) == {"prefix_per_row", *baselines.VARIANTS} - {"cache_grown"}
    assert found["gradient_error"] < 1e-5
    for axis, line in found["scaling"].items():
        middle = sum(line["values"]) / 3 * line["slope"] + line["intercept"]
        assert middle == pytest.approx(sum(line["seconds"]) / 3) and 0 <= line["r2"] <= 1 and axis in axes


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


def test_the_result_and_its_copy_are_written(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LATENTLAB_REPORTS", str(tmp_path))
    small = {"num_problems": 1, "num_generations": 2, "repeats": 1, "axes": {"answer": (1, 2)}}
    monkeypatch.setattr(engine, "run_bench", partial(engine.run_bench, **small))
    monkeypatch.setitem(engine.SHAPES, "tiny", engine.SHAPES["toy"])
    assert main(["bench", "--shape", "tiny", "--json", str(tmp_path / "copy.json")]) == 0
    written = json.loads((tmp_path / "bench" / "cpu_tiny.json").read_text())
    assert written == json.loads((tmp_path / "copy.json").read_text())
    assert written["parameters"]["threads"] == 1 and "times the official scheme" in written["headline"]
    table = capsys.readouterr().out
    assert (tmp_path / "bench" / "cpu_tiny.png").exists()
    assert "speedup_vs_definition  " in table and "scaling.answer.seconds.1  " in table


def test_a_bad_shape_is_one_line():
    with pytest.raises(ValueError, match="expected one of tiny, gpt2, smollm2"):
        engine.run_bench("huge")
