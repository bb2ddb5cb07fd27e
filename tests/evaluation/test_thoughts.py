"""thoughts.py: decoded by the head, and swapped between problems, on a model whose rollouts are given."""

import torch

from latentlab.evaluation import thoughts
from latentlab.evaluation.thoughts import decoded_thoughts, swap_thoughts
from latentlab.rollouts import rollout
from tests.conftest import sharpen, tiny_gpt2


def test_thoughts_are_decoded_to_the_most_probable_tokens_in_order(problems):
    model = sharpen(tiny_gpt2())
    out = rollout(model, problems, num_generations=1, masks=None, temperature=0.0, run_seed=0, step=0)
    rows = decoded_thoughts(model, problems, top=3)
    assert len(rows) == 4 and {len(row) for row in rows} == {2}
    for row, thought in zip(rows, out.thoughts, strict=True):
        order = (thought @ model.lm.get_output_embeddings().weight.T).argsort(-1, descending=True)[:, :3]
        assert row == [[model.tokenizer.decode([t]) for t in tokens] for tokens in order.tolist()]
    assert {len(thought) for row in decoded_thoughts(model, problems) for thought in row} == {5}


def test_answers_follow_the_donor_or_not_by_hand(problems, monkeypatch):
    """Of clean answers a b b d, the donors' are b b d a; with the donors' thoughts the model writes b x d d."""
    model, calls = sharpen(tiny_gpt2()), []

    def given(model, questions, **settings):
        calls.append(settings.get("edit"))
        out = rollout(model, questions, num_generations=1, masks=None, temperature=0.0, run_seed=0, step=0)
        object.__setattr__(out, "text", (("a", "b", "b", "d"), ("b", "x", "d", "d"))[len(calls) - 1])
        return out

    monkeypatch.setattr(thoughts, "_greedy", given)
    assert swap_thoughts(model, problems) == {
        "n": 4,
        "changed": 3 / 4,
        "follows_donor": 2 / 4,
        "same_by_chance": 1 / 4,
    }


def test_each_problem_gets_all_thoughts_of_the_next_one(problems, monkeypatch):
    model, outs, original = sharpen(tiny_gpt2()), [], thoughts._greedy
    monkeypatch.setattr(thoughts, "_greedy", lambda *a, **kw: (outs.append(original(*a, **kw)), outs[-1])[1])
    swap_thoughts(model, problems)
    clean, swapped = outs
    assert clean.temperature == 0.0 and clean.masks is None and len(clean.text) == 4
    assert torch.equal(swapped.thoughts, clean.thoughts[[1, 2, 3, 0]])
    assert not torch.equal(swapped.thoughts, clean.thoughts)
