"""evaluate.py: what the accuracies mean, and that they do not depend on the batch size."""

import dataclasses

import numpy as np
import pytest

from latentlab.evaluation import accuracy
from latentlab.evaluation.accuracy import Evaluation, evaluate, summary
from latentlab.masks import MaskSpec
from latentlab.problems import Problem
from latentlab.rollouts import rollout
from tests.conftest import sharpen, tiny_gpt2


def outcomes(texts, answers, k):
    problems = tuple(Problem(str(i), "?", (), answer, "test") for i, answer in enumerate(answers))
    correct = np.array(
        [[float(t == f"### {p.answer}") for t in texts[i * k : i * k + k]] for i, p in enumerate(problems)]
    )
    return Evaluation(problems, correct, tuple(texts))


def test_accuracies_by_hand():
    texts = ["### 1", "### 1", "### 2", "none", "### 5", "none", "none", "### 6"]
    result = outcomes(texts, ["1", "6"], 4)
    assert result.accuracy == 3 / 8
    assert result.pass_at(1) == pytest.approx(3 / 8)
    assert result.pass_at(2) == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)  # 1 - C(4 - c, 2) / C(4, 2)
    assert result.pass_at(4) == 1.0
    assert result.majority().tolist() == [1.0, 0.0]  # 5 and 6 have one vote each: the first wins; "none" has no vote
    assert result.distinct_answers() == 3.0


@pytest.mark.parametrize("settings", [{}, {"num_generations": 3, "mask": MaskSpec(rate=0.3), "temperature": 1.0}])
def test_results_do_not_depend_on_the_batch_size(problems, settings):
    model = sharpen(tiny_gpt2())
    results = [evaluate(model, problems, batch_size=size, **settings) for size in (1, 3, 100)]
    for result in results[1:]:
        assert result.text == results[0].text and np.array_equal(result.correct, results[0].correct)
    assert results[0].correct.shape == (4, settings.get("num_generations", 1))


def test_the_default_is_the_clean_greedy_model(problems):
    model = sharpen(tiny_gpt2())
    greedy = rollout(model, problems, num_generations=1, masks=None, temperature=0.0, run_seed=9, step=9)
    assert evaluate(model, problems, batch_size=4).text == greedy.text


def test_right_answers_are_counted(problems, monkeypatch):
    texts = dict(zip([p.id for p in problems], ["### 7", "### 8", "7", "### 7.0"], strict=True))
    grade = accuracy.exact_answer
    monkeypatch.setattr(accuracy, "exact_answer", lambda _, problem: grade(texts[problem.id], problem))
    fitting = [dataclasses.replace(problem, answer="7") for problem in problems]
    assert evaluate(tiny_gpt2(), fitting, batch_size=3).correct[:, 0].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_results_come_in_the_order_of_the_problems_whatever_their_batches(problems):
    model, settings = sharpen(tiny_gpt2()), {"batch_size": 3, "num_generations": 2, "temperature": 1.0}
    mask = MaskSpec(rate=0.3)
    forwards, backwards = (evaluate(model, p, mask=mask, **settings) for p in (problems, problems[::-1]))
    assert len(set(forwards.text)) > 4 and forwards.problems == tuple(problems)
    for i in range(4):
        alone = evaluate(model, problems[i : i + 1], mask=mask, **settings)
        assert alone.text == forwards.text[2 * i : 2 * i + 2] == backwards.text[6 - 2 * i : 8 - 2 * i]
        assert (alone.correct == forwards.correct[i]).all()


def test_batches_are_of_questions_of_like_length(problems, monkeypatch):
    batches, real = [], accuracy.rollout
    monkeypatch.setattr(accuracy, "rollout", lambda m, batch, **k: (batches.append(batch), real(m, batch, **k))[1])
    evaluate(
        tiny_gpt2(),
        problems[::-1] if len(problems[0].question) < len(problems[-1].question) else problems,
        batch_size=2,
    )
    lengths = [len(problem.question) for batch in batches for problem in batch]
    assert lengths == sorted(lengths) and len(set(lengths)) > 2


def test_a_summary_names_both_deployments(problems, config):
    model = sharpen(tiny_gpt2())
    c = config()
    result = summary(model, problems, c, mask=c.grpo.mask, temperature=1.0)
    assert result["n"] == 4 and result["greedy"]["pass@1"] == result["greedy"]["correct"] / 4
    shares = [result["sampled"]["pass@k"][str(k)] for k in range(1, 5)]
    assert shares == sorted(shares) and result["sampled"]["mean"] == pytest.approx(shares[0])


def test_no_problems_is_one_line():
    with pytest.raises(ValueError, match="^problems: got an empty list, expected at least one"):
        evaluate(tiny_gpt2(), [], batch_size=4)


def test_the_two_grading_rules_are_counted_apart():
    assert outcomes(["### 7", "### 7.0", "7", "### 8"], ["7", "8"], 2).correct_by_string() == 2


def test_a_summary_by_hand(problems, config, monkeypatch):
    """Four problems, greedy 1 of 4 right, and of K = 2 sampled ones 2, 1, 0 and 1."""
    calls = []

    def given(model, on, *, batch_size, num_generations=1, mask=None, temperature=0.0, run_seed=0):
        calls.append((batch_size, num_generations, mask, temperature, run_seed))
        right = [[1], [0], [0], [0]] if num_generations == 1 else [[1, 1], [0, 1], [0, 0], [1, 0]]
        texts = [f"### {p.answer}" if r else "### -1" for p, row in zip(on, right, strict=True) for r in row]
        return Evaluation(tuple(on), np.array(right, float), tuple(texts))

    monkeypatch.setattr(accuracy, "evaluate", given)
    c, mask = config(evaluate={"num_generations": 2, "batch_size": 7}, seed=5), MaskSpec(rate=0.25)
    model = tiny_gpt2()
    result = summary(model, problems, c, mask=mask, temperature=0.9)
    assert calls == [(7, 1, None, 0.0, 0), (3, 2, mask, 0.9, 5)]
    greedy, sampled = result["greedy"], result["sampled"]
    assert greedy["correct"] == 1 and greedy["pass@1"] == 0.25 and greedy["correct_string_rule"] == 1
    assert greedy["interval"] == pytest.approx(accuracy.wilson_interval(1, 4))
    assert sampled == {"mask_rate": 0.25, "mean": 0.5, "pass@k": {"1": 0.5, "2": 0.75}, "majority": 0.5}
    assert result["weights"] == model.provenance
    assert (
        summary(model, problems, config(evaluate={"num_generations": 2, "batch_size": 1}), mask=None, temperature=1)[
            "sampled"
        ]["mask_rate"]
        == 0.0
    )
    assert calls[-1][0] == 1


@pytest.mark.parametrize("places", [(0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_an_id_given_twice_is_one_line_before_the_model_runs(problems, places):
    """Its k would continue counting within a batch, so answers would depend on the batch size."""
    repeated = [dataclasses.replace(problems[i], question=f"{problems[i].question} {n}") for n, i in enumerate(places)]
    named = max(places, key=places.count)
    with pytest.raises(ValueError, match=f"^problems: got id '{problems[named].id}' [23] times, expected each once"):
        evaluate(None, repeated, batch_size=1)
