"""loss.py: against numbers derived by hand and the same formulas in plain Python floats."""

import math

import pytest
import torch

from latentlab.loss import LOSS_TYPES, grpo_loss, k3_kl, loss_denominator

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
ADVANTAGES = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
RATIOS = torch.tensor([[1.5, 0.5, 1.1], [1.5, 1.0, 1.0], [0.9, 1.3, 1.0]], dtype=torch.float64)
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, 0, 0], [-3.0, -1.5, 0]], dtype=torch.float64)
REF = OLD + torch.tensor([[0.3, -0.2, 0.0], [0.5, 0, 0], [-1.0, 0.1, 0]], dtype=torch.float64)
LOGP = OLD + RATIOS.log()
# -min(ratio A, clip(ratio, 0.8, 1.2) A), each token by hand
TOKENS = [[-0.6, -0.25, -0.55], [1.5], [-1.8, -2.4]]


def by_hand(tokens, loss_type, longest=3):
    rows = [sum(row) for row in tokens]
    count = sum(len(row) for row in tokens)
    return {
        "dr_grpo": sum(rows) / (len(rows) * longest),
        "grpo": sum(total / len(row) for total, row in zip(rows, tokens, strict=True)) / len(rows),
        "bnpo": sum(rows) / count,
        "dapo": sum(rows) / count,
    }[loss_type]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_loss_type_by_hand(loss_type):
    loss, stats = grpo_loss(LOGP, OLD, ADVANTAGES, MASK, loss_type=loss_type)
    assert loss.item() == pytest.approx(by_hand(TOKENS, loss_type), abs=1e-12)
    assert stats["clip_ratio/high_mean"] == pytest.approx(2 / 6)  # 1.5 at A = 0.5 and 1.3 at A = 2
    assert stats["clip_ratio/low_mean"] == 0
    assert stats["ratio_max_deviation"] == pytest.approx(0.5)
    assert stats["kl"] == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_kl_shares_the_normalisation_of_the_policy_loss(loss_type):
    beta = 0.3
    ratio = [[1.5, 0.5, 1.1], [1.5], [0.9, 1.3]]
    gap = [[0.3, -0.2, 0.0], [0.5], [-1.0, 0.1]]
    k3 = [
        [math.exp(g - math.log(r)) - (g - math.log(r)) - 1 for g, r in zip(*rows, strict=True)]
        for rows in zip(gap, ratio, strict=True)
    ]
    tokens = [[t + beta * k for t, k in zip(*rows, strict=True)] for rows in zip(TOKENS, k3, strict=True)]
    loss, stats = grpo_loss(LOGP, OLD, ADVANTAGES, MASK, loss_type=loss_type, beta=beta, ref_logp=REF)
    assert loss.item() == pytest.approx(by_hand(tokens, loss_type), abs=1e-12)
    assert stats["kl"] == pytest.approx(sum(map(sum, k3)) / 6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.3, 0.0),  # gained enough: clipped at 1 + epsilon_high
        (0.5, 1.0, -0.5, -0.5),  # lost, though good: never clipped
        (1.5, -1.0, 1.5, 1.5),  # gained, though bad: never clipped
        (0.5, -1.0, 0.8, 0.0),  # lost enough: clipped at 1 - epsilon
        (1.25, 1.0, -1.25, -1.25),  # epsilon_high is wider than epsilon
        (1.0, -2.0, 2.0, 2.0),
    ],
)
def test_clipping_on_both_sides(ratio, advantage, loss, slope):
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    value, stats = grpo_loss(
        logp, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1).bool(), epsilon=0.2, epsilon_high=0.3
    )
    value.backward()
    assert value.item() == pytest.approx(loss) and logp.grad.item() == pytest.approx(slope)
    assert stats["clip_ratio/low_mean"] == float(ratio < 0.8 and advantage < 0)
    assert stats["clip_ratio/high_mean"] == float(ratio > 1.3 and advantage > 0)


def test_on_policy_gradient_is_minus_advantage_over_the_constant():
    logp = OLD.clone().requires_grad_()
    loss, _ = grpo_loss(logp, OLD, ADVANTAGES, MASK, max_completion_length=10)
    loss.backward()
    torch.testing.assert_close(logp.grad, -ADVANTAGES[:, None] * MASK / 30)


def test_what_lies_behind_the_end_of_an_answer_does_not_count():
    noise = torch.where(MASK, 0.0, torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) * 50)
    logp = (LOGP + noise).requires_grad_()
    for loss_type in LOSS_TYPES:
        loss, stats = grpo_loss(logp, OLD, ADVANTAGES, MASK, loss_type=loss_type, beta=0.1, ref_logp=REF - noise / 60)
        clean, clean_stats = grpo_loss(LOGP, OLD, ADVANTAGES, MASK, loss_type=loss_type, beta=0.1, ref_logp=REF)
        assert loss.item() == pytest.approx(clean.item()) and stats == pytest.approx(clean_stats)
        (grad,) = torch.autograd.grad(loss, logp)
        assert torch.count_nonzero(grad[~MASK]) == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (1, 2)])
def test_micro_batches_under_the_global_denominator_add_up(loss_type, sizes):
    whole, _ = grpo_loss(
        LOGP, OLD, ADVANTAGES, MASK, loss_type=loss_type, beta=0.2, ref_logp=REF, max_completion_length=7
    )
    denominator = loss_denominator(MASK, loss_type, 7)
    parts = zip(*(x.split(sizes) for x in (LOGP, OLD, ADVANTAGES, MASK, REF)), strict=True)
    total = sum(
        grpo_loss(a, b, c, d, loss_type=loss_type, beta=0.2, ref_logp=e, denominator=denominator)[0].item()
        for a, b, c, d, e in parts
    )
    assert total == pytest.approx(whole.item(), abs=1e-12)


def naive_loss(logp, old_logp, ref_logp, advantages, lengths, *, loss_type, epsilon, epsilon_high, beta, limit):
    """(loss, its KL part) in Python floats: nested lists [R][A], R advantages, R answer lengths."""
    policy: list[list[float]] = []  # token terms of each row
    kl: list[list[float]] = []
    for row, length in enumerate(lengths):
        ratios = [math.exp(logp[row][t] - old_logp[row][t]) for t in range(length)]
        clipped = [max(1 - epsilon, min(1 + epsilon_high, ratio)) for ratio in ratios]
        gain = advantages[row]
        policy.append([-min(ratio * gain, clip * gain) for ratio, clip in zip(ratios, clipped, strict=True)])
        deltas = [ref_logp[row][t] - logp[row][t] for t in range(length)]
        kl.append([beta * (math.exp(delta) - delta - 1) for delta in deltas])

    def normalise(terms: list[list[float]]) -> float:
        if loss_type == "grpo":
            return sum(sum(row) / len(row) for row in terms) / len(terms)
        if loss_type == "dr_grpo":
            return sum(map(sum, terms)) / (len(terms) * limit)
        return sum(map(sum, terms)) / sum(lengths)  # bnpo; dapo with all rows in one batch

    return normalise(policy) + normalise(kl), normalise(kl)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_plain_formulas_give_the_same_value_kl_part_and_sum_of_micro_batches(loss_type):
    """Both clip bounds, k3 KL, ragged answers and a length limit beyond the longest one, to 1e-12."""
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 5, generator=g, dtype=torch.float64)
    logp, ref = (old + torch.randn(4, 5, generator=g, dtype=torch.float64) * 0.4 for _ in range(2))
    lengths, advantages = [5, 2, 3, 1], [1.5, -0.5, -1.0, 2.0]
    mask, a = torch.arange(5) < torch.tensor(lengths)[:, None], torch.tensor(advantages, dtype=torch.float64)
    settings = {"epsilon": 0.2, "epsilon_high": 0.3, "loss_type": loss_type}
    rows = [x.tolist() for x in (logp, old, ref)]
    want, kl = naive_loss(*rows, advantages, lengths, limit=6, beta=0.04, **settings)
    settings["max_completion_length"] = 6
    got, _ = grpo_loss(logp, old, a, mask, ref_logp=ref, beta=0.04, **settings)
    policy, _ = grpo_loss(logp, old, a, mask, **settings)
    settings["denominator"] = loss_denominator(mask, loss_type, 6)
    parts = sum(
        grpo_loss(logp[s], old[s], a[s], mask[s], ref_logp=ref[s], beta=0.04, **settings)[0]
        for s in (slice(0, 1), slice(1, 4))
    )
    assert abs(got.item() - want) <= 1e-12
    assert abs(parts.item() - want) <= 1e-12
    assert abs((got - policy).item() - kl) <= 1e-12


def test_k3_is_never_negative_zero_at_equality_and_unbiased():
    p, q = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.4, 0.35, 0.25]).double()
    estimate = k3_kl(p.log(), q.log())
    assert estimate.min() > 0 and torch.count_nonzero(k3_kl(p.log(), p.log())) == 0
    torch.testing.assert_close((p * estimate).sum(), (p * (p / q).log()).sum())  # expectation under the policy


def test_wrong_use_is_one_line():
    for settings in ({"loss_type": "ppo"}, {"beta": 0.1}):
        with pytest.raises(ValueError, match="got .*expected"):
            grpo_loss(LOGP, OLD, ADVANTAGES, MASK, **settings)
