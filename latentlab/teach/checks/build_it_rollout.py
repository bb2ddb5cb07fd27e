"""The first four exercises of notebook 06: thoughts, masks and sampling, each against naive.py.

The model of the cases is random, in float64. A hint compares the reader's value with that of one
wrong way, made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentlab.teach import naive
from latentlab.teach.exercise import Exercise
from latentlab.teach.naive import LIMIT, THOUGHTS, Weights

WIDTH, VOCABULARY, TEMPERATURE = 16, 12, 1.5
PROMPT = [5, 9, 6, naive.START]


def _weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, WIDTH), "wpe.weight": (24, WIDTH)}
    for name, given, out in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
        shapes |= {f"h.0.{name}.weight": (given * WIDTH, out * WIDTH), f"h.0.{name}.bias": (out * WIDTH,)}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    random = {name: torch.randn(shape, generator=generator).double() / 2 for name, shape in shapes.items()}
    return {name: weight.requires_grad_() for name, weight in random.items()}


W = _weights()
FACTORS = naive.place(naive.draw_mask(1, 0.3, WIDTH), len(PROMPT) - 1, len(PROMPT) + THOUGHTS + 1 + LIMIT)
ONES = torch.ones_like(FACTORS)
SLOPES = torch.linspace(-1, 2, 200, dtype=torch.float64)  # of the scalar whose gradient is looked at


def same(a: Any, b: Any) -> bool:
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-6)


def gradient_of(value: Tensor, parameters: Sequence[Tensor] = tuple(W.values())) -> Tensor:
    """The gradient of a weighted sum of `value`, as one vector; zeros where there is none."""
    total = (value * SLOPES[: value.numel()].view(value.shape)).sum()
    found = torch.autograd.grad(total, parameters, materialize_grads=True) if total.requires_grad else []
    return torch.cat([torch.zeros(1), *(gradient.flatten() for gradient in found)])


def with_gradient(f: Callable, *arguments: Any) -> Any:
    """What f returns and its gradient, or None."""
    value = f(*arguments)
    if value is None:
        return None
    value = torch.stack(value) if isinstance(value, list) else value
    return value.detach(), gradient_of(value)


def equals(*wrong: Any) -> Callable[[Any], bool]:
    """Does the value, of a pair the first, equal one of these?"""
    return lambda value: any(same(value[0] if isinstance(value, tuple) else value, other) for other in wrong)


# -- 1 thoughts -----------------------------------------------------------------------------------


def _fed_back(step: Callable[[Tensor], Tensor]) -> Tensor:
    """`naive.think` with another next input: step maps inputs [T, D] to [1, D]."""
    x = W["wte.weight"][PROMPT]
    for _ in range(THOUGHTS):
        x = torch.cat([x, step(x)])
    return x


def _likeliest(x: Tensor) -> Tensor:
    return W["wte.weight"][[int(naive.policy(W, naive.hidden(W, x, FACTORS)[-1], 1).argmax())]]


_think = with_gradient(naive.think, W, PROMPT, FACTORS)

think = Exercise(
    "think",
    lambda f: with_gradient(f, W, PROMPT, FACTORS),
    lambda value: same(value[0], _think[0]) and same(value[1], _think[1]),
    [
        (
            lambda value: len(value[0]) == THOUGHTS,
            "only thoughts come back; the prompt's embeddings belong before them",
        ),
        (equals(_fed_back(lambda x: naive.block(W, x, FACTORS)[-1:])), "these thoughts are from before the final norm"),
        (equals(_fed_back(_likeliest)), "a token is fed back: that is a chain of words; feed the hidden state itself"),
        (equals(_fed_back(lambda x: naive.hidden(W, x, ONES)[-1:])), "the factors have no effect: pass them on"),
        (equals(_fed_back(lambda x: naive.hidden(W, x, FACTORS)[-2:-1])), "off by one: not the last position's state"),
        (equals(_fed_back(lambda x: naive.hidden(W, x, FACTORS)[:1])), "this is the first position's state"),
        (
            equals(_think[0]),
            "the values are right, but the gradient is cut at the thoughts: no detach, item or no_grad",
        ),
    ],
)

# -- 2 a mask from a seed -------------------------------------------------------------------------

RATE, WIDE = 0.25, 500


def _three_masks(f: Callable) -> list[Tensor] | None:
    masks = [f(seed, RATE, WIDE) for seed in (3, 3, 4)]
    return None if masks[0] is None else masks


def _values(*expected: float) -> Callable[[Any], bool]:
    return lambda masks: same(masks[0].unique(), expected)


def _dropped(masks: Any) -> float:
    return (masks[0] == 0).double().mean().item()


draw_mask = Exercise(
    "draw_mask",
    _three_masks,
    lambda masks: (
        masks[0].shape == (2, WIDE)
        and torch.equal(masks[0], masks[1])
        and not torch.equal(masks[0], masks[2])
        and not torch.equal(masks[0][0], masks[0][1])
        and _values(0, 1 / (1 - RATE))(masks)
        and abs(_dropped(masks) - RATE) < 0.06
    ),
    [
        (lambda masks: masks[0].shape != (2, WIDE), "expected one row for each of the two branches, [2, width]"),
        (
            lambda masks: not torch.equal(masks[0], masks[1]),
            "redrawn: one seed gives two masks, and no replay is exact",
        ),
        (lambda masks: torch.equal(masks[0], masks[2]), "two seeds give one mask: all rollouts would be equal again"),
        (
            lambda masks: torch.equal(masks[0][0], masks[0][1]),
            "both branches lose the same features: draw each its own",
        ),
        (lambda masks: _dropped(masks) > 2 * RATE, "it drops with probability 1 - rate: turn the comparison round"),
        (_values(0, 1), "not scaled: at rate p a feature's mean falls to 1 - p; what keeps it?"),
        (_values(0, 1 / RATE), "scaled by 1 / p: the mean of the mask must be 1"),
        (_values(0, 1 - RATE), "scaled the wrong way round: the mean of the mask must be 1"),
        (lambda masks: len(masks[0].unique()) > 2, "more than two values: a feature is kept or dropped"),
    ],
)

# -- 3 where the mask acts ------------------------------------------------------------------------

MASK, FIRST, LENGTH = torch.arange(2.0, 8.0).view(2, 3), 3, 13
LAST = FIRST + THOUGHTS  # the last thought's position


def _placed(first: int, behind: int, rest: float = 1.0) -> Tensor:
    factors = torch.full((LENGTH, *MASK.shape), rest)
    factors[first:behind] = MASK
    return factors


place = Exercise(
    "place",
    lambda f: f(MASK, FIRST, LENGTH),
    equals(naive.place(MASK, FIRST, LENGTH)),
    [
        (lambda factors: factors.shape != (LENGTH, *MASK.shape), "expected one mask for each position, [length, 2, D]"),
        (equals(_placed(FIRST + 1, LAST + 1)), "<start> is not masked: thought 1 would be equal in all rollouts"),
        (equals(_placed(FIRST, LAST)), "off by one: the last thought is not masked"),
        (equals(_placed(FIRST, LAST + 2)), "off by one: <end> is masked too"),
        (equals(_placed(FIRST, LENGTH)), "the mask is on the answer too; the answer is read with the clean weights"),
        (equals(_placed(0, LAST + 1), _placed(0, LENGTH)), "the question is masked: it belongs to all rollouts"),
        (equals(_placed(FIRST, LAST + 1, 0.0)), "zeros outside the latent phase switch the branches off there"),
    ],
)

# -- 4 an answer ----------------------------------------------------------------------------------

UNIFORMS = torch.rand(6, LIMIT, generator=torch.Generator().manual_seed(2))
UNIFORMS[0] = torch.tensor([0.7, 1e-9, 0.4, 0.9])  # ends early: eos is the first of the tokens
Answers = list[tuple[list[int], Tensor]]


def _answers(f: Callable, factors: Tensor = FACTORS, temperature: float = TEMPERATURE) -> Any:
    found = [f(W, PROMPT, factors, uniforms, temperature) for uniforms in UNIFORMS]
    if found[0] is None:
        return None
    return [(list(tokens), torch.as_tensor(logps).detach()) for tokens, logps in found]


def _without_end(w: Weights, prompt: list[int], factors: Tensor, uniforms: Tensor, temperature: float) -> tuple:
    tokens: list[int] = []
    logps: list[Tensor] = []
    for uniform in uniforms:
        x = torch.cat([naive.think(w, prompt, factors), w["wte.weight"][tokens]])
        logp = naive.policy(w, naive.hidden(w, x, factors)[-1], temperature)
        tokens.append(int((logp.exp().cumsum(-1) <= uniform).sum()))
        logps.append(logp[tokens[-1]])
        if tokens[-1] == naive.EOS:
            break
    return tokens, torch.stack(logps)


def _tokens(answers: Any) -> list[list[int]]:
    return [tokens for tokens, _ in answers]


def _logps(change: Callable[[list[int], Tensor], Tensor]) -> Callable[[Any], bool]:
    """Are the tokens right, and the log-probs changed like this?"""
    return lambda answers: (
        _tokens(answers) == _tokens(_sampled)
        and all(same(logps, change(*right)) for (_, logps), right in zip(answers, _sampled, strict=True))
    )


def _like(other: Answers) -> Callable[[Any], bool]:
    return lambda answers: _tokens(answers) == _tokens(other)


def _plain(answers: Any) -> bool:
    return all(type(token) is int for tokens in _tokens(answers) for token in tokens)


def _goes_on(answers: Any) -> bool:
    tokens, right = answers[0][0], _sampled[0][0]
    return len(tokens) > len(right) and tokens[: len(right)] == right


_sampled = _answers(naive.sample)
_recorded = _logps(lambda _, logps: logps)
_logp_at_1 = _logps(lambda tokens, _: naive.score(W, PROMPT, FACTORS, tokens, 1.0))
_logp_unmasked = _logps(lambda tokens, _: naive.score(W, PROMPT, ONES, tokens, TEMPERATURE))

sample = Exercise(
    "sample",
    _answers,
    lambda answers: _plain(answers) and _recorded(answers),
    [
        (lambda answers: not _plain(answers), "the tokens are no plain numbers: make each an int"),
        (_logp_at_1, "the tokens are drawn at the temperature, but the log-probs are those at temperature 1"),
        (_logps(lambda _, logps: logps.exp()), "these are probabilities, not their logarithms"),
        (_logp_unmasked, "the log-probs are those without a mask"),
        (lambda answers: _tokens(answers)[0] == _tokens(_sampled)[0][:-1], "eos is missing: the model chose it too"),
        (_goes_on, "it goes on behind eos"),
        (_like(_answers(_without_end)), "<end> is missing: the first answer token is read behind it"),
        (_like(_answers(naive.sample, temperature=1.0)), "the temperature has no effect"),
        (_like(_answers(naive.sample, factors=ONES)), "the factors have no effect: pass them on"),
        (
            lambda answers: len({tokens[0] for tokens, _ in answers}) == 1,
            "the uniform numbers have no effect: an argmax?",
        ),
    ],
)
