"""The hundred lines of notebook 06 compute what the library computes."""

from types import SimpleNamespace

import pytest
import torch

from latentlab.advantage import group_advantages
from latentlab.config import load_preset
from latentlab.data.word_problems import word_problems
from latentlab.grpo import policy_gradient
from latentlab.loss import grpo_loss
from latentlab.masks import MaskSpec, uniforms
from latentlab.pretrained.loading import load_model
from latentlab.reward import exact_answer
from latentlab.rollouts import rollout
from latentlab.teach import naive

K, TEMPERATURE = 4, 1.5
SETTINGS = {"num_generations": K, "masks": MaskSpec(rate=0.1), "temperature": TEMPERATURE, "run_seed": 0, "step": 0}


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def both(request):
    """One mixed group by the library and by naive.py, from the same masks and uniform numbers."""
    model = load_model("tiny").to(request.param)
    for problem in word_problems("test", 40, seed=0):
        out = rollout(model, [problem], **SETTINGS)
        if 0 < out.rewards(exact_answer).sum() < K:
            break
    w = {name: p.detach().clone().requires_grad_() for name, p in model.lm.transformer.named_parameters()}
    prompt = naive.encode(model.tokenizer.get_vocab(), problem.question)
    length = len(prompt) + naive.THOUGHTS + 1 + naive.LIMIT
    factors = [naive.place(mask, len(prompt) - 1, length) for mask in out.masks.values]
    numbers = torch.stack([uniforms(out.seeds, t) for t in range(naive.LIMIT)], 1)
    answers = [naive.sample(w, prompt, f, u, TEMPERATURE) for f, u in zip(factors, numbers, strict=True)]
    tolerance = 1e-6 if request.param == torch.float32 else 1e-10
    parts = {"model": model, "out": out, "w": w, "prompt": prompt, "factors": factors, "answers": answers}
    logits = model.head(out.thoughts).abs().max().item()  # the size of what a log-prob is a difference of
    return SimpleNamespace(tolerance=tolerance, logits=logits, problem=problem, **parts)


def gap(a, b):
    return (a.double() - b.double()).abs().max().item()


def test_prompt_thoughts_answers_and_log_probs_are_the_librarys(both):
    out = both.out
    assert both.prompt == out.prompt_ids[0].tolist()
    for k, (tokens, logp) in enumerate(both.answers):
        assert tokens == out.tokens[k][out.token_mask[k]].tolist()
        assert gap(logp, out.logp[k, : len(tokens)]) / both.logits < both.tolerance
        thoughts = naive.think(both.w, both.prompt, both.factors[k])[len(both.prompt) :]
        assert gap(thoughts, out.thoughts[k]) / out.thoughts.abs().max() < both.tolerance


def test_advantages_loss_and_gradient_are_the_librarys(both):
    out, model = both.out, both.model
    rewards = out.rewards(exact_answer)
    advantages = naive.group_advantages(out.text, both.problem.answer)
    assert torch.equal(advantages.double(), group_advantages(rewards).flatten())
    stats = policy_gradient(model, out, group_advantages(rewards).flatten(), load_preset("tiny"))
    given = [(f, tokens, TEMPERATURE) for f, (tokens, _) in zip(both.factors, both.answers, strict=True)]
    loss = naive.dr_grpo(
        [naive.score(both.w, both.prompt, *args) for args in given], [old for _, old in both.answers], advantages
    )
    loss.backward()
    assert loss.item() == pytest.approx(stats["loss"], abs=both.tolerance)
    theirs = dict(model.lm.transformer.named_parameters())
    assert max(gap(weight.grad, theirs[name].grad) for name, weight in both.w.items()) < both.tolerance


def test_the_loss_clips_as_the_librarys():
    old = torch.randn(K, naive.LIMIT, generator=torch.Generator().manual_seed(0))
    logp, advantages = old.flip(0), torch.tensor([0.5, -0.5, 0.75, -0.25])
    theirs, _ = grpo_loss(logp, old, advantages, torch.ones(K, naive.LIMIT, dtype=torch.bool))
    assert naive.dr_grpo(logp, old, advantages).item() == pytest.approx(theirs.item(), abs=1e-6)


def test_a_mask_drops_its_share_and_keeps_the_mean():
    mask = naive.draw_mask(7, 0.25, 5000)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert mask.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(mask, naive.draw_mask(7, 0.25, 5000)) and not torch.equal(mask, naive.draw_mask(8, 0.25, 5000))


def test_a_step_follows_the_gradient_down_and_leaves_the_weights():
    w = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    moved = naive.descend(w, {"a": torch.tensor([3.0]), "b": torch.zeros(1)}, 0.5)
    assert moved == {"a": torch.tensor([-0.5]), "b": torch.tensor([2.0])} and w["a"].item() == 1
    assert moved["a"].requires_grad
