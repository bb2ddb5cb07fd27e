"""The latent reasoner: a Hugging Face causal LM whose last hidden state is fed back as its next input.

    question <start>            z_1 = h(question, <start>)         the last hidden state, after the final norm
    z_1 ... z_L                 z_{i+1} = h(..., z_i)              L thoughts, no token in between
    z_L <end>                   logits of the first answer token   one pass
    answer tokens               logits of the next one

`prefix -> think -> answer` is the only path: sampling, scoring and the curriculum all take it. A mask multiplies the
output of residual branches at the positions of its scope, by hooks that exist only during that forward pass.

Deviations from the official Coconut code (arXiv 2412.06769): batched; the question runs once per problem under scope
"latent" and its keys and values are kept once for its K rows (attention.py), gradient included; padding is never
attended to; the head runs at answer positions only.

Letters: B problems, K rollouts each, R = B * K rows, Q prompt tokens, L thoughts, A answer tokens, D width, S sites.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from latentlab.attention import RolloutCache, rollout_attention
from latentlab.masks import Masks

START, LATENT, END = "<|start-latent|>", "<|latent|>", "<|end-latent|>"
FEEDBACKS = ("thought", "pause", "none")

Edit = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass
class State:
    """Where a batch of rows stands: what is cached, and the one input vector not yet passed."""

    cache: RolloutCache
    position: torch.Tensor  # [R] position id of the next input
    pending: torch.Tensor  # [R, 1, D] next input: the embedding of <start>, or the last thought
    masks: Masks | None
    slot: int = (
        0  # mask slot of `pending`: 0 question and start, i thought i, L + 1 + t the position predicting answer token t
    )

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but `rows` [R'] (finished rows leave the batch)."""
        self.cache.keep(rows)
        self.position, self.pending = self.position[rows], self.pending[rows]
        if self.masks is not None:
            self.masks = self.masks.take(rows)


class LatentReasoner(nn.Module):
    """A causal LM with `num_thoughts` latent steps between question and answer.

    lm: any GPT-2 or Llama-family `transformers` causal LM; tokenizer: has START, LATENT and END as single tokens.
    feedback: "thought" (Coconut), or a control: "pause" (the embedding of <|latent|> is fed instead of the thought),
    "none" (no latent step at all: the direct answer). max_new_tokens: longest answer, in tokens, eos included.
    """

    def __init__(self, lm, tokenizer, *, num_thoughts: int, max_new_tokens: int, feedback: str = "thought"):
        super().__init__()
        if feedback not in FEEDBACKS:
            raise ValueError(f"feedback: got {feedback!r}, expected one of {', '.join(FEEDBACKS)}")
        self.lm, self.tokenizer, self.feedback = lm, tokenizer, feedback
        self.num_thoughts = 0 if feedback == "none" else num_thoughts
        self.max_new_tokens = max_new_tokens
        self.start_id, self.latent_id, self.end_id = (_single_token(tokenizer, text) for text in (START, LATENT, END))
        self.eos_id = tokenizer.eos_token_id
        self.autocast_dtype: torch.dtype | None = None  # matrix products in this type; None: as the weights are
        self._branches: dict[tuple[str, ...], list[nn.Module]] = {}
        self.provenance: dict = {}  # where the weights come from: kind, path, sha256
        self.eval()

    # -- what masks need to know ------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        return self.lm.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    def num_sites(self, sites: tuple[str, ...]) -> int:
        """How many places S a mask on `sites` touches."""
        return len(self._branch_modules(sites)) + ("embedding" in sites)

    def num_slots(self, scope: str) -> int:
        """How many slots a per_step mask has: question and start, each thought, in scope "all" each answer token."""
        return 1 + self.num_thoughts + (self.max_new_tokens if scope == "all" else 0)

    def _branch_modules(self, sites: tuple[str, ...]) -> list[nn.Module]:
        """The modules whose output is a residual branch's output, layer by layer (sites.py)."""
        if sites not in self._branches:  # the search walks over all modules: once is enough
            self._branches[sites] = branch_outputs(self.lm, sites)
        return self._branches[sites]

    def place(self, device: str = "auto", precision: str = "float32") -> LatentReasoner:
        """Move to `device` ("auto": CUDA if there is one), matrix products in `precision`: float32 or bfloat16.

        Autocast: weights, optimizer, suffix attention (attention.py), the head, log-probs and loss stay float32.
        Raises ValueError for a missing device.
        """
        self.autocast_dtype = torch.bfloat16 if precision == "bfloat16" else None
        place = torch_device(device)
        if place.type == "cuda":
            torch.cuda.set_device(place)  # what is measured and waited for is this one
        return self.to(place)

    def _autocast(self):
        on = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=on)

    def cast_once(self):
        """A context around several passes: each weight is cast once, not in every pass; nothing else changes inside.

        Autocast keeps its casts until the outermost context ends. So no weight may change inside, and passes with and
        without gradient do not share one context.
        """
        kind = self.device.type
        return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))

    # -- one forward pass -------------------------------------------------------------------------------------------

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [R, T] -> input vectors [R, T, D]."""
        return self.lm.get_input_embeddings()(token_ids)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits [..., V] in float32 or wider; autocast is off.

        Logits in bfloat16 lie 0.1 apart where they matter: ties, and log-probs that do not replay (arXiv 2506.13585).
        """
        head = self.lm.get_output_embeddings()
        with torch.autocast(self.device.type, enabled=False):
            logits = head(hidden.to(head.weight.dtype))
        return logits if logits.dtype == torch.float64 else logits.float()

    def _forward(self, state: State, inputs: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """Pass `inputs` [R, T, D] on top of the cache, the first len(slots) positions masked. -> hidden [R, T, D]."""
        new = inputs.shape[1]
        positions = state.position[:, None] + torch.arange(new, device=inputs.device)
        state.position = state.position + new
        return self._pass(state, inputs, positions, slots)

    def _pass(self, state: State, inputs: torch.Tensor, positions: torch.Tensor, slots: list[int]) -> torch.Tensor:
        lm, cache, branches, factors = self.lm.base_model, state.cache, [], None
        if state.masks is not None and slots:
            factors, sites = state.masks.factors(slots), state.masks.spec.sites  # [R, 1 or len(slots), S, D]
            branches = self._branch_modules(sites)
            if "embedding" in sites:
                inputs = scale_first(inputs, factors[:, :, -1], len(slots))
        with self._autocast(), scaled(branches, factors, len(slots)), rollout_attention(lm.config):
            output = lm(
                inputs_embeds=inputs,
                attention_mask=cache.visible(inputs.shape[1]),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                rollout_cache=cache,
            )
        return output.last_hidden_state

    # -- prefix -> think -> answer ----------------------------------------------------------------------------------

    def prefix(
        self, prompt_ids: torch.Tensor, prompt_valid: torch.Tensor, *, num_generations: int, masks: Masks | None
    ) -> State:
        """Run the questions; prompts [B, Q] are left-padded and end with <start>, which stays pending.

        The question is run once per problem and shared by its K rows, unless the mask's scope covers it.
        """
        if masks is not None and len(masks.values) != len(prompt_ids) * num_generations:
            raise ValueError(
                f"masks: got {len(masks.values)} rows for {len(prompt_ids)} x {num_generations} rollouts, expected one "
                "mask per rollout; draw them from the seeds of these rollouts"
            )
        masked = masks is not None and masks.spec.scope != "latent"
        if masked:
            prompt_ids, prompt_valid = (x.repeat_interleave(num_generations, 0) for x in (prompt_ids, prompt_valid))
        embedded = self.embed(prompt_ids)  # [B, Q, D]
        question = prompt_valid[:, :-1]  # [B, Q - 1]
        state = State(
            cache=RolloutCache(question, capacity=1 + self.num_thoughts + self.max_new_tokens),
            position=question.sum(1),
            pending=embedded[:, -1:],
            masks=masks,
        )
        positions = (question.long().cumsum(1) - 1).clamp(min=0)  # padding may take any position: it is not seen
        self._pass(state, embedded[:, :-1], positions, [0] * question.shape[1] if masked else [])
        rows = 1 if masked else num_generations
        state.cache.start_rows(rows)
        state.position, state.pending = (x.repeat_interleave(rows, 0) for x in (state.position, state.pending))
        return state

    def think(self, state: State, *, edit: Edit | None = None) -> torch.Tensor:
        """Take the latent steps: -> thoughts [R, L, D], the last one left pending.

        `edit(i, z)` may replace thought i (1 ... L), [R, D], before it is fed back: the place for interventions.
        """
        thoughts = []
        for i in range(1, self.num_thoughts + 1):
            z = self._forward(state, state.pending, [state.slot])[:, -1]  # [R, D]
            z = z if edit is None else edit(i, z)
            thoughts.append(z)
            state.pending, state.slot = self._fed_back(z)[:, None], i
        empty = state.pending[:, :0]  # [R, 0, D]
        return torch.stack(thoughts, 1) if thoughts else empty

    def _fed_back(self, z: torch.Tensor) -> torch.Tensor:
        if self.feedback == "pause":
            return self.embed(torch.full((len(z),), self.latent_id, device=z.device))
        return z

    def answer(self, state: State, tokens: torch.Tensor) -> torch.Tensor:
        """Pass the last thought, <end> and `tokens` [R, T] at once: -> hidden [R, 1 + T, D], from <end> on.

        Position t of the result predicts answer token t.
        """
        ids = torch.cat([tokens.new_full((len(tokens), 1), self.end_id), tokens], 1)  # [R, 1 + T]
        inputs = torch.cat([state.pending, self.embed(ids)], 1)  # [R, 2 + T, D]
        slots = ([state.slot] if state.masks is not None else []) + self._answer_slots(state, ids.shape[1])
        state.slot += ids.shape[1]
        hidden = self._forward(state, inputs, slots)[:, 1:]
        if state.masks is not None and state.masks.spec.scope != "all":
            state.masks = None  # worn for the last time: rows that leave need not carry them
        return hidden

    def next_token(self, state: State, tokens: torch.Tensor) -> torch.Tensor:
        """Pass one more answer token [R]: -> hidden [R, D], which predicts the next."""
        inputs = self.embed(tokens[:, None])
        slots = self._answer_slots(state, 1)
        state.slot += 1
        return self._forward(state, inputs, slots)[:, 0]

    def _answer_slots(self, state: State, count: int) -> list[int]:
        """Slots of answer positions: only scope "all" masks them."""
        if state.masks is None or state.masks.spec.scope != "all":
            return []
        return [state.slot + 1 + t for t in range(count)]

    def check_length(self, prompt: int, answer: int) -> None:
        """Raise ValueError if Q prompt tokens, the thoughts, <end> and all answer tokens but the last do not fit."""
        limit = self.lm.config.max_position_embeddings
        need = prompt + self.num_thoughts + answer
        if need > limit:
            raise ValueError(
                f"length: got {need} positions ({prompt} prompt + {self.num_thoughts} thoughts + {answer} answer), "
                f"expected at most {limit}; drop long problems, or lower max_new_tokens"
            )

    # -- scoring ----------------------------------------------------------------------------------------------------

    def teacher_forced(
        self,
        prompt_ids: torch.Tensor,
        prompt_valid: torch.Tensor,
        tokens: torch.Tensor,
        *,
        num_generations: int = 1,
        masks: Masks | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [R, A, D] that predict answer tokens [R, A], and the thoughts [R, L, D], with gradient."""
        self.check_length(prompt_ids.shape[1], tokens.shape[1])
        with self.cast_once():
            state = self.prefix(prompt_ids, prompt_valid, num_generations=num_generations, masks=masks)
            thoughts = self.think(state)
            return self.answer(state, tokens[:, :-1]), thoughts

    def score(self, rollouts, *, masks: Masks | None) -> torch.Tensor:
        """Log-probs of recorded answers under `masks`, with gradient: [R, A] nats, 0 after the end of an answer.

        Under the masks that the rollouts were drawn with this equals `rollouts.logp` (tested; see `replay_gap`).
        """
        hidden, _ = self.teacher_forced(
            rollouts.prompt_ids,
            rollouts.prompt_valid,
            rollouts.tokens,
            num_generations=rollouts.num_generations,
            masks=masks,
        )
        said = rollouts.token_mask.nonzero(as_tuple=True)  # the N places where an answer has a token
        logp = token_logps(self.head(hidden[said]), rollouts.tokens[said], rollouts.temperature)
        return logp.new_zeros(rollouts.tokens.shape).index_put(said, logp)


def torch_device(name: str) -> torch.device:
    """The device `name`: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1"; ValueError if it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or index and not index.isdigit():
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:1")
    if kind == "cuda" and torch.cuda.device_count() <= int(index or 0):
        raise ValueError(
            f"device: got {name}, but torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return torch.device(name)


def token_logps(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs [...] of `tokens` [...] under logits [..., V] at `temperature` (greedy, 0, is scored at 1)."""
    return policy(logits, temperature).gather(-1, tokens[..., None])[..., 0]


def policy(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs of all tokens [..., V] under logits [..., V] at `temperature` (greedy, 0, is scored at 1)."""
    return torch.log_softmax(logits if temperature in (0, 1) else logits / temperature, -1)


def _single_token(tokenizer, text: str) -> int:
    ids = tokenizer.convert_tokens_to_ids([text])
    if ids[0] is None or ids[0] == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(ids) != [text]:
        raise ValueError(f"tokenizer: got no token {text}, expected the three latent tokens; use load_model")
    return ids[0]


# -- where masks act: the outputs of residual branches, found by their role ------------------------------------------


def branch_outputs(lm: nn.Module, sites: tuple[str, ...]) -> list[nn.Module]:
    """The modules that a mask on `sites` scales, layer by layer; site "embedding" is no module's output."""
    return [branch_output(layer, site) for layer in decoder_layers(lm) for site in sites if site != "embedding"]


@contextmanager
def scaled(modules: list[nn.Module], factors: torch.Tensor | None, count: int):
    """While inside, the first `count` positions of module s's output are scaled by factors[:, :, s].

    factors: [R, 1 or count, S, D]; not looked at without modules.
    """
    handles = []
    for s, module in enumerate(modules):
        hook = lambda _, __, out, f=factors[:, :, s]: scale_first(out, f, count)  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def scale_first(out: torch.Tensor, factors: torch.Tensor, count: int) -> torch.Tensor:
    """Multiply the first `count` positions of out [R, T, D] by factors [R, 1 or count, D]."""
    if count == out.shape[1]:
        return out * factors
    return torch.cat([out[:, :count] * factors, out[:, count:]], 1)


def decoder_layers(lm: nn.Module) -> nn.ModuleList:
    """The stack of decoder blocks: the first ModuleList whose members each have an attention and an MLP child."""
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and module and _children(module[0], "att") and _children(module[0], "mlp"):
            return module
    raise ValueError(
        f"backbone: got {type(lm).__name__}, expected blocks with an attention and an mlp child (GPT-2, Llama)"
    )


def branch_output(layer: nn.Module, site: str) -> nn.Module:
    """The last linear map of a block's attention or MLP branch: what is added to the residual stream."""
    branch = _children(layer, "att" if site == "attention" else "mlp")[0]
    return [m for m in branch.modules() if isinstance(m, (nn.Linear, Conv1D))][-1]


def _children(layer: nn.Module, word: str) -> list[nn.Module]:
    """Child modules named after a role that hold a linear map (`post_attention_layernorm` is none)."""
    return [
        child for name, child in layer.named_children()
        if word in name and any(isinstance(m, (nn.Linear, Conv1D)) for m in child.modules())
    ]  # fmt: skip
