"""The checks of notebook 01: solutions pass, typical mistakes each get a message of their own."""

import pytest
import torch

from latentlab.teach.checks import collapse as check


def differences(thoughts, k):
    grouped = thoughts.unflatten(0, (-1, k))
    return grouped - grouped[:, :1]


SOLUTIONS = {
    check.advantages: lambda r: r - r.mean(1, keepdim=True),
    check.collapsed: lambda r: (r == r[:, :1]).all(1).double().mean().item(),
    check.difference: lambda z, k: differences(z, k).abs().max().item(),
}
WRONG = {
    check.advantages: {
        "sign": lambda r: r.mean(1, keepdim=True) - r,
        "over all groups": lambda r: r - r.mean(),
        "over the problems": lambda r: r - r.mean(0),
        "0 / 0": lambda r: (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True),
        "no division": lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4),
        "shape": lambda r: (r - r.mean(1, keepdim=True)).flatten(),
        "raised": lambda r: r - r.mean(1),
        "compare it": lambda r: r,
    },
    check.collapsed: {
        "mixed groups": lambda r: (r != r[:, :1]).any(1).double().mean().item(),
        "every answer is right": lambda r: (r == 0).all(1).double().mean(),
        "every answer is wrong": lambda r: (r == 1).all(1).double().mean(),
        "number of groups": lambda r: (r.std(1) == 0).sum(),
        "one per group": lambda r: r.std(1) == 0,
    },
    check.difference: {
        "different problems": lambda z, k: (z - z[0]).abs().max(),
        "absolute value": lambda z, k: differences(z, k).max(),
        "last thought": lambda z, k: differences(z, k)[:, :, -1].abs().max(),
        "mean difference": lambda z, k: differences(z, k).abs().mean(),
        "every pair": lambda z, k: (z.unflatten(0, (-1, k)).amax(1) - z.unflatten(0, (-1, k)).amin(1)).max(),
    },
}
MISTAKES = [(exercise, text, wrong) for exercise, cases in WRONG.items() for text, wrong in cases.items()]


@pytest.mark.parametrize("exercise", SOLUTIONS, ids=lambda exercise: exercise.name)
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


def test_single_precision_is_precise_enough():
    assert check.advantages(lambda r: r.float() - r.float().mean(1, keepdim=True)) is True
    assert check.difference(lambda z, k: torch.tensor(differences(z, k).abs().max().item())) is True
