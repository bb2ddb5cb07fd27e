"""The checks of notebook 06: the naive form passes, typical mistakes are told apart, a stub is no answer."""

import pytest
import torch

from latentlab.teach import naive
from latentlab.teach.checks import build_it as check
from latentlab.teach.naive import END, LIMIT, THOUGHTS

EXERCISES = {name: getattr(check, name) for name in check.__all__}


def fed_back(step):
    def think(w, prompt, factors):
        x = w["wte.weight"][prompt]
        for _ in range(THOUGHTS):
            x = torch.cat([x, step(w, x, factors)])
        return x

    return think


def placed(first, behind, rest=1.0):
    def place(mask, start, length):
        factors = torch.full((length, *mask.shape), rest)
        factors[first(start) : behind(start, length)] = mask
        return factors

    return place


def scaled(scale):
    return lambda *given: (naive.draw_mask(*given) > 0) * scale(given[1])


def changed_sample(change):
    def sample(w, prompt, factors, uniforms, temperature):
        tokens, logps = naive.sample(w, prompt, factors, uniforms, temperature)
        return change(tokens, logps, w, prompt, factors)

    return sample


def endless(w, prompt, factors, uniforms, temperature):
    tokens, logps = naive.sample(w, prompt, factors, uniforms, temperature)
    more = [5] * (LIMIT - len(tokens))
    return tokens + more, torch.cat([logps, torch.zeros(len(more))])


def without_end(w, prompt, factors, uniforms, temperature):
    tokens, logps = [], []
    for uniform in uniforms:
        x = torch.cat([naive.think(w, prompt, factors), w["wte.weight"][tokens]])
        logp = naive.policy(w, naive.hidden(w, x, factors)[-1], temperature)
        tokens.append(int((logp.exp().cumsum(-1) <= uniform).sum()))
        logps.append(logp[tokens[-1]])
        if tokens[-1] == naive.EOS:
            break
    return tokens, torch.stack(logps)


def shifted_score(shift, end=(END,)):
    def score(w, prompt, factors, tokens, temperature):
        x = torch.cat([naive.think(w, prompt, factors), w["wte.weight"][[*end, *tokens]]])
        first = len(prompt) + THOUGHTS + shift
        states = naive.hidden(w, x, factors)[first : first + len(tokens)]
        return naive.policy(w, states, temperature)[range(len(tokens)), tokens]

    return score


def cut_score(w, prompt, factors, tokens, temperature):
    x = torch.cat([naive.think(w, prompt, factors).detach(), w["wte.weight"][[END, *tokens[:-1]]]])
    return naive.policy(w, naive.hidden(w, x, factors)[-len(tokens) :], temperature)[range(len(tokens)), tokens]


def graded(reward):
    def advantages(texts, answer):
        r = torch.tensor([float(reward(text, answer)) for text in texts])
        return r - r.mean()

    return advantages


def over_std(texts, answer, epsilon=1e-4):
    advantages = naive.group_advantages(texts, answer)
    return advantages / (advantages.std() + epsilon)


def unclipped(logps, old, gains):
    rows = zip(logps, old, gains, strict=True)
    return -sum(((logp - before).exp() * gain).sum() for logp, before, gain in rows) / (len(logps) * LIMIT)


def policy_gradient(logps, old, gains):
    return -sum((logp * gain).sum() for logp, gain in zip(logps, gains, strict=True)) / (len(logps) * LIMIT)


def by_length(logps, old, gains):
    rows = zip(logps, old, gains, strict=True)
    return sum(naive.dr_grpo([a], [b], g[None]) * LIMIT / len(a) for a, b, g in rows) / len(logps)


WRONG = {
    "think": {
        "before the final norm": fed_back(lambda w, x, f: naive.block(w, x, f)[-1:]),
        "gradient is cut": fed_back(lambda w, x, f: naive.hidden(w, x, f)[-1:].detach()),
        "no effect": fed_back(lambda w, x, f: naive.hidden(w, x, torch.ones_like(f))[-1:]),
        "off by one": fed_back(lambda w, x, f: naive.hidden(w, x, f)[-2:-1]),
        "a token is fed back": fed_back(
            lambda w, x, f: w["wte.weight"][naive.policy(w, naive.hidden(w, x, f)[-1:], 1).argmax(-1)]
        ),
        "only thoughts": lambda w, prompt, f: naive.think(w, prompt, f)[len(prompt) :],
        "first position": fed_back(lambda w, x, f: naive.hidden(w, x, f)[:1]),
        "it raised KeyError": lambda w, prompt, f: w["wte"],
        "not yet": fed_back(lambda w, x, f: 2 * naive.hidden(w, x, f)[-1:]),
    },
    "draw_mask": {
        "not scaled": scaled(lambda rate: 1.0),
        "redrawn": lambda seed, rate, width: (torch.rand(2, width) >= rate) / (1 - rate),
        "two seeds": lambda seed, rate, width: naive.draw_mask(0, rate, width),
        "one row": lambda seed, rate, width: naive.draw_mask(seed, rate, width)[0],
        "same features": lambda seed, rate, width: naive.draw_mask(seed, rate, width)[:1].expand(2, -1),
        "turn the comparison": lambda seed, rate, width: naive.draw_mask(seed, 1 - rate, width),
        "1 / p": scaled(lambda rate: 1 / rate),
        "wrong way round": scaled(lambda rate: 1 - rate),
        "more than two": lambda seed, rate, width: torch.rand(2, width, generator=torch.manual_seed(seed)),
    },
    "place": {
        "<start> is not masked": placed(lambda start: start + 1, lambda start, _: start + 1 + THOUGHTS),
        "on the answer too": placed(lambda start: start, lambda _, length: length),
        "question is masked": placed(lambda _: 0, lambda start, _: start + 1 + THOUGHTS),
        "last thought is not masked": placed(lambda start: start, lambda start, _: start + THOUGHTS),
        "<end> is masked": placed(lambda start: start, lambda start, _: start + 2 + THOUGHTS),
        "switch the branches off": placed(lambda start: start, lambda start, _: start + 1 + THOUGHTS, 0.0),
        "each position": lambda mask, start, length: mask,
    },
    "sample": {
        "those at temperature 1": changed_sample(
            lambda tokens, _, w, prompt, factors: (tokens, naive.score(w, prompt, factors, tokens, 1.0))
        ),
        "temperature has no effect": lambda *given: naive.sample(*given[:4], 1.0),
        "without a mask": changed_sample(
            lambda tokens, _, w, prompt, factors: (
                tokens,
                naive.score(w, prompt, torch.ones_like(factors), tokens, 1.5),
            )
        ),
        "factors have no effect": lambda w, prompt, f, *rest: naive.sample(w, prompt, torch.ones_like(f), *rest),
        "<end> is missing": without_end,
        "eos is missing": changed_sample(lambda tokens, logps, *_: ([t for t in tokens if t], logps)),
        "goes on behind eos": endless,
        "make each an int": changed_sample(lambda tokens, logps, *_: (torch.tensor(tokens), logps)),
        "probabilities": changed_sample(lambda tokens, logps, *_: (tokens, logps.exp())),
        "an argmax": lambda w, prompt, f, uniforms, t: naive.sample(w, prompt, f, torch.full((LIMIT,), 0.5), t),
    },
    "group_advantages": {
        "standard deviation": over_std,
        "0 / 0": lambda texts, answer: over_std(texts, answer, 0.0),
        "sign": lambda *given: -naive.group_advantages(*given),
        "no baseline": lambda texts, answer: naive.group_advantages(texts, answer).gt(0).double(),
        "leave-one-out": lambda texts, answer: naive.group_advantages(texts, answer) * len(texts) / (len(texts) - 1),
        "without the marker": graded(lambda text, answer: text.rpartition("### ")[2].strip() == answer),
        "blank": graded(lambda text, answer: text == f"### {answer}"),
        "18 ends in 8": graded(lambda text, answer: "###" in text and text.strip().endswith(answer)),
        "somewhere": graded(lambda text, answer: answer in text),
    },
    "score": {
        "cut at the thoughts": cut_score,
        "without a gradient": torch.no_grad()(naive.score),
        "behind it": shifted_score(1),
        "from <end>": shifted_score(-1),
        "<end> is missing": shifted_score(-1, ()),
        "temperature 1": lambda *given: naive.score(*given[:4], 1.0),
        "not replayed": lambda w, prompt, f, *rest: naive.score(w, prompt, torch.ones_like(f), *rest),
        "probabilities": lambda *given: naive.score(*given).exp(),
        "not their sum": lambda *given: naive.score(*given).sum(),
    },
    "dr_grpo": {
        "sign": lambda *given: -naive.dr_grpo(*given),
        "not clipped": unclipped,
        "instead of ratios": policy_gradient,
        "every ratio is 1": lambda logps, old, gains: naive.dr_grpo(logps, [logp.detach() for logp in logps], gains),
        "answer's length": by_length,
        "divided by K alone": lambda *given: naive.dr_grpo(*given) * LIMIT,
        "tokens there are": lambda logps, *rest: naive.dr_grpo(logps, *rest) * 4 * LIMIT / sum(map(len, logps)),
        "without a gradient": torch.no_grad()(naive.dr_grpo),
    },
}


@pytest.mark.parametrize("name", EXERCISES)
def test_the_naive_form_passes_and_a_stub_is_not_tried_yet(name, capsys):
    assert EXERCISES[name](getattr(naive, name)) is True
    assert EXERCISES[name](lambda *given: None) is EXERCISES[name](None) is None
    assert capsys.readouterr().out.split("\n")[1:3] == [f"{name}: not tried yet"] * 2


@pytest.mark.parametrize("name, says", [(name, says) for name, wrong in WRONG.items() for says in wrong])
def test_a_typical_mistake_is_named(name, says, capsys):
    assert EXERCISES[name](WRONG[name][says]) is False
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("name", EXERCISES)
def test_each_mistake_has_a_message_of_its_own(name, capsys):
    for wrong in WRONG[name].values():
        EXERCISES[name](wrong)
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == len(lines) >= 7
