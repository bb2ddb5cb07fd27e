"""Exercises of 00: the solution passes, typical mistakes get a message of their own."""

import pytest
import torch

from latentlab.masks import MaskSpec
from latentlab.teach.checks import tour


def tokens_of(model, thoughts):
    return model.head(thoughts).argmax(-1).tolist()


def right_decoding(model, thoughts):
    return [model.tokenizer.decode([t]) for t in tokens_of(model, thoughts)]


def right_values(model, spec):
    slots = model.num_slots(spec.scope) if spec.scheme == "per_step" else 1
    return slots * model.num_sites(spec.sites) * model.width


def first(seed):
    def answer(model, problems):
        return problems[0], seed

    return answer


def search(model, problems):
    for problem in problems:
        for seed in range(200):
            if tour._repaired(lambda *_, p=problem, s=seed: (p, s)) == ["repaired"]:
                return problem, seed


def wrong_but_unrepaired(model, problems):
    for problem in problems:
        if tour._repaired(lambda *_, p=problem: (p, 0)) == ["still wrong"]:
            return problem, 0


@pytest.mark.parametrize(
    ("check", "answer"),
    [(tour.decode_thoughts, right_decoding), (tour.mask_values, right_values), (tour.repairing_mask, search)],
)
def test_solutions_pass_and_stubs_are_not_tried(check, answer, capsys):
    assert check(answer) is True
    assert check(lambda *_: None) is None
    assert "not tried yet" in capsys.readouterr().out


WRONG = {
    tour.decode_thoughts: (
        lambda model, z: tokens_of(model, z),  # ids
        lambda model, z: right_decoding(model, z)[:1],  # the first alone
        lambda model, z: ["7"] * 4,
        lambda model, z: [model.tokenizer.decode([t]) for t in model.head(z).argmin(-1).tolist()],
    ),
    tour.mask_values: (
        lambda model, spec: model.num_sites(spec.sites) * model.width,  # one mask per step forgotten
        lambda model, spec: (
            right_values(model, spec) * (4 if spec.scheme == "per_step" else 5) // 5
        ),  # no slot of <start>
        lambda model, spec: model.width if spec.scheme == "shared" else right_values(model, spec),
        lambda model, spec: right_values(model, MaskSpec(spec.scheme, sites=spec.sites)),  # no answer tokens
        lambda model, spec: 7 * right_values(model, spec),
    ),
    tour.repairing_mask: (wrong_but_unrepaired, first(0), lambda model, problems: 1 / 0),
}


@pytest.mark.parametrize("check", WRONG, ids=lambda check: check.name)
def test_each_mistake_has_a_message_of_its_own(check, capsys):
    with torch.no_grad():
        assert [check(answer) for answer in WRONG[check]] == [False] * len(WRONG[check])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(set(said)) == len(WRONG[check])
