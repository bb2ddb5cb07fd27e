"""attention.py: one softmax over a shared prefix and an own suffix equals ordinary attention over both, repeated."""

from types import SimpleNamespace

import pytest
import torch

from latentlab.attention import Positions, RolloutCache, attention, rollout_attention
from latentlab.masks import MaskSpec
from latentlab.rollouts import rollout
from tests.conftest import sharpen, tiny_gpt2

B, K, Q, WIDTH = 3, 4, 7, 8


class Layer(torch.nn.Module):
    layer_idx = 0


def inputs(heads, shared, new, seed=0, rows=B * K):
    """Random query [R, H G, T, d], keys and values [R, H, T, d]."""
    g = torch.Generator().manual_seed(seed)
    sizes = (heads * shared, heads, heads)
    return [torch.randn(rows, n, new, WIDTH, generator=g, dtype=torch.float64).requires_grad_() for n in sizes]


def prefilled(heads, capacity=8):
    """A cache of B questions, the first padded by three places, the second by one; its keys and values as leaves."""
    valid = torch.arange(Q) >= torch.tensor([3, 1, 0])[:, None]
    cache = RolloutCache(valid, capacity)
    _, keys, values = inputs(heads, 1, Q, seed=9, rows=B)
    cache.update(keys, values, 0)
    cache.start_rows(K)
    return cache, keys, values


def ordinary(query, prefix, suffix, valid, problem, window=99, cap=None):
    """Softmax attention of each row over its repeated prefix and its suffix; the new positions are the last."""
    keys, values = (torch.cat([p[problem], s], 2) for p, s in zip(prefix, suffix, strict=True))
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
    new, total = query.shape[2], keys.shape[2]
    seen = (
        torch.ones(new, total, dtype=torch.bool).tril(total - new)[None]
        & torch.cat([valid[problem], torch.ones(len(query), total - valid.shape[1], dtype=torch.bool)], 1)[:, None]
    )
    seen = seen & torch.ones(new, total, dtype=torch.bool).triu(total - new - window + 1)
    scores = query @ keys.mT / 3
    scores = cap * (scores / cap).tanh() if cap else scores
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


def passed(cache, query, keys, values, **more):
    """The attention function as transformers calls it."""
    mask = cache.visible(query.shape[2])
    all_keys, all_values = cache.update(keys, values, 0)
    with rollout_attention(SimpleNamespace(_attn_implementation="sdpa"), cache):
        out, _ = attention(Layer(), query, all_keys, all_values, mask, scaling=1 / 3, **more)
    return out, (all_keys, all_values)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("news", [(1, 1), (1, 3), (2, 1)])
def test_values_and_gradients_equal_ordinary_attention_over_a_repeated_question(shared, news):
    cache, *prefix = prefilled(2)
    valid, problem = cache.valid, cache.problem.clone()
    for i, new in enumerate(news):
        given = inputs(2, shared, new, seed=i)
        got, suffix = passed(cache, *given)
        want = ordinary(given[0], prefix, suffix, valid, problem)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        weight = torch.sin(torch.arange(got.numel(), dtype=torch.float64)).view(got.shape)
        leaves = [*given, *prefix]
        grads = [torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (got, want)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
        assert all(grad.abs().max() > 1e-3 for grad in grads[0])


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize(("window", "cap"), [(4, None), (2, None), (1, None), (9, 0.5), (99, 0.5), (3, 0.2)])
def test_windows_and_caps_apply_to_both_parts(window, cap, shared):
    """The window of 2 ends inside the suffix, 4 and 9 reach into the question."""
    cache, *prefix = prefilled(2)
    valid, problem, suffix = cache.valid, cache.problem.clone(), []
    for i, new in enumerate((1, 3, 1)):
        given = inputs(2, shared, new, seed=i)
        got, suffix = passed(cache, *given, sliding_window=window, softcap=cap)
        want = ordinary(given[0], prefix, suffix, valid, problem, window, cap)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "cap"), [(3, None), (None, 0.5), (3, 0.5)])
def test_windows_and_caps_apply_inside_a_question(window, cap, monkeypatch):
    monkeypatch.setattr(Layer, "num_key_value_groups", 3, raising=False)
    query, keys, values = inputs(2, 3, Q, rows=B)
    cache = RolloutCache(torch.ones(B, Q, dtype=torch.bool), 8)
    got, _ = passed(cache, query, keys, values, sliding_window=window, softcap=cap)
    nothing = [x[:, :, :0] for x in (keys, values)]
    want = ordinary(query, nothing, (keys, values), cache.valid[:, :0], torch.arange(B), window or 99, cap)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    "leaving",
    [[[0, 1, 3, 4, 5, 6, 7, 8, 10, 11], [0, 2, 3, 4, 5, 6, 7, 9]], [[0, 1, 2, 3, 9, 11], [4, 5], [1]], [[6]], [[8]]],
)
def test_rows_leave_in_any_order_and_the_others_go_on_as_before(leaving):
    """`leaving` keeps rows by their place in what is left: ragged groups, groups that vanish, a single row."""
    cache, *prefix = prefilled(2, capacity=2)
    valid, problem = cache.valid, cache.problem.clone()
    _, suffix = passed(cache, *inputs(2, 1, 1))
    for i, keep in enumerate(leaving):
        rows = torch.tensor(keep)
        cache.keep(rows)
        problem, suffix = problem[rows], [x[rows] for x in suffix]
        given = inputs(2, 1, 1, seed=i + 1, rows=len(rows))
        got, (keys, values) = passed(cache, *given)
        suffix = [torch.cat([old, new], 2) for old, new in zip(suffix, given[1:], strict=True)]
        assert torch.equal(keys, suffix[0]) and torch.equal(values, suffix[1])
        torch.testing.assert_close(got, ordinary(given[0], prefix, suffix, valid, problem), rtol=0, atol=1e-12)
    assert len(cache.valid) == (1 if len(set(problem.tolist())) == 1 else 3)  # lone questions are not dragged along


def test_positions_are_written_in_place_and_grow_where_there_is_no_room():
    new = [torch.full((2, 1, n, 3), float(i)) for i, n in enumerate((2, 1, 3))]
    with torch.no_grad():
        part = Positions(capacity=3)
        first = part.append(new[0])
        assert part.append(new[1]).data_ptr() == first.data_ptr()
        grown = part.append(new[2])
        assert grown.data_ptr() != first.data_ptr() and torch.equal(grown, torch.cat(new, 2))
    part = Positions(capacity=8)
    with torch.enable_grad():
        kept = [part.append(x) for x in new]
    with torch.no_grad():
        mixed = Positions(capacity=8)
        mixed.append(new[0])
    assert torch.equal(mixed.append(new[1]), torch.cat(new[:2], 2))  # with gradient, the free places are left out
    assert torch.equal(kept[0], new[0]) and torch.equal(kept[2], torch.cat(new, 2))  # what autograd saved stays


def test_plain_calls_of_the_same_model_are_left_alone(problems):
    model = sharpen(tiny_gpt2())
    ids = torch.tensor([[1, 2, 3]])
    before, config = model.lm(ids).logits, model.lm.config
    name = config._attn_implementation
    settings = {"num_generations": 2, "temperature": 1.0, "run_seed": 0, "step": 0}
    rollout(model, problems, masks=MaskSpec(rate=0.3), **settings)
    model.lm.base_model.h[1].forward = None
    with pytest.raises(TypeError):
        rollout(model, problems, masks=MaskSpec(rate=0.3), **settings)
    del model.lm.base_model.h[1].forward
    assert config._attn_implementation == name and torch.equal(model.lm(ids).logits, before)
