"""theory/: the enumeration is complete, and equals what training computes on one batch."""

import itertools
import math

import pytest
import torch

from latentlab import advantage, loss
from latentlab.masks import draw_masks, rollout_seeds
from latentlab.theory import enumeration, moments, proofs
from latentlab.theory.enumeration import SPEC
from tests.conftest import tiny_gpt2


@pytest.fixture(scope="module")
def x():
    return enumeration.example()


def test_all_answers_are_enumerated_once(x):
    tokens, token_mask = enumeration.answer_space(x.model)
    said = {tuple(row[mask].tolist()) for row, mask in zip(tokens, token_mask, strict=True)}
    others = range(1, len(x.model.tokenizer))
    assert said == {(0,)} | {(a, b) for a in others for b in range(len(x.model.tokenizer))} and len(said) == len(tokens)


def test_probabilities_sum_to_one_under_every_mask(x):
    for policy in x.policies:
        sums = policy.probs.view(256, -1).sum(1) / policy.mask_probs
        assert (sums - 1).abs().max() < 1e-12 and abs(policy.mask_probs.sum() - 1) < 1e-12


def test_enumerated_masks_are_the_drawn_ones(x):
    masks, probs = enumeration.mask_space(x.model, SPEC)
    drawn = draw_masks(SPEC, x.model, rollout_seeds(0, 0, ["p"], 4000)).values.flatten(1)
    index = (drawn[:, None] == masks.values.flatten(1)).all(2).long()
    assert (index.sum(1) == 1).all()  # each drawn mask is exactly one of the 256
    assert torch.allclose(index.double().mean(0), probs, atol=5 * (probs.max() / 4000).sqrt().item())


def test_a_model_with_too_many_masks_is_refused():
    with pytest.raises(ValueError, match="masks: got 4 sites x 32 features, expected at most 12"):
        enumeration.mask_space(tiny_gpt2(), SPEC)


def test_scores_average_to_zero_and_reproduce_a_plain_backward(x):
    policy = x.policies[0]
    assert torch.einsum("n,ntp->p", policy.probs, policy.scores).abs().max() < 1e-12
    masks, _ = enumeration.mask_space(x.model, SPEC)
    rows = enumeration.enumerated_rollouts(x.model, x.problems[0], masks)
    weights = torch.linspace(-1, 1, policy.logp.numel(), dtype=torch.float64).view_as(policy.logp)
    grads = torch.autograd.grad((weights * x.model.score(rows, masks=rows.masks)).sum(), list(x.model.parameters()))
    plain = torch.cat([g.flatten() for g in grads])
    assert moments.relative_error(torch.einsum("nt,ntp->p", weights, policy.scores), plain) < 1e-12


def test_pattern_sum_equals_enumerating_whole_groups():
    """K = 2, one-logit policy: all pairs of answers, each pushed through the training functions by itself."""
    policy, rewards = enumeration.one_logit(0.3), torch.tensor([1.0, 0.0], dtype=torch.float64)
    for baseline, scale in (("mean", "none"), ("leave_one_out", "none"), ("none", "none"), ("mean", "group")):
        mean = square = 0.0
        for pair in itertools.product((0, 1), repeat=2):
            logp = policy.logp[list(pair)].clone().requires_grad_()
            a = advantage.group_advantages(rewards[list(pair)][None], baseline=baseline, scale=scale)[0]
            value, _ = loss.grpo_loss(logp, logp.detach(), a, torch.ones(2, 1, dtype=torch.bool))
            g = -(torch.autograd.grad(value, logp)[0] * policy.scores[list(pair), :, 0]).sum().item()
            weight = policy.probs[list(pair)].prod().item()
            mean, square = mean + weight * g, square + weight * g * g
        got = moments.group_moments(policy, rewards, 2, baseline=baseline, scale=scale)
        assert math.isclose(got.mean.item(), mean, abs_tol=1e-14)
        assert math.isclose(got.variance, square - mean**2, abs_tol=1e-14)


def test_variance_agrees_with_whole_groups_of_the_reasoner(x):
    """The trace of the covariance against drawing (mask, answer) groups from the enumerated probabilities."""
    policy, rewards, k, n = x.policies[0], x.rewards[0], 4, 20_000
    drawn = torch.multinomial(policy.probs, n * k, replacement=True, generator=torch.Generator().manual_seed(0))
    r = rewards.repeat(256)[drawn].view(n, k)
    a = advantage.group_advantages(r, baseline="leave_one_out")
    g = torch.einsum("gk,gkp->gp", a, policy.scores.sum(1)[drawn].view(n, k, -1)) / k
    exact = moments.group_moments(policy, rewards, k, baseline="leave_one_out")
    assert math.isclose(g.var(0).sum().item(), exact.variance, rel_tol=0.05)


def test_one_logit_variances_are_the_known_ones():
    """Leave-one-out over none at K = 8: 0.45 at pass rate 0.3, 2.44 at 0.7; the bound on a constant is 2(1 - p)."""
    for rate, ratio in ((0.3, 0.45), (0.7, 2.44)):
        row = moments.variance_row(enumeration.one_logit(rate), torch.tensor([1.0, 0.0]).double(), 8)
        assert row["leave_one_out"] / row["none"] == pytest.approx(ratio, abs=0.006)
        assert row["bound"] == pytest.approx(2 * (1 - rate))


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_crossover_has_a_closed_form(k):
    assert moments.crossover(k) == pytest.approx(2 * (k - 2) / (3 * k - 5), abs=1e-5)


def test_std_factors_are_those_of_the_method():
    assert [round(proofs.std_factor(8, p), 2) for p in (0.5, 0.05)] == [1.74, 2.31]


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_monte_carlo_agrees_with_the_enumeration(x, baseline):
    """Real rollouts with drawn masks, through score, loss and backward, give the enumerated expectation."""
    size = {"num_generations": 4, "groups": 200, "repeats": 16}
    got = moments.monte_carlo(x.model, x.problems[0], SPEC, x.rewards[0], **size, run_seed=1, baseline=baseline)
    want = 0.75 if baseline == "mean" else 1.0
    assert abs(got["share"] - want) < 4 * got["standard_error"] and got["standard_error"] < 0.1


def test_fresh_masks_on_one_token_answers_are_unbiased_with_token_ratios(x):
    """With one token per answer the token ratio is the sequence ratio; detached log-probs stay biased."""
    model = enumeration.tiny_reasoner()
    model.max_new_tokens = 1
    policy = enumeration.enumerate_policy(model, x.problems[0], SPEC)
    rewards = enumeration.reward_table(policy, 0.5)
    gradient = enumeration.true_gradient(model, x.problems[0], SPEC, rewards)
    bias = {
        form: moments.relative_error(moments.fresh_mask_moments(policy, rewards, 2, form=form).mean, gradient)
        for form in ("detached", "token_ratio")
    }
    assert bias["token_ratio"] < 1e-10 and bias["detached"] > 1e-3


def test_bias_table_has_one_row_per_estimator(x):
    model = enumeration.tiny_reasoner()
    model.max_new_tokens = 1
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0], dtype=torch.float64)
    rows = moments.bias_table(model, x.problems[0], SPEC, rewards, 2)
    assert len({row["estimator"] for row in rows}) == len(rows) == 9
    assert all(math.isfinite(row[key]) for row in rows for key in ("bias", "direction_error", "variance"))


def test_unknown_form_is_refused(x):
    with pytest.raises(ValueError, match="form: got 'soft'"):
        moments.fresh_mask_moments(x.policies[0], x.rewards[0], 2, form="soft")
