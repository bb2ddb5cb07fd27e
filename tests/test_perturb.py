"""perturb.py: copies hold exactly, repeat byte for byte, and any doubt freezes a number or rejects the problem."""

import os
from fractions import Fraction

import pytest

from latentlab import sources
from latentlab.config import DataConfig, from_dict, load_preset
from latentlab.perturb import parse_step, perturb, perturbed, trace
from latentlab.problems import Problem, read_jsonl, write_jsonl


def problem(question, *steps, answer=None):
    answer = answer or steps[-1].rpartition("=")[2].removesuffix(">>")
    return Problem("p", question, steps, answer, "test")


APPLES = problem(
    "Ann has 48 apples. She gives away 20 of them, then buys 3 bags of 16 each. How many has she?",
    "<<48-20=28>>",
    "<<3*16=48>>",
    "<<28+48=76>>",
)
PENS = problem("A pen costs $2.50 and a ruler $4. How much are 6 pens and 7 rulers?",
               "<<6*2.50=15.00>>", "<<7*4=28>>", "<<15+28=43>>")  # fmt: skip
SALE = problem("A coat of $140 is sold at 20% off. What does it cost?", "<<140*.20=28>>", "<<140-28=112>>")


def free(problem):
    template = trace(problem)
    return set() if template is None else {float(template.values[i]) for i in template.free}


def holds(variant):
    """Every equation, by Fraction arithmetic of its own."""
    for step in variant.steps:
        text, literals, program, result = parse_step(step)
        tokens = [text[a:b] for a, b in literals]
        stack = []
        for item in program:
            if isinstance(item, int):
                stack.append(Fraction(tokens[item]))
            else:
                right, left = stack.pop(), stack.pop()
                stack.append(item(left, right))
        if stack != [Fraction(result)]:
            return False
    return Fraction(parse_step(variant.steps[-1])[3]) == Fraction(variant.answer)


@pytest.mark.parametrize("original", [PENS, SALE])
def test_copies_are_new_distinct_and_exact(original):
    copies = perturb(original, 12, seed=0)
    assert len(copies) == 12 == len({p.question for p in copies} - {original.question})
    assert [p.id for p in copies] == [f"p~{k}" for k in range(12)]
    assert {p.source for p in copies} == {"test/perturbed"}
    assert all(holds(p) for p in copies)


def test_copies_repeat_and_a_longer_call_begins_with_the_shorter_one(tmp_path):
    assert perturb(PENS, 30, seed=1)[:10] == perturb(PENS, 10, seed=1)
    assert perturb(PENS, 10, seed=1) != perturb(PENS, 10, seed=2)
    write_jsonl(perturbed([PENS], 30, seed=1), tmp_path / "p.jsonl")
    assert read_jsonl(tmp_path / "p.jsonl") == perturb(PENS, 30, seed=1)


@pytest.mark.parametrize("original", [APPLES, PENS, SALE])
def test_the_old_numbers_give_the_original(original):
    template = trace(original)
    values = tuple(template.values)
    assert template.recompute(values) == template.results
    assert template.write(values, template.results) == (original.question, original.steps)


def test_a_leaf_with_two_origins_freezes_all_behind_it():
    assert free(APPLES) == {20.0}  # 48 may be the first number or 3 * 16


@pytest.mark.parametrize(
    ("question", "steps"),
    [
        ("He buys 5 pens at $3 each. How much?", ("<<5*3*2=30>>",)),  # no word licenses the 2
        ("He buys 5 pens at $3 each. How much?", ("<<5*3=16>>",)),
        ("Bob needs 20 minutes a lap, Al 17. How long does the slower one take for 5 laps?",
         ("<<5*17=85>>", "<<5*20=100>>")),  # 85 is used by nothing: a comparison
        ("He was born in 1990. How old is he in 2020?", ("<<2020-1990=30>>",)),
        ("He eats 1/4 of 3/4 cake.", ("<<1*3=3>>",)),
        ("How many?", ()),
    ],
)  # fmt: skip
def test_doubt_rejects_the_problem(question, steps):
    assert perturb(problem(question, *steps, answer=None if steps else "3"), 5, seed=0) == []


def test_load_appends_the_copies_to_train_alone(tmp_path, monkeypatch):
    for name in ("train", "valid", "test"):
        write_jsonl([PENS, Problem("q", *[getattr(SALE, k) for k in ("question", "steps", "answer", "source")])],
                    tmp_path / f"gsm8k_{name}.jsonl")  # fmt: skip
    (tmp_path / "gsm8k_flags.json").write_text('{"train": {"gsm8k_aug_valid_500": []}}')
    monkeypatch.setenv("LATENTLAB_DATA", str(tmp_path))
    data = DataConfig(name="gsm8k", train_size=0, validation_size=9, test_size=9, copies=4)
    rows = sources.load(data, "train")
    assert len(rows) == 2 + 8 and rows[2:] == perturbed(rows[:2], 4, seed=0)
    assert len(sources.load(data, "validation")) == len(sources.load(data, "test")) == 2
    fresh = sources.benchmark("gsm8k_perturbed")
    assert [p.id for p in fresh] == ["p~0", "q~0"] and all(map(holds, fresh))


def test_copies_of_word_problems_are_refused():
    with pytest.raises(ValueError, match="^data.copies: got 3 with word_problems, expected 0") as caught:
        from_dict({"data": {"copies": 3}})
    assert "\n" not in str(caught.value)
    assert load_preset("smol").data.copies == 50


@pytest.mark.skipif(not os.environ.get("LATENTLAB_DATA"), reason="LATENTLAB_DATA names no data folder")
def test_real_problems_hold_and_share_no_question_with_held_out_sets():
    train = sources.gsm8k("train")[:600]
    copies = perturbed(train, 5, seed=0)
    assert len({p.id.partition("~")[0] for p in copies}) > 300 and all(map(holds, copies))
    held_out = {p.question for split in ("validation", "test") for p in sources.gsm8k(split)}
    assert not held_out & {p.question for p in copies}
