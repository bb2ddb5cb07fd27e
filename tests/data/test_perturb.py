"""data/perturb: copies hold exactly, repeat byte for byte, and any doubt freezes a number or rejects the problem."""

import importlib.util
import json
import os
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latentlab.config import DataConfig, from_dict, load_preset
from latentlab.data import datasets
from latentlab.data.jsonl import read_jsonl, write_jsonl
from latentlab.data.perturb import parse_step, perturb, perturbed, skeleton, trace
from latentlab.data.perturb.equations import number, write_like
from latentlab.data.word_problems import word_problems
from latentlab.problems import Problem, canonical_answer

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "reports" / "published" / "perturb"
spec = importlib.util.spec_from_file_location("measure_copies", ROOT / "scripts" / "measure_copies.py")
measure_copies = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure_copies)
relaxed = settings(derandomize=True, deadline=None, max_examples=200)
real_data = pytest.mark.skipif(not os.environ.get("LATENTLAB_DATA"), reason="LATENTLAB_DATA names no data folder")


def problem(question, *steps, answer=None):
    answer = answer or canonical_answer(steps[-1].rpartition("=")[2])
    return Problem("p", question, steps, answer, "test")


APPLES = problem(
    "Ann has 48 apples. She gives away 20 of them, then buys 3 bags of 16 each. How many has she?",
    "<<48-20=28>>",
    "<<3*16=48>>",
    "<<28+48=76>>",
)
PENS = problem(
    "A pen costs $2.50 and a ruler $4. How much are 6 pens and 7 rulers?",
    "<<6*2.50=15.00>>",
    "<<7*4=28>>",
    "<<15+28=43>>",
)
SALE = problem("A coat of $140 is sold at 20% off. What does it cost?", "<<140*.20=28>>", "<<140-28=112>>")
REST = problem("A coat of $1,400 is sold at 20% off. What does it cost?", "<<1400*.80=1120>>")
WALK = problem("An 8-mile walk takes Bo 15 minutes a mile. How many hours is that?", "<<8*15=120>>", "<<120/60=2>>")


BOXES = problem("A box holds 12 cakes. How many cakes are in 7 boxes?", "<<12*7=84>>")


def free(problem):
    template = trace(problem)
    return set() if template is None else {float(template.values[i]) for i in template.free}


def value_of(text):
    """The value of an expression by recursive descent, knowing nothing of equations.py; None for a division by zero."""
    tokens = re.findall(r"[0-9]*\.?[0-9]+|[-+*/()]", text)

    def factor():
        token = tokens.pop(0)
        if token == "(":
            inner = expression()
            tokens.pop(0)
            return inner
        return factor() if token == "+" else Fraction(token)

    def term():
        value = factor()
        while tokens and tokens[0] in "*/":
            value = value * factor() if tokens.pop(0) == "*" else value / factor()
        return value

    def expression():
        value = term()
        while tokens and tokens[0] in "+-":
            value = value + term() if tokens.pop(0) == "+" else value - term()
        return value

    try:
        return expression()
    except ZeroDivisionError:
        return None


def holds(copy):
    sides = [step.removeprefix("<<").removesuffix(">>").split("=") for step in copy.steps]
    right = all(value_of(left) == Fraction(result) for left, result in sides)
    return right and canonical_answer(sides[-1][1]) == copy.answer


# Equations

literals = st.from_regex(r"(?:[1-9][0-9]{0,3}|0|[1-9][0-9]?\.[0-9]{1,2}|\.[0-9]{1,2})", fullmatch=True)
expressions = st.recursive(
    literals,
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " * "]), inner, st.booleans()).map(
        lambda parts: f"({''.join(parts[:3])})" if parts[3] else "".join(parts[:3])
    ),
    max_leaves=8,
)


@relaxed
@given(expressions)
def test_expressions_have_the_value_of_an_independent_parser(text):
    equation = parse_step(f"<<{text}=1>>")
    assert (equation is None) == (re.search(r"[0-9.] ?[-+*/] ?[(0-9.]|\)", text) is None)  # one number is no equation
    if equation is not None:
        got = [number(equation.left[a:b]) for a, b in equation.literals]
        assert equation.compute(got) == value_of(text)


@relaxed
@given(st.text("0123456789.+-*/()= <>_exj", max_size=30) | st.text(max_size=20))
@example("__import__('os')")
@example("9**9**9")
@example("(" * 200)
@example("1//2")
@example("0777+1")
@example("1,000+1")
def test_any_other_text_is_no_equation_and_no_error(text):
    equation = parse_step(f"<<{text}=1>>")
    if equation is not None:
        assert len(equation.literals) > 1 and set(equation.left) <= set("0123456789.+-*/() ")


@relaxed
@given(st.integers(0, 10**9), st.integers(0, 4), st.sampled_from(["12", "2.50", "2.5", ".5", "1,000", "0.25", "18.00"]))
def test_a_value_survives_being_written_in_any_manner(digits, places, manner):
    value = Fraction(digits, 10**places)
    written = write_like(value, manner)
    assert number(written) == value
    assert write_like(number(manner), manner) == manner


# Copies


@pytest.mark.parametrize("original", [PENS, SALE, REST])
def test_copies_are_new_distinct_and_exact(original):
    copies = perturb(original, 12, seed=0)
    assert len(copies) == 12 == len({p.question for p in copies} - {original.question})
    assert [p.id for p in copies] == [f"p~{k}" for k in range(12)]
    assert {p.source for p in copies} == {"test/perturbed"}
    assert all(map(holds, copies))
    assert {re.sub(r"[\d,.]+", "#", p.question) for p in copies} == {re.sub(r"[\d,.]+", "#", original.question)}


def test_copies_repeat_and_a_longer_call_begins_with_the_shorter_one(tmp_path):
    assert perturb(PENS, 30, seed=1)[:10] == perturb(PENS, 10, seed=1)
    assert perturb(PENS, 10, seed=1) != perturb(PENS, 10, seed=2)
    write_jsonl(perturbed([PENS], 30, seed=1), tmp_path / "p.jsonl")
    assert read_jsonl(tmp_path / "p.jsonl") == perturb(PENS, 30, seed=1)


def test_the_copies_are_the_ones_that_results_were_made_with():
    assert perturb(PENS, 2, seed=0)[1] == Problem(
        "p~1",
        "A pen costs $3.50 and a ruler $5. How much are 10 pens and 12 rulers?",
        ("<<10*3.50=35.00>>", "<<12*5=60>>", "<<35+60=95>>"),
        "95",
        "test/perturbed",
    )


@pytest.mark.parametrize("original", [APPLES, PENS, SALE, REST, WALK])
def test_the_old_numbers_give_the_original(original):
    template = trace(original)
    assert template.recompute(template.values) == template.numbers
    assert template.write(template.numbers) == (original.question, original.steps)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_copies_of_random_chains_keep_every_promise(seed, steps):
    original = word_problems("train", 1, seed=seed, steps=steps)[0]
    old = [int(n) for n in re.findall(r"\d+", original.question)]
    for copy in perturb(original, 5, seed=0):
        new = [int(n) for n in re.findall(r"\d+", copy.question)]
        pairs = [(i, j) for i in range(len(old)) for j in range(len(old))]
        assert all((new[i] < new[j]) == (old[i] < old[j]) for i, j in pairs)  # order, and equal numbers stay tied
        assert holds(copy) and min(new) >= 1
        assert all(re.fullmatch(r"<<[^=]*=[1-9][0-9]*>>", step) for step in copy.steps)  # positive whole numbers
        assert [re.sub(r"\d+", "#", s) for s in copy.steps] == [re.sub(r"\d+", "#", s) for s in original.steps]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text(max_size=80), st.lists(st.text("0123456789.+-*/()=<> ", max_size=20), max_size=4))
@example("1/0 of 5 and ٣ eggs", ["<<5/0=1>>"])
@example("9" * 5000 + " eggs", ["<<" + "9" * 150 + "*2=4>>"])
def test_any_problem_is_perturbed_or_left_alone_without_an_error(question, steps):
    assert isinstance(perturb(Problem("p", question, tuple(steps), "1", "test"), 2, seed=0), list)


# What is frozen, and what is refused


def test_a_leaf_with_two_origins_freezes_all_behind_it():
    assert free(APPLES) == {20.0}  # 48 may be the first number or 3 * 16


@pytest.mark.parametrize(
    ("question", "steps", "expected"),
    [
        ("He buys 5 pens at $9 each for each of two friends.", ["<<5*9=45>>", "<<45*2=90>>"], {5, 9}),
        ("He buys 2 pens at $9 each for each of two friends.", ["<<2*9=18>>", "<<18*2=36>>"], {9}),  # two is a word
        ("For 6 hours at $9 each day he works. What is it in a week?", ["<<6*9=54>>", "<<54*7=378>>"], {6, 9}),
        ("He keeps 50% of 30 nuts.", ["<<30/2=15>>"], set()),  # 2 stands for 50 %
        ("He keeps half of 30 nuts, then finds 40.", ["<<30/2=15>>", "<<15+40=55>>"], {30, 40}),
        ("Of 90 pupils 40 are boys and 50 girls; 30 boys sing.", ["<<40-30=10>>"], {30}),  # 90 = 40 + 50
        ("It is 90 degrees, 11 more than at night.", ["<<90-11=79>>"], {11}),  # a fact is left alone
        ("He pays with 3 $20 bills for 7 pens at $6.", ["<<3*20=60>>", "<<7*6=42>>", "<<60-42=18>>"], {3, 7, 6}),
        ("20% like tea, 40% milk and 80 neither.", ["<<80/40=2>>", "<<2*100=200>>"], set()),  # 40 and 80 are rests too
        ("He walks 9 miles on May 6 and 23 on May 4.", ["<<9+23=32>>"], {9, 23}),
        ("He walks 9 miles on May 6 and 14 on May 8.", ["<<9+14=23>>"], {9}),  # 14 = 6 + 8
        ("A cat has 15 toys; 3 cats: Ann, Bea and Cy.", ["<<15*3=45>>"], {15}),  # the names are counted
        ("A coin of 25 cents buys 9 nuts; he buys 18.", ["<<18/9=2>>", "<<2*.25=.50>>"], {9, 18}),
    ],
)
def test_what_may_change(question, steps, expected):
    assert free(problem(question, *steps)) == expected


@pytest.mark.parametrize(
    ("question", "steps"),
    [
        ("He buys 5 pens at $3 each. How much?", ["<<5*3*2=30>>"]),  # no word licenses the 2
        ("He buys 5 pens at $3 each. How much?", ["<<5*3=16>>"]),
        ("He buys 5 pens at $3 each. How much?", ["<<15=15>>"]),
        (
            "Bob needs 20 minutes a lap, Al 17. How long does the slower one take for 5 laps?",
            ["<<5*17=85>>", "<<5*20=100>>"],
        ),  # 85 is used by nothing: a comparison
        ("He was born in 1990. How old is he in 2020?", ["<<2020-1990=30>>"]),
        ("He eats 1/4 of 3/4 cake.", ["<<1*3=3>>"]),
        ("How many?", []),
        ("He owes 9 and has 4.", ["<<4-9=-5>>"]),
    ],
)
def test_doubt_rejects_the_problem(question, steps):
    assert perturb(problem(question, *steps, answer=None if steps else "3"), 5, seed=0) == []


def test_an_answer_that_the_chain_does_not_reach_rejects_the_problem():
    assert perturb(problem("He buys 5 pens at $3.", "<<5*3=15>>", answer="16"), 5, seed=0) == []


def test_new_numbers_fit_their_place():
    copies = perturb(WALK, 50, seed=0)
    assert {re.match(r"An (\d+)-mile", p.question)[1] for p in copies} <= {"8", "11"}  # "an", below 8 * 9 / 5
    assert all(int(p.steps[1].rpartition("=")[2][:-2]) == float(p.answer) for p in copies)
    hours = problem("She works 8 hours a day for 20 days. How many hours is that?", "<<8*20=160>>")
    assert all(int(p.question.split()[2]) <= 12 for p in perturb(hours, 50, seed=0))
    shares = problem(
        "Of 400 nuts 60% are red, 30% are blue. How many?",
        "<<400*60/100=240>>",
        "<<400*30/100=120>>",
        "<<240+120=360>>",
    )
    for copy in perturb(shares, 50, seed=0):
        assert sum(map(int, re.findall(r"(\d+)%", copy.question))) <= 100


def test_a_decision_keeps_the_order_of_results():
    race = problem(
        "Al runs 9 laps of 20 seconds, Bo 4 of 30. By how much is the faster one faster?",
        "<<9*20=180>>",
        "<<4*30=120>>",
        "<<180-120=60>>",
    )
    for copy in perturb(race, 50, seed=0):
        results = [int(step.rpartition("=")[2][:-2]) for step in copy.steps]
        numbers = [int(n) for n in re.findall(r"\d+", copy.question)]
        assert numbers[2] < numbers[0] < numbers[1] < numbers[3] < results[2] < results[1] < results[0]


def test_a_negative_number_of_copies_is_refused():
    with pytest.raises(ValueError, match="^got n = -1, expected at least 0"):
        perturb(PENS, -1, seed=0)


# Data sets


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with PENS and SALE to train on; the test set has PENS with other names and numbers."""
    pencils = Problem("t", "A pen costs $3.50 and a ruler $5. How much are 8 pens and 9 rulers?", (), "73", "test")
    coat = Problem("q", *[getattr(SALE, k) for k in ("question", "steps", "answer", "source")])
    rows = {"train": [PENS, coat], "valid": [BOXES], "test": [pencils]}
    for name, problems in rows.items():
        write_jsonl(problems, tmp_path / f"gsm8k_{name}.jsonl")
    (tmp_path / "gsm8k_flags.json").write_text('{"train": {"gsm8k_aug_valid_500": []}}')
    monkeypatch.setenv("LATENTLAB_DATA", str(tmp_path))
    return tmp_path


def test_load_appends_copies_to_train_alone_and_none_of_a_held_out_twin(folder):
    data = DataConfig(name="gsm8k", train_size=0, validation_size=9, test_size=9, copies=4)
    rows = datasets.load(data, "train")
    assert [row.id for row in rows] == ["p", "q", "q~0", "q~1", "q~2", "q~3"]
    assert rows[2:] == perturb(rows[1], 4, seed=0)
    assert [len(datasets.load(data, split)) for split in ("validation", "test")] == [1, 1]
    assert [p.id for p in datasets.benchmark("gsm8k_perturbed")] == ["p~0"]
    assert [p.id for p in datasets.benchmark("gsm8k_perturbable")] == ["p"]


def test_copies_of_word_problems_are_refused():
    with pytest.raises(ValueError, match="^data.copies: got 3 with word_problems, expected 0") as caught:
        from_dict({"data": {"copies": 3}})
    assert "\n" not in str(caught.value)
    assert load_preset("smol").data.copies == 50


def test_a_skeleton_forgets_numbers_names_and_genders():
    assert skeleton("Max has 3 eggs. He eats two.") == skeleton("Bella has 12 eggs. She eats 5.")
    assert skeleton("Max has 3 eggs.") != skeleton("Max has 3 pens.")


def test_the_report_counts_what_it_says(folder, monkeypatch, capsys):
    monkeypatch.setattr(measure_copies, "READ", 3)
    measure_copies.measure(folder / "out")
    metrics = json.loads((folder / "out" / "perturb" / "perturb.json").read_text())["metrics"]
    each = [len(perturb(original, 50, seed=0)) for original in (PENS, SALE, BOXES)]
    assert (metrics["all"]["problems"], metrics["all"]["perturbable"], metrics["all"]["copies"]) == (3, 3, sum(each))
    assert metrics["wrong_equations"] == metrics["wrong_answers"] == metrics["originals_not_restored"] == 0
    assert metrics["held_out_in_training"] == {"questions": 0, "but_for_numbers_and_names": 0}
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == metrics["read"]


def test_every_sampled_copy_was_read_and_97_are_sensible():
    rows = re.findall(r"^\| (gsm8k\S+) \|.*\| (yes|no) \| \S", (REPORTS / "reading.md").read_text(), re.M)
    read = json.loads((REPORTS / "perturb.json").read_text())["metrics"]["read"]
    assert [id for id, _ in rows] == read and len(read) == 100
    assert [verdict for _, verdict in rows].count("yes") >= 97


@real_data
def test_real_copies_hold_and_have_the_bytes_of_the_committed_report():
    train = datasets.gsm8k("train")[: measure_copies.PINNED]
    copies = perturbed(train, 50, seed=0)
    metrics = json.loads((REPORTS / "perturb.json").read_text())["metrics"]
    assert measure_copies.digest(copies) == metrics["sha256_first"]
    assert all(map(holds, copies))
    assert not {p.question for split in ("validation", "test") for p in datasets.gsm8k(split)} & {
        p.question for p in copies
    }
