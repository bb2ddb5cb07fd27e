"""teach: thoughts as a table, one's own questions, live outputs with a static form, exercises."""

import html
import re

import pytest
import torch
from ipywidgets.widgets.widget import _instances

from latentlab.cli import main
from latentlab.data.word_problems import word_problems
from latentlab.masks import MaskSpec
from latentlab.pretrained.loading import load_model
from latentlab.problems import Problem
from latentlab.rollouts import rollout
from latentlab.teach import playground
from latentlab.teach.exercise import Exercise
from latentlab.teach.picture import draw_thoughts
from latentlab.teach.table import Table
from latentlab.teach.thoughts import ask, show_thoughts

QUESTION = (
    "Leo has 15 coins. He loses 8 coins today. He gives 2 coins away. He gets 2 for each. He loses 2 coins today."
)
QUESTION += " How many coins remain?"


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def train():
    return word_problems("train", 150, seed=0)


def test_a_row_is_a_rollout_with_its_decoded_thoughts_answer_reward_and_advantage(tiny, train):
    problem = train[59]
    table = show_thoughts(tiny, problem, rate=0.1, k=8, seed=3)
    clean, *masked = table.trains
    out = rollout(tiny, [problem], num_generations=8, masks=MaskSpec(rate=0.1), temperature=0.0, run_seed=3, step=0)
    tokens = tiny.head(out.thoughts).argmax(-1)
    assert [t.thoughts for t in masked] == [tuple(map(tiny.tokenizer.decode, row[:, None].tolist())) for row in tokens]
    assert [t.reward for t in masked] == [float(f"### {problem.answer}" in text) for text in out.text]
    assert sum(t.advantage for t in masked) == pytest.approx(0) and any(t.advantage for t in masked)
    results = [step.split("=")[1].rstrip(">") for step in problem.steps]
    for row in table.trains:
        assert row.right == tuple(z == r for z, r in zip(row.thoughts, results, strict=True))
    assert clean.advantage is None and clean.name == "no mask"


def test_text_and_html_say_the_same_without_colours(tiny, train):
    table = show_thoughts(tiny, train[59], k=4)
    shown = table._repr_html_()
    assert "<style" not in shown and "class=" not in shown
    plain = html.unescape(re.sub(r"<[^>]+>", " ", shown)).split()
    assert sorted(plain) == sorted(str(table).split())
    assert "✓" in plain and "✗" in plain
    assert shown.count("<tr>") == 6 and "p = 0.1, K = 4, seed 0, greedy answers" in shown


def test_the_picture_has_every_thought_with_its_sign(tiny, train):
    table = show_thoughts(tiny, train[59], k=4)
    drawn = [text.get_text() for text in draw_thoughts(table).axes[0].texts]
    for row in table.trains:
        for z, right in zip(row.thoughts, row.right, strict=True):
            assert ("✓ " if right else "✗ ") + z in drawn
    assert {"mask 4", table.setting, *(f"{row.advantage:+.2f}" for row in table.trains[1:])} <= {*drawn}


def test_html_escapes_what_a_model_or_user_says(gpt2):
    table = show_thoughts(gpt2, Problem("x", "one <script>", (), "1", "t"), k=2)
    assert "<script>" not in table._repr_html_() and "&lt;script&gt;" in table._repr_html_()


def test_equal_groups_have_no_signal_and_rate_zero_samples(tiny, train):
    assert "all equal: no signal" in str(show_thoughts(tiny, train[3], rate=0.0, k=4))
    sampled = show_thoughts(tiny, train[59], rate=0.0, k=16, temperature=2.0)
    assert len({t.thoughts for t in sampled.trains}) == 1 and len({t.answer for t in sampled.trains[1:]}) > 1
    assert sampled.trains[1].name == "sample 1" and "temperature 2" in str(sampled)


def test_several_thoughts_a_step_and_backbones_without_marks(gpt2, problems):
    table = show_thoughts(gpt2, problems[0], k=2)
    assert len(table.trains) == 3 and all(len(t.right) == gpt2.num_thoughts for t in table.trains)


def test_ask_answers_ones_own_question_and_names_unknown_words(tiny):
    table = ask(tiny, QUESTION, k=3)
    assert table.trains[0].thoughts == ("7", "5", "10", "8") and table.trains[0].reward is None
    with pytest.raises(ValueError, match="^question: got the words zebras, flies, which this model does not know"):
        ask(tiny, "Leo has 15 zebras. He flies 8 coins.")
    with pytest.raises(ValueError, match="^question: got no text"):
        ask(tiny, "  ")


def test_the_command_line_asks_and_plots(tmp_path, capsys):
    assert main(["ask", QUESTION, "--k", "2", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(QUESTION) and said.count("\n") == 6 and "seed 1" in said
    assert main(["ask", "Leo eats"]) == main(["plot", str(tmp_path)]) == 2
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n{"step": 1, "reward": 0.75}\n')
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_shows_itself():
    table = Table(["a", "b"], [[1, 0.123456], ["x<y", None]], "said")
    assert str(table) == "  a      b\n  1  0.123\nx<y\nsaid"
    assert "<td>x&lt;y</td><td></td>" in table._repr_html_()


def test_a_live_output_has_the_default_setting_for_places_without_a_kernel(tiny, train, monkeypatch):
    shown = []
    monkeypatch.setattr(playground, "display", lambda bundle, raw: shown.append(bundle))
    seen, original = {}, playground.live
    monkeypatch.setattr(
        playground, "live", lambda draw, **controls: (seen.update(controls), original(draw, **controls))
    )
    playground.playground(tiny, train[59:61])
    default = show_thoughts(tiny, train[59])
    assert shown[0]["text/html"] == default._repr_html_() and shown[0]["text/plain"] == str(default)
    box = _instances[shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"]]
    seen["rate"].value = 0.3
    assert "p = 0.3" in box.children[-1].value


def test_an_exercise_says_what_a_mistake_does(capsys):
    check = Exercise("double", lambda f: f(3), lambda v: v == 6, ((lambda v: v == 9, "that is the square"),))
    assert check(lambda x: 2 * x) is True
    assert check(lambda x: x * x) is False
    assert check(lambda x: torch.zeros(2, 2)) is False
    assert check(lambda x: 1 / 0) is False
    assert check(lambda x: None) is check(None) is None
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "double: right" and said[1] == "double: that is the square"
    assert said[2].startswith("double: not yet") and said[3] == "double: it raised ZeroDivisionError: division by zero"
    assert said[4:] == ["double: not tried yet"] * 2
