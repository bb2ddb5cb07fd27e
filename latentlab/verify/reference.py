"""The definition of a latent rollout, written as plainly as possible, for comparison. Slow.

    z_{i+1} = h(question <start> z_1 ... z_i)    masked at the scope's positions

One row, no cache: every thought and token is a pass of the whole sequence. No code is shared with
model.py or rollouts.py. Source: Coconut, arXiv 2412.06769.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import accumulate

import torch

from latentlab.masks import Masks, MaskSpec, uniforms


@torch.no_grad()
def naive_rollout(
    model, question: str, temperature: float, seed: torch.Tensor, masks: Masks | None = None, tokens=None
) -> tuple[list[int], list[float]]:
    """One answer and its log-probs; `tokens`, a list of ids, forces what is passed on next.

    Of `model` only lm, tokenizer, num_thoughts and max_new_tokens are used. seed: int64 [1]; masks:
    of this row, values [1, S, D], or per_step [1, slots, S, D].
    """
    lm, tokenizer = model.lm, model.tokenizer
    ids = [*tokenizer.encode(question + "\n", add_special_tokens=True), tokenizer.get_vocab()["<|start-latent|>"]]
    embed, start = lm.get_input_embeddings(), len(ids) - 1
    sequence = list(embed(torch.tensor(ids, device=lm.device)))  # input vectors [D]

    def hidden() -> torch.Tensor:  # [D], of the last position
        if masks is None:
            return _last_hidden(lm, torch.stack(sequence))
        values = [_values(i - start, model.num_thoughts, masks.values[0], masks.spec) for i in range(len(sequence))]
        return _last_hidden(lm, torch.stack(sequence), torch.stack(values), masks.spec)

    for _ in range(model.num_thoughts):
        sequence.append(hidden())
    sequence.append(embed.weight[tokenizer.convert_tokens_to_ids("<|end-latent|>")])
    answer: list[int] = []
    logps: list[float] = []
    for t in range(model.max_new_tokens):
        logits = lm.get_output_embeddings()(hidden())
        logits = logits if logits.dtype == torch.float64 else logits.float()
        answer.append(_choose(logits, seed, t, temperature))
        said = answer[t] if tokens is None else tokens[t]
        logps.append(torch.log_softmax(logits / (temperature or 1.0), -1)[said].item())
        if said == tokenizer.eos_token_id:
            break
        sequence.append(embed.weight[said])
    return answer, logps


def _values(offset: int, thoughts: int, mask: torch.Tensor, spec: MaskSpec) -> torch.Tensor:
    """What acts on the sites at `offset` positions behind <|start-latent|>: [S, D]."""
    inside = {"latent": 0 <= offset <= thoughts, "prompt+latent": offset <= thoughts, "all": True}[spec.scope]
    if spec.scheme == "per_step":
        mask = mask[max(offset, 0) if inside else 0]
    return mask if inside else torch.full_like(mask, 1.0 if spec.noise == "dropout" else 0.0)


def _last_hidden(
    lm, inputs: torch.Tensor, values: torch.Tensor | None = None, spec: MaskSpec | None = None
) -> torch.Tensor:
    """One pass of inputs [T, D], values [T, S, D] acting on the sites: last hidden state [D]."""

    def noisy(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return x * v if spec and spec.noise == "dropout" else x + v * (x**2).mean(-1, keepdim=True) ** 0.5

    with ExitStack() as hooks:
        if values is not None and spec is not None:
            for s, linear in enumerate(branches(lm, spec.sites)):
                hook = linear.register_forward_hook(lambda _, __, out, v=values[:, s]: noisy(out, v))
                hooks.enter_context(hook)
            if "embedding" in spec.sites:
                inputs = noisy(inputs, values[:, -1])
        return lm.base_model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0, -1]


def branches(lm, sites) -> list:
    """The last linear maps of the branches, layer by layer, by their names in GPT-2 and Llama."""
    base = lm.base_model
    if hasattr(base, "h"):
        pairs = [{"attention": block.attn.c_proj, "mlp": block.mlp.c_proj} for block in base.h]
    else:
        pairs = [{"attention": layer.self_attn.o_proj, "mlp": layer.mlp.down_proj} for layer in base.layers]
    return [pair[site] for pair in pairs for site in sites if site != "embedding"]


def _choose(logits: torch.Tensor, seed: torch.Tensor, t: int, temperature: float) -> int:
    """The argmax, or the first token whose cumulative probability exceeds the uniform number."""
    if temperature == 0:
        return int(logits.argmax())
    target = uniforms(seed, t).item()
    probs = torch.softmax(logits.double() / temperature, -1).tolist()
    return next((token for token, total in enumerate(accumulate(probs)) if total > target), len(probs) - 1)
