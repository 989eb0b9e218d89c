"""S4ND against public numbers, and what its equations say about other grids."""

import pytest
import torch

from mixers.s4nd import S4ND, Kernel
from public_numbers import assert_near, assert_public, with_public_weights


def test_public_numbers(golden):
    """Public code keeps the grid (B, h, w, D), of state-spaces/s4 at e757cef."""
    numbers = golden("s4nd.npz")
    flat = {name: numbers[name].flatten(1, 2) for name in ("x", "out", "cotangent", "grad_x")}
    assert_public(S4ND(6, grid_size=(3, 5), state_dim=8), numbers | flat)


@pytest.mark.parametrize("axis", [0, 1])
def test_public_kernels(golden, axis):
    numbers = golden("s4nd.npz")
    layer = with_public_weights(S4ND(6, grid_size=(3, 5), state_dim=8), numbers)
    kernel = numbers[f"kernel{axis}"]
    assert_near(layer.kernel[axis](kernel.shape[-1]), kernel)


@pytest.mark.parametrize("finer", [2, 3])
def test_half_as_wide_steps_share_the_kernel_of_a_whole_one(finer):
    """Which is what a zero-order hold means: on a finer grid of the same picture, the same system."""
    kernel = Kernel(4, 8).double()
    shares = kernel(5 * finer, 1 / finer).unflatten(-1, (5, finer)).sum(-1)
    torch.testing.assert_close(shares, kernel(5), rtol=1e-10, atol=1e-12)


def test_another_grid_has_other_steps():
    layer = S4ND(4, grid_size=(4, 6), state_dim=8).double()
    layer.grid_size = (8, 3)
    forward, backward = layer.kernel[0](8, 0.5)
    assert torch.equal(layer.lags(0)[:, :, 0], forward)
    assert torch.equal(layer.lags(0)[:, 0, 1:], backward[:, :7])
    assert torch.equal(layer.lags(1)[:, :, 0], layer.kernel[1](3, 2.0)[0])
    assert layer(torch.randn(2, 24, 4).double()).shape == (2, 24, 4)


def test_states_beyond_the_limit_are_left_out():
    kernel = Kernel(4, 8).double()
    steps = torch.tensor([[0.05], [0.3], [1.0], [2.0]], dtype=torch.float64)
    kernel.inv_dt.data = steps.log()
    limited = kernel(9, bandlimit=0.7)
    kept = steps * torch.pi * torch.arange(4) / (2 * torch.pi) < 0.35      # cycles per token of each state
    assert 0 < kept.sum() < kept.numel()
    kernel.C.data *= kept[..., None]
    torch.testing.assert_close(limited, kernel(9), rtol=1e-12, atol=1e-12)


def test_the_convolution_is_in_float32_whatever_the_products_are():
    layer, tokens = S4ND(8, grid_size=(3, 4)), torch.randn(2, 12, 8)
    seen = []
    layer.output_linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(tokens)
    assert torch.equal(*seen)
    assert out.dtype == torch.bfloat16


def test_initial_steps_run_from_a_thousandth_to_a_tenth():
    steps = Kernel(4096, 2).inv_dt.exp()
    assert 0.001 <= steps.min() < 0.00102
    assert 0.098 < steps.max() <= 0.1001


def test_states_come_in_pairs():
    with pytest.raises(ValueError, match=r"^--s4nd-state-dim 7: states come in conjugate pairs, so their number is even$"):
        S4ND(8, grid_size=(2, 2), state_dim=7)


def test_parameters_have_the_default_type():
    torch.set_default_dtype(torch.float64)
    try:
        mixer = S4ND(8, grid_size=(2, 3))
        assert mixer(torch.randn(1, 6, 8)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_layer_with_a_limit_is_one_without_the_states_beyond_it():
    """Of a finer grid of the same picture there are fewer, since its tokens can follow faster waves."""
    limited, plain = (S4ND(4, grid_size=(4, 6), state_dim=8, bandlimit=limit).double() for limit in (0.7, None))
    steps = torch.tensor([[0.05], [0.3], [1.0], [2.0]], dtype=torch.float64)
    for kernel in limited.kernel:
        kernel.inv_dt.data = steps.log()
    for finer, states in ((1, 9), (2, 11)):
        kept = steps / finer * torch.arange(4) / 2 < 0.35
        assert kept.sum() == states
        plain.load_state_dict(limited.state_dict())
        for kernel in plain.kernel:
            kernel.C.data *= kept[..., None]
        plain.grid_size = limited.grid_size = (4 * finer, 6 * finer)
        u = torch.randn(2, 24 * finer**2, 4, dtype=torch.float64)
        torch.testing.assert_close(limited(u), plain(u))
