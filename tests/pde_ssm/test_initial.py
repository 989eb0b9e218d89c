"""What a layer begins with: scales, shifts, weights."""

import math

import pytest
import torch

from pde_ssm import COUPLINGS, PDESSM, TERMS


def test_initial_scales_span_half_a_token_to_a_quarter_of_the_image():
    n, tokens = 256, 16
    pde = PDESSM(32, grid_size=(tokens, tokens)).double()
    with torch.no_grad():
        pde.equation.b.zero_()
        kernel = pde.kernel(n, n)
        distance = (torch.fft.fftfreq(n, dtype=torch.float64)).expand(n, n)
        width = (kernel * distance**2).sum((1, 2)).sqrt()
    assert width[0] == pytest.approx(0.5 / tokens, rel=1e-3)
    assert width[-1] == pytest.approx(0.25, rel=0.1)  # the torus cuts the tails of the widest
    ratios = width[1:20] / width[:19]
    torch.testing.assert_close(ratios, ratios[:1].expand(19), rtol=1e-3, atol=0)
    shifts = PDESSM(4096, grid_size=(tokens, tokens)).equation.b * tokens
    assert 1.9 < shifts.norm(dim=1).max() <= 2
    assert (shifts.mean(0).abs() < 0.1).all()
    one_token = PDESSM(8, grid_size=(1, 1)).equation.log_lx.exp() * math.sqrt(2)
    torch.testing.assert_close(one_token, torch.full((8,), 0.5))           # half a token is more than a quarter of the image


def test_initial_layers_are_xaviers_and_components_after_the_first_weigh_half():
    pde = PDESSM(128, state_dim=384, gate=True, components=3)
    for layer in (pde.R, pde.gate, pde.out):
        assert layer.weight.std().item() == pytest.approx((2 / (128 + 384)) ** 0.5, rel=0.03)
    assert not PDESSM(8, activation=True).R.bias.any()
    assert (pde.equation.g0[0] == 1).all()
    assert pde.equation.g0[1:].std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("terms", [TERMS, ("diffusion",)], ids="-".join)
def test_initial_pairs_of_channels_weigh_as_much_as_the_channel_itself(terms):
    """By their rates; without reaction, by what a channel begins with."""
    pde, own = PDESSM(8, coupling="pairwise", terms=terms), torch.eye(8)
    _, _, r, tau = pde.coefficients()
    weight = own if "reaction" in terms else own / 8
    torch.testing.assert_close(pde.equation.g0[0], weight)
    expected = own + (1 - own) / 8 if "reaction" in terms else torch.ones(8, 8)
    torch.testing.assert_close((tau * r[0]).exp(), expected)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("grid", [(4, 16), (16, 4)], ids=str)
def test_a_token_is_one_of_the_longer_side(grid, coupling):
    torch.manual_seed(1)
    square = PDESSM(8, grid_size=(16, 16), coupling=coupling).state_dict()
    torch.manual_seed(1)
    oblong = PDESSM(8, grid_size=grid, coupling=coupling).state_dict()
    assert all(torch.equal(square[name], oblong[name]) for name in square)


def test_every_component_has_all_scales_in_an_order_of_its_own():
    scales = PDESSM(32, components=3).equation.log_lx.detach()
    assert torch.equal(scales.sort(1).values, scales[:1].sort(1).values.expand(3, 32))
    assert len({tuple(row) for row in scales.tolist()}) == 3
