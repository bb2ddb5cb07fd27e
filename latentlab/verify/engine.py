"""The rows of `latentlab verify` that depend on device and precision, and those on loss, grading and file formats.

The engine must equal the plain definition of a latent rollout (reference.py), and itself in any batch.

    bound for "equal"    float64 1e-12 · float32 1e-5 · bfloat16 0.1       nats, largest over all tokens

In bfloat16 a token may differ where two are equally likely; there tokens are counted in the note and do not decide.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import math
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from latentlab import loss, problems, reward, rollouts
from latentlab.masks import MaskSpec, draw_masks, rollout_seeds
from latentlab.model import LatentReasoner
from latentlab.pretrained import coconut, loading, scratch
from latentlab.pretrained.loading import load_model, save_model
from latentlab.pretrained.scratch import build_model
from latentlab.problems import Problem
from latentlab.theory.proofs import Property, judge
from latentlab.verify.reference import branches, naive_loss, naive_rollout

BOUNDS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.1}
WORDS = ("one", "two", "three", "four", "five", "six", "?", "\n")
QUESTIONS = ("one ?", "two three four five six ?", "three one", "four two two two ?", "five", "six six six six six")
ALL_SITES = ("attention", "mlp", "embedding")
# sha256 of `_golden_bits`: the same on every device and in every process
BITS_SHA256 = "75a81c5b80911a07a310038aa2ef0bd5b7078ff869dd78ffd7dcbe309dada5f9"


class Engine:
    """What the rows of this module need: two small models on `device` in `dtype`, six questions, the bound."""

    def __init__(self, device: str, dtype: str):
        self.device, self.dtype, self.bound = device, dtype, BOUNDS[dtype]
        self.models = {"gpt2": _gpt2(), "llama": _llama()}
        for model in self.models.values():
            model.to(device=device, dtype=getattr(torch, dtype))
        self.problems = tuple(Problem(f"q{i}", text, (), "1", "verify") for i, text in enumerate(QUESTIONS))

    def roll(self, model, problems, spec, *, k: int = 4, temperature: float = 1.0, run_seed: int = 0):
        """Rollouts of `problems` with the masks of `spec` (None: clean)."""
        return rollouts.rollout(
            model, problems, num_generations=k, masks=spec, temperature=temperature, run_seed=run_seed, step=0
        )

    def tokens_decide(self) -> bool:
        return self.dtype != "bfloat16"


def _gpt2() -> LatentReasoner:
    return _sharpened(
        build_model(WORDS, n_layer=2, n_embd=32, n_head=4, n_positions=64, num_thoughts=3, max_new_tokens=6, seed=0)
    )


def _llama() -> LatentReasoner:
    tokenizer = scratch.word_tokenizer(WORDS)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = LlamaForCausalLM(config)
    return _sharpened(LatentReasoner(lm, tokenizer, num_thoughts=3, max_new_tokens=6))


def _sharpened(model: LatentReasoner) -> LatentReasoner:
    """Larger weights than at initialisation, so that masks and thoughts change answers."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
    return model


# -- 5 ... 9: the engine --------------------------------------------------------------------------------------------


def replay(e: Engine) -> Property:
    """Recorded log-probs equal re-scored ones: every scheme and scope, both backbones, ragged and shrinking batches."""
    gap, cases = 0.0, 0
    with torch.no_grad():
        for model in e.models.values():
            for scheme in ("shared", "per_step"):
                for scope in ("latent", "prompt+latent", "all"):
                    out = e.roll(model, e.problems, MaskSpec(scheme, 0.2, ALL_SITES, scope), temperature=0.8)
                    gap, cases = max(gap, _rescored(model, out)), cases + 1
            lone = _shrinking(e, model)
            gap, cases = max(gap, _rescored(model, lone)), cases + 1
    return judge("replay", gap, e.bound, f"max |re-scored - recorded| over {cases} cases, one shrinks to a single row")


def _rescored(model, out) -> float:
    """Largest gap between recorded and re-scored log-probs; every answer must have been recorded up to its eos."""
    ended = ((out.tokens == model.eos_id) & out.token_mask).any(1) | (out.token_mask.sum(1) == model.max_new_tokens)
    if not ended.all():
        return math.inf
    return rollouts.replay_gap(model.score(out, masks=out.masks), out)


def _shrinking(e: Engine, model):
    """Three rollouts of which two end early: the batch shrinks to one row."""
    for seed in range(200):
        out = e.roll(model, e.problems[:3], MaskSpec(rate=0.2), k=1, run_seed=seed)
        if out.token_mask[:, -1].sum() == 1:
            return out
    raise RuntimeError("no batch shrinks to a single row: the model never ends an answer early")


def mask_identity(e: Engine) -> Property:
    """A shared mask equals scaling the output features (weight and bias) of the branches' last linear maps."""
    gap = 0.0
    with torch.no_grad():
        for model in e.models.values():
            spec = MaskSpec(rate=0.2, scope="all")
            for problem in e.problems[:3]:
                out = e.roll(model, [problem], spec, k=1)
                scaled = _scaled_copy(model, out.masks.values[0])
                gap = max(gap, (scaled.score(out, masks=None) - model.score(out, masks=out.masks)).abs().max().item())
    return judge("mask_identity", gap, e.bound, "masked outputs = scaled weight columns and biases, without hooks")


def _scaled_copy(model: LatentReasoner, mask: torch.Tensor) -> LatentReasoner:
    """A copy whose branch outputs are scaled by mask [S, D] in the weights themselves; sites attention, mlp."""
    copied = copy.deepcopy(model)
    maps = branches(copied.lm, ("attention", "mlp"))
    for linear, factor in zip(maps, mask, strict=True):
        linear.weight.mul_(factor if isinstance(linear, Conv1D) else factor[:, None])  # Conv1D: [in, out]
        if linear.bias is not None:
            linear.bias.mul_(factor)
    return copied


def mask_statistics(e: Engine) -> Property:
    """Rate, scale and independence of a million bits; the same four numbers give the same bits everywhere."""
    model, rate, sigma = e.models["gpt2"], 0.1, 5.0
    ids = [f"p{i}" for i in range(1000)]
    base = _bits(model, rollout_seeds(0, 0, ids, 8), rate)  # [8000, S * D]
    drop = 1 - base.mean().item()
    error = abs(drop - rate) / math.sqrt(rate * (1 - rate) / base.numel())
    others = {
        "run seed": _bits(model, rollout_seeds(1, 0, ids, 8), rate),
        "step": _bits(model, rollout_seeds(0, 1, ids, 8), rate),
        "problem": base.view(1000, 8, -1).roll(1, 0).reshape(base.shape),
        "k": base.view(1000, 8, -1).roll(1, 1).reshape(base.shape),
    }
    worst = max(abs(_correlation(base, other)) * math.sqrt(base.numel()) for other in others.values())
    values = draw_masks(MaskSpec(rate=rate), model, rollout_seeds(0, 0, ids, 1)).values
    scale = torch.tensor([0, 1 / (1 - rate)], dtype=values.dtype, device=values.device)
    exact = torch.isin(values, scale).all().item() and _alone_equals_batch(model, ids) and _golden() == BITS_SHA256
    device = hashlib.sha256(_golden_bits(model.device).cpu().numpy().tobytes()).hexdigest() == BITS_SHA256
    note = f"standard errors, {base.numel():.2g} bits: rate {drop:.5f}, correlations; same bits on {e.device} and CPU"
    return judge("mask_statistics", max(error, worst), sigma, note, also=exact and device)


def _bits(model, seeds: torch.Tensor, rate: float) -> torch.Tensor:
    """Kept features as 1.0, dropped as 0.0: [R, S * D] float64."""
    return (draw_masks(MaskSpec(rate=rate), model, seeds).values > 0).flatten(1).double()


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()).item()


def _alone_equals_batch(model, ids) -> bool:
    """A rollout's mask is the same drawn alone and drawn with others."""
    batch = _bits(model, rollout_seeds(0, 0, ids[:4], 4), 0.3)
    return bool((batch[7] == _bits(model, rollout_seeds(0, 0, [ids[1]], 4), 0.3)[3]).all())


def _golden_bits(device) -> torch.Tensor:
    """The mask bits of one fixed rollout on `device`: [S, D] bool."""

    class Shape:
        width, dtype = 64, torch.float32

        def num_sites(self, sites):
            return 4

    Shape.device = device
    return draw_masks(MaskSpec(rate=0.3), Shape(), rollout_seeds(7, 3, ["golden"], 2)).values[1] > 0


def _golden() -> str:
    return hashlib.sha256(_golden_bits(torch.device("cpu")).numpy().tobytes()).hexdigest()


def batch_invariance(e: Engine) -> Property:
    """Tokens and log-probs of a problem do not depend on its batch mates, their lengths, or K."""
    gap, different, total = 0.0, 0, 0
    for model in e.models.values():
        for temperature in (0.0, 1.0):
            for spec in (MaskSpec(rate=0.2), MaskSpec("per_step", 0.2, ALL_SITES, "all")):
                together = e.roll(model, e.problems, spec, temperature=temperature)
                for i, problem in enumerate(e.problems):
                    alone = e.roll(model, [problem], spec, k=2, temperature=temperature)
                    for k in range(2):
                        difference = _compare(alone, k, together, i * 4 + k)
                        gap, different, total = max(gap, difference or 0.0), different + (difference is None), total + 1
    note = f"each problem alone with K = 2 against all six with K = 4: {different} of {total} answers differ"
    return judge("batch_invariance", gap, e.bound, note, also=different == 0 or not e.tokens_decide())


def _compare(a, i: int, b, j: int) -> float | None:
    """Largest log-prob difference of row i of a and row j of b; None where their tokens differ."""
    x, y = (out.tokens[row][out.token_mask[row]].tolist() for out, row in ((a, i), (b, j)))
    if x != y:
        return None
    return (a.logp[i, : len(x)] - b.logp[j, : len(x)]).abs().max().item()


@torch.no_grad()
def naive_equality(e: Engine) -> Property:
    """The engine equals the plain definition: one rollout at a time, no cache, no batch."""
    gap, different, total = 0.0, 0, 0
    for name, model in e.models.items():
        for temperature, spec in (
            (0.0, None), (1.0, MaskSpec(rate=0.2)), (1.0, MaskSpec("shared", 0.2, ALL_SITES, "all")),
            (0.7, MaskSpec("per_step", 0.2, ALL_SITES, "prompt+latent" if name == "gpt2" else "all")),
        ):  # fmt: skip
            out = e.roll(model, e.problems, spec, k=2, temperature=temperature)
            for row in range(len(out.tokens)):
                length = int(out.token_mask[row].sum())
                tokens = out.tokens[row, :length].tolist()
                answer, logps = naive_rollout(
                    model.lm, model.tokenizer, out.problems[row // 2].question, thoughts=model.num_thoughts,
                    limit=model.max_new_tokens, temperature=temperature, seed=out.seeds[row : row + 1].to(e.device),
                    mask=None if spec is None else out.masks.values[row], spec=spec, tokens=tokens,
                )  # fmt: skip
                recorded = out.logp[row, :length].tolist()
                gap = max(gap, *(abs(a - b) for a, b in zip(logps, recorded, strict=True)))
                different, total = different + (answer != tokens), total + 1
    note = f"against the uncached reference: {different} of {total} answers differ"
    return judge("naive_equality", gap, e.bound, note, also=different == 0 or not e.tokens_decide())


# -- 10 ... 12: loss, grading, formats ------------------------------------------------------------------------------


def trl_loss(e: Engine) -> Property:
    """Four loss types, both clip bounds, k3 KL and micro-batches against the same formulas in Python floats."""
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(4, 5, generator=g, dtype=torch.float64)
    logp, ref = (old + torch.randn(4, 5, generator=g, dtype=torch.float64) * 0.4 for _ in range(2))
    lengths, advantages = [5, 2, 3, 1], [1.5, -0.5, -1.0, 2.0]
    settings = {"epsilon": 0.2, "epsilon_high": 0.3, "beta": 0.04}
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    a, worst = torch.tensor(advantages, dtype=torch.float64), 0.0
    for loss_type in loss.LOSS_TYPES:
        given = {**settings, "loss_type": loss_type}
        want, kl = naive_loss(*(x.tolist() for x in (logp, old, ref)), advantages, lengths, limit=6, **given)
        given["max_completion_length"] = 6
        got, _ = loss.grpo_loss(logp, old, a, mask, ref_logp=ref, **given)
        policy, _ = loss.grpo_loss(logp, old, a, mask, **{**given, "beta": 0.0})
        denominator = loss.loss_denominator(mask, loss_type, 6)
        parts = sum(
            loss.grpo_loss(logp[s], old[s], a[s], mask[s], ref_logp=ref[s], denominator=denominator, **given)[0]
            for s in (slice(0, 1), slice(1, 4))
        )
        worst = max(worst, abs(got.item() - want), abs(parts.item() - want), abs((got - policy).item() - kl))
    return judge("trl_loss", worst, 1e-12, "grpo, dr_grpo, bnpo, dapo: value, KL part, sum of micro-batches")


HARD = {
    "1,000": "1000", "$3.50": "3.5", "50%": "50", "-7": "-7", ".5": "0.5", "1/2": "0.5", "18.0": "18",
    "18 apples": "18", "3 or 4": None, "": None, "no number": None, "\u0661\u0662": None, "\u00b2": None,
    "1e3": None, "9" * 400: "9" * 400, "1,5": None, "3:45": None, "1/0": None, "-0": "0",
    "nan": None, "__import__('os')": None, "\u22125": "-5",
}  # fmt: skip


def grading(e: Engine) -> Property:
    """Hard strings follow the documented rule: nothing raises, nothing is evaluated, the unparsable win no vote."""
    wrong = sum(problems.canonical_answer(text) != want for text, want in HARD.items())
    for text, want in HARD.items():
        problem = Problem("a", "q", (), want or "1", "verify")
        wrong += reward.exact_answer(f"### {text}", problem) != float(want is not None)
    wrong += reward.majority_vote(["### nothing"] * 9 + ["### 7"]) != "7"
    wrong += reward.majority_vote(["### nothing", "no marker"]) is not None
    for module in (problems, reward):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        wrong += len(names & {"eval", "exec"})
    return judge("grading", wrong, 0, f"{len(HARD)} hard strings, the vote, and no eval in problems.py and reward.py")


def published_format(e: Engine) -> Property:
    """Both published layouts load with their source's logits; export and reload are bit-exact; no native dropout."""
    with tempfile.TemporaryDirectory() as folder:
        source = published_examples(Path(folder))
        loaded = [
            load_model(Path(folder) / "meta" / "checkpoint_3", base=str(Path(folder) / "base")),
            load_model(Path(folder) / "hf"),
        ]
        exported = Path(folder) / "export"
        save_model(loaded[0], exported)
        plain = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
        text = "one two ?\n<|start-latent|><|latent|><|end-latent|>"
        ids = torch.tensor([source["tokenizer"](text)["input_ids"]])
        with torch.no_grad():
            want = source["lm"].eval()(ids).logits
            gap = max((lm(ids).logits - want).abs().max().item() for lm in (*(m.lm for m in loaded), plain))
        same = tokenizer(text)["input_ids"] == ids[0].tolist() == loaded[1].tokenizer(text)["input_ids"]
        pairs = zip(plain.state_dict().values(), loaded[0].lm.state_dict().values(), strict=True)
        same = same and all(torch.equal(a, b) for a, b in pairs)
    active = sum(m.p > 0 for model in loaded for m in model.train().modules() if isinstance(m, torch.nn.Dropout))
    active += sum(getattr(model.lm.config, key, 0) or 0 for model in loaded for key in loading.NATIVE_DROPOUT)
    note = f"state dict, HF folder, export: largest logit difference; active native dropout sites: {active}"
    return judge("published_format", gap, 0, note, also=same and active == 0)


def published_examples(folder: Path) -> dict:
    """Write a small GPT-2 with native dropout as base/, meta/checkpoint_3 and hf/; return its lm and tokenizer."""
    vocabulary = {word: i for i, word in enumerate(("<eos>", "<unk>", *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=2, n_embd=16, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )  # with GPT-2's native dropout of 0.1
    config.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tokenizer.add_tokens(list(coconut.TOKENS))  # the official order: start, end, latent
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        lm = GPT2LMHeadModel(config)
    state = {f"{coconut.PREFIX}{key}": value for key, value in lm.state_dict().items()}
    (folder / "meta").mkdir()
    torch.save(
        {**state, "embedding.weight": lm.get_input_embeddings().weight.detach()}, folder / "meta" / "checkpoint_3"
    )
    for key, token in zip(coconut.CONFIG_IDS, coconut.TOKENS, strict=True):
        setattr(lm.config, key, tokenizer.convert_tokens_to_ids(token))
    transformers.utils.logging.disable_progress_bar()
    lm.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    return {"lm": lm, "tokenizer": tokenizer}


CHECKS = {
    f.__name__: f
    for f in (
        replay, mask_identity, mask_statistics, batch_invariance, naive_equality, trl_loss, grading, published_format,
    )
}  # fmt: skip
