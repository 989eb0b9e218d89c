"""PlainMamba against public numbers."""

import pytest
import torch
from torch.nn.functional import softplus

from mixers.orders import follow, put_back, steps
from mixers.plainmamba import PlainMamba
from models import DiT
from public_numbers import assert_public, on_meta, part


def numbers_of(golden, case):
    """PlainMamba at 0975a1d: as its paper has it (intended), put right, or as it was released."""
    numbers = golden("plainmamba.npz")
    return part(numbers, case) | {name: x for name, x in numbers.items() if name.startswith("state.")}


def build():
    return PlainMamba(20, grid_size=(3, 4), states=4, conv_size=3)


def test_public_numbers(golden):
    assert_public(build(), numbers_of(golden, "intended"))


def test_what_the_released_code_computes(golden):
    """Only x follows the snakes, what it is scanned with stays in raster order, and the bias of the steps counts twice."""
    mixer = build()

    def scan(x, grid_size):
        dt, B, C = mixer.x_proj(x).split(mixer.sizes, dim=2)
        delta, B, C = (part[:, :, None].expand(-1, -1, 4, -1) for part in (mixer.dt_proj(dt), B, C))
        B = B + mixer.direction_Bs[steps(mixer.paths, grid_size, x)]
        return put_back(mixer.along(follow(x, mixer.paths, grid_size), delta, B, C, mixer.dt_proj.bias), mixer.paths, grid_size)

    mixer.scan = scan
    assert_public(mixer, numbers_of(golden, "as_released"))


@pytest.mark.parametrize(("D", "parameters"), [(384, 1000400), (1152, 8530640)])
def test_public_sizes(D, parameters):
    assert sum(p.numel() for p in on_meta(PlainMamba, D).parameters()) == parameters


def test_time_steps_survive_what_initializes_a_model():
    for block in DiT(8, hidden_size=32, depth=2, num_heads=4, num_classes=10, mixer="plainmamba").blocks:
        time_steps = softplus(block.attn.dt_proj.bias)
        assert 0.00099 < time_steps.min() < 0.01 < 0.03 < time_steps.max() < 0.101
        rates = block.attn.A_log.exp()                                     # of the decay of states, 1 to their number
        torch.testing.assert_close(rates, torch.arange(1.0, 17).expand_as(rates))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(states=0), "states of plainmamba is a whole number from 1; it is 0"),
        (dict(expand=0), "expand of plainmamba is a whole number from 1; it is 0"),
        (dict(conv_size=4), "--plainmamba-conv-size 4: a side of the convolution is odd"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PlainMamba(8, **options)
