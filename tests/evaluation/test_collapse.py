"""collapse.py: four numbers of a group, exact zeros without noise, and what lies inside the thoughts."""

import dataclasses
import statistics

import pytest
import torch

from latentlab.config import arm_settings
from latentlab.data.word_problems import word_problems
from latentlab.evaluation import collapse
from latentlab.evaluation.collapse import measure_groups, principal_plane, spread_by_step
from latentlab.masks import rollout_seeds
from latentlab.rollouts import rollout
from tests.conftest import sharpen, tiny_gpt2


def graded(text, problem):
    """A reward that tells any two answers apart, so that random models earn different ones."""
    return sum(map(ord, text)) / 1000


@pytest.fixture
def measure(config, problems):
    """measure(arm): the numbers of one arm on four problems with K = 4."""

    def run(arm, model=None, on=problems, scale="none", **changes):
        c = config(grpo={"mask": {"rate": 0.3}, "scale_rewards": scale})
        mask, temperature = arm_settings(c.grpo, arm)
        settings = {"num_generations": 4, "batch_size": 4, "run_seed": 0, "reward": graded, **changes}
        return measure_groups(model or sharpen(tiny_gpt2()), on, c, mask=mask, temperature=temperature, **settings)

    return run


# -- the four numbers -----------------------------------------------------------------------------------------------


def test_without_noise_all_four_numbers_are_exact_and_the_backward_pass_is_run(measure, monkeypatch):
    """The gradient is zero, not missing: every parameter that takes part has a `.grad`, and all of it is 0.0."""
    counts, original = [], collapse.policy_gradient

    def watched(model, *args, **kwargs):
        stats = original(model, *args, **kwargs)
        grads = [p.grad for p in model.parameters()]
        counts.append([grad is not None and torch.count_nonzero(grad).item() for grad in grads])
        return stats

    monkeypatch.setattr(collapse, "policy_gradient", watched)
    model = sharpen(tiny_gpt2())
    numbers = measure("none", model, batch_size=2)
    names = ("frac_reward_zero_std", "max_thought_difference", "distinct_answers", "grad_norm")
    assert [numbers[name] for name in names] == [1.0, 0.0, 1.0, 0.0]
    assert len(counts) == 2 and all(count is not False and count == 0 for batch in counts for count in batch)
    assert all(p.grad is None for p in model.parameters())
    assert numbers["problems"] == 4 and numbers["num_generations"] == 4


def test_temperature_varies_answers_and_leaves_thoughts_equal(measure):
    numbers = measure("temperature")
    assert numbers["max_thought_difference"] == 0.0
    assert numbers["distinct_answers"] > 1 and numbers["frac_reward_zero_std"] < 1 and numbers["grad_norm"] > 0


@pytest.mark.parametrize("arm", ["shared", "per_step", "shared_greedy"])
def test_masks_move_thoughts_and_give_a_gradient(measure, arm):
    numbers = measure(arm)
    assert numbers["max_thought_difference"] > 0.1
    assert numbers["distinct_answers"] > 1 and numbers["frac_reward_zero_std"] < 1 and numbers["grad_norm"] > 0


@pytest.mark.parametrize("arm", ["none", "temperature", "shared"])
def test_scores_replay_what_was_sampled(measure, arm):
    assert 0 <= measure(arm)["replay_gap"] < 1e-5


def test_a_mask_that_is_not_replayed_shows_in_the_gap(measure):
    model = sharpen(tiny_gpt2())
    score = model.score
    model.score = lambda out, masks: score(out, masks=None)
    assert measure("shared", model)["replay_gap"] > 1e-3


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_the_numbers_do_not_depend_on_the_batch_size(measure, scale):
    """Neither does the gradient: batches of 1 and of 3 + 1 problems add up to the one batch."""
    whole = measure("shared", sharpen(tiny_gpt2()).double(), scale=scale)
    assert whole["grad_norm"] > 0
    for size in (1, 3):
        parts = measure("shared", sharpen(tiny_gpt2()).double(), batch_size=size, scale=scale)
        assert parts == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_batch_scaling_divides_by_the_deviation_of_all_rewards(measure):
    seen = []

    def recorded(text, problem):
        seen.append(graded(text, problem))
        return seen[-1]

    plain, scaled = (measure("shared", scale=scale, reward=recorded)["grad_norm"] for scale in ("none", "batch"))
    assert scaled == pytest.approx(plain / (statistics.stdev(seen[16:]) + 1e-4), rel=1e-5)


def test_the_gradient_of_the_first_problems_is_their_own(measure, problems):
    """`gradient_problems` rounds up to whole batches; the other numbers are still over all problems."""
    model = sharpen(tiny_gpt2()).double()
    whole, part = measure("shared", model), measure("shared", model, batch_size=2, gradient_problems=1)
    alone = measure("shared", model, on=problems[:2])
    assert part["gradient_problems"] == 2 and part["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-9)
    assert part["grad_norm"] != pytest.approx(whole["grad_norm"], rel=1e-3)
    names = ("reward", "distinct_answers", "problems", "frac_reward_zero_std")
    assert [part[name] for name in names] == [whole[name] for name in names]


def test_numbers_by_hand(measure, monkeypatch):
    """Two groups of two: one with equal answers, one with two; a reward of one for the first word "a"."""
    texts = iter([("a", "a", "b", "a")])
    original = collapse.rollout
    monkeypatch.setattr(collapse, "rollout", lambda *a, **kw: dataclasses.replace(original(*a, **kw), text=next(texts)))
    pair = word_problems("train", 2, seed=0, steps=2)
    numbers = measure("temperature", on=pair, num_generations=2, reward=lambda text, _: float(text == "a"))
    assert numbers["frac_reward_zero_std"] == 0.5 and numbers["distinct_answers"] == 1.5 and numbers["reward"] == 0.75


def test_a_model_without_thoughts_has_no_difference(measure):
    numbers = measure("shared", sharpen(tiny_gpt2(feedback="none")))
    assert numbers["max_thought_difference"] == 0.0 and numbers["grad_norm"] > 0


def test_no_problems_is_one_line(measure):
    with pytest.raises(ValueError, match="^problems: got an empty list, expected at least one"):
        measure("shared", on=[])


def test_the_numbers_are_those_of_the_rollouts(problems, config, monkeypatch):
    """From one rollout in one batch, with the baseline and the loss of the config; sampling settings are passed on."""
    outs, original = [], collapse.rollout
    monkeypatch.setattr(collapse, "rollout", lambda *a, **kw: (outs.append(original(*a, **kw)), outs[-1])[1])
    c = config(grpo={"mask": {"rate": 0.3}, "baseline": "leave_one_out", "scale_rewards": "none"})
    mask, temperature = arm_settings(c.grpo, "shared")
    model = sharpen(tiny_gpt2()).double()
    settings = {"num_generations": 4, "temperature": temperature, "run_seed": 5}
    numbers = measure_groups(model, problems, c, mask=mask, batch_size=4, reward=graded, **settings)
    (out,) = outs
    assert out.masks.spec == mask and torch.equal(out.seeds, rollout_seeds(5, 0, [p.id for p in problems], 4))
    groups, rewards = out.thoughts.view(4, 4, -1), out.rewards(graded)
    assert numbers["max_thought_difference"] == max((g - g[0]).abs().max().item() for g in groups) > 0.1
    assert numbers["distinct_answers"] == sum(len(set(out.text[4 * b : 4 * b + 4])) for b in range(4)) / 4
    assert numbers["reward"] == pytest.approx(rewards.mean().item())
    assert numbers["frac_reward_zero_std"] == sum(len(set(row.tolist())) == 1 for row in rewards) / 4
    assert [numbers[name] for name in ("problems", "gradient_problems", "num_generations")] == [4, 4, 4]
    advantages = (rewards - rewards.mean(1, keepdim=True)) * 4 / 3
    logp = model.score(out, masks=out.masks)
    (-(advantages.flatten() * logp.sum(1)).sum() / (16 * model.max_new_tokens)).backward()
    norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt().item()
    assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-9)


def test_gradients_from_before_do_not_count(measure):
    model = sharpen(tiny_gpt2())
    before = measure("shared", model)
    model.lm.transformer.wte.weight.grad = torch.ones_like(model.lm.transformer.wte.weight)
    assert measure("shared", model) == before


@pytest.mark.parametrize(("asked", "used"), [(None, 4), (1, 3), (3, 3), (4, 4), (9, 4)])
def test_whole_batches_of_three_count_for_the_gradient(measure, asked, used):
    assert measure("temperature", batch_size=3, gradient_problems=asked)["gradient_problems"] == used


# -- inside the thoughts --------------------------------------------------------------------------------------------


def test_spread_by_hand():
    """K = 2, L = 2, D = 2, two groups. Step 1 of group 1: (1, 0) and (3, 0), variance 2, mean square 5."""
    first = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 2.0]]])
    second = torch.tensor([[[1.0, 1.0], [4.0, 0.0]], [[1.0, 1.0], [0.0, 4.0]]])
    spread = spread_by_step(torch.cat([first, second]), 2)
    assert spread.tolist() == pytest.approx([(2 / 5 + 0) / 2, (0 + 16 / 16) / 2])


def test_equal_thoughts_have_no_spread_and_masked_ones_do(config, problems):
    model = sharpen(tiny_gpt2())
    for arm, zero in (("temperature", True), ("shared", False)):
        mask, temperature = arm_settings(config(grpo={"mask": {"rate": 0.3}}).grpo, arm)
        out = rollout(model, problems, num_generations=4, masks=mask, temperature=temperature, run_seed=0, step=0)
        spread = spread_by_step(out.thoughts, 4)
        assert spread.shape == (2,) and ((spread == 0).all() if zero else (spread > 1e-3).all())


def test_the_plane_of_points_that_lie_in_one():
    """Points 3 a u + b v + centre with u, v orthonormal: distances survive, nothing is left outside, u comes first."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(7, 2, generator=generator, dtype=torch.float64))[0].T
    a, b = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0])[:, None, None]
    points = a[..., None] * u + b[..., None] * v + 10.0
    plane, shares = principal_plane(points)
    assert plane.shape == (5, 3, 2) and shares.sum().item() == pytest.approx(1.0)
    assert shares[0] > 0.6 and plane.flatten(0, 1).mean(0).abs().max() < 1e-9
    torch.testing.assert_close(
        torch.cdist(plane.flatten(0, 1), plane.flatten(0, 1)), torch.cdist(points.flatten(0, 1), points.flatten(0, 1))
    )
    scatter = plane.flatten(0, 1).T @ plane.flatten(0, 1)
    assert scatter[0, 1].abs() < 1e-9 and scatter[0, 0] / scatter.trace() == pytest.approx(shares[0].item())


def test_the_plane_has_a_fixed_sign():
    """The largest component of each direction is positive: here along e_2, and then e_0."""
    points = torch.zeros(4, 1, 3)
    points[:, 0, 2], points[:, 0, 0] = torch.tensor([-6.0, 6.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, -1.0])
    plane, shares = principal_plane(points)
    torch.testing.assert_close(plane[:, 0], points[:, 0, [2, 0]].double())
    assert shares.tolist() == pytest.approx([72 / 74, 2 / 74])
