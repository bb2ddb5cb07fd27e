"""backbone.py: branches are found by role in both families of backbones; a hook lasts for one pass."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from latentlab import backbone
from latentlab.backbone import _gaps, _layer_calls, branch_gaps, branch_outputs, decoder_layers, window_sizes
from latentlab.masks import SITES, perturb, perturbed
from latentlab.model import LatentReasoner
from tests.conftest import tiny_gpt2


def names_of(model, sites):
    names = {id(module): name for name, module in model.lm.named_modules()}
    return [names[id(module)] for module in branch_outputs(model.lm, sites)]


def test_sites_are_found_by_role(make_model):
    assert names_of(make_model("gpt2"), ("attention", "mlp")) == [
        f"transformer.h.{i}.{site}" for i in (0, 1) for site in ("attn.c_proj", "mlp.c_proj")
    ]
    assert names_of(make_model("llama"), ("mlp", "attention")) == [
        f"model.layers.{i}.{site}" for i in (0, 1) for site in ("mlp.down_proj", "self_attn.o_proj")
    ]


def test_a_site_is_the_last_linear_map_of_its_branch_and_as_wide_as_the_stream(model):
    for site, word in (("attention", "att"), ("mlp", "mlp")):
        for layer, module in zip(decoder_layers(model.lm), branch_outputs(model.lm, (site,)), strict=True):
            branch = next(child for name, child in layer.named_children() if word in name and "norm" not in name)
            seen = []
            handles = [
                m.register_forward_hook(lambda m, _, out, seen=seen: seen.append((m, out.shape[-1])))
                for m in branch.modules()
                if isinstance(m, (nn.Linear, Conv1D))
            ]
            model.lm(torch.tensor([[1, 2]]))
            for handle in handles:
                handle.remove()
            assert seen[-1] == (module, model.width)


def test_every_site_but_the_embedding_is_a_branch_of_a_block():
    blocks = nn.ModuleList([nn.ModuleDict({"self_attention": nn.Linear(2, 2), "feed_forward": nn.Linear(2, 2)})])
    assert decoder_layers(nn.Sequential(nn.Linear(2, 2), blocks)) is blocks
    assert decoder_layers(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), blocks)) is blocks
    assert {*backbone.ROLES, "embedding"} == set(SITES)


def test_a_backbone_without_blocks_is_refused_in_one_line():
    with pytest.raises(ValueError, match="^backbone: got Sequential, expected blocks"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_the_first_positions_are_scaled_while_inside_and_after_an_error_nothing_is():
    module, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    factors, plain = torch.rand(4, 1, 1, 2), module(x)
    with pytest.raises(KeyError), perturbed([module], factors, 2):
        assert torch.equal(module(x), torch.cat([plain[:, :2] * factors[:, :, 0], plain[:, 2:]], 1))
        raise KeyError
    assert torch.equal(module(x), plain)


def test_gaussian_noise_is_added_in_units_of_the_root_mean_square_of_each_position():
    x, noise = torch.randn(4, 5, 8, dtype=torch.float64), torch.randn(4, 1, 8, dtype=torch.float64)
    out = perturb(x, noise, 2, "gaussian")
    rms = (x**2).mean(-1, keepdim=True) ** 0.5
    torch.testing.assert_close(out[:, :2], x[:, :2] + rms[:, :2] * noise)
    assert torch.equal(out[:, 2:], x[:, 2:])
    zero = torch.zeros(1, 1, 8, requires_grad=True)
    perturb(zero, torch.ones(1, 1, 8), 1, "gaussian").sum().backward()
    assert torch.isfinite(zero.grad).all()  # where the root mean square is 0


def test_the_gap_is_the_largest_deviation_relative_to_the_largest_output_of_a_branch():
    """Of layers that add what no mask multiplies, also where only the mask's ones are, or that sum over positions."""
    first, second = nn.Identity(), nn.Identity()
    x = torch.arange(1.0, 13).view(1, 3, 4)
    f = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    assert 0 < f.mean() < 1
    assert _gaps(lambda: first(x) + second(2 * x), [first, second]) == [0, 0]
    for extra in (f / 2, torch.full_like(f, 0.5)):
        largest = [(x + extra).max().item(), (2 * x + extra).max().item()]
        gaps = _gaps(lambda extra=extra: first(x) + second(2 * x) + extra, [first, second])
        assert gaps == pytest.approx([0.5 / largest[0], 0.5 / largest[1]])
    summed = ((f * x).cumsum(1) - f * x.cumsum(1)).abs().max() / x.cumsum(1).max()
    gaps = _gaps(lambda: first(x).cumsum(1) + second(x), [first, second])
    assert gaps == pytest.approx([summed.item(), 0])


def test_the_gap_of_a_model_is_the_largest_of_its_layers(monkeypatch, model):
    found = iter([[1.0, 4.0], [3.0, 2.0]])
    monkeypatch.setattr(backbone, "_find", lambda *_: {})
    monkeypatch.setattr(backbone, "_gaps", lambda *_: next(found))
    assert branch_gaps(model.lm) == (3, 4)


@torch.no_grad()
def test_layers_are_examined_at_the_same_small_random_inputs_in_every_run(model):
    x = torch.randn(2, 3, model.width, generator=torch.Generator().manual_seed(0))[:, None] / 100
    for at, ((layer, call), decoder) in enumerate(zip(_layer_calls(model.lm), decoder_layers(model.lm), strict=True)):
        handle = layer.register_forward_hook(lambda _, args, out: (out[0] if isinstance(out, tuple) else out) * 0 + 1)
        assert layer is decoder
        torch.testing.assert_close(call(), 1 - x[at])
        handle.remove()


def test_windows_and_chunks_are_whole_positive_numbers_under_such_a_name():
    config = SimpleNamespace(
        sliding_window=1, attention_chunk_size=8, use_sliding_window=True, n_positions=64, local_window=0, window=None
    )
    assert window_sizes(config) == [1, 8]


def test_gelu_new_is_computed_by_one_kernel_and_is_the_same_function():
    shape = {"vocab_size": 96, "n_layer": 2, "n_embd": 8, "n_head": 1, "n_positions": 16}
    lm = GPT2LMHeadModel(GPT2Config(**shape, activation_function="gelu_new"))
    LatentReasoner(lm, tiny_gpt2().tokenizer, num_thoughts=1, max_new_tokens=1)
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert not any(isinstance(module, NewGELUActivation) for module in lm.modules())
    assert lm.config.activation_function == "gelu_new"  # as it is saved
    for block in lm.transformer.h:
        torch.testing.assert_close(block.mlp.act(x), NewGELUActivation()(x), rtol=0, atol=1e-14)
