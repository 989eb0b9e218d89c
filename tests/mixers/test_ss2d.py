"""SS2D against public numbers, and what it promises of grids."""

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from mixers.ss2d import PRESETS, SS2D
from models import DiT
from public_numbers import as_tokens, assert_public, on_meta, part


@pytest.mark.parametrize("case", ["z.continuous", "z.continuous_odd", "z.cross", "noz.cross", "v0.cross"])
def test_public_numbers(golden, case):
    """LaMamba-Diff at 27b3c1d (z) and VMamba at 2ed52ea."""
    numbers, (kind, order) = golden("ss2d.npz"), case.split(".")
    config = json.loads(str(numbers["config"]))[kind]
    options = {name: config[key] for name, key in dict(states="d_state", gate="gate", conv_bias="conv_bias").items()}
    tokens, grid_size = as_tokens(part(numbers, case))
    mixer = SS2D(config["d_model"], grid_size=grid_size, order=order.removesuffix("_odd"), **options)
    assert_public(mixer, tokens | {f"state.{name}": x for name, x in part(numbers, f"{kind}.state").items()})


@pytest.mark.parametrize(("D", "options", "parameters"), [
    (384, PRESETS["ss2d"], 761088), (384, dict(expand=1), 380544), (1152, PRESETS["ss2d-lamamba"], 9361152),
    (768, PRESETS["ss2d-v0"], 4454400),
])  # fmt: skip
def test_public_sizes(D, options, parameters):
    assert sum(p.numel() for p in on_meta(SS2D, D, **options).parameters()) == parameters


def test_a_transposed_picture_is_mixed_alike():
    """Cross reads rows and columns alike: exchange their weights and transpose the convolution, and so is the result."""
    h, w, D = 3, 5, 8
    mixer, turned = (SS2D(D, grid_size=grid, states=2, gate=True) for grid in ((h, w), (w, h)))
    nn.init.normal_(mixer.A_logs), nn.init.normal_(mixer.Ds)
    exchanged = {"conv2d.weight": mixer.conv2d.weight.transpose(2, 3)}
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
        weight = getattr(mixer, name)
        exchanged[name] = weight.view(4, -1)[[1, 0, 3, 2]].view_as(weight)
    turned.load_state_dict(mixer.state_dict() | exchanged)
    x = torch.randn(2, h, w, D)
    expected = mixer(x.flatten(1, 2)).view_as(x).transpose(1, 2)
    torch.testing.assert_close(turned(x.transpose(1, 2).flatten(1, 2)).unflatten(1, (w, h)), expected)


@pytest.mark.parametrize("mixer", PRESETS)
def test_time_steps_survive_what_initializes_a_model(mixer):
    for block in DiT(8, hidden_size=32, depth=2, num_heads=4, num_classes=10, mixer=mixer).blocks:
        steps = softplus(block.attn.dt_projs_bias)
        assert 0.00099 < steps.min() < 0.005 < 0.05 < steps.max() < 0.101
        rates = block.attn.A_logs.exp()                                    # of the decay of states, 1 to their number
        torch.testing.assert_close(rates, torch.arange(1.0, rates.shape[1] + 1).expand_as(rates))


def test_it_scans_in_float32_under_autocast():
    mixer, tokens = SS2D(16, gate=True), torch.randn(2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer.scan(tokens.bfloat16().repeat(1, 1, 2), (4, 4)).dtype == torch.float32
        assert (mixer(tokens) - mixer(tokens).float()).abs().max() == 0
        rounded = mixer(tokens).float()
    torch.testing.assert_close(rounded, mixer(tokens), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("gate", [False, True])
def test_tokens_stay_together_through_the_convolution(gate, batch):
    """Where channels are far apart, convolution, activation and gathering take many times as long."""
    mixer, seen = SS2D(16, gate=gate), []
    mixer.conv2d.register_forward_hook(lambda module, inputs, output: seen.append(output))
    mixer(torch.randn(batch, 16, 16))
    assert seen[0].permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(states=0), "states of ss2d is a whole number from 1; it is 0"),
        (dict(expand=0), "expand of ss2d is a whole number from 1; it is 0"),
        (dict(order="zigzag"), "orders cross, continuous; order='zigzag'"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SS2D(8, **options)


def test_tokens_of_another_grid_are_named():
    with pytest.raises(ValueError, match=r"ss2d is on a grid of 3 x 5 = 15 tokens .* got the shape \(1, 12, 8\)"):
        SS2D(8, grid_size=(3, 5))(torch.randn(1, 12, 8))
    with pytest.raises(ValueError, match=r"ss2d is on a grid of 3 x 3 = 9 tokens .* got the shape \(1, 12, 8\)"):
        SS2D(8)(torch.randn(1, 12, 8))
