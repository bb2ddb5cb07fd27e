"""Property tests over large input spaces: masks, group advantages, padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentlab.advantage import group_advantages, group_diagnostics, is_collapsed
from latentlab.masks import MaskSpec, draw_masks, rollout_seeds, uniforms
from latentlab.pretrained.scratch import build_model
from latentlab.problems import Problem
from latentlab.rollouts import rollout
from latentlab.verify.engine import WORDS

relaxed = settings(derandomize=True, deadline=None, max_examples=60)
few = settings(derandomize=True, deadline=None, max_examples=12)

ints = st.integers(-(2**63), 2**63 - 1)
names = st.lists(st.text(max_size=8), min_size=1, max_size=5)
rates = st.floats(0, 0.99)
values = st.floats(-1e3, 1e3, allow_nan=False) | st.sampled_from([0.0, 1.0])
rewards = st.integers(2, 9).flatmap(lambda k: st.lists(st.lists(values, min_size=k, max_size=k), min_size=1))
right_or_wrong = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=9)


class Shape:
    """As much of a model as masks need."""

    width, device, dtype = 16, torch.device("cpu"), torch.float64

    def num_sites(self, sites):
        return len(sites)

    def num_slots(self, scope):
        return 3


# -- masks ----------------------------------------------------------------------------------------------------------


@relaxed
@given(ints, ints, names, st.integers(1, 6))
def test_seeds_depend_on_their_own_four_numbers_alone(run_seed, step, ids, k):
    together = rollout_seeds(run_seed, step, ids, k).view(-1, k)
    for name in set(ids):
        first = ids.index(name)
        assert torch.equal(together[first], rollout_seeds(run_seed, step, [name], k)[:k])
    assert len(set(together.flatten().tolist())) == together.numel()  # an id drawn twice goes on counting


@relaxed
@given(ints, rates, st.sampled_from(["shared", "per_step"]))
def test_masks_have_two_values_and_ignore_their_neighbours(seed, rate, scheme):
    spec = MaskSpec(scheme, rate)
    seeds = torch.tensor([seed, seed ^ 1, ~seed])
    masks = draw_masks(spec, Shape(), seeds).values
    assert torch.isin(masks, torch.tensor([0, 1 / (1 - rate)], dtype=torch.float64)).all()
    assert torch.equal(masks[1:2], draw_masks(spec, Shape(), seeds[1:2]).values)
    assert masks.shape == ((3, 2, 16) if scheme == "shared" else (3, 3, 2, 16))
    if rate == 0:
        assert (masks == 1).all()


@relaxed
@given(ints, st.floats(0, 0.9), st.floats(0, 0.09))
def test_a_higher_rate_drops_a_superset(seed, rate, more):
    low, high = (draw_masks(MaskSpec(rate=r), Shape(), torch.tensor([seed])).values > 0 for r in (rate, rate + more))
    assert (high <= low).all()


@relaxed
@given(st.lists(ints, min_size=1, max_size=20), st.integers(0, 2**20))
def test_uniform_numbers_lie_in_the_unit_interval(seeds, t):
    u = uniforms(torch.tensor(seeds), t)
    assert ((u >= 0) & (u < 1)).all()


# -- group advantages -----------------------------------------------------------------------------------------------


@relaxed
@given(rewards)
def test_advantages_keep_their_algebra(rows):
    r = torch.tensor(rows, dtype=torch.float64)
    k, size = r.shape[1], 1 + r.abs().max()
    mean, loo = (group_advantages(r, baseline=b) for b in ("mean", "leave_one_out"))
    others = (r.sum(1, keepdim=True) - r) / (k - 1)
    assert torch.allclose(loo, r - others, atol=1e-12 * size) and torch.allclose(mean * k / (k - 1), loo)
    assert (mean.sum(1).abs() < 1e-12 * size * k).all()
    assert torch.equal(group_advantages(r, baseline="none"), r)


@relaxed
@given(rewards, st.floats(-100, 100, allow_nan=False))
def test_equal_rewards_have_advantage_exactly_zero(rows, value):
    r = torch.cat([torch.tensor(rows, dtype=torch.float64), torch.full((1, len(rows[0])), value, dtype=torch.float64)])
    for baseline in ("mean", "leave_one_out"):
        for scale in ("none", "group", "batch"):
            a = group_advantages(r, baseline=baseline, scale=scale)
            assert (a[is_collapsed(r)] == 0).all() and torch.isfinite(a).all()
    collapsed = sum(max(row) == min(row) for row in r.tolist())
    assert group_diagnostics(r)["frac_reward_zero_std"] == pytest.approx(collapsed / len(r))


@relaxed
@given(rewards, st.randoms(use_true_random=False))
def test_advantages_follow_a_permutation_of_rollouts_and_of_groups(rows, random):
    r = torch.tensor(rows, dtype=torch.float64)
    columns, groups = (random.sample(range(n), n) for n in (r.shape[1], r.shape[0]))
    for baseline in ("mean", "leave_one_out", "none"):
        moved = group_advantages(r[groups][:, columns], baseline=baseline)
        assert torch.allclose(moved, group_advantages(r, baseline=baseline)[groups][:, columns], atol=1e-9)


@relaxed
@given(right_or_wrong, st.floats(0.1, 9))
def test_right_answers_never_have_less_than_wrong_ones(row, scale):
    a = group_advantages(scale * torch.tensor([row], dtype=torch.float64))[0]
    right, wrong = (a[torch.tensor(row) == value] for value in (1.0, 0.0))
    assert not len(right) or not len(wrong) or right.min() > 0 > wrong.max()


# -- padding --------------------------------------------------------------------------------------------------------

question = st.lists(st.sampled_from(WORDS[:6]), min_size=1, max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def model():
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}
    small = build_model(WORDS, **shape, num_thoughts=2, max_new_tokens=4, seed=0).double()
    with torch.no_grad():
        for weight in small.parameters():
            if weight.dim() > 1:
                weight.mul_(8)  # fresh weights give almost uniform answers, on which no mistake would show
    return small


@few
@given(
    st.lists(question, min_size=1, max_size=4),
    st.sampled_from(["latent", "prompt+latent", "all"]),
    st.sampled_from([0.0, 1.0]),
)
def test_padding_is_never_seen(model, texts, scope, temperature):
    """Any ragged batch gives each question what it gets alone, and its own log-probs back."""
    problems = [Problem(f"p{i}", text, (), "1", "t") for i, text in enumerate(texts)]
    spec = MaskSpec(rate=0.2, sites=("attention", "mlp", "embedding"), scope=scope)
    settings = {"num_generations": 2, "masks": spec, "temperature": temperature, "run_seed": 0, "step": 0}
    together = rollout(model, problems, **settings)
    for i, problem in enumerate(problems):
        alone, part = rollout(model, [problem], **settings), together.take(slice(i, i + 1))
        width = alone.tokens.shape[1]
        assert torch.equal(alone.tokens, part.tokens[:, :width]) and not part.token_mask[:, width:].any()
        assert (alone.logp - part.logp[:, :width]).abs().max() < 1e-12
        assert (alone.thoughts - part.thoughts).abs().max() < 1e-12
    with torch.no_grad():
        assert (model.score(together, masks=together.masks) - together.logp).abs().max() < 1e-12
