"""The latent reasoner: a causal LM whose last hidden state is fed back as its next input.

    question <start>     z_1 = h(question, <start>)        h: last hidden state, after the final norm
    z_1 ... z_L          z_{i+1} = h(..., z_i)             L latent steps (thoughts), no tokens
    z_L <end>            logits of the first answer token  one forward pass for both positions
    answer tokens        logits of the next tokens

Sampling, scoring and the curriculum share one path: `prefix -> think -> answer`. A mask acts on
the outputs of residual branches at the positions in its scope, through forward hooks that exist
only during the forward pass.

Source: Coconut, arXiv 2412.06769. Deviations from its code:
1. Rollouts are batched; prompts are left-padded and padding is never attended to.
2. What is equal for rollouts is run once, gradient included: the question under mask scope "latent"
   (attention.py), without masks also thoughts and equal beginnings of answers.
3. The language-model head runs at answer positions only, the last layer at question positions only
   as far as its keys and values.

Dimensions: B problems, K rollouts per problem, R = B * K rows, Q prompt tokens, L thoughts,
A answer tokens, T positions of one forward pass, D width, S mask sites, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from latentlab.attention import PrefixRun, RolloutCache, rollout_attention
from latentlab.backbone import branch_outputs, fuse_gelu, longest_sequence, multiplies_bfloat16, own_logits
from latentlab.masks import Masks, perturb, perturbed

START, LATENT, END = "<|start-latent|>", "<|latent|>", "<|end-latent|>"
FEEDBACKS = ("thought", "pause", "none")

Edit = Callable[[int, Tensor], Tensor]


@dataclass
class State:
    """Generation state of a batch of rows: the cache, and the one input that was not run yet."""

    cache: RolloutCache
    position: Int[Tensor, " R"]  # position id of the next input
    pending: Float[Tensor, "R 1 D"]  # the next input: the embedding of <start>, or the last thought
    masks: Masks | None

    def keep(self, rows: Int[Tensor, " N"]) -> None:
        """Replace the rows by `rows` (ascending): finished ones leave, one that branches is there several times."""
        self.cache.keep(rows)
        self.position, self.pending = self.position[rows], self.pending[rows]
        if self.masks is not None:
            self.masks = self.masks.take(rows)


class LatentReasoner(nn.Module):
    """A causal LM with `num_thoughts` latent steps between question and answer.

    lm: a `transformers` causal LM of a supported family (docs/backbones.md), which gets a faster
        kernel of GPT-2's activation (`fuse_gelu`).
    tokenizer: has START, LATENT and END as single tokens.
    max_new_tokens: longest answer in tokens, eos included.
    feedback: "thought" (Coconut), or a control: "pause" (the embedding of <|latent|> replaces the
        thought) or "none" (no latent steps: direct answers).
    """

    same_passes = False  # True: the same whole passes for every batch, as FSDP2 needs; nothing is left out

    def __init__(self, lm, tokenizer, *, num_thoughts: int, max_new_tokens: int, feedback: str = "thought"):
        super().__init__()
        if feedback not in FEEDBACKS:
            raise ValueError(f"feedback: got {feedback!r}, expected one of {', '.join(FEEDBACKS)}")
        if not (type(num_thoughts) is type(max_new_tokens) is int and num_thoughts >= 0 < max_new_tokens):
            got = f"num_thoughts={num_thoughts!r}, max_new_tokens={max_new_tokens!r}"
            raise ValueError(f"LatentReasoner: got {got}, expected ints >= 0 and >= 1; correct them")
        self.lm, self.tokenizer, self.feedback = lm, tokenizer, feedback
        self.num_thoughts = 0 if feedback == "none" else num_thoughts
        self.max_new_tokens = max_new_tokens
        self.start_id, self.latent_id, self.end_id = (_single_token(tokenizer, text) for text in (START, LATENT, END))
        self.eos_id = tokenizer.eos_token_id
        self.autocast_dtype: torch.dtype | None = None  # of matrix products; None: as the weights
        self.provenance: dict = {}  # origin of the weights: kind, path, sha256
        self._branches: dict[tuple[str, ...], list[nn.Module]] = {}
        fuse_gelu(lm)
        self.eval()

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
        """Number of mask sites S: one per layer and branch, and one for the embedding."""
        return len(self.branches(sites)) + ("embedding" in sites)

    def num_slots(self, scope: str) -> int:
        """Number of per-step mask slots: prompt, thoughts and, in scope "all", answer tokens."""
        return 1 + self.num_thoughts + (self.max_new_tokens if scope == "all" else 0)

    def branches(self, sites: tuple[str, ...]) -> list[nn.Module]:
        """The modules whose outputs a mask on `sites` multiplies (`branch_outputs`), cached."""
        if sites not in self._branches:
            self._branches[sites] = branch_outputs(self.lm, sites)
        return self._branches[sites]

    def place(self, device: torch.device | str, precision: str = "float32") -> LatentReasoner:
        """Move to `device`; precision "bfloat16" is autocast of matrix products, all else stays float32.

        "auto" is bfloat16 on a device that has instructions for it, else "float32".
        """
        half = multiplies_bfloat16(device) if precision == "auto" else precision == "bfloat16"
        self.autocast_dtype = torch.bfloat16 if half else None
        return self.to(device)

    def autocast(self):
        """The autocast context of a forward pass of the backbone."""
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def cast_once(self):
        """Context for several forward passes in which autocast casts each weight only once.

        Weights must not change inside, nor may passes with and without gradient share one context.
        """
        kind = self.device.type  # autocast keeps its casts until the outermost context ends
        return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))

    # -- one forward pass -------------------------------------------------------------------------

    def embed(self, token_ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows D"]:
        """Token ids -> input embeddings."""
        return self.lm.get_input_embeddings()(token_ids)

    def head(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Logits (`own_logits`) in float32 or wider, computed without autocast.

        bfloat16 logits are spaced by about 0.1: ties, log-probs that do not replay (arXiv 2506.13585).
        """
        hidden = hidden.to(self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            logits = own_logits(self.lm, hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def forward_pass(self, state: State, inputs: Float[Tensor, "R T D"]) -> Float[Tensor, "R _ D"]:
        """Append `inputs` to the cache, masked where in scope: -> last hidden states (none in the prefix)."""
        new, cache, masks = inputs.shape[1], state.cache, state.masks
        positions = state.position[:, None] + torch.arange(new, device=inputs.device)  # [R, T]
        state.position = state.position + new
        masked = self._num_masked(state, new)
        hooks: AbstractContextManager = nullcontext()
        if masks is not None and masked:
            values = masks.at(cache.get_seq_length(), 1 if cache.in_prefix else masked)
            hooks = perturbed(self.branches(masks.spec.sites), values, masked, masks.spec.noise)
            if "embedding" in masks.spec.sites:
                inputs = perturb(inputs, values[:, :, -1], masked, masks.spec.noise)
        try:
            with self.autocast(), hooks, rollout_attention(self.lm.config, cache):
                output = self.lm.base_model(
                    inputs_embeds=inputs,
                    attention_mask=cache.visible(new),
                    position_ids=positions.clamp(min=0),  # padding is before position 0
                    past_key_values=cache,
                    use_cache=True,
                )
        except PrefixRun:
            return inputs[:, :0]
        return output.last_hidden_state

    def _num_masked(self, state: State, new: int) -> int:
        """How many of the next `new` positions are in the masks' scope; they come first."""
        if state.masks is None:
            return 0
        scope = state.masks.spec.scope
        if state.cache.in_prefix:
            return 0 if scope == "latent" else new
        latent = 1 + self.num_thoughts - state.cache.get_seq_length()  # <start> and thoughts left
        return new if scope == "all" else min(new, max(0, latent))

    # -- prefix -> think -> answer ----------------------------------------------------------------

    def prefix(
        self,
        prompt_ids: Int[Tensor, "B Q"],
        prompt_valid: Bool[Tensor, "B Q"],
        *,
        num_generations: int,
        masks: Masks | None,
    ) -> State:
        """Run the questions of left-padded prompts; their last token, <start>, stays pending.

        A question is run once for its K rows, or once per row if the masks' scope covers it.
        """
        if masks is not None and len(masks.values) != len(prompt_ids) * num_generations:
            raise ValueError(
                f"masks: got {len(masks.values)} rows for {len(prompt_ids)} x {num_generations} rollouts, expected one "
                "mask per rollout; draw them from the seeds of these rollouts"
            )
        rows = num_generations
        if masks is not None and masks.spec.scope != "latent":
            prompt_ids, prompt_valid = (x.repeat_interleave(rows, 0) for x in (prompt_ids, prompt_valid))
            rows = 1
        embedded, question = self.embed(prompt_ids), prompt_valid[:, :-1]
        last_layer = None if self.same_passes else self.lm.config.num_hidden_layers - 1
        cache = RolloutCache(question, 1 + self.num_thoughts + self.max_new_tokens, last_layer)
        start = question.sum(1) - question.shape[1]  # [B] minus the padding: real tokens start at 0
        state = State(cache=cache, position=start, pending=embedded[:, -1:], masks=masks)
        self.forward_pass(state, embedded[:, :-1])
        cache.start_rows(rows)
        state.position, state.pending = (x.repeat_interleave(rows, 0) for x in (state.position, state.pending))
        return state

    def think(self, state: State, *, edit: Edit | None = None) -> Float[Tensor, "R L D"]:
        """Run the latent steps: -> thoughts; the last one stays pending.

        `edit(i, z)` may replace thought i (1 ... L), z [R, D], before it is fed back (interventions).
        """
        thoughts = []
        for i in range(1, self.num_thoughts + 1):
            z = self.forward_pass(state, state.pending)[:, -1]  # [R, D]
            z = z if edit is None else edit(i, z)
            thoughts.append(z)
            if self.feedback == "pause":
                z = self.embed(torch.full((len(z),), self.latent_id, device=z.device))
            state.pending = z[:, None]
        return torch.stack(thoughts, 1) if thoughts else state.pending[:, :0]

    def answer(
        self, state: State, tokens: Int[Tensor, "R T"], rows: Int[Tensor, " R"] | None = None
    ) -> Float[Tensor, "R T+1 D"]:
        """Run the last thought, <end> and `tokens`: -> hidden states from <end> on.

        Position t of the result predicts answer token t. rows (ascending): the row of the state that
        each answer continues, so that several branch off one after <end>; None: its own.
        """
        end = self.embed(tokens.new_full((len(state.pending), 1), self.end_id))
        together = [self.embed(tokens)] if rows is None else []  # one pass
        hidden = self.forward_pass(state, torch.cat([state.pending, end, *together], 1))[:, 1:]
        if state.masks is not None and state.masks.spec.scope != "all":
            state.masks = None  # no later position is masked
        if rows is not None:
            state.keep(rows)
            more = [self.forward_pass(state, self.embed(tokens))] if tokens.shape[1] else []
            hidden = torch.cat([hidden[rows], *more], 1)
        return hidden

    def next_token(self, state: State, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R D"]:
        """Run one more answer token per row: -> the hidden states that predict the next one."""
        return self.forward_pass(state, self.embed(tokens[:, None]))[:, 0]

    def check_length(self, prompt: int, answer: int) -> None:
        """Raise ValueError if prompt, thoughts, <end> and answer[:-1] do not fit."""
        limit = longest_sequence(self.lm.config)
        need = prompt + self.num_thoughts + answer
        if need > limit:
            raise ValueError(
                f"length: got {need} positions ({prompt} prompt + {self.num_thoughts} thoughts + {answer} answer), "
                f"expected at most {limit}; drop long problems, or use a backbone with more positions"
            )

    # -- scoring ----------------------------------------------------------------------------------

    def teacher_forced(
        self,
        prompt_ids: Int[Tensor, "B Q"],
        prompt_valid: Bool[Tensor, "B Q"],
        tokens: Int[Tensor, "R A"],
        *,
        num_generations: int = 1,
        masks: Masks | None = None,
        prompts: Int[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R A D"], Float[Tensor, "R L D"]]:
        """The hidden states that predict the answer `tokens`, and the thoughts, with gradient.

        The answers belong to the prompts in order, `num_generations` each, or, without masks, to
        `prompts` (ascending); then thoughts are run once per prompt.
        """
        self.check_length(prompt_ids.shape[1], tokens.shape[1])
        with self.cast_once():
            rows = num_generations if prompts is None else 1
            state = self.prefix(prompt_ids, prompt_valid, num_generations=rows, masks=masks)
            thoughts = self.think(state)
            hidden = self.answer(state, tokens[:, :-1], prompts)
        return hidden, thoughts if prompts is None else thoughts[prompts]

    def score(self, rollouts, *, masks: Masks | None) -> Float[Tensor, "R A"]:
        """Log-probs (nats) of the rollouts' answers under `masks`, with gradient; 0 after the end.

        Under the masks of the rollouts they equal `rollouts.logp` up to rounding (`replay_gap`).
        Without masks equal answers to a problem are run once.
        """
        r, k = rollouts, rollouts.num_generations
        rows, prompts = torch.arange(len(r.tokens), device=r.tokens.device), None
        first = copies = rows  # [R'] one rollout of each distinct row, [R] the distinct row of each rollout
        if masks is None and not self.same_passes:
            distinct, copies = torch.cat([rows[:, None] // k, r.tokens, r.token_mask], 1).unique(
                dim=0, return_inverse=True
            )
            prompts = distinct[:, 0]
            first = torch.empty_like(prompts).index_copy(0, copies, rows)
        tokens, token_mask = r.tokens[first], r.token_mask[first]
        hidden, _ = self.teacher_forced(
            r.prompt_ids, r.prompt_valid, tokens, num_generations=k, masks=masks, prompts=prompts
        )
        at = token_mask.nonzero(as_tuple=True)  # the N answer tokens
        logp = token_logps(self.head(hidden[at]), tokens[at], r.temperature)  # [N]
        return logp.new_zeros(tokens.shape).index_put(at, logp)[copies]


def policy(logits: Float[Tensor, "*rows V"], temperature: float) -> Float[Tensor, "*rows V"]:
    """Log-probs (nats) of all tokens at `temperature`; temperature 0 (greedy) is scored at 1."""
    return torch.log_softmax(logits if temperature in (0, 1) else logits / temperature, -1)


def token_logps(
    logits: Float[Tensor, "*rows V"], tokens: Int[Tensor, "*rows"], temperature: float
) -> Float[Tensor, "*rows"]:
    """Log-probs (nats) of `tokens` under `policy(logits, temperature)`."""
    return policy(logits, temperature).gather(-1, tokens[..., None])[..., 0]


def _single_token(tokenizer, text: str) -> int:
    ids = tokenizer.convert_tokens_to_ids([text])
    if ids[0] is None or ids[0] == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(ids) != [text]:
        raise ValueError(f"tokenizer: got no token {text}, expected the three latent tokens; use load_model")
    return ids[0]
