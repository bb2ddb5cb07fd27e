"""problems.py: canonical answers are total and exact; a file of problems is read whole or refused in one line."""

import gzip
import json
import os
import random
import re
import time
import unicodedata
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentlab.data.jsonl import read_jsonl, write_jsonl
from latentlab.problems import Problem, answers_match, canonical_answer, extract_answer, step_result

relaxed = settings(derandomize=True, deadline=None, max_examples=200)

ROW = {"id": "a-0", "question": "How many?", "steps": ["<<1+1=2>>"], "answer": "2", "source": "test"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000", "1000"),
        ("1,234,567.50", "1234567.5"),
        ("$3.50", "3.5"),
        ("-$3.50", "-3.5"),
        ("$-3.50", "-3.5"),
        ("50%", "50"),
        ("-7", "-7"),
        ("\u22127", "-7"),
        ("+7", "7"),
        ("x-7", "7"),
        (".5", "0.5"),
        ("18.", "18"),
        ("18.0", "18"),
        ("007", "7"),
        ("-0", "0"),
        ("-0.00", "0"),
        ("18 apples", "18"),
        ("  18\n", "18"),
        ("1/2", "0.5"),
        ("-1/8", "-0.125"),
        ("1,000 / 4", "250"),
        ("0.1/0.3", "1/3"),
        ("-4/6", "-2/3"),
        ("0/5", "0"),
        ("1/0", None),
        ("1/0.00", None),
        ("1" * 101 + "/3", None),
        ("0." + "0" * 97 + "1/333", None),
        ("1 1/2", None),
        ("18 or 20", None),
        ("5-3", None),
        ("1e3", None),
        ("1,5", None),
        ("1,0000", None),
        ("3:45", None),
        ("1.2.3", None),
        ("", None),
        ("none", None),
        (".", None),
        ("\u0663", None),
        ("\u00bd", None),
        ("nan", None),
    ],
)
def test_canonical_answer_follows_its_rule(text, expected):
    assert canonical_answer(text) == expected


WHOLE = {  # what touches a number and is dropped
    "7-day": "7",
    "$18/hour": "18",
    "18kg": "18",
    "5th": "5",
    "18 m\u00b2": "18",  # a unit, or a subscript of a word
    "H\u2082O 5": "5",
    "<b>18</b>": "18",
    "**18**": "18",
    "'18'": "18",
    "(5)": "5",
    "x=-5": "-5",
    "$18.": "18",
    "18.5.": "18.5",
    "18,": "18",
    "12>>": "12",
    "-\u20b918": "-18",
    "caf\u00e9-18": "18",  # a hyphen behind a letter
    "\u201c-18\u201d": "-18",  # a sign behind a quotation mark
    "- 18": "18",  # a list item
    "- .5": "0.5",
    "-> **18**": "18",
    "- **-18**": "-18",
    "- **Answer**: 18": "18",
    "**-18**": "-18",
    "\\boxed{-18}": "-18",
    "<b>-18</b>": "-18",
    "so\u2026 18": "18",
    "\u2705\ufe0f **18**": "18",
    "<b>1</b>/<b>2</b>": "0.5",
    "sub-**18**": "18",
}
PARTS = (  # a number that would be read in part
    *("1\u00bd", "10\u2076", "\uff15.0", "Rs.18", "\u00b23", "1\u066b5", "\u066b5", "\uff0e5", "10\u2099", "10\u207f"),
    *("--5", "\u2212\u22125", "+-5", "-$-5", "\u00b15", "~5", "\u02d75", "\u27965", "x\u20137", "5-", "5+", "5- or 7"),
    *(
        "1_000",
        "1'000",
        "1\u00a0000",
        "1\u2009000",
        "1 \u00bd",
        "5 and \u00bd",
        "a,5",
        "5..",
        "..5",
        "18/",
        "1/2/",
        "/5",
    ),
    *("0x10", "0xff", "5=x", "<5", ">5", "5^x", "|5|", "\u21635", "5\u4e94", "5\u4e07", "\u51435\u5341", "5\u20e3"),
    *("5\u0338", "5\u200b", "1\u2064\u00bd", "1\u20442", "5\u2044", "\uff10", "\u2460 18", "5\u02b0", "\u221a5"),
    *("-**18**", r"-\boxed{18}", "-$ 18", "- $18", "-`18`", "-(18)", "-<b>18</b>", "- <b>18</b>", "\u2212**18**"),
    *("-_18_", "-'18'", "**-**18", r"-\(18\)", r"-\$18", r"-\mathbf{18}", "-\u20ac 18", "\u2013 $18", "-(.5)", "+*18*"),
    *(
        "-USD 18",
        "-USD18",
        "-A$18",
        "x = -**18**",
        "\u00b1**18**",
        "- **$18**",
        "-\u201c18\u201d",
        "-<i><b>18",
        "18\u2026",
        "18...",
    ),
    *("\u202618", "...18", "18\u2025"),
)


def test_a_fraction_has_a_hundred_digits_on_a_side_at_most():
    nines = "9" * 100
    assert canonical_answer(f"{nines}/7") == f"{nines}/7"
    assert canonical_answer(f"{nines}/1") == nines and canonical_answer(f"{nines}0/1") is None
    tenth = "." + "0" * 98 + "1"  # 10 ** -99
    assert canonical_answer(f"1/{tenth}") == "1" + "0" * 99
    assert canonical_answer(f"10/{tenth}") is None and canonical_answer(f"{tenth}/10") is None


@pytest.mark.parametrize(("text", "expected"), [*WHOLE.items(), *((text, None) for text in PARTS)])
def test_a_number_is_read_whole_or_not_at_all(text, expected):
    assert canonical_answer(text) == expected
    assert canonical_answer(f"  {text}\n") == expected


NUMERALS_AND_SIGNS = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Nd", "Nl", "No", "Sm", "Pd")]


@pytest.mark.parametrize("number", ["0", "18", "-7", "0.5", "1/3", "-2/3"])
def test_no_numeral_and_no_sign_can_touch_a_number(number):
    """Exceptions: ASCII digits, which make another number; a sign in front; "=" in front and ">" behind."""
    for c in NUMERALS_AND_SIGNS:
        if c in "0123456789":
            continue
        front = {"=": number, "+": number, "-": f"-{number}", "\u2212": f"-{number}"}.get(c)
        want = None if front is None or number[0] == "-" and c != "=" else front.replace("-0", "0", number == "0")
        assert canonical_answer(c + number) == want, (c, number)
        assert canonical_answer(number + c) == (number if c == ">" else None), (number, c)


@pytest.mark.parametrize(
    "part",
    [
        "1",
        "1/",
        "1,",
        "111,",
        "1,1111",
        "1.",
        "-",
        "+$",
        ".",
        "<a",
        "<a ",
        "a.",
        "\u00bd",
        "\u2212$",
        "\u4e94a",
        "-*",
        "- ",
        "-<a>",
        r"\aUSD",
        r"\aUSD ",
    ],
)
def test_a_long_text_takes_linear_time(part):
    start = time.perf_counter()
    canonical_answer(part * (100_000 // len(part)))
    canonical_answer("-" + part * (100_000 // len(part)))
    assert time.perf_counter() - start < 2  # a quadratic search takes minutes


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "gsm8k_valid"])
def test_every_answer_of_gsm8k_is_a_number(name):
    path = Path(os.environ.get("LATENTLAB_DATA", "data/downloads")) / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    for line in path.open(encoding="utf-8"):
        row = json.loads(line)
        assert canonical_answer(row["answer"]) == row["answer"]
        for step in row["steps"]:
            if re.search(r"=\d+>>$", step):
                assert step_result(step) == str(int(step.rpartition("=")[2][:-2]))


@relaxed
@given(st.text() | st.text(alphabet="0123456789.,/-+$% e#<>="))
def test_canonical_answer_is_total_and_idempotent(text):
    value = canonical_answer(text)
    assert value is None or canonical_answer(value) == value


@relaxed
@given(st.decimals(allow_nan=False, allow_infinity=False, places=4))
def test_canonical_answer_keeps_the_value_of_a_decimal(value):
    canonical = canonical_answer(f"{value:,f}")
    assert Decimal(canonical) == value
    assert canonical == "0" or not (canonical.startswith("-0") and "." not in canonical)
    assert "." not in canonical or not canonical.endswith("0")


@relaxed
@given(st.integers(-(10**30), 10**30), st.integers(1, 10**30))
def test_canonical_answer_keeps_the_value_of_a_fraction(top, bottom):
    assert Fraction(canonical_answer(f"{top}/{bottom}")) == Fraction(top, bottom)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<<1+1=2>>\n### 2", "2"),
        ("#### 2", "2"),
        ("### 1\n### 2", "2"),
        ("###\n\n 2 apples \n", "2 apples"),
        ("### 2\nand 3", "2"),
        ("the answer is 2", None),
        ("2 ###", None),
        ("", None),
    ],
)
def test_extract_answer_takes_the_line_after_the_last_marker(text, expected):
    assert extract_answer(text) == expected


def test_answers_match_by_value_or_by_text():
    assert answers_match("$1,000.0", "1000")
    assert answers_match("2/4", ".5")
    assert not answers_match("1000", "1001")
    assert answers_match(" 7 ", "7", rule="string")
    assert not answers_match("7.0", "7", rule="string")


@pytest.mark.parametrize("rule", ["numeric", "string"])
def test_nothing_matches_an_unparsable_answer(rule):
    assert not answers_match(None, None, rule=rule)
    assert not answers_match(None, "1", rule=rule)
    assert not answers_match("many", "many")  # without a number only the string rule can match


def test_answers_match_refuses_an_unknown_rule():
    with pytest.raises(ValueError, match="got rule 'float'"):
        answers_match("1", "1", rule="float")


@pytest.mark.parametrize(
    ("step", "expected"), [("<<7+5=12>>", "12"), ("<<2/.5=4>>", "4"), ("<<3/4=3/4>>", "0.75"), ("<<8=4*2=08>>", "8")]
)
def test_step_result_is_right_of_the_last_equals_sign(step, expected):
    assert step_result(step) == expected


@pytest.mark.parametrize("step", ["<<7+5>>", "<<7+5=>>", "12", ""])
def test_step_result_refuses_a_step_without_result(step):
    with pytest.raises(ValueError, match="expected") as caught:
        step_result(step)
    assert "\n" not in str(caught.value)


# Files


printable = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@relaxed
@given(rows=st.lists(st.tuples(printable, printable, st.lists(st.text(st.characters(codec="utf-8")))), min_size=1))
def test_what_is_written_is_read_back_equal(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("jsonl") / "p.jsonl"
    problems = [Problem(f"{i}-{id}", q, tuple(steps), str(i), "test") for i, (id, q, steps) in enumerate(rows)]
    write_jsonl(problems, path)
    assert read_jsonl(path) == problems
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_jsonl(packed) == problems


def _line(**changes) -> bytes:
    return (json.dumps(ROW | changes) + "\n").encode()


NAMED_FAULTS = {
    "truncated": _line()[:-20],
    "not UTF-8": _line().replace(b"How", b"\xff\xfe"),
    "not an object": b"[1, 2]\n",
    "not JSON": b"hello\n",
    "blank line": b"\n",
    "a bare NaN": _line(answer=float("nan")),
    "a number as answer": _line(answer=2),
    "an answer with a separator": _line(answer="1,000"),
    "an answer without a number": _line(answer="two"),
    "steps as text": _line(steps="<<1+1=2>>"),
    "steps of numbers": _line(steps=[1]),
    "a blank question": _line(question=" "),
    "an additional key": _line(note="x"),
    "a missing key": b'{"id": "x", "question": "q", "steps": [], "answer": "2"}\n',
    "half a surrogate pair": _line(question="\ud800"),
    "an integer of 5,000 digits": _line().replace(b'"2"', b"9" * 5000),
    "deep nesting": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("fault", NAMED_FAULTS)
def test_a_faulty_line_is_one_error_with_file_and_line(tmp_path, fault):
    path = tmp_path / "p.jsonl"
    path.write_bytes(_line() + NAMED_FAULTS[fault])
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: .*expected") as caught:
        read_jsonl(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@relaxed
@given(seed=st.integers(0, 2**32), junk=st.binary(min_size=1, max_size=8))
def test_random_damage_is_refused_in_one_line_or_read_as_valid_problems(tmp_path_factory, seed, junk):
    data = _line() + _line(id="a-1") + _line(id="a-2")
    at = random.Random(seed).randrange(len(data))
    path = tmp_path_factory.mktemp("damage") / "p.jsonl"
    path.write_bytes(data[:at] + junk + data[at + len(junk) :])
    try:
        problems = read_jsonl(path)
    except ValueError as error:
        assert "\n" not in str(error) and "p.jsonl" in str(error)
    else:
        assert problems and all(canonical_answer(p.answer) == p.answer for p in problems)


def test_a_repeated_id_names_both_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(_line() + _line(id="b") + _line())
    with pytest.raises(ValueError, match="line 3: got id 'a-0' again .first on line 1."):
        read_jsonl(path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "p.jsonl").touch()
    with pytest.raises(ValueError, match="no problem at all"):
        read_jsonl(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    "data", [gzip.compress(_line() * 9)[:-9], b"plain text", b"\x1f\x8b\x08" + b"\x00" * 7 + b"\xff" * 9]
)
def test_broken_gzip_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "p.jsonl.gz").write_bytes(data)
    with pytest.raises(ValueError, match="gz") as caught:
        read_jsonl(tmp_path / "p.jsonl.gz")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_not_found(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file"):
            read_jsonl(path)


def test_a_refused_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "p.jsonl"
    good = Problem("a", "q", (), "2", "test")
    write_jsonl([good], path)
    for bad in ([], [good, good], [Problem("a", "q", (), "2.0", "test")], [Problem("a", "q", "abc", "2", "test")]):
        with pytest.raises(ValueError, match="expected"):
            write_jsonl(bad, path)
    assert read_jsonl(path) == [good]
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]
    with pytest.raises(ValueError, match=r"expected a name ending in \.jsonl"):
        write_jsonl([good], tmp_path / "p.jsonl.gz")
