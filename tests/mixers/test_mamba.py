"""Mamba and Vim against public numbers, and what their equations imply."""

import re

import pytest
import torch
from torch.nn.functional import conv1d, pad, silu, softplus

from mixers import build_mixer, read_mixer
from mixers.mamba import Mamba, convolve
from mixers.selective_scan import selective_scan
from models import DiT
from pde_ssm_kernels import set_backend
from public_numbers import assert_near, assert_public, on_meta, part, with_public_weights

PUBLIC = dict(d_state=8)  # of the public numbers


@pytest.mark.parametrize(("case", "bidirectional"), [("mono", False), ("bi", True)])
def test_public_numbers(golden, case, bidirectional):
    assert_public(Mamba(20, **PUBLIC, bidirectional=bidirectional), part(golden("vim.npz"), case))


def test_the_sum_of_both_directions_is_public_too(golden):
    numbers = part(golden("vim.npz"), "bi")
    summed = with_public_weights(Mamba(20, **PUBLIC, bidirectional=True, summed=True), numbers)
    assert_near(summed(numbers["x"].double()), numbers["out_undivided"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mamba, one direction, N=16", dict()),
        ("vim, N=16", dict(bidirectional=True)),
        ("vim, N=16, expand=1", dict(bidirectional=True, expand=1)),
    ],
)
def test_public_counts(golden, name, options):
    for widths, parameters in golden("systems.json")["mixers"].items():
        dim = int(re.match(r"D=(\d+)", widths)[1])
        assert sum(p.numel() for p in on_meta(Mamba, dim, **options).parameters()) == parameters[name]


@torch.no_grad()
def test_tokens_in_reverse_are_mixed_in_reverse_if_the_directions_change_places():
    tokens, mixer, other = torch.randn(2, 7, 16), Mamba(16, bidirectional=True), Mamba(16, bidirectional=True)
    layers = ("conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias")
    places = {"A_log": "A_b_log", "D": "D_b"} | {name: name.replace(".", "_b.") for name in layers}
    places |= {there: name for name, there in places.items()}
    other.load_state_dict({places.get(name, name): w for name, w in mixer.state_dict().items()})
    torch.testing.assert_close(other(tokens.flip(1)).flip(1), mixer(tokens), rtol=1e-5, atol=1e-6)
    assert (mixer(tokens.flip(1)).flip(1) - mixer(tokens)).abs().max() > 1e-3


@torch.no_grad()
def test_mamba_sees_what_came_before_and_vim_everything():
    tokens = torch.randn(1, 6, 16)
    other = tokens.clone()
    other[:, 3] += 1
    for mixer, seen in ((Mamba(16), [False] * 3 + [True] * 3), (Mamba(16, bidirectional=True), [True] * 6)):
        assert ((mixer(tokens) - mixer(other)).abs().amax((0, 2)) > 0).tolist() == seen


@torch.no_grad()
@pytest.mark.parametrize(("layer", "path"), [(9, [0, 3, 4, 1, 2, 5]), (5, [3, 0, 1, 4, 5, 2])])
def test_zigzags_are_mamba_along_a_path_of_their_layer(layer, path):
    """Layer 9 runs as layer 1 does: by columns from the top left, every second one upwards; layer 5 from the bottom left."""
    tokens, path = torch.randn(2, 6, 16), torch.tensor(path)
    mixer = Mamba(16, zigzag=True, grid_size=(2, 3), layer=layer)
    plain = Mamba(16)
    plain.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(tokens)[:, path], plain(tokens[:, path]))
    mixer.grid_size = (1, 6)  # up and down are one
    torch.testing.assert_close(mixer(tokens), plain(tokens))


@pytest.mark.parametrize("name", ["mamba", "vim", "zigzag"])
def test_time_steps_of_a_whole_network_start_between_a_thousandth_and_a_tenth(name):
    model = DiT(8, hidden_size=32, depth=2, num_heads=4, mixer=name)
    for bias in (p for key, p in model.named_parameters() if "dt_proj" in key and key.endswith("bias")):
        steps = softplus(bias)
        assert 0.99e-3 < steps.min() < 0.005
        assert 0.02 < steps.max() < 0.101
    for A_log in (p for key, p in model.named_parameters() if key.endswith("_log")):       # and states decay at rates 1 to 16
        torch.testing.assert_close(A_log.exp(), torch.arange(1.0, 17).expand_as(A_log))


@torch.no_grad()
def test_autocast_rounds_what_the_scan_gets_and_gives_and_nothing_in_between(monkeypatch):
    """Hundreds of steps in half precision would be further off."""
    errors = []

    def compare(*inputs, **how):
        out = selective_scan(*inputs, **how)
        with torch.autocast("cpu", enabled=False):
            exact = selective_scan(*(x.double() for x in inputs), **how)
        errors.append(((out - exact).abs() / exact.abs()).max())
        return out

    monkeypatch.setattr("mixers.mamba.selective_scan", compare)
    with torch.autocast("cpu", torch.bfloat16):
        assert Mamba(16, bidirectional=True)(torch.randn(2, 300, 16)).dtype == torch.bfloat16
    assert len(errors) == 2
    assert 2**-10 < max(errors) < 2**-8


@pytest.mark.parametrize("options", [dict(expand=1), dict(d_state=4, d_conv=3), dict(bidirectional=True)])
def test_options_are_read_off_weights(options):
    mixer = build_mixer("mamba", 32, 4, None, 0, **options)
    defaults = dict(expand=2, d_state=16, d_conv=4, bidirectional=False)
    assert read_mixer(mixer.state_dict()) == ("mamba", defaults | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(expand=0), "expand of Mamba is a whole number from 1; it is 0"),
        (dict(d_state=-1), "d_state of Mamba is a whole number from 1; it is -1"),
        (dict(summed=True), "summed adds up two directions and Mamba has one"),
        (dict(zigzag=True, prefix_tokens=1), "on which 1 prefix_tokens have no place"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba(32, **options)


def test_zigzags_need_tokens_on_a_grid():
    with pytest.raises(ValueError, match=r"Mamba along zigzags is on a grid of 2 x 3 = 6 tokens .*\(1, 7, 16\)"):
        Mamba(16, zigzag=True, grid_size=(2, 3))(torch.randn(1, 7, 16))
    with pytest.raises(ValueError, match="Mamba along zigzags has to know the grid of its tokens"):
        Mamba(16, zigzag=True)(torch.randn(1, 9, 16))


@pytest.mark.parametrize(("E", "L", "width"), [(5, 1, 4), (37, 9, 4), (16, 20, 1), (40, 3, 5), (70, 30, 3)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["torch", "default"])
def test_its_convolution_and_the_gradients_are_those_of_the_equation(E, L, width, reverse, dtype, backend):
    set_backend(backend)
    x = torch.randn(3, L, 2 * E, dtype=dtype)[..., :E].mT                  # with others between them, as in a Mamba
    given = [t.requires_grad_() for t in (x, torch.randn(E, 1, width, dtype=dtype), torch.randn(E, dtype=dtype))]
    weights, results = torch.randn(3, E, L).double(), []
    out = convolve(*given, reverse)
    results.append([out, *torch.autograd.grad((out * weights).sum(), given)])
    x, weight, bias = (t.double() for t in given)
    seen = x.flip(2) if reverse else x
    seen = silu(conv1d(pad(seen, (width - 1, 0)), weight, bias, groups=E))
    out = seen.flip(2) if reverse else seen
    results.append([out, *torch.autograd.grad((out * weights).sum(), given)])
    for mine, exact in zip(*results):
        assert mine.dtype == dtype
        assert (mine - exact).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-14) * exact.abs().max()


def test_its_convolution_of_tensors_that_are_negated_lazily():
    given = [t.requires_grad_() for t in (torch.randn(2, 5, 9), torch.randn(5, 1, 4), torch.randn(5))]
    out = convolve(*given, False)
    torch.testing.assert_close(convolve(torch._neg_view(-given[0]), *given[1:], False), out)
    found, expected = (torch.autograd.grad(out, given, g, retain_graph=True) for g in (torch._neg_view(-out), out))
    torch.testing.assert_close(found, expected)


def test_its_convolution_does_not_read_a_bias_in_float64_as_float32():
    with pytest.raises(RuntimeError, match="type"):
        convolve(torch.randn(2, 5, 9), torch.randn(5, 1, 4), torch.randn(5).double(), False)


def test_its_convolution_has_the_same_bits_for_any_number_of_threads(threads):
    given = [t.requires_grad_() for t in (torch.randn(5, 50, 9), torch.randn(50, 1, 4), torch.randn(50))]
    results = []
    for number in (1, 3):
        threads(number)
        out = convolve(*given, False)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    assert all(torch.equal(one, three) for one, three in zip(*results))
