"""masks.py: a mask is a value, a function of (run seed, step, problem id, k) and of nothing else."""

import hashlib

import pytest
import torch

from latentlab.masks import Masks, MaskSpec, draw_masks, hash_words, rollout_seeds, uniforms
from latentlab.rollouts import rollout

WORD = (1 << 64) - 1


def splitmix_finaliser(x):
    """The same hash on Python integers, written from the paper: shifts 30, 27, 31."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def test_a_seed_is_the_blake2b_of_the_four_names():
    digest = hashlib.blake2b(b"(7, 3, 'word-1', 0)", digest_size=8).digest()
    assert rollout_seeds(7, 3, ["word-1"], 1).tolist() == [int.from_bytes(digest, "little", signed=True)]


def test_each_of_the_four_names_changes_the_seed():
    seeds = [rollout_seeds(*names, 2) for names in ((0, 0, ["a"]), (1, 0, ["a"]), (0, 1, ["a"]), (0, 0, ["b"]))]
    assert len(set(torch.cat(seeds).tolist())) == 8


def test_seeds_do_not_depend_on_the_batch():
    together = rollout_seeds(0, 5, ["a", "b", "c"], 3).view(3, 3)
    alone = torch.stack([rollout_seeds(0, 5, [name], 3) for name in ("a", "b", "c")])
    assert torch.equal(together, alone)


def test_a_problem_drawn_twice_continues_counting_k():
    twice = rollout_seeds(0, 0, ["a", "b", "a"], 2)
    assert torch.equal(twice[[0, 1, 4, 5]], rollout_seeds(0, 0, ["a"], 4))


def test_the_hash_equals_splitmix64_on_python_integers():
    seeds = torch.tensor([0, -1, 123456789, -(2**63)], dtype=torch.int64)
    words = hash_words(seeds, 2, torch.arange(3))
    for row, seed in zip(words.tolist(), seeds.tolist(), strict=True):
        key = splitmix_finaliser((seed + 2 * 0xD1342543DE82EF95) & WORD)
        expected = [splitmix_finaliser((key + (i + 1) * 0x9E3779B97F4A7C15) & WORD) for i in range(3)]
        assert [word & WORD for word in row] == expected


@pytest.mark.parametrize("scheme", ["shared", "per_step"])
def test_a_mask_is_independent_of_the_rows_beside_it(gpt2, scheme):
    spec, seeds = MaskSpec(scheme=scheme, rate=0.3), rollout_seeds(0, 0, ["a", "b"], 3)
    values = draw_masks(spec, gpt2, seeds).values
    for row in range(6):
        assert torch.equal(draw_masks(spec, gpt2, seeds[row : row + 1]).values[0], values[row])
    assert len({tuple(v.flatten().tolist()) for v in values}) == 6


def test_shapes_and_sites(gpt2):
    seeds = rollout_seeds(0, 0, ["a"], 2)
    assert draw_masks(MaskSpec(), gpt2, seeds).values.shape == (2, 4, 32)
    everywhere = MaskSpec(scheme="per_step", sites=("embedding", "mlp"), scope="all")
    assert draw_masks(everywhere, gpt2, seeds).values.shape == (2, 1 + 2 + 5, 3, 32)
    assert draw_masks(MaskSpec(scheme="none"), gpt2, seeds) is None


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_share_of_zeros_is_the_rate_and_the_mean_is_kept(gpt2, rate):
    values = draw_masks(MaskSpec(rate=rate), gpt2, rollout_seeds(0, 0, ["a"], 400)).values
    assert set(values.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate)).item()}
    sigma = (rate * (1 - rate) / values.numel()) ** 0.5
    assert abs((values == 0).double().mean().item() - rate) < 5 * sigma
    per_feature = (values == 0).double().mean(0)  # no site and no feature is treated differently
    assert (per_feature - rate).abs().max().item() < 5.5 * (rate * (1 - rate) / 400) ** 0.5


def test_neighbouring_features_and_rollouts_are_uncorrelated(gpt2):
    dropped = (draw_masks(MaskSpec(rate=0.5), gpt2, rollout_seeds(0, 0, ["a"], 500)).values == 0).double().flatten(
        1
    ) - 0.5
    for a, b in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1]), (dropped[:, 32:], dropped[:, :-32])):
        assert abs((a * b).mean().item()) < 5 * 0.25 / a.numel() ** 0.5


def test_per_step_slots_differ_and_shared_has_one(gpt2):
    seeds = rollout_seeds(0, 0, ["a"], 2)
    fresh = draw_masks(MaskSpec(scheme="per_step", rate=0.3), gpt2, seeds)
    assert fresh.values.shape[1] == gpt2.num_thoughts + 1
    for a in range(3):
        for b in range(a):
            assert not torch.equal(fresh.factors(a, 1), fresh.factors(b, 1))
    assert torch.equal(fresh.factors(0, 3), fresh.values)
    assert torch.equal(fresh.factors(1, 2), fresh.values[:, 1:3])
    shared = draw_masks(MaskSpec(rate=0.3), gpt2, seeds)
    assert torch.equal(shared.factors(0, 1), shared.factors(2, 3))


@pytest.mark.parametrize("scope", ["latent", "prompt+latent", "all"])
def test_rate_zero_is_the_identity_bit_for_bit(model, problems, scope):
    sites = ("attention", "mlp", "embedding")
    ones = draw_masks(MaskSpec(rate=0.0, sites=sites, scope=scope), model, rollout_seeds(0, 0, ["a"], 2))
    assert torch.equal(ones.values, torch.ones_like(ones.values))
    settings = {"num_generations": 2, "temperature": 1.0, "run_seed": 0, "step": 0}
    clean = rollout(model, problems[:1], masks=None, **settings)
    masked = rollout(model, problems[:1], masks=MaskSpec(rate=0.0, sites=sites, scope=scope), **settings)
    assert torch.equal(clean.tokens, masked.tokens)
    torch.testing.assert_close(clean.thoughts, masked.thoughts, rtol=0, atol=0 if scope == "latent" else 1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"rate": 1.0},
        {"rate": -0.1},
        {"rate": float("nan")},
        {"rate": "0.1"},
        {"rate": None},
        {"scheme": "fresh"},
        {"scope": "answer"},
        {"sites": ()},
        {"sites": "mlp"},
        {"sites": ("mlp", "mlp")},
        {"sites": ("head",)},
    ],
)
def test_bad_values_are_one_line(bad, unchecked):
    with pytest.raises(ValueError, match=r"^mask \w+: got .*, expected .*") as error:
        MaskSpec(**bad)
    assert "\n" not in str(error.value)


def test_taking_rows_keeps_values_and_spec(gpt2):
    masks = draw_masks(MaskSpec(), gpt2, rollout_seeds(0, 0, ["a"], 4))
    part = masks.take(slice(1, 3))
    assert part.spec == masks.spec and torch.equal(part.values, masks.values[1:3])
    assert isinstance(part, Masks)


def test_uniform_numbers_are_uniform_and_belong_to_seed_and_token():
    seeds = rollout_seeds(0, 0, [str(i) for i in range(2000)], 1)
    first, second = uniforms(seeds, 0), uniforms(seeds, 1)
    for u in (first, second):
        assert 0 <= u.min() and u.max() < 1 and u.dtype == torch.float64
        quarters = torch.histc(u.float(), 4, 0, 1) / 2000
        assert (quarters - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5
    assert abs(((first - 0.5) * (second - 0.5)).mean()) < 5 / 12 / 2000**0.5
    assert torch.equal(uniforms(seeds[5:6], 1), second[5:6])
