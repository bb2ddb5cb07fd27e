"""model.py: one latent path, checked against plain forwards without cache, batch, padding or hooks."""

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from latentlab.backbone import decoder_layers
from latentlab.masks import MaskSpec, draw_masks, rollout_seeds
from latentlab.model import LatentReasoner, token_logps
from latentlab.rollouts import encode_prompts
from tests.conftest import BACKBONES

SITES = ("attention", "mlp", "embedding")
SCOPES = ("latent", "prompt+latent", "all")


def prompts(model, problems):
    return encode_prompts(model.tokenizer, problems, "cpu")


def answers(model, rows, length=4):
    """Made-up answer tokens [rows, length]."""
    return torch.randint(5, len(model.tokenizer), (rows, length), generator=torch.Generator().manual_seed(rows))


def masks_for(model, rows, scheme="shared", scope="latent", sites=("attention", "mlp"), rate=0.3, seed=0):
    spec = MaskSpec(scheme=scheme, rate=rate, scope=scope, sites=sites)
    return draw_masks(spec, model, rollout_seeds(seed, 0, ["a"], rows))


def plain_thoughts_and_logits(model, prompt, tokens):
    """The Coconut loop by the book for one problem: the whole sequence again for every thought."""
    inputs, thoughts = model.embed(prompt), []  # [1, Q, D]
    for _ in range(model.num_thoughts):
        z = model.lm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1:]
        thoughts.append(z)
        inputs = torch.cat([inputs, z], 1)
    rest = torch.cat([torch.tensor([[model.end_id]]), tokens[:, :-1]], 1)
    logits = model.lm(inputs_embeds=torch.cat([inputs, model.embed(rest)], 1), use_cache=False).logits
    return torch.cat(thoughts, 1), logits[:, -tokens.shape[1] :]


def test_the_latent_path_equals_the_plain_loop_without_cache(model, problems):
    tokens = answers(model, 1)
    for problem in problems:
        prompt, valid = prompts(model, [problem])
        hidden, thoughts = model.teacher_forced(prompt, valid, tokens)
        expected_thoughts, expected_logits = plain_thoughts_and_logits(model, prompt, tokens)
        torch.testing.assert_close(thoughts, expected_thoughts, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.head(hidden), expected_logits, rtol=0, atol=1e-4)


def test_pause_feeds_the_latent_token_and_none_feeds_nothing(model, problems):
    prompt, valid = prompts(model, problems[:1])
    tokens = answers(model, 1)
    for feedback, fed in (("pause", [model.latent_id] * 2), ("none", [])):
        control = LatentReasoner(model.lm, model.tokenizer, num_thoughts=2, max_new_tokens=5, feedback=feedback)
        hidden, thoughts = control.teacher_forced(prompt, valid, tokens)
        ids = torch.cat([prompt, torch.tensor([[*fed, model.end_id]]), tokens[:, :-1]], 1)
        assert thoughts.shape[1] == len(fed)
        torch.testing.assert_close(model.head(hidden), model.lm(ids).logits[:, -4:], rtol=0, atol=1e-4)


def test_left_padding_changes_nothing(model, problems):
    """Each problem alone, without padding, against the whole batch, padded: hidden states and thoughts."""
    tokens = answers(model, len(problems))
    prompt, valid = prompts(model, problems)
    assert (~valid).any(), "the fixture's questions should differ in length"
    hidden, thoughts = model.teacher_forced(prompt, valid, tokens)
    for row, problem in enumerate(problems):
        alone, alone_thoughts = model.teacher_forced(*prompts(model, [problem]), tokens[row : row + 1])
        torch.testing.assert_close(hidden[row], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(thoughts[row], alone_thoughts[0], rtol=0, atol=1e-5)


def test_what_stands_in_the_padding_is_never_seen(model, problems):
    tokens = answers(model, len(problems))
    prompt, valid = prompts(model, problems)
    other = torch.where(valid, prompt, torch.full_like(prompt, 7))
    assert torch.equal(model.teacher_forced(prompt, valid, tokens)[0], model.teacher_forced(other, valid, tokens)[0])


# -- masks ----------------------------------------------------------------------------------------------------------


def test_a_mask_in_scope_all_is_one_sample_of_the_weights(model, problems):
    """m * (W x + b) is the clean model whose rows of W and b are scaled: Gal and Ghahramani's reading."""
    masks = masks_for(model, 1, scope="all")
    prompt, valid = prompts(model, problems[:1])
    tokens = answers(model, 1)
    masked = model.teacher_forced(prompt, valid, tokens, masks=masks)[0]
    clean = model.teacher_forced(prompt, valid, tokens)[0]
    with torch.no_grad():
        for factor, module in zip(masks.values[0], model.branches(("attention", "mlp")), strict=True):
            module.weight.mul_(factor if isinstance(module, Conv1D) else factor[:, None])
            if module.bias is not None:
                module.bias.mul_(factor)
    sampled = model.teacher_forced(prompt, valid, tokens)[0]
    torch.testing.assert_close(masked, sampled, rtol=0, atol=1e-5)
    assert (clean - sampled).abs().max() > 0.05


class Recorder(nn.Module):
    """Stands around a site's linear map and notes by what each output was multiplied."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.factors = inner, []

    def forward(self, x):
        out, raw = self.inner(x), self.inner.forward(x)  # with and without hooks
        self.factors.append(torch.where(raw == 0, torch.ones_like(raw), out / raw))
        return out


@pytest.mark.parametrize("scheme", ["shared", "per_step"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_masks_exactly_its_positions(model, problems, scope, scheme):
    """Factors at every position of one rollout: question, <start>, 2 thoughts, <end>, 3 answer tokens."""
    masks = masks_for(model, 1, scheme=scheme, scope=scope)
    recorders = []
    for layer in decoder_layers(model.lm):
        for branch in (child for name, child in layer.named_children() if name in ("attn", "self_attn", "mlp")):
            name = next(n for n in ("c_proj", "o_proj", "down_proj") if hasattr(branch, n))
            setattr(branch, name, Recorder(getattr(branch, name)))
            recorders.append(getattr(branch, name))
    prompt, valid = prompts(model, problems[:1])
    questions, model.same_passes = prompt.shape[1] - 1, True
    with torch.no_grad():
        model.teacher_forced(prompt, valid, answers(model, 1), masks=masks)
    slots = [0] * questions + [0, 1, 2] + [3, 4, 5, 6]  # <end> is the first answer position: it predicts token 0
    inside = [scope != "latent"] * questions + [True] * 3 + [scope == "all"] * 4
    for s, recorder in enumerate(recorders):
        seen = torch.cat(recorder.factors, 1)[0]  # [positions, D]
        values = masks.values[0] if scheme == "per_step" else masks.values[0].expand(7, *masks.values[0].shape)
        expected = torch.stack([values[i, s] if on else torch.ones(32) for i, on in zip(slots, inside, strict=True)])
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_embedding_site_multiplies_the_input_vectors(gpt2, problems, scope, monkeypatch):
    masks = masks_for(gpt2, 1, scope=scope, sites=("embedding",))
    seen = []
    forward = gpt2.lm.base_model.forward

    def watched(**arguments):
        seen.append(arguments["inputs_embeds"])
        return forward(**arguments)

    monkeypatch.setattr(gpt2.lm.base_model, "forward", watched)
    prompt, valid = prompts(gpt2, problems[:1])
    tokens = answers(gpt2, 1)
    with torch.no_grad():
        _, thoughts = gpt2.teacher_forced(prompt, valid, tokens, masks=masks)
        rest = torch.cat([torch.tensor([[gpt2.end_id]]), tokens[:, :-1]], 1)
        raw = torch.cat([gpt2.embed(prompt), thoughts, gpt2.embed(rest)], 1)[0]
    questions, m = prompt.shape[1] - 1, masks.values[0, 0]
    inside = torch.tensor([scope != "latent"] * questions + [True] * 3 + [scope == "all"] * 4)
    torch.testing.assert_close(torch.cat(seen, 1)[0], torch.where(inside[:, None], raw * m, raw))


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.lm.modules())


def test_hooks_are_gone_after_a_forward_and_after_an_exception(model, problems, monkeypatch):
    masks = masks_for(model, 2)
    before = count_hooks(model)
    arguments = (*prompts(model, problems[:1]), answers(model, 2))
    clean = model.teacher_forced(*arguments, num_generations=2)[0]
    during = []
    last = decoder_layers(model.lm)[-1]
    handle = last.register_forward_pre_hook(lambda *_: during.append(count_hooks(model)))
    model.teacher_forced(*arguments, num_generations=2, masks=masks)
    handle.remove()
    assert max(during) == before + 1 + 4 and count_hooks(model) == before

    def fail(*_, **__):
        raise RuntimeError("in the middle")

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="in the middle"):
        broken.setattr(last, "forward", fail)
        state = model.prefix(*arguments[:2], num_generations=2, masks=None)
        state.masks = masks
        model.think(state)
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="in the middle"):
        state = model.prefix(*arguments[:2], num_generations=2, masks=masks)
        broken.setattr(last, "forward", fail)
        model.think(state)
    assert count_hooks(model) == before
    assert torch.equal(model.teacher_forced(*arguments, num_generations=2)[0], clean)


# -- prefix sharing -------------------------------------------------------------------------------------------------


def values_and_gradients(model, prompt, valid, tokens, weights, **settings):
    model.zero_grad()
    hidden, thoughts = model.teacher_forced(prompt, valid, tokens, **settings)
    logp = token_logps(model.head(hidden), tokens, 1.0)
    (logp * weights).sum().backward()
    return logp.detach(), thoughts.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("scheme", ["shared", "per_step", "none"])
def test_sharing_the_question_equals_repeating_it_values_and_gradients(model, problems, scheme):
    model.double()
    rows = len(problems) * 3
    masks, tokens = masks_for(model, rows, scheme=scheme, sites=SITES), answers(model, rows)
    weights = torch.linspace(-1, 2, rows * 4, dtype=torch.float64).view(rows, 4)
    prompt, valid = prompts(model, problems)
    shared = values_and_gradients(model, prompt, valid, tokens, weights, num_generations=3, masks=masks)
    repeated = (x.repeat_interleave(3, 0) for x in (prompt, valid))
    unshared = values_and_gradients(model, *repeated, tokens, weights, num_generations=1, masks=masks)
    exact = 1e-11 if model.lm.config.model_type == "gpt2" else 1e-5  # Llama's norm computes in float32 even here
    torch.testing.assert_close(shared, unshared, rtol=0, atol=exact)
    assert max(g.abs().max().item() for g in shared[2]) > 0.1


def test_gradients_through_the_thoughts_equal_finite_differences(gpt2, problems):
    gpt2.double()
    prompt, valid = prompts(gpt2, problems[:2])
    masks, tokens = masks_for(gpt2, 4), answers(gpt2, 4)

    def loss():
        hidden, _ = gpt2.teacher_forced(prompt, valid, tokens, num_generations=2, masks=masks)
        return token_logps(gpt2.head(hidden), tokens, 1.0).sum()

    loss().backward()
    lm = gpt2.lm.transformer
    for parameter in (lm.h[0].mlp.c_fc.weight, lm.ln_f.weight, lm.wpe.weight):
        place = parameter.grad.abs().argmax()
        with torch.no_grad():
            values = []
            for shift in (1e-5, -2e-5):
                parameter.view(-1)[place] += shift
                values.append(loss().item())
            parameter.view(-1)[place] += 1e-5
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(parameter.grad.view(-1)[place].item(), rel=1e-5)


def test_the_thoughts_carry_gradient(gpt2, problems):
    """Cut at the thoughts, the gradient changes: the answer's loss reaches the question through them."""
    prompt, valid = prompts(gpt2, problems[:1])
    tokens = answers(gpt2, 1)

    def gradient(edit):
        gpt2.zero_grad()
        state = gpt2.prefix(prompt, valid, num_generations=1, masks=None)
        gpt2.think(state, edit=edit)
        token_logps(gpt2.head(gpt2.answer(state, tokens[:, :-1])), tokens, 1.0).sum().backward()
        return gpt2.lm.transformer.ln_f.weight.grad.clone()

    assert (gradient(None) - gradient(lambda i, z: z.detach())).abs().max() > 1e-2


# -- what it refuses, and what may not be random --------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_no_dropout_module_is_active(make_model, name):
    model = make_model(name)
    model.train()  # even then
    assert not [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.lm(ids).logits, model.lm(ids).logits)


def test_unknown_feedback_and_missing_tokens_are_one_line(gpt2):
    with pytest.raises(ValueError, match="^feedback: got 'echo', expected one of"):
        LatentReasoner(gpt2.lm, gpt2.tokenizer, num_thoughts=1, max_new_tokens=1, feedback="echo")
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")))
    bare.unk_token = "b"
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=2, n_layer=1, n_embd=4, n_head=1))
    with pytest.raises(ValueError, match="^tokenizer: got no token .*start-latent.*expected") as error:
        LatentReasoner(lm, bare, num_thoughts=1, max_new_tokens=1)
    assert "\n" not in str(error.value)
