"""Which backbones the engine computes exactly: families and variants of transformers, one by one.

    make backbones      writes reports/published/backbones.json, docs/backbones.md

For maintainers; a minute, offline. Each family is a tiny random model of its real config class. Its
engine is compared with the plain forward of one unpadded row (pretrained/selfcheck.py).
"""

import json
import time
from datetime import UTC, datetime
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from latentlab.data.word_problems import WORDS
from latentlab.model import LatentReasoner
from latentlab.pretrained.scratch import word_tokenizer
from latentlab.pretrained.selfcheck import check_backbone, compare
from latentlab.runtime import environment as runtime
from latentlab.runtime.files import write_atomically
from latentlab.study.results import published_folder

TOKENIZER = word_tokenizer(WORDS)
IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
NAMES = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
PLAIN: dict[str, Any] = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, **NAMES, **IDS}
PLAIN |= {"initializer_range": 0.3}
GQA = {**PLAIN, "num_key_value_heads": 2}
GPT = {"vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, **IDS}
GPT |= {"initializer_range": 0.3}
OPT = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, **NAMES, **IDS}
ALTERNATING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 24}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", GPT),
    "GPT-2, scale_attn_weights off": ("GPT2", {**GPT, "scale_attn_weights": False}),
    "GPT-2, scale_attn_by_inverse_layer_idx": ("GPT2", {**GPT, "scale_attn_by_inverse_layer_idx": True}),
    "GPT-2, reorder_and_upcast_attn": ("GPT2", {**GPT, "reorder_and_upcast_attn": True}),
    "GPT-2, untied head": ("GPT2", {**GPT, "tie_word_embeddings": False}),
    "GPT-2, padded vocabulary": ("GPT2", {**GPT, "vocab_size": len(TOKENIZER) + 7}),
    "Llama, grouped-query attention": ("Llama", GQA),
    "Llama, head_dim 6": ("Llama", {**GQA, "head_dim": 6}),
    "Llama, tied head, biases": ("Llama", {**GQA, "tie_word_embeddings": True, "attention_bias": True}),
    "Llama, llama3 rotary scaling": ("Llama", {**GQA, "rope_parameters": LLAMA3}),
    "Qwen2": ("Qwen2", GQA),
    "Qwen2, window 24 in one layer": (
        "Qwen2",
        {**GQA, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "Qwen3": ("Qwen3", {**GQA, "head_dim": 8}),
    "Qwen3-MoE": (
        "Qwen3Moe",
        {**GQA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "Mistral, window 24": ("Mistral", {**GQA, "sliding_window": 24}),
    "Mixtral": ("Mixtral", {**GQA, "num_local_experts": 4}),
    "Gemma": ("Gemma", {**GQA, "head_dim": 8}),
    "Gemma-2, window 24, caps 5 and 3": ("Gemma2", {**GQA, "head_dim": 8, **ALTERNATING, **CAPS}),
    "Gemma-3, window 24": ("Gemma3Text", {**GQA, "head_dim": 8, **ALTERNATING}),
    "Phi": ("Phi", GQA),
    "Phi-3, window 24": ("Phi3", {**GQA, "sliding_window": 24}),
    "Granite, all multipliers": ("Granite", {**GQA, **GRANITE}),
    "Granite-MoE, logits_scaling 8": ("GraniteMoe", {**GQA, "num_local_experts": 4, "logits_scaling": 8.0}),
    "Cohere, logit_scale 0.25": ("Cohere", {**GQA, "logit_scale": 0.25}),
    "Cohere-2, window 24": ("Cohere2", {**GQA, "logit_scale": 0.25, **ALTERNATING}),
    "OLMo, clip_qkv": ("Olmo", {**GQA, "clip_qkv": 1.0}),
    "OLMo-2": ("Olmo2", GQA),
    "OLMo-3, window 24": ("Olmo3", {**GQA, **ALTERNATING}),
    "StableLM": ("StableLm", GQA),
    "StableLM, parallel, normed queries": ("StableLm", {**GQA, "use_parallel_residual": True, "qk_layernorm": True}),
    "SmolLM3": ("SmolLM3", {**GQA, "no_rope_layers": [1, 0]}),
    "GPT-NeoX": ("GPTNeoX", PLAIN),
    "GPT-NeoX, sequential": ("GPTNeoX", {**PLAIN, "use_parallel_residual": False}),
    "GPT-BigCode": ("GPTBigCode", GPT),
    "GPT-BigCode, multi-head": ("GPTBigCode", {**GPT, "multi_query": False}),
    "StarCoder2, window 24": ("Starcoder2", {**GQA, "sliding_window": 24}),
    "Nemotron": ("Nemotron", GQA),
    "GLM": ("Glm", {**GQA, "head_dim": 8}),
    "GLM-4": ("Glm4", {**GQA, "head_dim": 8}),
    "Falcon": ("Falcon", PLAIN),
    "Falcon, ALiBi": ("Falcon", {**PLAIN, "alibi": True}),
    "OPT": ("OPT", OPT),
    "Bloom": ("Bloom", {"vocab_size": len(TOKENIZER), "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MPT": ("Mpt", {"vocab_size": len(TOKENIZER), "d_model": 32, "n_heads": 4, "n_layers": 2}),
    "GPT-J": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "GPT-Neo, window 24": (
        "GPTNeo",
        {
            "vocab_size": len(TOKENIZER),
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 96,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 24,
            **IDS,
        },
    ),
    "GPT-OSS": ("GptOss", {**GQA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **ALTERNATING}),
    "Mamba": ("Mamba", {"vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}
FLOAT32 = ("Mixtral", "Qwen3Moe", "GraniteMoe", "GptOss")  # their experts' products have no float64
SHOWN = ("thoughts", "log_probs", "attention_masks", "mlp_masks", "answers", "gradient")
HEADER = """# Backbones

Generated by `make backbones` from
[backbones.json](../reports/published/backbones.json); transformers {transformers}.

`load_model` compares every backbone with itself: two left-padded questions of random tokens, masks of ones, two
thoughts fed back and four answer tokens, through the engine and through the model's own forward of each unpadded row
without cache. A backbone is right, or it is refused in one line before any compute.

- **Thoughts** are fed back as elements of `inputs_embeds`. What a family does to `inputs_embeds` is done to thoughts
  (Granite's `embedding_multiplier`); what it does in its embedding layer is not (Gemma's factor √D).
- **Logits** come from the model's own head: scales and caps apply (Granite, Cohere, Gemma-2).
- **Windows and caps of attention** are those that the family hands to its attention function. A window of at most 512
  positions is exceeded by the question of the comparison, shrunk for it where the family reads it at every call.
- **Masks** multiply what a branch adds to the residual stream: the output of its last linear map, or of the norm behind
  it (Gemma-2 and -3, OLMo-2 and -3, GLM-4), or of the whole branch (mixtures of experts). Each layer is run under masks
  to find out which.
- Families with `attn_logit_softcapping` run in `eager` attention; transformers has no other for them.

## Supported

Each row is a tiny random model of the family's own config class, in float64 (mixtures of experts: float32). Gaps are
the largest difference from the plain forward, relative to its largest value (log-probs: to the largest logit), with the
bound in brackets. Masks: the error of multiplying what a branch adds. Answers: greedy answers that differ. Many
families compute norms, or eager softmax, in float32 in a model of any precision, hence the wider bounds.

| family | thoughts | log-probs | attention masks | mlp masks | answers | gradient |
|---|---|---|---|---|---|---|
"""


def build(name: str) -> LatentReasoner:
    """The tiny random model of a family, weights of norms and biases included."""
    kind, settings = FAMILIES[name]
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**settings))
    for key, weight in lm.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, 1.0 if "norm" in key or "ln_" in key else 0.0, 0.3)
    return LatentReasoner(lm if kind in FLOAT32 else lm.double(), TOKENIZER, num_thoughts=2, max_new_tokens=4)


def measure(name: str) -> dict[str, Any]:
    """{"gaps": {row: {"value", "bound", "ok"}}}, or {"refused": the line}."""
    model = build(name)
    row = {"family": name, "model_type": model.lm.config.model_type, "class": type(model.lm).__name__}
    try:
        check_backbone(model)
    except ValueError as error:
        return {**row, "refused": str(error)}
    gaps = {gap.name: {"value": gap.value, "bound": gap.bound, "ok": gap.ok} for gap in compare(model, full=True)}
    return {**row, "gaps": gaps}


def page(result: dict[str, Any]) -> str:
    """docs/backbones.md."""
    rows = result["metrics"]["families"]
    text = HEADER.format(transformers=result["environment"]["transformers"])
    for row in rows:
        if "gaps" in row:
            cells = [row["gaps"][key] for key in SHOWN]
            shown = [f"{x['value']:.0g} ({x['bound']:g})" if x["bound"] else str(x["value"]) for x in cells]
            text += f"| {row['family']} (`{row['model_type']}`) | {' | '.join(shown)} |\n"
    text += "\n## Refused\n\n| family | the line |\n|---|---|\n"
    for row in rows:
        if "refused" in row:
            text += f"| {row['family']} (`{row['model_type']}`) | {row['refused']} |\n"
    return text


def main() -> None:
    """Measure all families; write the result and the page."""
    started = time.time()
    families = [measure(name) for name in FAMILIES]
    right = sum("gaps" in row for row in families)
    result = {
        "schema_version": 1,
        "name": "backbones",
        "preset": "",
        "question": "Does the engine compute what each family of backbones computes?",
        "headline": f"{right} of {len(families)} variants agree with their plain forward, the others are refused",
        "parameters": {"tokens": "random", "thoughts": 2, "answer_tokens": 4},
        "metrics": {"agree": right, "refused": len(families) - right, "families": families},
        "arms": [],
        "environment": runtime.environment(),
        "commit": runtime.commit(),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": time.time() - started,
    }
    write_atomically(published_folder() / "backbones.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(runtime.repository_root() / "docs" / "backbones.md", page(result).encode())
    print(result["headline"])


if __name__ == "__main__":
    main()
