"""backbone.py: branches are found by role in both families of backbones; a hook lasts for one pass."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from latentlab.backbone import branch_outputs, decoder_layers
from latentlab.masks import scaled


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


def test_a_backbone_without_blocks_is_refused_in_one_line():
    with pytest.raises(ValueError, match="^backbone: got Sequential, expected blocks"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_the_first_positions_are_scaled_while_inside_and_after_an_error_nothing_is():
    module, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    factors, plain = torch.rand(4, 1, 1, 2), module(x)
    with pytest.raises(KeyError), scaled([module], factors, 2):
        assert torch.equal(module(x), torch.cat([plain[:, :2] * factors[:, :, 0], plain[:, 2:]], 1))
        raise KeyError
    assert torch.equal(module(x), plain)
