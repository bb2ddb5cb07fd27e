"""The definitions, written as plainly as possible, for `verify` to compare the engine with. Slow on purpose.

`naive_rollout` is one rollout: no batch, no cache, the whole sequence passed anew for every thought and token.
`naive_loss` is the GRPO loss in Python floats. Neither shares code with model.py, rollout.py or loss.py.
"""

from __future__ import annotations

import math

import torch

from latentlab.masks import uniforms


def naive_rollout(
    lm, tokenizer, question: str, *, thoughts: int, limit: int, temperature: float, seed, mask=None, spec=None, tokens=None
) -> tuple[list[int], list[float]]:
    """One answer of at most `limit` tokens and its log-probs, straight from the definition; `tokens` forces the answer.

    mask: one row's values [S, D], or [slots, S, D] per step. seed: the row's, an int64 tensor [1].
    """
    blocks = lm.base_model.h if hasattr(lm.base_model, "h") else lm.base_model.layers
    ids = tokenizer(question + "\n<|start-latent|>", add_special_tokens=False)["input_ids"]
    end, start = tokenizer.convert_tokens_to_ids("<|end-latent|>"), len(ids) - 1
    embed = lm.get_input_embeddings()
    sequence = list(embed(torch.tensor(ids, device=lm.device)))  # input vectors [D]

    def factor(position: int) -> torch.Tensor | None:  # [S, D] at this position, None where unmasked
        inside = {"latent": start <= position <= start + thoughts, "prompt+latent": position <= start + thoughts, "all": True}
        if mask is None or not inside[spec.scope]:
            return None
        return mask[max(position - start, 0)] if spec.scheme == "per_step" else mask

    def last_hidden() -> torch.Tensor:
        factors = [factor(i) for i in range(len(sequence))]
        inputs, hooks, s = torch.stack(sequence)[None], [], 0
        for block in blocks if mask is not None else ():
            gpt2 = hasattr(block, "attn")
            for site in [site for site in spec.sites if site != "embedding"]:
                attention, mlp = (block.attn.c_proj, block.mlp.c_proj) if gpt2 else (block.self_attn.o_proj, block.mlp.down_proj)
                scale = torch.stack([torch.ones_like(sequence[0]) if f is None else f[s] for f in factors])  # [T, D]
                hook = lambda _, __, out, scale=scale: out * scale  # noqa: E731
                hooks.append((attention if site == "attention" else mlp).register_forward_hook(hook))
                s += 1
        if mask is not None and "embedding" in spec.sites:
            inputs = inputs * torch.stack([torch.ones_like(sequence[0]) if f is None else f[s] for f in factors])
        hidden = lm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0, -1]
        for hook in hooks:
            hook.remove()
        return hidden

    for _ in range(thoughts):
        sequence.append(last_hidden())
    sequence.append(embed.weight[end])
    answer, logps = [], []
    for t in range(limit):
        logits = lm.get_output_embeddings()(last_hidden())
        logits = logits if logits.dtype == torch.float64 else logits.float()
        answer.append(_choose(logits, seed, t, temperature))
        given = answer[t] if tokens is None else tokens[t]
        logps.append(torch.log_softmax(logits / (temperature or 1.0), -1)[given].item())
        if given == tokenizer.eos_token_id:
            break
        sequence.append(embed.weight[given])
    return answer, logps


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
