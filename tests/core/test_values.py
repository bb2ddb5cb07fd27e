"""Values by hand or in plain Python, where other tests compare two paths of the library with each other."""

import dataclasses
import math

import pytest
import torch

from latentlab import backbone, rollouts
from latentlab import model as model_module
from latentlab.attention import RolloutCache
from latentlab.masks import MaskSpec, draw_masks, hash_words, uniforms
from latentlab.model import LatentReasoner, State, policy, token_logps
from latentlab.reward import exact_answer, majority_vote
from latentlab.rollouts import choose, encode_prompts, rollout
from tests.conftest import sharpen, tiny_gpt2

SEEDS = torch.tensor([0, 1, -1, 12345678901234567, -(2**63)])


def upper_bits(seed, stream, counter):
    """The 53 upper bits of a random word, as a Python integer."""
    word = hash_words(torch.tensor([seed]), stream, torch.tensor([counter])).item()
    return (word % 2**64) >> 11


# -- records --------------------------------------------------------------------------------------------------------


def test_a_record_cannot_be_changed(problems):
    out = rollout(tiny_gpt2(), problems, num_generations=1, masks=MaskSpec(), temperature=1.0, run_seed=0, step=0)
    assert out.rewards(exact_answer).shape == (4, 1)
    for record in (out, out.masks, out.masks.spec, out.problems[0]):
        for field in dataclasses.fields(record):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(record, field.name, None)


# -- masks and random numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["shared", "per_step"])
def test_a_feature_is_dropped_where_its_53_bits_lie_below_the_rate(scheme):
    """Of stream 1; the counter runs over slots, sites and features, in this order."""
    model = tiny_gpt2()
    for rate in (0.1, 0.5):
        spec = MaskSpec(scheme=scheme, rate=rate, sites=("embedding", "mlp"))
        values = draw_masks(spec, model, SEEDS, num_slots=2).values
        assert values.shape == ((5, 3, 32) if scheme == "shared" else (5, 2, 3, 32)) and values.dtype == torch.float32
        for row, seed in zip(values.flatten(1).tolist(), SEEDS.tolist(), strict=True):
            kept = [upper_bits(seed, 1, i) >= rate * 2**53 for i in range(len(row))]
            assert row == pytest.approx([1 / (1 - rate) if keep else 0.0 for keep in kept], rel=1e-6)


def test_a_feature_whose_53_bits_equal_the_rate_is_kept(monkeypatch):
    words = torch.tensor([2**52 - 1, 2**52, 2**52 + 1]).repeat(32)[None, :64] << 11
    monkeypatch.setattr("latentlab.masks.hash_words", lambda *_: words)
    values = draw_masks(MaskSpec(rate=0.5, sites=("mlp",)), tiny_gpt2(), SEEDS[:1]).values
    assert values.flatten()[:6].tolist() == [0, 2, 2, 0, 2, 2]


def test_a_uniform_number_is_53_bits_of_stream_2_at_its_token():
    for t in (0, 7):
        assert uniforms(SEEDS, t).tolist() == [upper_bits(seed, 2, t) / 2**53 for seed in SEEDS.tolist()]


def test_slots_count_the_question_the_thoughts_and_in_scope_all_the_answer():
    model = tiny_gpt2(num_thoughts=3, max_new_tokens=7)
    assert [model.num_slots(scope) for scope in ("latent", "prompt+latent", "all")] == [4, 4, 11]
    sites = [("attention",), ("mlp",), ("embedding",), ("embedding", "attention", "mlp")]
    assert [model.num_sites(s) for s in sites] == [2, 2, 1, 5]


# -- sampling -------------------------------------------------------------------------------------------------------


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_uniform_number(monkeypatch):
    """p = 0, 1/4, 1/4, 0, 1/2, 0; a token of probability 0 is never taken, not even at the ends."""
    logps = torch.tensor([0.0, 0.25, 0.25, 0.0, 0.5, 0.0]).log()
    given = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 0.9999], dtype=torch.float64)
    seen = []
    monkeypatch.setattr("latentlab.rollouts.uniforms", lambda seeds, t: (seen.append(t), given)[1])
    assert choose(logps.expand(6, 6), torch.zeros(6, dtype=torch.int64), 3).tolist() == [1, 1, 2, 2, 4, 4]
    assert seen == [3]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_log_probs_and_entropies_are_those_of_each_place_and_zero_behind_the_end(problems, temperature):
    model = sharpen(tiny_gpt2(), 2.0)
    settings = {"num_generations": 8, "masks": None, "run_seed": 0, "step": 0}
    out = rollout(model, problems, temperature=temperature, **settings)
    hidden, _ = model.teacher_forced(out.prompt_ids, out.prompt_valid, out.tokens, num_generations=8)
    logps = torch.log_softmax(model.head(hidden) / (temperature or 1), -1)
    torch.testing.assert_close(out.logp, logps.gather(-1, out.tokens[..., None])[..., 0] * out.token_mask)
    torch.testing.assert_close(out.entropy, -(logps.exp() * logps).sum(-1) * out.token_mask)
    if not temperature:
        assert torch.equal(out.tokens[out.token_mask], logps.argmax(-1)[out.token_mask])


def test_the_policy_divides_logits_by_the_temperature():
    logits = torch.tensor([[0.0, math.log(4.0)]])
    for temperature, odds in ((1.0, 4.0), (0.5, 16.0), (2.0, 2.0), (0.0, 4.0)):
        assert policy(logits, temperature)[0].exp().tolist() == pytest.approx([1 / (1 + odds), odds / (1 + odds)])
        assert token_logps(logits, torch.tensor([1]), temperature).exp().item() == pytest.approx(odds / (1 + odds))


def test_a_part_of_the_rollouts_has_its_rows_of_everything(problems):
    model = sharpen(tiny_gpt2())
    settings = {"num_generations": 3, "temperature": 1.0, "run_seed": 0, "step": 0}
    out = rollout(model, problems, masks=MaskSpec(rate=0.3), **settings)
    widths = out.prompt_valid.sum(1).tolist()
    for part, places in ((out.take([3, 1]), [3, 1]), (out.take(slice(1, 3)), [1, 2]), (out.take([0]), [0])):
        rows = [3 * b + k for b in places for k in range(3)]
        width = max(widths[b] for b in places)
        assert part.problems == tuple(problems[b] for b in places) and part.num_generations == 3
        assert part.text == tuple(out.text[row] for row in rows) and part.temperature == 1.0
        assert torch.equal(part.prompt_ids, out.prompt_ids[places, -width:])
        assert torch.equal(part.prompt_valid, out.prompt_valid[places, -width:])
        assert torch.equal(part.masks.values, out.masks.values[rows])
        for name in ("tokens", "token_mask", "logp", "thoughts", "seeds", "entropy"):
            assert torch.equal(getattr(part, name), getattr(out, name)[rows]), name
    bare = dataclasses.replace(out, entropy=None, masks=None).take([2])
    assert bare.entropy is None and bare.masks is None


def test_rewards_are_given_to_each_answer_with_its_problem(problems):
    out = rollout(tiny_gpt2(), problems, num_generations=2, masks=None, temperature=1.0, run_seed=0, step=0)
    out = dataclasses.replace(out, text=tuple("abcdefgh"))
    place = {problem.id: i for i, problem in enumerate(problems)}
    rewards = out.rewards(lambda text, problem: 10 * place[problem.id] + ord(text) - ord("a"))
    assert rewards.dtype == torch.float64
    assert rewards.tolist() == [[0, 1], [12, 13], [24, 25], [36, 37]]


def test_prompts_are_the_question_a_line_break_and_start(problems):
    model = tiny_gpt2()
    ids, valid = encode_prompts(model.tokenizer, problems, "cpu")
    for row, mask, problem in zip(ids, valid, problems, strict=True):
        expected = model.tokenizer(problem.question + "\n", add_special_tokens=False)["input_ids"] + [model.start_id]
        assert row[mask].tolist() == expected and set(row[~mask].tolist()) <= {model.eos_id}
        assert mask.tolist() == sorted(mask.tolist())


def test_the_vote_ignores_what_is_no_answer_and_ties_go_to_the_first():
    assert majority_vote(["### 2", "### 1", "### 1.0", "### 2", "none", "none", "none"]) == "2"
    assert majority_vote(["### 3", "### 1", "### 1.0"]) == "1"
    assert majority_vote(["none", "### "]) is None and majority_vote([]) is None


# -- the model ------------------------------------------------------------------------------------------------------


def test_exactly_the_context_fits():
    """64 positions: prompt, thoughts, <end> and the answer but for its last token, which is never run."""
    model = tiny_gpt2(num_thoughts=3)
    model.check_length(50, 11)
    with pytest.raises(ValueError, match=r"^length: got 65 positions \(50 prompt \+ 3 thoughts \+ 12 answer\)"):
        model.check_length(50, 12)


def test_precision_is_that_of_products_alone(monkeypatch):
    model = tiny_gpt2()
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", None)):
        assert model.place("cpu", precision) is model and model.autocast_dtype == dtype
        with model.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)
        assert model.dtype == torch.float32 and model.head(torch.ones(1, 32)).dtype == torch.float32
    assert model.place("cpu").autocast_dtype is None
    for found in (True, False):
        monkeypatch.setattr(model_module, "multiplies_bfloat16", lambda device, found=found: found)
        assert model.place("cpu", "auto").autocast_dtype == (torch.bfloat16 if found else None)
    assert model.double().head(torch.ones(1, 32)).dtype == torch.float64


@pytest.mark.parametrize("avx512, amx", [(True, False), (False, True), (False, False)])
def test_a_cpu_multiplies_bfloat16_with_either_instruction(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert backbone.multiplies_bfloat16("cpu") == (avx512 or amx)


def test_masks_cover_the_positions_of_their_scope(problems):
    """Of a question of 3 inputs; then of <start> and 2 thoughts, of which one was run."""
    model = tiny_gpt2(num_thoughts=2)
    for scope, question, latent, answer in (
        ("latent", 0, 2, 0),
        ("prompt+latent", 3, 2, 0),
        ("all", 3, 4, 4),
        ("", 0, 0, 0),
    ):
        cache, masks = started(1, 1), draw_masks(MaskSpec(scope=scope), model, SEEDS[:1]) if scope else None
        state = State(cache, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 32), masks)
        assert model._num_masked(state, 4) == latent
        cache.update(*torch.zeros(2, 1, 1, 2, 2), 0)
        assert model._num_masked(state, 4) == answer
        cache.in_prefix = True
        assert model._num_masked(state, 3) == question


def test_a_model_of_direct_answers_has_no_thought_whatever_it_is_told():
    base = tiny_gpt2()
    for feedback, thoughts in (("none", 0), ("pause", 4), ("thought", 4)):
        settings = {"num_thoughts": 4, "max_new_tokens": 5, "feedback": feedback}
        model = LatentReasoner(base.lm, base.tokenizer, **settings)
        assert model.num_thoughts == thoughts and model.provenance == {} and not model.training
    assert LatentReasoner(base.lm, base.tokenizer, num_thoughts=1, max_new_tokens=5).feedback == "thought"


# -- the cache ------------------------------------------------------------------------------------------------------


def started(problems, generations, layers=1):
    cache = RolloutCache(torch.ones(problems, 3, dtype=torch.bool), capacity=4)
    for layer in range(layers):
        keys = torch.arange(problems, dtype=torch.float32)[:, None, None, None].expand(problems, 1, 3, 2)
        cache.update(keys, keys + 0.5, layer)
    assert cache.get_seq_length() == 0
    cache.start_rows(generations)
    rows = torch.zeros(problems * generations, 1, 1, 2)
    for layer in range(layers):
        cache.update(rows, rows, layer)
    return cache


@torch.no_grad()
def test_questions_stay_until_half_of_them_have_no_row():
    cache = started(5, 2, layers=2)
    assert cache.get_seq_length() == 1 and (cache.width, cache.place) == (2, None)
    cache.keep(torch.tensor([0, 4, 5, 8]))  # of problems 0, 2, 2, 4: three of five are left
    assert len(cache.valid) == 5 and cache.problem.tolist() == [0, 2, 2, 4]
    assert cache.width == 2 and cache.place.tolist() == [0, 4, 5, 8]
    cache.keep(torch.tensor([1, 2, 3]))  # of problems 2, 2, 4: two of five
    assert len(cache.valid) == 2 and cache.problem.tolist() == [0, 0, 1]
    assert cache.width == 2 and cache.place.tolist() == [0, 1, 2]
    for keys, values in cache.prefix:
        assert keys[:, 0, 0, 0].tolist() == [2, 4] and values[:, 0, 0, 0].tolist() == [2.5, 4.5]
    assert [len(keys.buffer) for keys, _ in cache.suffix] == [3, 3]
    cache.keep(torch.tensor([0, 2]))  # one row a problem: in order again
    assert (cache.width, cache.place) == (1, None) and cache.problem.tolist() == [0, 1]


@torch.no_grad()
def test_rows_are_stacked_below_their_question_with_zeros_where_one_left():
    cache = started(2, 3)
    rows = torch.arange(1.0, 7.0)[:, None, None, None]  # [R, 1, 1, 1]
    assert cache.stack(rows)[:, 0, :, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    cache.keep(torch.tensor([0, 1, 2, 3, 5]))
    rows = rows[[0, 1, 2, 3, 5]]
    assert cache.stack(rows)[:, 0, :, 0].tolist() == [[1, 2, 3], [4, 6, 0]]
    assert torch.equal(cache.unstack(cache.stack(rows)), rows)
    pairs = rows.expand(5, 1, 2, 1) * torch.tensor([1.0, 10.0])[:, None]  # two new positions
    assert cache.stack(pairs)[1, 0, :, 0].tolist() == [4, 40, 6, 60, 0, 0]


@torch.no_grad()
def test_sampling_allocates_its_positions_once(problems):
    """<start>, L thoughts, <end> and all answer tokens but the last."""
    model = tiny_gpt2(num_thoughts=3, max_new_tokens=4)
    state = model.prefix(*encode_prompts(model.tokenizer, problems, "cpu"), num_generations=2, masks=None)
    model.think(state)
    parts = [part for layer in state.cache.suffix for part in layer]
    places = [part.buffer.data_ptr() for part in parts]
    model.answer(state, torch.empty(8, 0, dtype=torch.int64))
    for _ in range(3):
        model.next_token(state, torch.zeros(8, dtype=torch.int64))
    assert [part.length for part in parts] == [part.buffer.shape[2] for part in parts] == [1 + 3 + 1 + 3] * len(parts)
    assert [part.buffer.data_ptr() for part in parts] == places


@torch.no_grad()
def test_a_question_without_padding_is_run_as_the_model_runs_it(model, problems):
    """To the last bit, when transformers' own attention function is the same."""
    ids, valid = encode_prompts(model.tokenizer, problems[2:3], "cpu")
    seen, model.same_passes = [], True
    handle = model.lm.base_model.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
    model.prefix(ids, valid, num_generations=1, masks=None)
    model.lm.set_attn_implementation("sdpa")
    model.lm(ids[:, :-1], attention_mask=valid[:, :-1])
    handle.remove()
    assert torch.equal(*seen)


def test_a_position_sees_itself_and_what_came_before():
    valid = torch.tensor([[False, True, True]])
    cache = RolloutCache(valid, capacity=4)
    assert cache.visible(3)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # padding sees itself alone
    cache = started(1, 1)
    assert cache.visible(1) is None
    assert cache.visible(2)[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("rows, vocabulary", [(7, 2**17), (5, 2**18 + 1), (1000, 300), (1, 3)])
def test_tokens_do_not_depend_on_how_many_rows_are_chosen_at_a_time(rows, vocabulary):
    """Bit for bit those of one cumulative sum over all rows."""
    logps = torch.log_softmax(torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)), -1)
    seeds = torch.arange(rows)
    cdf = logps.exp().cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(cdf, uniforms(seeds, 3)[:, None] * cdf[:, -1:], right=True)[:, 0]
    assert torch.equal(choose(logps, seeds, 3), expected)


@pytest.mark.parametrize("uniform, token", [(0.995, 10_000), (1.0, 20_000)])
def test_a_choice_sums_probabilities_in_float64_and_ends_with_the_last_token(monkeypatch, uniform, token):
    """20,000 tokens share a hundredth behind one of 0.99; float32 sums would be off by hundreds of tokens."""
    logps = torch.tensor([0.99] + [0.01 / 20_000] * 20_000).log()
    monkeypatch.setattr(rollouts, "uniforms", lambda seeds, t: torch.full((len(seeds),), uniform, dtype=torch.float64))
    chosen = choose(logps.expand(3, -1), torch.zeros(3, dtype=torch.int64), 0)
    assert (chosen - token).abs().max() <= 20 and chosen.max() <= 20_000
