"""The definitions, written as plainly as possible, for `verify` to compare the engine with. Slow on purpose.

`naive_rollout` is one rollout: no batch, no cache, the whole sequence passed anew for every thought and token.
`naive_loss` is the GRPO loss in Python floats. Neither shares code with model.py, rollout.py or loss.py.
"""

from __future__ import annotations

import math

import torch

from latentlab.masks import uniforms


def naive_rollout(
    lm,
    tokenizer,
    question: str,
    *,
    thoughts: int,
    limit: int,
    temperature: float,
    seed,
    mask=None,
    spec=None,
    tokens=None,
) -> tuple[list[int], list[float]]:
    """One answer of at most `limit` tokens and its log-probs; `tokens` forces what is said, not what would be chosen.

    mask: one row's values [S, D], per_step [slots, S, D]. seed: the row's, an int64 tensor [1].
    """
    ids = tokenizer(question + "\n<|start-latent|>", add_special_tokens=False)["input_ids"]
    embed, start = lm.get_input_embeddings(), len(ids) - 1
    sequence = list(embed(torch.tensor(ids, device=lm.device)))  # input vectors [D]

    def hidden() -> torch.Tensor:  # [D], of the last position
        factors = None
        if mask is not None:
            factors = torch.stack([_factor(i - start, thoughts, mask, spec) for i in range(len(sequence))])
        return _last_hidden(lm, torch.stack(sequence), factors, spec)

    for _ in range(thoughts):
        sequence.append(hidden())
    sequence.append(embed.weight[tokenizer.convert_tokens_to_ids("<|end-latent|>")])
    answer, logps = [], []
    for t in range(limit):
        logits = lm.get_output_embeddings()(hidden())
        logits = logits if logits.dtype == torch.float64 else logits.float()
        answer.append(_choose(logits, seed, t, temperature))
        said = answer[t] if tokens is None else tokens[t]
        logps.append(torch.log_softmax(logits / (temperature or 1.0), -1)[said].item())
        if said == tokenizer.eos_token_id:
            break
        sequence.append(embed.weight[said])
    return answer, logps


def _factor(offset: int, thoughts: int, mask: torch.Tensor, spec) -> torch.Tensor:
    """What multiplies the sites at `offset` positions behind <|start-latent|>: [S, D]."""
    inside = {"latent": 0 <= offset <= thoughts, "prompt+latent": offset <= thoughts, "all": True}[spec.scope]
    if spec.scheme == "shared":
        return mask if inside else torch.ones_like(mask)
    return mask[max(offset, 0)] if inside else torch.ones_like(mask[0])


def _last_hidden(lm, inputs: torch.Tensor, factors: torch.Tensor | None, spec) -> torch.Tensor:
    """One pass over inputs [T, D], sites multiplied by factors [T, S, D]: the last position's hidden state [D]."""
    hooks = []
    if factors is not None:
        for s, linear in enumerate(branches(lm, spec.sites)):
            hooks.append(linear.register_forward_hook(lambda _, __, out, f=factors[:, s]: out * f))
        if "embedding" in spec.sites:
            inputs = inputs * factors[:, -1]
    hidden = lm.base_model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0, -1]
    for hook in hooks:
        hook.remove()
    return hidden


def branches(lm, sites) -> list:
    """The last linear maps of the named branches, layer by layer, by the names that GPT-2 and Llama give them."""
    base = lm.base_model
    if hasattr(base, "h"):
        pairs = [{"attention": block.attn.c_proj, "mlp": block.mlp.c_proj} for block in base.h]
    else:
        pairs = [{"attention": layer.self_attn.o_proj, "mlp": layer.mlp.down_proj} for layer in base.layers]
    return [pair[site] for pair in pairs for site in sites if site != "embedding"]


def _choose(logits: torch.Tensor, seed: torch.Tensor, t: int, temperature: float) -> int:
    """The argmax, or the first token whose cumulative probability exceeds the row's uniform number."""
    if temperature == 0:
        return int(logits.argmax())
    target, total = uniforms(seed, t).item(), 0.0
    probs = torch.softmax(logits.double() / temperature, -1).tolist()
    for token, prob in enumerate(probs):
        total += prob
        if total > target:
            return token
    return len(probs) - 1


def naive_loss(
    logp, old_logp, ref_logp, advantages, lengths, *, loss_type, epsilon, epsilon_high, beta, limit
) -> tuple[float, float]:
    """(loss, its KL part) in Python floats: nested lists [R][A], R advantages, R answer lengths."""
    policy, kl = [], []  # one list of token terms per row
    for row, length in enumerate(lengths):
        policy.append([])
        kl.append([])
        for t in range(length):
            ratio = math.exp(logp[row][t] - old_logp[row][t])
            clipped = max(1 - epsilon, min(1 + epsilon_high, ratio))
            policy[row].append(-min(ratio * advantages[row], clipped * advantages[row]))
            delta = ref_logp[row][t] - logp[row][t]
            kl[row].append(beta * (math.exp(delta) - delta - 1))

    def normalise(terms) -> float:
        if loss_type == "grpo":
            return sum(sum(row) / len(row) for row in terms) / len(terms)
        if loss_type == "dr_grpo":
            return sum(map(sum, terms)) / (len(terms) * limit)
        return sum(map(sum, terms)) / sum(lengths)  # bnpo; dapo with all rows at hand

    return normalise(policy) + normalise(kl), normalise(kl)
