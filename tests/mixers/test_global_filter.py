"""The filter per frequency: what it is in space, on other grids, and beside the PDE."""

import os
import subprocess
import sys
from ctypes.util import find_library

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention

from commands import ROOT
from mixers import MIXERS
from mixers.global_filter import GlobalFilter
from mixers.mean import Mean
from pde_ssm import PDESSM, replace_attention

GRIDS = [(1, 1), (2, 3), (5, 4), (6, 6), (7, 5)]


def of_kernel(kernel):
    """A GlobalFilter that convolves with a kernel (D, h, w) on the torus."""
    layer = GlobalFilter(len(kernel), grid_size=kernel.shape[1:]).double()
    layer.complex_weight.data = torch.view_as_real(torch.fft.rfft2(kernel).permute(1, 2, 0).contiguous())
    return layer


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_is_a_convolution_on_the_torus(grid):
    kernel, u = torch.randn(2, *grid).double(), torch.randn(3, 2, *grid).double()
    shifted = [u.roll((i, j), (2, 3)) * kernel[:, i, j, None, None] for i in range(grid[0]) for j in range(grid[1])]
    out = of_kernel(kernel)(u.flatten(2).transpose(1, 2))
    torch.testing.assert_close(out, sum(shifted).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("other", GRIDS, ids=str)
@pytest.mark.parametrize("grid", [(5, 4), (6, 7)], ids=str)
def test_other_grids_have_the_same_kernel_in_tokens(grid, other):
    """The lags of each axis; the middle one of an even number goes half to either side."""
    kernel = torch.randn(2, *grid).double()
    layer, placed = of_kernel(kernel), torch.zeros(2, *other).double()
    for i in range(grid[0]):
        for j in range(grid[1]):
            lags = [{n, n - side} if 2 * n == side else {n if 2 * n < side else n - side} for n, side in zip((i, j), grid)]
            for y in lags[0]:
                for x in lags[1]:
                    placed[:, y % other[0], x % other[1]] += kernel[:, i, j] / len(lags[0]) / len(lags[1])
    layer.grid_size = other
    u = torch.randn(3, 2, *other).double().flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(u), of_kernel(placed)(u))


def test_initial_weights_are_gfnets():
    assert GlobalFilter(64, grid_size=(8, 8)).complex_weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_on_its_own_grid_the_series_gives_the_weights_back():
    layer = of_kernel(torch.randn(2, 6, 7).double())
    before = layer.filter()
    layer.trained_grid, layer.grid_size = torch.Size((6, 7)), [6, 7]
    torch.testing.assert_close(layer.filter(), before)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)], ids=str)
def test_the_pde_is_one_of_them(grid):
    pde = PDESSM(6, grid_size=grid).double()
    layer = GlobalFilter(6, grid_size=grid, projection=True).double()
    layer.R.weight.data = pde.R.weight.data
    layer.complex_weight.data = of_kernel(pde.kernel(*grid).detach()).complex_weight.data
    u = torch.randn(2, 6, *grid).double()
    torch.testing.assert_close(layer(u.flatten(2).transpose(1, 2)), pde(u).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_the_transform_is_in_float32_whatever_the_products_are():
    layer, tokens = GlobalFilter(8, grid_size=(3, 4)), torch.randn(2, 12, 8)
    expected = layer(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(tokens), expected)
    assert layer(tokens.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("grid", "tokens", "call", "message"),
    [
        (None, 12, {}, r"^global-filter has to know the grid of its tokens: grid_size=\(h, w\)$"),
        ((3, 4), 13, {}, r"on a grid of 3 x 4 = 12 tokens \(B, N, D\), real; it got the shape \(2, 13, 8\) of"),
        ((3, 4), 12, dict(attn_mask=torch.ones(1)), r"cannot follow attn_mask$"),
    ],
)
def test_what_does_not_fit_is_named(grid, tokens, call, message):
    with pytest.raises(ValueError, match=message):
        GlobalFilter(8, grid_size=grid)(torch.randn(2, tokens, 8), **call)


def test_the_mean_is_attention_with_equal_scores():
    mean, attention, tokens = Mean(8, qkv_bias=True), Attention(8, num_heads=2, qkv_bias=True), torch.randn(2, 5, 8)
    for name in ("weight", "bias"):
        getattr(attention.qkv, name).data[:16] = 0                         # of queries and keys
        getattr(attention.qkv, name).data[16:] = getattr(mean.v, name).data
    attention.proj = mean.proj
    torch.testing.assert_close(mean(tokens), attention(tokens))


@pytest.mark.parametrize("mixer", ["s4nd", "global-filter", "mean"])
def test_they_take_the_place_of_attention_in_timms_models(mixer):
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, class_token=False, global_pool="avg")
    replace_attention(model, MIXERS[mixer])
    layer = model.blocks[0].attn
    assert layer.grid_size == (3, 3) if mixer != "mean" else type(layer) is Mean
    model(torch.randn(2, 3, 48, 48)).sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.skipif(find_library("c_malloc_debug") is None, reason="glibc's checks of memory are not there")
def test_nothing_is_written_beyond_its_memory():
    """As MKL does in the gradients of transforms along axes in the middle, which glibc notices when memory is freed."""
    code = """
import torch
from mixers.global_filter import GlobalFilter
for channels in (3, 8, 32):
    layer = GlobalFilter(channels, grid_size=(2, 128))
    for _ in range(3):
        layer(torch.randn(1, 256, channels, requires_grad=True)).square().sum().backward()
"""
    checks = dict(MALLOC_CHECK_="3", LD_PRELOAD="libc_malloc_debug.so.0")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | checks, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_integers_are_refused():
    """The transform would round its result to them."""
    with pytest.raises(ValueError, match=r"it got the shape \(2, 12, 8\) of torch.int64$"):
        GlobalFilter(8, grid_size=(3, 4))(torch.ones(2, 12, 8, dtype=torch.int64))
