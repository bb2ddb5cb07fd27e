"""Dropout-GRPO on a one-layer GPT-2 in plain PyTorch: one rollout at a time, no batch, no cache.

    factors = place(mask, start, length)             one mask from <start> to the last thought
    x = think(w, prompt, factors)                    question, <start>, z_1 ... z_L
    tokens, old = sample(w, prompt, factors, ...)    an answer and its log-probs
    logp = score(w, prompt, factors, tokens, ...)    the same again, with gradient: the replay
    loss = dr_grpo([logp, ...], [old, ...], group_advantages(texts, answer))

Notebook 06 builds it piece by piece, and compares it with the library, which computes the same.

Dimensions: T positions, Q prompt tokens (<start> last), L thoughts, A answer tokens, D width,
V vocabulary, K rollouts of one problem. w: GPT-2's weights by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

Weights = dict[str, Tensor]
EOS, START, END = 0, 2, 4  # token ids of the shipped model
HEADS, THOUGHTS, LIMIT = 4, 4, 4  # attention heads; L; longest answer in tokens
WORD = re.compile(r"\n|<<|>>|###|\d+|[A-Za-z]+|[^\sA-Za-z\d]")


def encode(vocab: dict[str, int], question: str) -> list[int]:
    """A question as token ids, one a word, and <start>: [Q]."""
    return [*(vocab[word] for word in WORD.findall(question + "\n")), START]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Layer norm with the gain and bias of `name`: [T, D] -> [T, D]."""
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """x W + b."""
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def block(w: Weights, x: Tensor, factors: Tensor) -> Tensor:
    """Inputs [T, D] -> the residual stream [T, D] behind the layer, before the final norm.

    factors [T or more, 2, D] multiply what the attention and the MLP branch add; ones: no mask.
    """
    length, width = x.shape
    f = factors[:length]
    h = x + w["wpe.weight"][:length]  # positions
    parts = linear(w, "h.0.attn.c_attn", norm(w, "h.0.ln_1", h)).split(width, -1)
    q, k, v = (part.view(length, HEADS, -1).transpose(0, 1) for part in parts)  # [H, T, D / H]
    scores = q @ k.transpose(1, 2) / math.sqrt(width / HEADS)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    h = h + f[:, 0] * linear(w, "h.0.attn.c_proj", mixed.transpose(0, 1).reshape(length, width))
    inner = gelu(linear(w, "h.0.mlp.c_fc", norm(w, "h.0.ln_2", h)), approximate="tanh")
    return h + f[:, 1] * linear(w, "h.0.mlp.c_proj", inner)


def hidden(w: Weights, x: Tensor, factors: Tensor) -> Tensor:
    """Inputs [T, D] -> last hidden states [T, D], after the final norm."""
    return norm(w, "ln_f", block(w, x, factors))


def policy(w: Weights, states: Tensor, temperature: float) -> Tensor:
    """Log-probs of the next token: [T, D] -> [T, V]. The head is the table of embeddings."""
    return (states @ w["wte.weight"].T / temperature).log_softmax(-1)


def draw_mask(seed: int, rate: float, width: int) -> Tensor:
    """One mask [2, D]: 0 with probability `rate`, else 1 / (1 - rate)."""
    uniform = torch.rand(2, width, generator=torch.Generator().manual_seed(seed))
    return (uniform >= rate) / (1 - rate)


def place(mask: Tensor, start: int, length: int) -> Tensor:
    """The factors [T, 2, D] of a rollout: the mask from <start> to the last thought, else ones."""
    factors = torch.ones(length, *mask.shape, dtype=mask.dtype)
    factors[start : start + 1 + THOUGHTS] = mask
    return factors


def think(w: Weights, prompt: Sequence[int], factors: Tensor) -> Tensor:
    """Prompt [Q] -> inputs [Q + L, D]: the embeddings of the prompt, and the thoughts."""
    x = w["wte.weight"][prompt]
    for _ in range(THOUGHTS):
        x = torch.cat([x, hidden(w, x, factors)[-1:]])
    return x


@torch.no_grad()
def sample(
    w: Weights, prompt: Sequence[int], factors: Tensor, uniforms: Tensor, temperature: float
) -> tuple[list[int], Tensor]:
    """An answer, one uniform number a token, and its log-probs [A]; eos ends it and belongs to it."""
    tokens: list[int] = []
    logps: list[Tensor] = []
    thoughts = think(w, prompt, factors)
    for uniform in uniforms:
        x = torch.cat([thoughts, w["wte.weight"][[END, *tokens]]])
        logp = policy(w, hidden(w, x, factors)[-1], temperature)
        cdf = logp.exp().double().cumsum(-1)
        tokens.append(int((cdf <= uniform * cdf[-1]).sum()))
        logps.append(logp[tokens[-1]])
        if tokens[-1] == EOS:
            break
    return tokens, torch.stack(logps)


def group_advantages(texts: Sequence[str], answer: str) -> Tensor:
    """Rewards of K answers, 1 if the number behind "###" is right, minus their mean: [K]."""
    found = [text.rpartition("###") for text in texts]
    rewards = torch.tensor([float(mark == "###" and tail.strip() == answer) for _, mark, tail in found])
    return rewards - rewards.mean()


def score(w: Weights, prompt: Sequence[int], factors: Tensor, tokens: Sequence[int], temperature: float) -> Tensor:
    """Log-probs [A] of an answer under the factors it was made with, in one pass, with gradient."""
    x = torch.cat([think(w, prompt, factors), w["wte.weight"][[END, *tokens[:-1]]]])
    logp = policy(w, hidden(w, x, factors)[-len(tokens) :], temperature)  # [A, V]
    return logp[range(len(tokens)), tokens]


def dr_grpo(logps: Sequence[Tensor], old: Sequence[Tensor], advantages: Tensor, epsilon: float = 0.2) -> Tensor:
    """The loss of K rollouts: clipped ratios times advantages, over the constant K * LIMIT."""
    total = torch.zeros(())
    for logp, before, advantage in zip(logps, old, advantages, strict=True):
        ratio = (logp - before).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
        total = total + gain.sum()
    return -total / (len(logps) * LIMIT)


def descend(w: Weights, gradient: Weights, rate: float) -> Weights:
    """The weights after one step of gradient descent; `w` stays as it is."""
    return {name: (weight - rate * gradient[name]).detach().requires_grad_() for name, weight in w.items()}
