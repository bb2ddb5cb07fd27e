"""The checks of notebook 02: solutions pass, typical mistakes each get a message of their own."""

import pytest
import torch

from latentlab.teach.checks import variance as check
from latentlab.theory.enumeration import two_masks


def uniform(seed, shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def steps(thoughts, results):
    return [i for i, (z, right) in enumerate(zip(thoughts, results, strict=True), 1) if z != right]


def scores(p, q, m):
    return (p * q * m * (1 - q)).sum(), (p * q).sum() * (p * m * (1 - q)).sum()


def loo_baseline(r, k):
    return (r.sum(1, keepdim=True) - r) / k


SOLUTIONS = {
    check.mask: lambda seed, shape, p: (uniform(seed, shape) >= p) / (1 - p),
    check.bias: lambda p, q, m: scores(p, q, m)[1] - scores(p, q, m)[0],
    check.leave_one_out: lambda r: r - loo_baseline(r, 3),
    check.repair: None,  # found below
    check.first_error: lambda z, right: min(steps(z, right), default=0),
}
WRONG = {
    check.mask: {
        "cannot replay": lambda seed, shape, p: (torch.rand(shape) >= p) / (1 - p),
        "every seed": lambda seed, shape, p: (uniform(7, shape) >= p) / (1 - p),
        "one mask": lambda seed, shape, p: ((uniform(seed, shape[1:]) >= p) / (1 - p)).expand(shape),
        "share of zeros": lambda seed, shape, p: (uniform(seed, shape) < p) / p,
        "no feature is dropped": lambda seed, shape, p: uniform(seed, shape) + 0.1,
        "another size": lambda seed, shape, p: (uniform(seed, shape) >= p).float(),
    },
    check.bias: {
        "zero": lambda p, q, m: 0.0,
        "itself": lambda p, q, m: scores(p, q, m)[1],
        "sign": lambda p, q, m: scores(p, q, m)[0] - scores(p, q, m)[1],
        "divided": lambda p, q, m: scores(p, q, m)[1] / scores(p, q, m)[0] - 1,
        "compare it": lambda p, q, m: (p * m * (1 - q)).sum(),
    },
    check.leave_one_out: {
        "own reward": lambda r: r - r.mean(1, keepdim=True),
        "divided by K": lambda r: r - loo_baseline(r, 4),
        "baseline alone": lambda r: loo_baseline(r, 3),
        "sign": lambda r: loo_baseline(r, 3) - r,
    },
    check.first_error: {
        "return 0": lambda z, right: min(steps(z, right), default=None),
        "from 0": lambda z, right: min(steps(z, right), default=1) - 1,
        "last wrong": lambda z, right: max(steps(z, right), default=0),
        "number of wrong": lambda z, right: len(steps(z, right)),
    },
}
MISTAKES = [(exercise, text, wrong) for exercise, cases in WRONG.items() for text, wrong in cases.items()]


@pytest.mark.parametrize("exercise", [e for e, mine in SOLUTIONS.items() if mine], ids=lambda exercise: exercise.name)
def test_the_solution_passes_and_a_stub_is_not_tried(exercise, capsys):
    assert exercise(SOLUTIONS[exercise]) is True
    assert exercise(lambda *_: None) is None
    assert "not tried" in capsys.readouterr().out


@pytest.mark.parametrize(("exercise", "text", "wrong"), MISTAKES, ids=[f"{e.name}: {t}" for e, t, _ in MISTAKES])
def test_a_mistake_is_named(exercise, text, wrong, capsys):
    assert exercise(wrong) is False
    assert text in capsys.readouterr().out


def test_each_mistake_has_a_message_of_its_own(capsys):
    for exercise, cases in WRONG.items():
        for wrong in cases.values():
            exercise(wrong)
        assert len(set(capsys.readouterr().out.splitlines())) == len(cases)


def test_a_repair_is_told_from_other_answers(capsys, unchecked):
    answers = [check.answer_under(seed) for seed in range(40)]
    clean = check.answer_under(0, rate=0.0)
    assert clean == "7"
    assert check.repair(None) is None
    assert check.repair(answers.index("6")) is True
    capsys.readouterr()
    for wrong, text in (
        (answers.index(clean), "without a mask"),
        (next(i for i, answer in enumerate(answers) if answer not in ("6", "7")), "another wrong one"),
        (0.5, "whole number"),
    ):
        assert check.repair(wrong) is False
        assert text in capsys.readouterr().out


def test_the_case_by_hand_is_that_of_the_policy():
    """E[r s] = 3/16 with replay, 5/32 with a fresh mask, by the exercise and by enumeration."""
    policy, rewards = two_masks(), torch.tensor([1.0, 0.0]).double()
    assert check.replayed[0] == 6 / 32 and check.fresh[0] == 5 / 32
    replay = (policy.probs * rewards.repeat(2)) @ policy.scores[:, 0, 0]
    assert replay.item() == pytest.approx(6 / 32, abs=1e-15)
    given = policy.probs.view(2, 2) / policy.mask_probs[:, None]
    mixed = torch.einsum("my,n,ny,y->", policy.probs.view(2, 2), policy.mask_probs, policy.scores.view(2, 2), rewards)
    assert mixed.item() == pytest.approx(5 / 32, abs=1e-15)
    assert given[:, 0].tolist() == pytest.approx([0.75, 0.5])
