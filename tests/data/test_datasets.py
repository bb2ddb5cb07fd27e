"""Data sets: synthetic problems are right, fixed in length, disjoint and repeatable; data sets share one schema."""

import json
import os
import re
import socket

import pytest

from latentlab.data import datasets
from latentlab.data import word_problems as word_problems_module
from latentlab.data.datasets import BENCHMARKS, benchmark, gsm8k, gsm8k_aug
from latentlab.data.jsonl import read_jsonl, write_jsonl
from latentlab.data.word_problems import SPLITS, WORDS, word_problems
from latentlab.problems import Problem, canonical_answer

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
VERBS = {
    **{"finds": "+", "buys": "+", "gives": "-", "loses": "-"},
    **{"gets": "*", "grows": "*", "splits": "/", "shares": "/"},
}
TOKEN = re.compile(r"<<|>>|###|\n|\d+|[A-Za-z]+|[^ ]")


def chain_of(problem: Problem) -> tuple[str, ...]:
    """Start, operations and operands, read from the question's words alone."""
    opening, *sentences = problem.question.split(". ")[:-1]
    moves = [VERBS[s.split()[1]] + re.search(r"\d+", s)[0] for s in sentences]
    return (re.search(r"\d+", opening)[0], *moves)


# Synthetic problems


@pytest.mark.parametrize("split", SPLITS)
def test_steps_and_answer_follow_from_the_words_of_the_question(split):
    for problem in word_problems(split, 500, seed=3):
        start, *moves = chain_of(problem)
        value = int(start)
        assert 1 <= value <= 29 and len(moves) == len(problem.steps) == 4
        for move, step in zip(moves, problem.steps, strict=True):
            result = OPERATIONS[move[0]](value, int(move[1:]))
            assert step == f"<<{value}{move}={result}>>"
            assert 2 <= int(move[1:]) <= 9 and 0 <= result <= 29
            value = result
        assert problem.answer == str(value) and problem.source == f"word/{split}"


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_every_question_has_its_words_at_the_same_places(steps):
    for problem in word_problems("train", 300, seed=0, steps=steps):
        tokens = TOKEN.findall(problem.question)
        assert len(tokens) == 5 + 6 * steps + 5
        assert [i for i, token in enumerate(tokens) if token.isdigit()] == [2] + [5 + 6 * k + 2 for k in range(steps)]
        assert [i for i, token in enumerate(tokens) if token == "."] == [4] + [5 + 6 * k + 5 for k in range(steps)]


def test_words_hold_every_token_and_every_word_occurs():
    problems = word_problems("train", 3000, seed=0)
    texts = ["\n".join([p.question, *p.steps, f"### {p.answer}"]) for p in problems]
    seen = {token for text in texts for token in TOKEN.findall(text)}
    assert len(set(WORDS)) == len(WORDS)
    assert seen == set(WORDS) - {","}  # the comma is reserved


def test_a_name_keeps_its_pronoun_and_the_objects_agree():
    pronouns = {}
    for problem in word_problems("train", 500, seed=1):
        opening, *sentences, closing = re.split(r"(?<=\.) ", problem.question)
        name, _, _, objects = opening.rstrip(".").split()
        assert closing == f"How many {objects} remain?"
        assert len({s.split()[0] for s in sentences}) == 1
        assert pronouns.setdefault(name, sentences[0].split()[0]) == sentences[0].split()[0]
    assert len(pronouns) == 8


def test_splits_share_no_chain_under_any_seed():
    sizes = {"train": 1500, "validation": 300, "test": 300}
    chains = {
        split: {chain_of(p) for seed in (0, 1, 2) for p in word_problems(split, n, seed=seed, steps=2)}
        for split, n in sizes.items()
    }
    assert not chains["train"] & chains["validation"]
    assert not chains["train"] & chains["test"]
    assert not chains["validation"] & chains["test"]


def test_about_a_tenth_of_all_chains_goes_to_each_held_out_split():
    chains = [f"{start}{op}{k}" for start in range(1, 30) for op in "+-*/" for k in range(2, 10)]
    shares = {split: sum(word_problems_module._split_of(c) == split for c in chains) / len(chains) for split in SPLITS}
    assert 0.07 < shares["validation"] < 0.13 and 0.07 < shares["test"] < 0.13


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_chains_are_distinct(split):
    chains = [chain_of(p) for p in word_problems(split, 600, seed=0, steps=2)]
    assert len(set(chains)) == 600


def test_train_repeats_chains_in_other_words():
    problems = word_problems("train", 3000, seed=0, steps=1)
    assert len({chain_of(p) for p in problems}) < 700 < len({p.question for p in problems})


@pytest.mark.parametrize("split", SPLITS)
def test_a_longer_call_begins_with_the_shorter_one(split):
    assert word_problems(split, 40, seed=5) == word_problems(split, 200, seed=5)[:40]
    assert word_problems(split, 40, seed=5) != word_problems(split, 40, seed=6)
    assert word_problems(split, 0, seed=5) == []


def test_the_stream_is_the_one_that_results_were_made_with():
    assert word_problems("test", 18, seed=0)[17] == Problem(
        "word-test-s0-4-000017",
        "Sam has 7 shells. He grows 4 from each. He splits 4 ways evenly. He shares 5 ways evenly. "
        "He grows 4 from each. How many shells remain?",
        ("<<7*4=28>>", "<<28/4=7>>", "<<7/5=1>>", "<<1*4=4>>"),
        "4",
        "word/test",
    )


def test_ids_are_unique_and_files_take_the_problems(tmp_path):
    problems = [p for s in SPLITS for seed in (0, 1) for p in word_problems(s, 50, seed=seed)]
    write_jsonl(problems, tmp_path / "p.jsonl")
    assert read_jsonl(tmp_path / "p.jsonl") == problems


@pytest.mark.parametrize("operation", list("+-*/"))
def test_operations_are_uniform_among_the_possible_ones(operation):
    # From a start of 2..14 all four are possible: each has probability 1/4 (sd 0.006 at some 5,400 draws).
    first = [p.steps[0] for p in word_problems("train", 12_000, seed=0, steps=2)]
    drawn = [re.match(r"<<(\d+)(.)", step).groups() for step in first]
    possible = [op for value, op in drawn if 2 <= int(value) <= 14]
    assert len(possible) > 5000
    assert abs(possible.count(operation) / len(possible) - 0.25) < 0.03


@pytest.mark.parametrize(
    "call",
    [
        lambda: word_problems("dev", 1, seed=0),
        lambda: word_problems("train", -1, seed=0),
        lambda: word_problems("train", 1, seed=0, steps=0),
        lambda: word_problems("test", 500, seed=0, steps=1),  # only some 60 chains of one step are test chains
        lambda: gsm8k("dev"),
        lambda: gsm8k_aug("dev"),
        lambda: benchmark("math"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(call):
    with pytest.raises(ValueError, match="^got .*expected") as caught:
        call()
    assert "\n" not in str(caught.value)


# A data folder


def rows(prefix: str, n: int) -> list[Problem]:
    return [
        Problem(f"{prefix}-{i}", f"Question {prefix} {i}?", (f"<<{i}+1={i + 1}>>",), str(i + 1), "t") for i in range(n)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LATENTLAB_DATA", raising=False)
    train = [
        *rows("train", 6),
        Problem("no-steps", "q?", (), "1", "t"),
        Problem("other-end", "r?", ("<<1+1=2>>",), "3", "t"),
    ]
    write_jsonl(train, tmp_path / "gsm8k_train.jsonl")
    write_jsonl(rows("valid", 2), tmp_path / "gsm8k_valid.jsonl")
    write_jsonl(rows("test", 3), tmp_path / "gsm8k_test.jsonl")
    write_jsonl(rows("svamp", 4), tmp_path / "svamp.jsonl")
    flags = {"train": {"gsm8k_aug_valid_500": ["train-1", "train-4"]}}
    (tmp_path / "gsm8k_flags.json").write_text(json.dumps(flags))
    return tmp_path


def test_train_from_a_folder_leaves_the_validation_ids_out(folder):
    ids = [p.id for p in gsm8k("train", data_dir=folder)]
    assert ids == ["train-0", "train-2", "train-3", "train-5", "no-steps", "other-end"]
    assert len(gsm8k("validation", data_dir=folder)) == 2 and len(gsm8k("test", data_dir=folder)) == 3


def test_with_steps_keeps_chains_that_end_at_the_answer(folder):
    assert [p.id for p in gsm8k("train", data_dir=folder, with_steps=True)] == [
        "train-0",
        "train-2",
        "train-3",
        "train-5",
    ]


def test_the_environment_names_the_folder_and_the_argument_wins(folder, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("LATENTLAB_DATA", str(folder))
    assert len(benchmark("gsm8k")) == 3 and len(benchmark("svamp")) == 4
    other = tmp_path_factory.mktemp("other")
    write_jsonl(rows("svamp", 1), other / "svamp.jsonl")
    assert len(benchmark("svamp", data_dir=other)) == 1


def test_what_a_folder_lacks_is_named_in_one_line(folder, monkeypatch):
    (folder / "gsm8k_flags.json").unlink()
    for call, name in [
        (lambda: gsm8k("train", data_dir=folder), "gsm8k_flags.json"),
        (lambda: benchmark("multiarith", data_dir=folder), "multiarith.jsonl"),
        (lambda: gsm8k("test", data_dir=folder / "absent"), "absent"),
        (lambda: benchmark("svamp"), "LATENTLAB_DATA"),
    ]:
        with pytest.raises(FileNotFoundError, match=name) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"train": {"gsm8k_aug_valid_500": 5}}'])
def test_a_broken_flags_file_is_one_line(folder, text):
    (folder / "gsm8k_flags.json").write_text(text)
    with pytest.raises(ValueError, match=r"gsm8k_flags\.json: got .*expected") as caught:
        gsm8k("train", data_dir=folder)
    assert "\n" not in str(caught.value)


real_data = pytest.mark.skipif(not os.environ.get("LATENTLAB_DATA"), reason="LATENTLAB_DATA names no data folder")


@real_data
def test_real_gsm8k_has_its_sizes_and_no_question_in_two_splits():
    splits = {split: gsm8k(split) for split in SPLITS}
    assert {split: len(problems) for split, problems in splits.items()} == {
        "train": 6973,
        "validation": 500,
        "test": 1319,
    }
    questions = {split: {p.question for p in problems} for split, problems in splits.items()}
    assert not questions["train"] & questions["validation"]
    assert not questions["test"] & (questions["train"] | questions["validation"])


@real_data
@pytest.mark.parametrize(("name", "n"), [("gsm8k", 1319), ("svamp", 1000), ("multiarith", 600), ("gsm_hard", 1319)])
def test_real_benchmarks_have_their_sizes_and_canonical_answers(name, n):
    problems = benchmark(name)
    assert len(problems) == n
    assert all(canonical_answer(p.answer) == p.answer for p in problems)


# The Hub, replaced by a function


@pytest.fixture
def hub(monkeypatch):
    """`hub[address, split] = rows` is what load_dataset then gives; the network is not touched."""
    served = {}
    monkeypatch.delenv("LATENTLAB_DATA", raising=False)
    monkeypatch.setattr(datasets, "hub_answers", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", lambda *address, split: served[address, split])
    return served


def gsm8k_rows(n: int) -> list[dict]:
    answer = "He sold <<{i}*2={d}>>{d}.\nThen <<{d}+1={e}>>{e}.\n#### {e:,}"
    return [{"question": f"Q{i}? ", "answer": answer.format(i=i, d=2 * i, e=2 * i + 1)} for i in range(n)]


def test_gsm8k_rows_of_the_hub_are_parsed(hub):
    hub[("openai/gsm8k", "main"), "test"] = gsm8k_rows(700)
    assert gsm8k("test")[600] == Problem(
        "gsm8k-test-00600", "Q600?", ("<<600*2=1200>>", "<<1200+1=1201>>"), "1201", "gsm8k/test"
    )


def test_validation_from_the_hub_is_taken_out_of_train_by_question(hub):
    hub[("openai/gsm8k", "main"), "train"] = [*gsm8k_rows(1500), *gsm8k_rows(1500)]  # every question twice
    train, validation = gsm8k("train"), gsm8k("validation")
    assert len(train) == 2000 and len(validation) == 1000
    assert len({p.question for p in validation}) == 500
    assert not {p.question for p in train} & {p.question for p in validation}
    hub[("openai/gsm8k", "main"), "train"] = gsm8k_rows(1500)[::-1]  # another order chooses the same questions
    assert {p.question for p in gsm8k("validation")} == {p.question for p in validation}


def test_gsm8k_aug_and_the_hub_benchmarks_share_the_schema(hub):
    hub[("whynlp/gsm8k-aug",), "train"] = [{"question": "Q?", "steps": ["<<1+1=2>>", "<<2*2=4>>"], "answer": "4"}]
    hub[("MU-NLPC/Calc-asdiv_a",), "test"] = [{"question": "Q?", "chain": "…", "result": "9", "result_float": 9.0}]
    hub[("qintongli/GSM-Plus",), "test"] = [
        {"question": "Unanswerable?", "solution": "", "answer": "None"},
        {"question": "Q?", "solution": "…", "answer": "1,005"},
    ]
    assert gsm8k_aug("train") == [
        Problem("gsm8k-aug-train-00000", "Q?", ("<<1+1=2>>", "<<2*2=4>>"), "4", "gsm8k-aug/train")
    ]
    assert benchmark("asdiv_a") == [Problem("asdiv_a-test-00000", "Q?", (), "9", "asdiv_a/test")]
    assert benchmark("gsm_plus") == [Problem("gsm_plus-test-00001", "Q?", (), "1005", "gsm_plus/test")]


@pytest.mark.parametrize(
    "row", [{"text": "Q?"}, {"question": "Q?", "answer": 5}, {"question": None, "answer": "#### 5"}]
)
def test_a_changed_hub_schema_is_one_line(hub, row):
    hub[("openai/gsm8k", "main"), "test"] = [row]
    with pytest.raises(ValueError, match="openai/gsm8k, test, row 0: got fields") as caught:
        gsm8k("test")
    assert "\n" not in str(caught.value)


def test_a_hub_split_without_answers_is_refused(hub):
    hub[("qintongli/GSM-Plus",), "test"] = [{"question": "Q?", "answer": "None"}]
    with pytest.raises(ValueError, match="no row with a numeric answer"):
        benchmark("gsm_plus")


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), RuntimeError("odd"), ValueError("no cache")])
def test_whatever_the_hub_raises_is_one_line_with_the_remedy(hub, monkeypatch, error):
    def fail(*address, split):
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    for call in (lambda: gsm8k("train"), lambda: gsm8k_aug("train"), lambda: benchmark("asdiv_a")):
        with pytest.raises(FileNotFoundError, match="LATENTLAB_DATA") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_an_offline_machine_fails_before_load_dataset_retries(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    def too_late(*args, **kwargs):
        raise AssertionError("load_dataset was called without a Hub")

    monkeypatch.delenv("LATENTLAB_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr("datasets.load_dataset", too_late)
    with pytest.raises(FileNotFoundError, match="got no answer from the Hub .* set LATENTLAB_DATA"):
        gsm8k("train")


def test_offline_mode_asks_the_cache_without_a_request(monkeypatch):
    monkeypatch.delenv("LATENTLAB_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", lambda *address, split: gsm8k_rows(3))
    assert len(gsm8k("test")) == 3


def test_every_benchmark_name_is_served(hub, folder):
    for name in ("multiarith", "gsm_hard"):
        write_jsonl(rows(name, 2), folder / f"{name}.jsonl")
    pens = Problem("p", "How much are 6 pens at $4 each?", ("<<6*4=24>>",), "24", "gsm8k/validation")
    write_jsonl([pens], folder / "gsm8k_valid.jsonl")
    hub[("MU-NLPC/Calc-asdiv_a",), "test"] = [{"question": "Q?", "result": "9"}]
    hub[("qintongli/GSM-Plus",), "test"] = [{"question": "Q?", "answer": "9"}]
    for name in BENCHMARKS:
        assert benchmark(name, data_dir=folder)[0].question
