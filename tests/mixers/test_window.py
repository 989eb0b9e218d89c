"""Attention in windows against public numbers, and who looks at whom."""

import pytest
import torch

from mixers.window import Window, layout, neighbours
from models import DiT
from public_numbers import as_tokens, assert_public, on_meta, part


def window_case(golden, case):
    """Public numbers of LaMamba-Diff at 27b3c1d, whose buffer of relative positions is no weight of ours."""
    numbers = golden("window_attention.npz")
    weights = {name: x for name, x in numbers.items() if name.startswith("state.") and "index" not in name}
    tokens, grid_size = as_tokens(part(numbers, case))
    return grid_size, {name.replace("grad_norm.attn.", "grad_norm."): x for name, x in (tokens | weights).items()}


@pytest.mark.parametrize("case", ["shift0", "shift2"])
def test_public_numbers(golden, case):
    grid_size, numbers = window_case(golden, case)
    assert_public(Window(12, 3, qkv_bias=True, grid_size=grid_size, layer=case == "shift2", size=4), numbers)


def test_public_regions(golden):
    see = neighbours((layout(8, 4, True),) * 2, (8, 8), torch.empty(0))
    assert torch.equal(see, golden("window_attention.npz")["shift2.mask"] == 0)


@pytest.mark.parametrize(("D", "heads", "parameters"), [(384, 6, 592710), (1152, 16, 5316624)])
def test_public_sizes(D, heads, parameters):
    assert sum(p.numel() for p in on_meta(Window, D, heads, qkv_bias=True).parameters()) == parameters


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("grid_size", [(8, 8), (6, 9), (3, 7), (2, 3), (1, 13), (4, 5)])
def test_a_token_sees_the_windows_tokens_and_no_others(grid_size, layer):
    """Along each axis, a window is 4 tokens from the edge of the grid, or from 2 beyond it where layers are shifted."""
    mixer = Window(8, 2, grid_size=grid_size, layer=layer, size=4)
    tokens = torch.randn(1, grid_size[0] * grid_size[1], 8)
    seen = torch.autograd.functional.jacobian(lambda x: mixer(x).sum((0, 2)), tokens)[:, 0].ne(0).any(2)
    starts = [2 * layer if n > 4 else 0 for n in grid_size]
    row, column = ((torch.arange(n) + start) // 4 for n, start in zip(grid_size, starts))
    window = (100 * row[:, None] + column).flatten()
    assert torch.equal(seen, window[:, None] == window)


@pytest.mark.parametrize("layer", [0, 1])
def test_nobody_looks_at_padding(layer):
    """Of equal tokens, attention makes the same as of each."""
    mixer = Window(8, 2, qkv_bias=True, grid_size=(3, 7), layer=layer, size=2)
    torch.nn.init.normal_(mixer.qkv.bias)
    token = torch.randn(8)
    torch.testing.assert_close(mixer(token.expand(1, 21, 8)), mixer.proj(mixer.qkv(token)[16:]).expand(1, 21, 8))


def test_a_small_grid_is_one_window_with_the_biases_of_a_large_one():
    mixer, tokens = Window(8, 2, size=8, layer=1), torch.randn(1, 6, 8)
    mixer.grid_size, alone = (2, 3), Window(8, 2, grid_size=(2, 3), size=3)
    weights = mixer.state_dict()
    table = weights.pop("relative_position_bias_table").view(15, 15, 2)[5:10, 5:10].flatten(0, 1)
    alone.load_state_dict(weights | dict(relative_position_bias_table=table))
    torch.testing.assert_close(mixer(tokens), alone(tokens))


def test_odd_layers_are_shifted():
    model = DiT(8, hidden_size=32, depth=3, num_heads=4, num_classes=10, mixer="window", size=2)
    assert [(block.attn.size, block.attn.shifted) for block in model.blocks] == [(2, False), (2, True), (2, False)]


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        (3, {}, "8 channels, which its 3 heads do not divide"),
        (2, dict(size=0), "size of window is a whole number from 1; it is 0"),
    ],
)
def test_mistakes_are_named(heads, options, message):
    with pytest.raises(ValueError, match=message):
        Window(8, heads, **options)


def test_tokens_of_another_grid_are_named():
    with pytest.raises(ValueError, match=r"window is on a grid of 3 x 5 = 15 tokens .* got the shape \(1, 12, 8\)"):
        Window(8, 2, grid_size=(3, 5))(torch.randn(1, 12, 8))


def test_a_layer_made_without_values_computes_the_same_with_weights_of_another():
    window, u = Window(8, 2, grid_size=(3, 4)), torch.randn(2, 12, 8)
    with torch.device("meta"):
        empty = Window(8, 2, grid_size=(3, 4))
    empty.load_state_dict(window.state_dict(), assign=True)
    torch.testing.assert_close(empty(u), window(u))
