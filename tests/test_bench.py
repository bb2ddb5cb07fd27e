"""bench.py: every ratio comes from its own seconds, and bad shapes or devices are one line."""

import pytest
import torch

from latentlab import bench


def test_ratios_are_those_of_the_seconds(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "toy", {"n_layer": 1, "n_embd": 16, "n_head": 2})
    monkeypatch.setattr(bench, "DEFINITION_ROWS", 1)
    found = bench.run_bench(shape="toy", num_problems=2, num_generations=2, repeats=1)
    seconds = {key.split(".")[1]: value for key, value in found.items() if key.startswith("seconds.")}
    assert all(value > 0 for value in seconds.values())
    assert found["rollouts_per_second"] == pytest.approx(4 / seconds["rollout"])
    assert found["speedup_vs_definition"] == pytest.approx(seconds["definition"] / seconds["rollout"])
    assert found["update_speedup_prefix"] == pytest.approx(seconds["update_unshared_prefix"] / seconds["update"])


def test_variants_are_interleaved_and_the_first_round_does_not_count():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = bench.median_seconds(variants, 2, "cpu")
    assert calls == list("ab" * 3)
    assert set(found) == {"a", "b"}


def test_bad_shape_and_device_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="expected one of tiny, gpt2"):
        bench.run_bench(shape="huge")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="use --device cpu"):
        bench.run_bench(shape="tiny", device="cuda")
