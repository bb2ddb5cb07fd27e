"""A backbone is compared with itself: through the engine, and by its own plain forward.

The plain forward is the family's own code, run on the whole sequence of one unpadded row, without
cache, mask or hook: `lm(inputs_embeds=…)`. The engine (model.py) runs both rows left-padded, two
rollouts each, with masks of ones. Thoughts and log-probs must agree; a backbone whose attention,
positions, head or embedding do something the engine leaves out is refused here, at load.

A thought is fed back as an element of `inputs_embeds`. What a family does to `inputs_embeds`
(Granite multiplies them) is done to thoughts as well; what it does inside its embedding layer
(Gemma's factor sqrt(D)) is not.

A question that exceeds a window of 512 takes long. Windows are therefore shrunk for the comparison,
if the plain forward shows that it reads them as they are set; else their full size is exceeded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentlab.backbone import COMPARED, SUPPORTED, branch_gaps, longest_sequence, window_names, window_sizes
from latentlab.masks import SITES, Masks, MaskSpec
from latentlab.model import LatentReasoner

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-4, torch.bfloat16: 0.1}
FLOAT64_WITH_FLOAT32 = 1e-5  # norms (gradient) and eager softmax of many families run in float32
THOUGHTS, ANSWER = 2, 4
SHRUNK = 8  # positions of a window during the comparison at load


@dataclass(frozen=True)
class Gap:
    """Largest difference between engine and plain forward, in units of the largest plain value.

    log_probs: in nats per unit of the largest logit (at least 1). answers: how many differ.
    """

    name: str
    value: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.value <= self.bound  # NaN is not


def check_backbone(model: LatentReasoner) -> None:
    """Raise a one-line ValueError unless the engine computes what the backbone computes."""
    lm = model.lm
    name = f"backbone: got the family {lm.config.model_type} ({type(lm).__name__})"
    try:
        wrong = [] if _agrees_in_small_windows(model) else [gap for gap in compare(model) if not gap.ok]
    except Exception as error:  # another family's code may raise any kind when it is called like this
        text = " ".join(str(error).split())[:160] or type(error).__name__
        if text.startswith("backbone: "):  # branch_outputs: no sites for masks
            raise
        raise ValueError(f"{name}, which cannot be run with latent thoughts and masks ({text}); {SUPPORTED}") from error
    if wrong:
        differ = ", ".join(f"{gap.name} by {gap.value:.1g}" for gap in wrong)
        raise ValueError(
            f"{name}, whose own forward differs from the engine's in {differ}, expected at most {wrong[0].bound:g}; "
            f"{SUPPORTED}"
        )


def compare(model: LatentReasoner, *, full: bool = False) -> list[Gap]:
    """Engine against plain forward: embeddings, thoughts, log_probs; in `full` masks, answers, gradient.

    Raises what the backbone's code raises where it cannot be run.
    """
    probe = LatentReasoner(model.lm, model.tokenizer, num_thoughts=THOUGHTS, max_new_tokens=ANSWER)
    sites = probe.num_sites(SITES)  # refuses layers without two branches
    prompts, tokens = _questions(probe)
    bound = BOUNDS[probe.dtype]
    if probe.lm.config._attn_implementation == "eager":
        bound = max(bound, FLOAT64_WITH_FLOAT32)
    with torch.set_grad_enabled(full):
        thoughts, logits = _engine(probe, prompts, tokens, sites)
        plain = [_plain(probe, prompt, row) for prompt, row in zip(prompts, tokens, strict=True)]
        plain_thoughts, plain_logits = (torch.stack(x).repeat_interleave(2, 0) for x in zip(*plain, strict=True))
        logp, plain_logp = logits.log_softmax(-1), plain_logits.log_softmax(-1)
    with torch.no_grad():
        ids = prompts[0][None]
        by_ids, by_vectors = (
            probe.lm(**given, use_cache=False).logits
            for given in ({"input_ids": ids}, {"inputs_embeds": probe.embed(ids)})
        )
        gaps = [
            Gap("embeddings", _relative(by_vectors, by_ids), bound),
            Gap("thoughts", _relative(thoughts, plain_thoughts), bound),
            Gap("log_probs", _relative(logp, plain_logp, plain_logits.abs().max().clamp(min=1)), bound),
        ]
    if full:
        gaps += [Gap(f"{site}_masks", gap, bound) for site, gap in zip(SITES[:2], branch_gaps(probe.lm), strict=True)]
        answers = sum(_greedy(probe, prompt) != _plain_greedy(probe, prompt) for prompt in prompts)
        gaps.append(Gap("answers", answers, len(prompts) if probe.dtype == torch.bfloat16 else 0))  # bfloat16: ties
        weights = [weight for weight in probe.lm.parameters() if weight.requires_grad]
        sums = [x.gather(-1, tokens.repeat_interleave(2, 0)[..., None]).sum() for x in (logp, plain_logp)]
        ours, theirs = (torch.autograd.grad(x, weights, materialize_grads=True) for x in sums)
        error = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        scale = max(float(b.abs().max()) for b in theirs)
        gaps.append(Gap("gradient", error / scale, max(bound, FLOAT64_WITH_FLOAT32)))
    return gaps


@torch.no_grad()
def _agrees_in_small_windows(model: LatentReasoner) -> bool:
    """Whether all agrees with windows shrunk, and the plain forward is another function then."""
    lm = model.lm
    if not any(SHRUNK < size <= COMPARED for size in window_sizes(lm.config)):
        return False
    table = lm.get_input_embeddings().weight
    vectors = table[torch.arange(2 * SHRUNK, device=table.device) % len(table)][None]
    outputs = [lm.base_model(inputs_embeds=vectors, use_cache=False).last_hidden_state]
    with _small_windows(lm):
        outputs.append(lm.base_model(inputs_embeds=vectors, use_cache=False).last_hidden_state)
        return not torch.equal(*outputs) and all(gap.ok for gap in compare(model))


@contextmanager
def _small_windows(lm) -> Iterator[None]:
    """Inside, windows of at most COMPARED positions have SHRUNK, in the config and in every module."""
    owners = {id(owner): owner for module in lm.modules() for owner in (module, getattr(module, "config", module))}
    named = [(vars(owner), name) for owner in owners.values() for name in window_names(owner)]
    before = [(held, name, held[name]) for held, name in named if SHRUNK < held[name] <= COMPARED]
    try:
        for held, name, _ in before:
            held[name] = SHRUNK
        yield
    finally:
        for held, name, size in before:
            held[name] = size


def _questions(probe: LatentReasoner) -> tuple[list[Int[Tensor, " Q"]], Int[Tensor, "2 A"]]:
    """Two questions of different length, <start> last, and answers, of random tokens.

    The longer question exceeds the attention windows of the config, up to COMPARED.
    """
    sizes = [size for size in window_sizes(probe.lm.config) if size <= COMPARED]
    longest = min(longest_sequence(probe.lm.config) - THOUGHTS - ANSWER, max([12, *(size + 8 for size in sizes)]))
    generator = torch.Generator().manual_seed(0)
    lengths = (max(2, longest // 2), longest)
    special = {probe.eos_id, probe.start_id, probe.latent_id, probe.end_id, probe.tokenizer.pad_token_id}
    ids = torch.tensor([i for i in range(len(probe.tokenizer)) if i not in special], device=probe.device)

    def draw(*shape: int) -> Tensor:
        return ids[torch.randint(len(ids), shape, generator=generator).to(probe.device)]

    start = ids.new_tensor([probe.start_id])
    return [torch.cat([draw(n - 1), start]) for n in lengths], draw(2, ANSWER)


def _engine(probe: LatentReasoner, prompts: list[Tensor], tokens: Tensor, sites: int) -> tuple[Tensor, Tensor]:
    """(thoughts [4, L, D], logits [4, A, V]) of two rollouts per question, through the engine."""
    length = max(map(len, prompts))
    padded = torch.stack([torch.cat([p.new_full((length - len(p),), probe.eos_id), p]) for p in prompts])
    valid = torch.stack([torch.arange(length, device=p.device) >= length - len(p) for p in prompts])
    ones = torch.ones(4, sites, probe.width, device=probe.device, dtype=probe.dtype)
    hidden, thoughts = probe.teacher_forced(
        padded, valid, tokens.repeat_interleave(2, 0), num_generations=2, masks=Masks(ones, MaskSpec(sites=SITES))
    )
    return thoughts, probe.head(hidden)


def _plain(probe: LatentReasoner, prompt: Int[Tensor, " Q"], tokens: Int[Tensor, " A"]) -> tuple[Tensor, Tensor]:
    """(thoughts [L, D], logits [A, V]) of one row, by the model's own forward."""
    inputs = probe.embed(prompt)[None]
    for _ in range(THOUGHTS):
        hidden = probe.lm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        inputs = torch.cat([inputs, hidden[:, -1:]], 1)
    thoughts = inputs[0, len(prompt) :]
    rest = probe.embed(torch.cat([prompt.new_tensor([probe.end_id]), tokens[:-1]]))
    logits = probe.lm(inputs_embeds=torch.cat([inputs, rest[None]], 1), use_cache=False).logits
    return thoughts, logits[0, -len(tokens) :].to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def _greedy(probe: LatentReasoner, prompt: Int[Tensor, " Q"]) -> list[int]:
    """A greedy answer of the engine, token by token."""
    state = probe.prefix(prompt[None], torch.ones_like(prompt[None], dtype=torch.bool), num_generations=1, masks=None)
    probe.think(state)
    hidden = probe.answer(state, prompt.new_empty(1, 0))[:, -1]
    answer = [_likeliest(probe, probe.head(hidden))]
    while len(answer) < ANSWER:
        answer.append(_likeliest(probe, probe.head(probe.next_token(state, answer[-1]))))
    return torch.cat(answer).tolist()


@torch.no_grad()
def _plain_greedy(probe: LatentReasoner, prompt: Int[Tensor, " Q"]) -> list[int]:
    """A greedy answer by the model's own forward of the whole sequence per token."""
    answer: list[int] = []
    while len(answer) < ANSWER:
        _, logits = _plain(probe, prompt, prompt.new_tensor([*answer, 0]))  # the last token is not run
        answer.append(int(_likeliest(probe, logits[-1])))
    return answer


def _likeliest(probe: LatentReasoner, logits: Float[Tensor, "*rows V"]) -> Int[Tensor, "*rows"]:
    """The argmax without latent tokens, whose rows start equal to that of "<<": exact ties."""
    latent = torch.tensor([probe.start_id, probe.latent_id, probe.end_id], device=logits.device)
    return logits.index_fill(-1, latent, -torch.inf).argmax(-1)


def _relative(got: Float[Tensor, "*n"], want: Float[Tensor, "*n"], scale: Tensor | None = None) -> float:
    return float((got - want).abs().max() / (want.abs().max() if scale is None else scale))
