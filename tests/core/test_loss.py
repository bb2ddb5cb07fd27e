"""loss.py: against numbers derived by hand and the same formulas in plain Python floats."""

import itertools
import math

import pytest
import torch

from latentlab.grpo import merge_stats
from latentlab.loss import LEVELS, LOSS_TYPES, grpo_loss, k3_kl, loss_denominator

NAN = float("nan")
CLIPPED = [name for name in LOSS_TYPES if name != "cispo"]
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
        "dapo": sum(rows) / count,
    }[loss_type]


@pytest.mark.parametrize("loss_type", CLIPPED)
def test_each_loss_type_by_hand(loss_type):
    loss, stats = grpo_loss(LOGP, OLD, ADVANTAGES, MASK, loss_type=loss_type)
    assert loss.item() == pytest.approx(by_hand(TOKENS, loss_type), abs=1e-12)
    assert stats["clip_ratio/high_mean"] == pytest.approx(2 / 6)  # 1.5 at A = 0.5 and 1.3 at A = 2
    assert stats["clip_ratio/low_mean"] == 0
    assert stats["ratio_max_deviation"] == pytest.approx(0.5)
    assert stats["kl"] == 0


@pytest.mark.parametrize("loss_type", CLIPPED)
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


@pytest.mark.parametrize("ratio", [0.75, 1.25])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_ratio_at_a_bound_and_an_advantage_of_0_are_not_clipped(ratio, advantage):
    for outside, share in ((ratio, 0), (1 + 2 * (ratio - 1), int((ratio - 1) * advantage > 0))):
        logp = torch.tensor([[math.log(outside)]], dtype=torch.float64)
        assert outside != ratio or logp.exp().item() == ratio
        settings = {"epsilon": 0.25, "epsilon_high": 0.25}
        _, stats = grpo_loss(logp, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1).bool(), **settings)
        assert stats["clip_ratio/low_mean"] + stats["clip_ratio/high_mean"] == share


def test_on_policy_gradient_is_minus_advantage_over_the_constant():
    logp = OLD.clone().requires_grad_()
    loss, _ = grpo_loss(logp, OLD, ADVANTAGES, MASK, max_completion_length=10)
    loss.backward()
    torch.testing.assert_close(logp.grad, -ADVANTAGES[:, None] * MASK / 30)


def test_what_lies_behind_the_end_of_an_answer_does_not_count():
    noise = torch.where(MASK, 0.0, torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) * 50)
    logp = (LOGP + noise).requires_grad_()
    for loss_type, level in itertools.product(LOSS_TYPES, LEVELS):
        s = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1, "epsilon_high": 0.3}
        loss, stats = grpo_loss(logp, OLD, ADVANTAGES, MASK, **s, ref_logp=REF - noise / 60)
        clean, clean_stats = grpo_loss(LOGP, OLD, ADVANTAGES, MASK, **s, ref_logp=REF)
        assert loss.item() == pytest.approx(clean.item()) and stats == pytest.approx(clean_stats)
        (grad,) = torch.autograd.grad(loss, logp)
        assert torch.count_nonzero(grad[~MASK]) == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (1, 2)])
def test_micro_batches_under_the_global_denominator_add_up(loss_type, sizes, level):
    s = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.2, "epsilon_high": 0.3}
    whole, stats = grpo_loss(LOGP, OLD, ADVANTAGES, MASK, ref_logp=REF, max_completion_length=7, **s)
    denominator = loss_denominator(MASK, loss_type, 7)
    parts = [
        (int(d.sum()), len(a), *grpo_loss(a, b, c, d, ref_logp=e, denominator=denominator, **s))
        for a, b, c, d, e in zip(*(x.split(sizes) for x in (LOGP, OLD, ADVANTAGES, MASK, REF)), strict=True)
    ]
    assert sum(loss.item() for *_, loss, _ in parts) == pytest.approx(whole.item(), abs=1e-12)
    shares = [(tokens, rows, part) for tokens, rows, _, part in parts]
    assert merge_stats(shares, level) == pytest.approx(stats, abs=1e-12)


def naive_loss(logp, old_logp, ref_logp, advantages, lengths, *, loss_type, level, epsilon, epsilon_high, beta, limit):
    """(loss, its gradient [R][A], share clipped high) in Python floats: nested lists [R][A], R advantages and lengths.

    Written from the papers: the derivative of each term by hand, rows and tokens in loops.
    """
    loss, clips, rows, count = 0.0, [], len(lengths), sum(lengths)
    grad = [[0.0] * len(logp[0]) for _ in lengths]
    for row, length in enumerate(lengths):
        share = {"grpo": rows * length, "dr_grpo": rows * limit}.get(loss_type, count)
        differences = [logp[row][t] - old_logp[row][t] for t in range(length)]
        mean, gain = sum(differences) / length, advantages[row]
        for t in range(length):
            ratio = math.exp(differences[t] if level == "token" else mean)
            if loss_type == "cispo":
                weight = min(ratio, epsilon_high)
                term, slopes = -weight * gain * logp[row][t], {t: -weight * gain}
                clipped = ratio > epsilon_high and gain > 0
            else:
                low, high = ratio < 1 - epsilon and gain < 0, ratio > 1 + epsilon_high and gain > 0
                bound = 1 - epsilon if low else 1 + epsilon_high
                term, clipped = -(bound if low or high else ratio) * gain, high
                within = {t: 1.0} if level == "token" else dict.fromkeys(range(length), 1 / length)
                slopes = {} if low or high else {u: -ratio * gain * part for u, part in within.items()}
            delta = ref_logp[row][t] - logp[row][t]
            loss += (term + beta * (math.exp(delta) - delta - 1)) / share
            grad[row][t] += beta * (1 - math.exp(delta)) / share
            for u, slope in slopes.items():
                grad[row][u] += slope / share
            clips.append((clipped, 1 / count if level == "token" else 1 / length / rows))
    return loss, grad, sum(clipped * weight for clipped, weight in clips)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_plain_formulas_give_the_same_value_gradient_and_clipped_share(loss_type, level):
    """Both clip bounds, k3 KL, ragged answers and a length limit beyond the longest one, to 1e-12."""
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(6, 5, generator=g, dtype=torch.float64)
    logp, ref = (old + torch.randn(6, 5, generator=g, dtype=torch.float64) * 0.5 for _ in range(2))
    lengths, advantages = [5, 2, 3, 1, 1, 4], [1.5, -0.5, -1.0, 2.0, 0.7, 1.1]
    mask, a = torch.arange(5) < torch.tensor(lengths)[:, None], torch.tensor(advantages, dtype=torch.float64)
    settings = {"epsilon": 0.2, "epsilon_high": 1.05 if loss_type == "cispo" else 0.1, "loss_type": loss_type}
    rows = [x.tolist() for x in (logp, old, ref)]
    want, slopes, clipped = naive_loss(*rows, advantages, lengths, limit=6, beta=0.04, level=level, **settings)
    settings |= {"max_completion_length": 6, "importance_sampling_level": level}
    logp.requires_grad_()
    got, stats = grpo_loss(logp, old, a, mask, ref_logp=ref, beta=0.04, **settings)
    got.backward()
    assert abs(got.item() - want) <= 1e-12
    torch.testing.assert_close(logp.grad, torch.tensor(slopes, dtype=torch.float64), rtol=0, atol=1e-12)
    name = "cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/high_mean"
    assert 0 < clipped < 1 and stats[name] == pytest.approx(clipped)


def test_cispo_by_hand():
    """Each token's gradient is -min(ratio, 1.2) A, clipped or not; the mean is over the batch's tokens."""
    logp = LOGP.clone().requires_grad_()
    loss, stats = grpo_loss(logp, OLD, ADVANTAGES, MASK, loss_type="cispo", epsilon_high=1.2)
    loss.backward()
    weights = torch.tensor([[1.2, 0.5, 1.1], [1.2, 0, 0], [0.9, 1.2, 0]], dtype=torch.float64)
    torch.testing.assert_close(logp.grad, -weights * ADVANTAGES[:, None] / 6)
    torch.testing.assert_close(loss.detach(), (-weights * ADVANTAGES[:, None] * LOGP).sum() / 6)
    assert stats["cispo_clip_ratio"] == pytest.approx(2 / 6)  # as in TRL, only where the advantage is positive
    assert "clip_ratio/high_mean" not in stats


def test_the_sequence_ratio_is_the_geometric_mean_of_an_answer():
    loss, stats = grpo_loss(LOGP, OLD, ADVANTAGES, MASK, loss_type="dapo", importance_sampling_level="sequence")
    first, last = (1.5 * 0.5 * 1.1) ** (1 / 3), (0.9 * 1.3) ** 0.5  # neither is clipped, nor 1.5 where A < 0
    assert loss.item() == pytest.approx(-(3 * first * 0.5 - 1.5 + 2 * last * 2) / 6)
    assert stats["ratio_max_deviation"] == pytest.approx(0.5)


def test_k3_is_never_negative_zero_at_equality_and_unbiased():
    p, q = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.4, 0.35, 0.25]).double()
    estimate = k3_kl(p.log(), q.log())
    assert estimate.min() > 0 and torch.count_nonzero(k3_kl(p.log(), p.log())) == 0
    torch.testing.assert_close((p * estimate).sum(), (p * (p / q).log()).sum())  # expectation under the policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ppo"}, "^loss_type: got 'ppo', expected one of dr_grpo, grpo, dapo, cispo"),
        ({"loss_type": "bnpo"}, "^loss_type: got 'bnpo', .* depends on how the batch is split; use dapo"),
        ({"loss_type": "sapo"}, "^loss_type: got 'sapo', expected"),
        ({"loss_type": "cispo"}, "^epsilon_high: got None with loss_type cispo, expected"),
        ({"importance_sampling_level": "batch"}, "^importance_sampling_level: got 'batch', expected token or sequence"),
        ({"beta": 0.1}, "^beta: got 0.1 without ref_logp, expected"),
        ({"beta": NAN, "ref_logp": REF}, "^loss: got .*beta=nan.*, expected"),
        ({"beta": -0.1, "ref_logp": REF}, "^loss: got .*beta=-0.1.*, expected"),
        ({"epsilon": NAN}, "^loss: got .*epsilon=nan.*, expected"),
        ({"epsilon": 0.0}, "^loss: got .*epsilon=0.0.*, expected"),
        ({"epsilon": -0.2}, "^loss: got .*epsilon=-0.2.*, expected"),
        ({"epsilon_high": NAN}, "^loss: got .*epsilon_high=nan.*, expected"),
        ({"epsilon_high": 0.0}, "^loss: got .*epsilon_high=0.0.*, expected"),
        ({"max_completion_length": 0}, "^max_completion_length: got 0, expected"),
        ({"ref_logp": REF[:2], "beta": 0.1}, "^shapes: got .*expected"),
        ({"old_logp": OLD[:1]}, "^shapes: got .*expected"),
        ({"advantages": ADVANTAGES[:1]}, "^shapes: got .*expected"),
        ({"token_mask": MASK[:, :1]}, "^shapes: got .*expected"),
    ],
)
def test_wrong_use_is_one_line(settings, message, unchecked):
    given = {"logp": LOGP, "old_logp": OLD, "advantages": ADVANTAGES, "token_mask": MASK, **settings}
    with pytest.raises(ValueError, match=message) as error:
        grpo_loss(**given)
    assert "\n" not in str(error.value)
