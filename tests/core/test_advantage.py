"""advantage.py: baselines by hand, exact zeros for collapsed groups, refusals."""

import statistics

import pytest
import torch

from latentlab.advantage import SCALES, group_advantages, group_diagnostics, is_collapsed

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("baseline", "first_row"),
    [("mean", [0.75, -0.25, -0.25, -0.25]), ("leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3]), ("none", [1.0, 0, 0, 0])],
)
def test_baselines_by_hand(baseline, first_row):
    torch.testing.assert_close(group_advantages(REWARDS, baseline=baseline)[0], torch.tensor(first_row).double())


def test_leave_one_out_subtracts_the_mean_of_the_others():
    rewards = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = group_advantages(rewards, baseline="leave_one_out")
    for b in range(3):
        for k in range(5):
            others = [rewards[b, j].item() for j in range(5) if j != k]
            assert got[b, k].item() == pytest.approx(rewards[b, k].item() - sum(others) / 4, abs=1e-12)


def test_std_scaling_reweights_a_group_by_one_positive_factor():
    plain, scaled = group_advantages(REWARDS), group_advantages(REWARDS, scale="group")
    factors = scaled / plain
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    torch.testing.assert_close(factors[0, 0].item(), 1 / (0.5 + 1e-4))  # 1, 0, 0, 0 has sample deviation 0.5


def test_batch_scaling_is_one_factor_for_all_groups():
    """TRL's: the unbiased deviation of all rewards, 1, 0, 0, 0 and 1, 1, 0, 1, is sqrt(2 / 7)."""
    scaled = group_advantages(REWARDS, scale="batch")
    torch.testing.assert_close(scaled, group_advantages(REWARDS) / ((2 / 7) ** 0.5 + 1e-4))
    many = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    deviation = statistics.stdev(many.flatten().tolist())
    for baseline in ("mean", "leave_one_out"):
        plain = group_advantages(many, baseline=baseline)
        scaled = group_advantages(many, baseline=baseline, scale="batch")
        torch.testing.assert_close(scaled, plain / (deviation + 1e-4), rtol=1e-12, atol=0)


def test_the_former_word_names_the_present_one():
    with pytest.raises(ValueError, match="^advantage: got .*scale='std', expected .*'group', .* TRL's group$"):
        group_advantages(REWARDS, scale="std")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.7, 1 / 3, 1e-8, -2.3])
def test_equal_rewards_give_exactly_zero(value, baseline, scale, dtype):
    rewards = torch.full((2, 7), value, dtype=dtype)
    assert torch.count_nonzero(group_advantages(rewards, baseline=baseline, scale=scale)) == 0


def test_rewards_are_left_untouched():
    rewards = REWARDS.clone()
    for baseline in ("mean", "none"):
        group_advantages(rewards, baseline=baseline).add_(5)
    assert torch.equal(rewards, REWARDS)


def test_diagnostics_count_collapsed_groups_not_batches():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert is_collapsed(rewards).tolist() == [True, True, False, True]
    stats = group_diagnostics(rewards)
    assert stats["frac_reward_zero_std"] == 0.75
    assert stats["pass@k"] == 0.75
    assert stats["reward"] == 0.5
    assert stats["reward_std"] == pytest.approx(0.5**0.5 / 4)


@pytest.mark.parametrize(
    ("rewards", "settings"),
    [
        (torch.zeros(3, 1), {}),
        (torch.zeros(3), {}),
        (REWARDS, {"baseline": "median"}),
        (REWARDS, {"scale": "std"}),
        (REWARDS, {"scale": "rows"}),
        (REWARDS, {"scale": "batch", "baseline": "none"}),
        (REWARDS.long(), {}),
        (REWARDS.bool(), {}),
        (torch.tensor([[0.0, float("nan")]]), {}),
        (torch.tensor([[0.0, float("inf")]]), {}),
    ],
)
def test_wrong_use_is_one_line(rewards, settings, unchecked):
    with pytest.raises(ValueError, match="got .*expected") as error:
        group_advantages(rewards, **settings)
    assert "\n" not in str(error.value)
