"""rollout.py: replay to rounding, answers independent of batch mates, answers that end early, late or at once."""

import copy
import dataclasses
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from latentlab.masks import MaskSpec, draw_masks, rollout_seeds
from latentlab.model import END, LATENT, START, LatentReasoner, policy
from latentlab.pretrained.loading import load_model
from latentlab.rollouts import choose, encode_prompts, first_tokens, replay_gap, rollout
from latentlab.training import preflight
from latentlab.verify.reference import naive_rollout
from tests.conftest import tiny_gpt2

SCOPES = ("latent", "prompt+latent", "all")
SETTINGS = {"num_generations": 3, "temperature": 1.0, "run_seed": 0, "step": 0}


@pytest.fixture
def eos_bias(monkeypatch):
    """eos_bias(x) adds x to the logit of eos, in sampling and scoring alike."""

    def bias(value):
        head = LatentReasoner.head

        def biased(self, hidden):
            logits = head(self, hidden)
            return logits + value * torch.nn.functional.one_hot(torch.tensor(self.eos_id), logits.shape[-1])

        monkeypatch.setattr(LatentReasoner, "head", biased)

    return bias


def gap(model, out, masks):
    return replay_gap(model.score(out, masks=masks), out)


@pytest.fixture
def uneven(monkeypatch):
    """Answers of uneven length, sampled or greedy: eos is more or less likely than all else, as the state has it."""
    head = LatentReasoner.head

    def uneven_head(self, hidden):
        logits = head(self, hidden)
        is_eos = torch.nn.functional.one_hot(torch.tensor(self.eos_id), logits.shape[-1]).bool()
        return torch.where(is_eos, logits.amax(-1, keepdim=True) + 3 * hidden[..., 1:2] - 1, logits)

    monkeypatch.setattr(LatentReasoner, "head", uneven_head)


# -- replay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scheme", ["shared", "per_step", "none"])
def test_replay_reproduces_the_sampled_log_probs(model, problems, scheme, scope, temperature, uneven):
    spec = MaskSpec(scheme=scheme, rate=0.3, scope=scope, sites=("attention", "mlp", "embedding"))
    out = rollout(model, problems, masks=spec, **{**SETTINGS, "temperature": temperature})
    assert len(set(out.token_mask.sum(1).tolist())) > 1, "no row left the batch early"
    assert gap(model, out, out.masks) < 1e-5
    redrawn = draw_masks(spec, model, out.seeds)  # from the stored seeds alone
    assert gap(model, out, redrawn) < 1e-5
    if scheme != "none":
        assert gap(model, out, draw_masks(spec, model, out.seeds + 1)) > 1e-3
        assert gap(model, out, None) > 1e-3


def test_sharp_attention_replays_too(make_model, problems):
    llama = make_model("llama")
    for name, weight in llama.lm.named_parameters():
        if "q_proj" in name:
            weight.data *= 4096  # scores so large that float32 would round them, and the log-probs, by 1e-4
    out = rollout(llama, problems, masks=MaskSpec(rate=0.2), **{**SETTINGS, "num_generations": 8})
    assert gap(llama, out, out.masks) < 1e-5


def test_a_micro_batch_replays_its_part(model, problems):
    out = rollout(model, problems, masks=MaskSpec(rate=0.3), **SETTINGS)
    part = out.take(slice(1, 3))
    assert part.problems == out.problems[1:3] and part.text == out.text[3:9]
    assert gap(model, part, part.masks) < 1e-5
    assert gap(model, out.take(slice(3, 99)), out.take(slice(3, 99)).masks) < 1e-5


def test_a_higher_weight_shows_as_a_replay_gap(gpt2, problems):
    out = rollout(gpt2, problems, masks=MaskSpec(rate=0.3), **SETTINGS)
    with torch.no_grad():
        gpt2.lm.transformer.ln_f.weight.add_(0.1)
    assert gap(gpt2, out, out.masks) > 0.01


# -- independence of the batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["shared", "per_step", "none"])
def test_a_problem_is_answered_alike_alone_and_among_others(model, problems, scheme, uneven):
    spec = MaskSpec(scheme=scheme, rate=0.3)
    together = rollout(model, problems, masks=spec, **SETTINGS)
    for i, problem in enumerate(problems):
        alone = rollout(model, [problem], masks=spec, **SETTINGS)
        part = together.take(slice(i, i + 1))
        width = alone.tokens.shape[1]
        assert torch.equal(part.seeds, alone.seeds)
        assert torch.equal(part.tokens[:, :width], alone.tokens) and not part.token_mask[:, width:].any()
        assert part.text == alone.text
        torch.testing.assert_close(part.logp[:, :width], alone.logp, rtol=0, atol=1e-5)
        torch.testing.assert_close(part.thoughts, alone.thoughts, rtol=0, atol=1e-5)


def test_the_first_rollouts_of_a_larger_group_are_the_smaller_group(gpt2, problems):
    few = rollout(gpt2, problems[:1], masks=MaskSpec(rate=0.3), **SETTINGS)
    many = rollout(gpt2, problems[:1], masks=MaskSpec(rate=0.3), **{**SETTINGS, "num_generations": 6})
    assert torch.equal(many.tokens[:3, : few.tokens.shape[1]], few.tokens)


def test_runs_and_steps_differ(gpt2, problems):
    tokens = [
        rollout(gpt2, problems, masks=None, **{**SETTINGS, **change}).tokens.flatten().tolist()
        for change in ({}, {"run_seed": 1}, {"step": 1}, {})
    ]
    assert tokens[0] == tokens[3] and tokens[0] != tokens[1] != tokens[2] != tokens[0]


def test_prompts_are_left_padded_and_end_with_start(gpt2, problems):
    ids, valid = encode_prompts(gpt2.tokenizer, problems, "cpu")
    assert (ids[:, -1] == gpt2.start_id).all()
    for row, problem in enumerate(problems):
        real = ids[row, valid[row]]
        assert gpt2.tokenizer.decode(real[:-2]).replace(" .", ".").replace(" ?", "?") == problem.question
        assert not valid[row, : -len(real)].any() and valid[row, -len(real) :].all()


def with_template(tokenizer, **names):
    """The tokenizer with more special tokens: `names` of its attributes; bos is put before a text, sep behind."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens(names)
    parts = [(names[k], tokenizer.convert_tokens_to_ids(names[k])) for k in ("bos_token", "sep_token") if k in names]
    single = " ".join([names.get("bos_token", ""), "$A", names.get("sep_token", "")]).strip()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=parts)
    return tokenizer


@pytest.mark.parametrize(
    "names",
    [
        {"bos_token": "<s>"},  # Llama 2
        {"bos_token": "<bos>"},  # Gemma
        {"bos_token": "<|begin_of_text|>"},  # Llama 3
        {"bos_token": "<s>", "sep_token": "</s>"},
    ],
)
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(llama_folder, problems, names):
    tokenizer = with_template(load_model(llama_folder, num_thoughts=1, max_new_tokens=2).tokenizer, **names)
    ids, valid = encode_prompts(tokenizer, problems, "cpu")
    for row, problem in enumerate(problems):
        real = ids[row, valid[row]].tolist()
        plain = tokenizer(problem.question + "\n", add_special_tokens=False)["input_ids"]
        around = [tokenizer.convert_tokens_to_ids(name) for name in names.values()]
        assert real == [around[0], *plain, *around[1:], tokenizer.convert_tokens_to_ids(START)]


def test_the_first_token_of_a_text_is_not_that_of_a_template(llama_folder):
    tokenizer = with_template(load_model(llama_folder, num_thoughts=1, max_new_tokens=2).tokenizer, bos_token="<s>")
    assert first_tokens(tokenizer, ["7 + 5", "12", "7 + 5"]) == {
        "7 + 5": tokenizer.convert_tokens_to_ids("7"),
        "12": tokenizer("12", add_special_tokens=False)["input_ids"][0],
    }
    with pytest.raises(ValueError, match="^tokenizer: got no token for ' '"):
        first_tokens(tokenizer, ["12", " "])


def test_without_a_template_a_prompt_is_the_question_and_start(model, problems):
    ids, valid = encode_prompts(model.tokenizer, problems, "cpu")
    text = [problem.question + "\n" + START for problem in problems]
    rows = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [ids[row, valid[row]].tolist() for row in range(4)] == rows


def test_the_reference_begins_its_prompts_with_bos_too(make_model, problems):
    model = make_model("llama")
    model.tokenizer = with_template(model.tokenizer, bos_token="<s>")
    model.lm.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    out = rollout(model, problems[:1], masks=None, **SETTINGS | {"num_generations": 1, "temperature": 0.0})
    tokens, logps = naive_rollout(model, problems[0].question, 0.0, out.seeds[:1])
    assert tokens == out.tokens[0].tolist()
    torch.testing.assert_close(torch.tensor(logps), out.logp[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("token", [START, "<eos>", "<s>", "</s>", "<bos>", "[INST]", "<|im_end|>"])
def test_a_control_token_of_the_tokenizer_in_a_text_is_refused(gpt2, problems, config, token):
    """By the tokenizer's own list: its named tokens and its special added ones; others are text."""
    control = {"bos_token": "<s>", "sep_token": "</s>"}
    gpt2.tokenizer = with_template(gpt2.tokenizer, **control)
    for special in ("<bos>", "[INST]", "<|im_end|>"):
        gpt2.tokenizer.add_tokens([AddedToken(special, special=True)])
    said = rf"^text: got the control token {re.escape(token)} in 'one {re.escape(token)} more.*; drop this problem$"
    asked = [*problems, replace(problems[0], id="x", question=f"one {token} more")]
    with pytest.raises(ValueError, match=said):
        rollout(gpt2, asked, masks=None, **SETTINGS)
    with pytest.raises(ValueError, match=said):
        preflight.expect_together(gpt2, asked, config())
    steps = (f"one {token} more", *problems[0].steps)
    with pytest.raises(ValueError, match=said):
        preflight.expect_together(gpt2, [replace(problems[0], steps=steps)], config(), curriculum=True)


@pytest.mark.parametrize("text", ["<s>", "<|im_end|>", "[INST]", "<unk>", "unheard of"])
def test_what_the_tokenizer_does_not_call_special_is_text(gpt2, problems, text):
    rollout(gpt2, [replace(problems[0], question=f"one {text} more")], masks=None, **SETTINGS)


@pytest.mark.parametrize("token", [START, LATENT, END])
def test_latent_tokens_of_ones_own_tokenizer_are_control_tokens_too(llama_folder, problems, token):
    """Those of a LatentReasoner made by hand need not be special."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(llama_folder), AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.add_tokens([START, LATENT, END])
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = LatentReasoner(lm, tokenizer, num_thoughts=1, max_new_tokens=2)
    with pytest.raises(ValueError, match=rf"control token {re.escape(token)} in 'one"):
        rollout(model, [replace(problems[0], question=f"one {token}")], masks=None, **SETTINGS)


def test_the_preflight_finds_a_control_token_among_short_questions(gpt2, problems, config, monkeypatch):
    monkeypatch.setattr(preflight, "LONGEST", 1)
    asked = [*problems, replace(problems[0], id="x", question="one <eos>")]
    with pytest.raises(ValueError, match="control token <eos>"):
        preflight.expect_together(gpt2, asked, config())


def test_an_unknown_word_that_reads_as_eos_is_refused(gpt2, problems):
    gpt2.tokenizer.eos_token = "<unk>"
    assert gpt2.tokenizer.eos_token_id == gpt2.tokenizer.unk_token_id
    rollout(gpt2, problems, masks=None, **SETTINGS)
    with pytest.raises(ValueError, match="control token <unk> in 'one unheard"):
        rollout(gpt2, [replace(problems[0], question="one unheard")], masks=None, **SETTINGS)


# -- the deterministic arm ------------------------------------------------------------------------------------------


def test_without_masks_thoughts_are_bit_equal_within_a_group(model, problems):
    for k in (2, 4, 6, 8, 16):  # an odd number of rows, some BLAS kernels round differently row by row
        for batch in (problems, problems[:1], problems[1:3]):
            out = rollout(model, batch, masks=None, **{**SETTINGS, "num_generations": k})
            groups = out.thoughts.unflatten(0, (-1, k))
            assert torch.equal(groups, groups[:, :1].expand_as(groups)), f"K = {k}, {len(batch)} problems"
    out = rollout(model, problems, masks=None, **{**SETTINGS, "num_generations": 8})
    greedy = rollout(model, problems, masks=None, **{**SETTINGS, "num_generations": 8, "temperature": 0.0})
    assert all(len(set(greedy.text[i : i + 8])) == 1 for i in range(0, 32, 8))
    assert any(len(set(out.text[i : i + 8])) > 1 for i in range(0, 32, 8))


def test_one_mask_per_rollout_makes_the_thoughts_differ_from_the_first_on(model, problems):
    out = rollout(model, problems[:1], masks=MaskSpec(rate=0.3), **SETTINGS)
    for i in range(model.num_thoughts):
        assert len({tuple(z.tolist()) for z in out.thoughts[:, i]}) == 3


# -- ends of answers ------------------------------------------------------------------------------------------------


def test_the_first_token_may_be_eos(model, problems, eos_bias):
    eos_bias(100.0)
    out = rollout(model, problems, masks=MaskSpec(), **SETTINGS)
    assert out.tokens.tolist() == [[model.eos_id]] * 12 and out.token_mask.all()
    assert set(out.text) == {""}
    assert gap(model, out, out.masks) < 1e-5


def test_a_truncated_answer_has_no_eos_and_is_an_outcome(model, problems, eos_bias):
    eos_bias(-100.0)
    out = rollout(model, problems, masks=MaskSpec(), **SETTINGS)
    assert out.tokens.shape == (12, model.max_new_tokens)
    assert not (out.tokens == model.eos_id).any() and out.token_mask.all()
    assert out.rewards(lambda text, problem: len(text.split())).shape == (4, 3)  # all of them are rewarded
    assert gap(model, out, out.masks) < 1e-5


def test_the_mask_covers_an_answer_through_its_eos_and_nothing_behind(model, problems, eos_bias):
    eos_bias(3.0)
    out = rollout(model, problems, masks=MaskSpec(), **SETTINGS)
    for tokens, mask, logp in zip(out.tokens, out.token_mask, out.logp, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        assert (tokens[: length - 1] != model.eos_id).all() and (tokens[length:] == model.eos_id).all()
        assert length == model.max_new_tokens or tokens[length - 1] == model.eos_id
        assert (logp[:length] < 0).all() and (logp[length:] == 0).all()


def test_finished_rows_leave_until_one_row_is_left(model, problems, eos_bias, monkeypatch):
    eos_bias(3.5)
    sizes = []
    step = LatentReasoner.next_token

    def counted(self, state, tokens):
        sizes.append(len(tokens))
        assert len(tokens) == len(state.cache.problem) == len(state.position) == len(state.cache.suffix[0][0].buffer)
        return step(self, state, tokens)

    monkeypatch.setattr(LatentReasoner, "next_token", counted)
    for run_seed in range(40):
        sizes.clear()
        out = rollout(model, problems[:2], masks=MaskSpec(rate=0.3, scope="all"), **{**SETTINGS, "run_seed": run_seed})
        lengths = out.token_mask.sum(1)
        expected = [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]
        assert sizes == expected
        assert gap(model, out, out.masks) < 1e-5  # the batch of one takes other kernels; the gap stays rounding
        if 1 in sizes:
            return
    pytest.fail("no run shrank to one row: the test has lost its point")


# -- what is equal is run once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_without_masks_rollouts_are_those_of_rows_of_their_own(model, problems, temperature, uneven):
    """Masks of ones keep the K rows of a problem apart from the question on."""
    model = model.double()
    settings = {**SETTINGS, "num_generations": 8, "temperature": temperature}
    together, apart = (rollout(model, problems, masks=masks, **settings) for masks in (None, MaskSpec(rate=0.0)))
    assert together.text == apart.text and torch.equal(together.tokens, apart.tokens)
    assert torch.equal(together.token_mask, apart.token_mask)
    assert len(set(together.text)) > len(problems) or not temperature
    for field in ("logp", "entropy", "thoughts"):
        torch.testing.assert_close(getattr(together, field), getattr(apart, field), rtol=0, atol=1e-12)
    weight = torch.arange(together.logp.numel()).view_as(together.logp).double().cos()
    scores = [model.score(out, masks=out.masks) for out in (together, apart)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((weight * logp).sum(), list(model.parameters())) for logp in scores]
    bound = 1e-11 if model.lm.config.model_type == "gpt2" else 1e-4  # Llama's norms are computed in float32
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def test_a_row_is_run_once_for_all_rollouts_that_are_equal_so_far(gpt2, problems, uneven, monkeypatch):
    sizes, real = [], LatentReasoner.forward_pass

    def recorded(self, state, inputs):
        sizes.append(tuple(inputs.shape[:2]))
        return real(self, state, inputs)

    monkeypatch.setattr(LatentReasoner, "forward_pass", recorded)
    out = rollout(gpt2, problems, masks=None, **{**SETTINGS, "num_generations": 8, "temperature": 0.2})
    b, answers = len(problems), out.tokens.unflatten(0, (-1, 8))

    def begun(t):
        """Different beginnings of t tokens among the answers of each problem that go on."""
        on = out.token_mask.unflatten(0, (-1, 8))
        return sum(
            len({tuple(row[:t]) for row, m in zip(a.tolist(), m, strict=True) if m[t]})
            for a, m in zip(answers, on, strict=True)
        )

    steps = [(b, 1)] * gpt2.num_thoughts
    assert sizes[1:] == [*steps, (b, 2), *((begun(t), 1) for t in range(1, out.tokens.shape[1]))]
    assert sizes[-1][0] < len(out.tokens)
    sizes.clear()
    gpt2.score(out, masks=None)
    distinct = sum(len({tuple(row) for row in a.tolist()}) for a in answers)
    assert sizes[1:] == [*steps, (b, 2), (distinct, out.tokens.shape[1] - 1)] and distinct < len(out.tokens)


def test_equal_answers_with_other_masks_of_their_tokens_stay_apart(gpt2, problems):
    """As where a caller leaves overlong answers out."""
    out = rollout(gpt2, problems, masks=None, **{**SETTINGS, "temperature": 0.0})
    edited = replace(out, token_mask=out.token_mask.clone())
    edited.token_mask[1::3] = False
    want = gpt2.score(out, masks=None) * edited.token_mask
    torch.testing.assert_close(gpt2.score(edited, masks=None), want, rtol=0, atol=1e-5)


def test_an_edit_sees_every_rollout(gpt2, problems):
    shapes = []
    edit = lambda i, z: (shapes.append(len(z)), z)[1]  # noqa: E731
    rollout(gpt2, problems, masks=None, edit=edit, **SETTINGS)
    assert shapes == [len(problems) * SETTINGS["num_generations"]] * gpt2.num_thoughts


@pytest.mark.parametrize("scope", SCOPES)
def test_the_last_layer_runs_a_question_for_its_keys_and_values_only(model, problems, scope):
    masks = MaskSpec(rate=0.3, scope=scope)
    short, sizes = rollout(model, problems, masks=masks, **SETTINGS), []
    handle = model.branches(("mlp",))[-1].register_forward_hook(lambda _, __, out: sizes.append(out.shape[1]))
    with handle:
        gap(model, short, short.masks)
    assert max(sizes) == 1 + short.tokens.shape[1]  # <end> and answer tokens, after the last thought
    model.same_passes = True
    whole = rollout(model, problems, masks=masks, **SETTINGS)
    assert torch.equal(short.logp, whole.logp) and torch.equal(short.thoughts, whole.thoughts)


# -- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(temperature):
    logits = torch.tensor([1.0, -0.5, 0.0, 2.0, -20.0])
    seeds = rollout_seeds(0, 0, [str(i) for i in range(4000)], 1)
    counts = torch.bincount(choose(policy(logits, temperature).expand(4000, 5), seeds, 0), minlength=5) / 4000
    expected = torch.softmax(logits / temperature, 0)
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_log_probs_are_those_of_the_tempered_policy(gpt2, problems):
    out = rollout(gpt2, problems[:1], masks=None, **{**SETTINGS, "temperature": 0.5})
    hidden, _ = gpt2.teacher_forced(out.prompt_ids, out.prompt_valid, out.tokens, num_generations=3)
    tempered = torch.softmax(gpt2.head(hidden) * 2, -1).log().gather(-1, out.tokens[..., None])[..., 0]
    torch.testing.assert_close(out.logp, tempered * out.token_mask, rtol=0, atol=1e-5)


# -- interventions and controls -------------------------------------------------------------------------------------


def test_an_edit_changes_the_answers_unless_thoughts_are_not_fed_back(gpt2, problems):
    def swap(i, z):
        calls.append(i)
        return z.roll(3, 0)  # the thoughts of the next problem

    for feedback, reaches in (("thought", True), ("pause", False)):
        model, calls = LatentReasoner(gpt2.lm, gpt2.tokenizer, num_thoughts=2, max_new_tokens=5, feedback=feedback), []
        plain = rollout(model, problems, masks=None, **{**SETTINGS, "temperature": 0.0})
        swapped = rollout(model, problems, masks=None, edit=swap, **{**SETTINGS, "temperature": 0.0})
        same = plain.tokens.shape == swapped.tokens.shape and torch.allclose(plain.logp, swapped.logp, atol=1e-6)
        assert same is not reaches and calls == [1, 2]


@pytest.mark.parametrize("feedback", ["pause", "none"])
@pytest.mark.parametrize("scheme", ["shared", "per_step"])
def test_the_controls_replay_too(gpt2, problems, feedback, scheme):
    control = LatentReasoner(gpt2.lm, gpt2.tokenizer, num_thoughts=2, max_new_tokens=5, feedback=feedback)
    for scope in SCOPES:
        out = rollout(control, problems, masks=MaskSpec(scheme=scheme, rate=0.3, scope=scope), **SETTINGS)
        assert out.thoughts.shape == (12, 2 if feedback == "pause" else 0, 32)
        assert gap(control, out, out.masks) < 1e-5
        assert gap(control, out, None) > 1e-3


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problems": []}, "^problems: got an empty list"),
        ({"problems": ["2 + 3"]}, "^problems: got '2 [+] 3', expected Problem objects"),
        ({"masks": 0.1}, "^masks: got 0.1, expected None, Masks or MaskSpec"),
        ({"num_generations": 0}, "^num_generations: got 0"),
        ({"num_generations": -1}, "^num_generations: got -1"),
        ({"num_generations": True}, "^num_generations: got True"),
        ({"num_generations": 2.0}, "^num_generations: got 2.0"),
        ({"temperature": -1.0}, "^temperature: got -1.0"),
        ({"temperature": float("nan")}, "^temperature: got nan"),
        ({"temperature": float("inf")}, "^temperature: got inf"),
        ({"temperature": True}, "^temperature: got True"),
        ({"temperature": "1"}, "^temperature: got '1'"),
        ({"temperature": None}, "^temperature: got None"),
        ({"run_seed": 0.0}, "^run_seed: got 0.0"),
        ({"step": True}, "^step: got True"),
        ({"seeds": torch.zeros(12, dtype=torch.int32)}, r"^seeds: got torch.int32 of shape \[12\], .* shape \[12\]"),
        ({"seeds": torch.zeros(12)}, "^seeds: got torch.float32"),
        ({"seeds": torch.zeros(11, dtype=torch.int64)}, r"^seeds: got torch.int64 of shape \[11\], .* shape \[12\]"),
        ({"seeds": torch.zeros(4, 3, dtype=torch.int64)}, r"^seeds: got torch.int64 of shape \[4, 3\]"),
    ],
)
def test_wrong_use_is_one_line_before_the_model_runs(gpt2, problems, change, message, unchecked, monkeypatch):
    monkeypatch.setattr(gpt2, "prefix", None)
    arguments = {"problems": problems, "masks": None, **SETTINGS, **change}
    with pytest.raises(ValueError, match=message) as error:
        rollout(gpt2, **arguments)
    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_numbers_of_other_types_and_equal_seeds_are_fine(gpt2, problems):
    want = rollout(gpt2, problems, masks=None, **SETTINGS)
    other = {"num_generations": np.int64(3), "temperature": np.float64(1), "run_seed": torch.tensor(0)}
    got = rollout(gpt2, problems, masks=None, step=np.int32(0), **other)
    assert torch.equal(got.tokens, want.tokens) and type(got.num_generations) is int and type(got.temperature) is float
    same = rollout(gpt2, problems[:1], masks=MaskSpec(), seeds=torch.full((3,), 7), **SETTINGS)
    assert len(set(same.text)) == 1


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.5), np.int64(2), np.True_, torch.tensor(0.5)])
def test_a_reward_may_be_any_finite_number(gpt2, problems, value):
    rewards = rollout(gpt2, problems, masks=None, **SETTINGS).rewards(lambda text, problem: value)
    assert torch.equal(rewards, torch.full((4, 3), float(value), dtype=torch.float64))


@pytest.mark.parametrize(
    "value", [None, "1.0", float("nan"), float("-inf"), np.float64("nan"), [1.0], torch.ones(2), 1j]
)
def test_a_reward_that_is_no_finite_number_names_its_problem_at_once(gpt2, problems, value):
    out, graded = rollout(gpt2, problems, masks=None, **SETTINGS), []

    def reward(text, problem):
        graded.append(problem.id)
        return value if problem is problems[1] else 1.0

    with pytest.raises(ValueError, match=f"^reward of problem {problems[1].id}: got .*, expected a finite") as error:
        out.rewards(reward)
    assert "\n" not in str(error.value) and graded == [problems[0].id] * 3 + [problems[1].id]


def test_a_question_too_long_for_the_backbone_is_one_line_and_one_that_just_fits_runs(problems):
    need = encode_prompts(tiny_gpt2().tokenizer, problems[1:2], "cpu")[0].shape[1] + 2 + 5
    out = rollout(tiny_gpt2(n_positions=need), problems[1:2], masks=None, **SETTINGS)
    model = tiny_gpt2(n_positions=need - 1)
    with pytest.raises(
        ValueError, match=f"^length: got {need} positions .* expected at most {need - 1}; drop"
    ) as error:
        rollout(model, problems[1:2], masks=None, **SETTINGS)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^length: got"):
        model.score(dataclasses.replace(out, tokens=torch.zeros(3, 5, dtype=torch.long)), masks=None)


def test_masks_of_another_number_of_rollouts_are_one_line(gpt2, problems):
    for rows in (1, 11, 13):
        masks = draw_masks(MaskSpec(), gpt2, rollout_seeds(0, 0, ["a"], rows))
        with pytest.raises(
            ValueError, match=f"^masks: got {rows} rows for 4 x 3 rollouts, expected one mask per rollout"
        ):
            rollout(gpt2, problems, masks=masks, **SETTINGS)


# -- mixed precision --------------------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts how often each tensor is converted to another type, by its address."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def test_bfloat16_products_leave_weights_log_probs_and_gradients_in_float32(model, problems):
    model.place("cpu", "bfloat16")
    out = rollout(model, problems, masks=MaskSpec(rate=0.3), **SETTINGS)
    logp = model.score(out, masks=out.masks)
    logp.sum().backward()
    assert {x.dtype for x in (out.logp, out.entropy, logp)} == {torch.float32}
    assert {x.dtype for weight in model.parameters() for x in (weight, weight.grad)} == {torch.float32}
    assert replay_gap(logp, out) < 0.1
    exact = rollout(model.place("cpu"), problems, masks=MaskSpec(rate=0.3), **SETTINGS)
    assert 1e-4 < (exact.thoughts - out.thoughts).abs().max() < 0.5  # bfloat16 it was, and only rounding


def test_bfloat16_casts_a_weight_once_per_rollout_and_never_keeps_the_cast(model, problems):
    model.place("cpu", "bfloat16")
    with Casts() as casts:
        before = rollout(model, problems, masks=None, **SETTINGS)
    head = model.lm.get_output_embeddings().weight
    blocks = [w for w in model.lm.parameters() if w.dim() == 2 and casts.counts[w.data_ptr()]]
    assert len(blocks) >= 4 and {casts.counts[w.data_ptr()] for w in blocks if w is not head} == {1}
    assert before.tokens.shape[1] > 1, "one pass only: nothing shown"
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1.5)
    after = rollout(model, problems, masks=None, **SETTINGS)
    fresh = LatentReasoner(
        copy.deepcopy(model.lm), model.tokenizer, num_thoughts=model.num_thoughts, max_new_tokens=model.max_new_tokens
    ).place("cpu", "bfloat16")
    assert torch.equal(after.logp, rollout(fresh, problems, masks=None, **SETTINGS).logp)
    assert not torch.equal(after.thoughts, before.thoughts)
