"""PDEs in most blocks, attention in every few: `attention_every`, and the preset that has it."""

import pytest
import torch
from timm.models.vision_transformer import Attention

from figures.kernels import kernels_of_layers
from mixers import build_mixer, mixer_options
from models import DiT_models


def build(name, mixer, **options):
    with torch.device("meta"):
        return DiT_models[name](input_size=16, mixer=mixer, **options)


def layers_of_attention(model):
    return [i for i, block in enumerate(model.blocks) if isinstance(block.attn, Attention)]


@pytest.mark.parametrize(("name", "layers"), [("DiT-N/4", [3]), ("DiT-S/2", [3, 7, 11])])
def test_the_preset_has_attention_in_every_fourth_block(name, layers):
    model = build(name, "pdessm-gla")
    assert layers_of_attention(model) == layers
    plain = build(name, "pdessm-gl")
    for i, (block, other) in enumerate(zip(model.blocks, plain.blocks)):
        shapes = [{key: w.shape for key, w in part.state_dict().items()} for part in (block, other)]
        assert (shapes[0] == shapes[1]) == (i not in layers)


@pytest.mark.parametrize("every", [2, 3, 7])
def test_every_so_many(every):
    model = build("DiT-N/4", "pdessm", attention_every=every)
    assert layers_of_attention(model) == [i for i in range(6) if (i + 1) % every == 0]
    layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
    assert {(layer.num_heads, layer.qkv.bias is None) for layer in layers} <= {(model.num_heads, False)}  # as DiT's have


def test_weights_alone_tell_it():
    weights = build("DiT-N/4", "pdessm", attention_every=3).state_dict()
    weights["pos_embed"] = torch.ones(weights["pos_embed"].shape)
    _, settings = DiT_models["DiT-N/4"].func.read(weights)
    assert (settings["mixer"], settings["mixer_options"]["attention_every"]) == ("pdessm", 3)


def test_what_leaves_no_pde_or_is_no_number_is_refused():
    with pytest.raises(ValueError, match="leaves no PDE; that is --mixer attention"):
        mixer_options("pdessm", dict(pde_attention_every=1))
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match=f"whole number from 1; it is {wrong}"):
            build_mixer("pdessm", 8, 2, (4, 4), 3, attention_every=wrong)


def test_what_a_block_passes_to_a_conditioned_pde_attention_does_not_get():
    model = DiT_models["DiT-N/4"](input_size=16, in_channels=3, mixer="pdessm-gla", conditioned=True)
    assert model(torch.randn(2, 3, 16, 16), torch.tensor([1, 2]), torch.tensor([1, 2])).shape == (2, 6, 16, 16)


def test_kernels_are_shown_by_the_number_of_their_layer():
    model = DiT_models["DiT-N/4"](input_size=16, mixer="pdessm", attention_every=3)
    assert list(kernels_of_layers(model, count=2)) == [1, 2, 4, 5]
