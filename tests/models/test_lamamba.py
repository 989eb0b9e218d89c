"""LaMamba-Diff against public numbers, and what is its alone; what every network promises is in test_backbones.py."""

import pytest
import torch

from backbones.lamamba import ATTENTION, Block, Expand, LaMamba, Merge, Stage
from checkpoints.build import settings_from_weights
from machine.cost import forward_flops
from models import MODELS
from public_numbers import assert_near, assert_public, on_meta, shapes, with_public_weights

TINY = dict(input_size=16, hidden_size=4, depths=(2, 1, 1, 1), middle_depth=2, num_heads=(2, 2, 4, 4), window=4, num_classes=6)


def test_public_numbers(golden):
    """LaMamba-Diff at 27b3c1d, whose state dict holds buffers as well. Guidance is of all channels there."""
    numbers = golden("lamamba.npz")
    model = LaMamba(**TINY)
    assert any(name.endswith(".attn_mask") for name in numbers)
    assert_public(model, numbers, numbers["t"], numbers["y"])
    # The sines of float32 angles differ from one processor to another.
    assert_near(model(numbers["x"].double(), numbers["t2"], numbers["y"]), numbers["out2"], 5e-5)
    x, t, y, scale = (numbers[f"cfg_{name}"] for name in ("x", "t", "y", "scale"))
    assert_near(model.forward_with_cfg(x.double(), t, y, scale.item(), channels=4), numbers["cfg_out"])


def test_other_names_than_the_public_buffers_are_refused(golden):
    numbers = golden("lamamba.npz")
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"layers.0.blocks.0.op.mask\""):
        with_public_weights(LaMamba(**TINY), numbers | {"state.layers.0.blocks.0.op.mask": numbers["x"]})


@pytest.mark.parametrize("name", ["LaMamba-S", "LaMamba-B", "LaMamba-XL"])
def test_public_sizes(golden, name):
    """Scans count as in the public code, nine multiply-adds for a state of a channel and token, and one for D u."""
    expected, model = golden("lamamba_models.json")[name], on_meta(MODELS[name]).eval()
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert expected["state_shapes"] in (None, shapes(model))
    x, t = torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, device="meta")
    flops = forward_flops(model, x, t, torch.zeros(1, dtype=torch.long, device="meta"))
    assert flops / 2e9 == pytest.approx(expected["gmacs_with_scan"], abs=5e-5)


def test_a_network_for_cpus():
    assert 0.8e6 < sum(p.numel() for p in on_meta(MODELS["LaMamba-N"], input_size=16).parameters()) < 1.2e6


def test_initial_values():
    """A block is the identity; the last layer, unlike DiT's, is not zero."""
    model = LaMamba(**TINY)
    x, c = torch.randn(1, 256, 4), torch.randn(1, 16)
    assert torch.equal(model.blocks[0](x, c), x)
    assert model.final_linear.weight.any()
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    for bias in (block.op.dt_projs_bias for block in model.blocks):
        assert 0.0009 < torch.nn.functional.softplus(bias).min() < torch.nn.functional.softplus(bias).max() < 0.11


def test_what_is_merged_comes_back_to_its_place():
    """A token that knows its number passes it to its place: by a norm of ones and layers that copy."""
    merge, expand = Merge(1), Expand(2)
    merge.norm = expand.norm = torch.nn.Identity()
    with torch.no_grad():
        merge.reduction.weight.copy_(torch.tensor([[0, 1.0, 0, 0], [0, 0, 1.0, 0]]))       # from (1, 0) and (0, 1)
        expand.expand.weight.copy_(torch.tensor([[0, 0.0], [0, 1], [1, 0], [0, 0]]))       # to (0, 1) and (1, 0)
        tokens = torch.arange(24.0).view(1, 24, 1)
        merged = merge(tokens, (4, 6))
        assert merged.shape == (1, 6, 2)
        back = expand(merged, (4, 6)).view(4, 6)
    places = tokens.view(4, 6).clone()
    places[::2, ::2] = places[1::2, 1::2] = 0
    assert torch.equal(back, places)


@torch.no_grad()
def test_positions_keep_their_place_in_the_picture():
    """On three times the columns every third has the place of an old one."""
    model = LaMamba(**TINY | dict(input_size=(8, 16)))
    model.pos_embed.normal_()
    trained = model.positions()
    finer = model.resize((8, 48)).positions()
    torch.testing.assert_close(finer.unflatten(1, (8, 48))[:, :, 1::3], trained.unflatten(1, (8, 16)), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.resize((8, 16)).positions(), trained)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (10, "10 x 10 is not divisible by 4"),
        ((16, 24), "16 x 24 does not fit windows of 4: this model comes to a side of 6, which is more than a window"),
        (40, "40 x 40 does not fit windows of 4: .* a side of 10"),
    ],
)
def test_sides_that_do_not_fit(size, message):
    with pytest.raises(ValueError, match=message):
        LaMamba(**TINY | dict(input_size=size))
    with pytest.raises(ValueError, match=message):
        on_meta(LaMamba, **TINY).resize(size)


@pytest.mark.parametrize(("attention", "gmacs"), [("none", 2.45), ("unshifted", 3.19), ("global", 4.24)])
def test_the_ablation_of_attention_costs_what_the_paper_says(attention, gmacs):
    model = on_meta(MODELS[f"LaMamba-S-{attention}"]).eval()
    assert settings_from_weights(model.state_dict())["model"] == f"LaMamba-S-{attention}"
    x, t = torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, device="meta")
    assert forward_flops(model, x, t, t.long()) / 2e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("attention", ATTENTION)
def test_how_far_a_block_sees_beside_its_scan(attention):
    """Of 8 x 8 tokens the first, by the branch of attention alone: in a block that shifts, where windows do."""
    block = Block(4, 2, 4, 1, 4, False, attention)
    stage = Stage([block])
    stage.resize((8, 8))
    if attention == "none":
        assert block.attn is None
        return
    tokens = torch.randn(1, 64, 4, requires_grad=True)
    block.attn(tokens)[0, 0].sum().backward()
    sees = tokens.grad[0].any(-1).view(8, 8)
    assert sees.sum() == dict(shifted=4, unshifted=16, **{"global": 64})[attention]
    assert sees[:2, :2].all()
