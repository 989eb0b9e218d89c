"""The C++ kernels of the pairwise coupling against the plain equations in double precision."""

import copy
import math

import pytest
import torch

import pde_ssm
from operators import random_operator
from pde_ssm import PDESSM, TERMS, green_symbol, wave_vectors
from pde_ssm_kernels import kept, pairs, pytorch

KERNELS, REASON = pairs.library()
pytestmark = pytest.mark.skipif(KERNELS is None, reason=str(REASON))
f64 = torch.float64
GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4), (5, 7), (1, 8), (9, 1), (6, 10), (13, 11), (16, 16), (12, 34), (40, 6)]
GRIDS += [(1, 130)]  # by Fourier transforms


def assert_close(mine, exact, of_largest):
    assert mine.shape == exact.shape
    assert (mine - exact).abs().max() <= of_largest * exact.abs().max() + 1e-12


def layer_and_gradients(pde, u, direction, backend, dtype, **grad):
    pde_ssm.set_backend(backend)
    pde, u = copy.deepcopy(pde).to(dtype), u.to(dtype).requires_grad_()
    out = pde(u)
    return out, *torch.autograd.grad(out, [u, *pde.parameters()], direction.to(dtype), **grad)


@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("channels", "groups", "batch"), [(18, 1, 3), (10, 2, 9), (33, 1, 1)])
def test_values_and_all_gradients_are_those_of_the_plain_equations(grid, channels, groups, batch, dtype):
    pde, (u, direction) = random_operator(channels, 0.1, "pairwise", groups), torch.randn(2, batch, channels, *grid)
    pde, allowed = pde.to(dtype), 1e-9 if dtype == f64 else 2e-5           # float64 takes PyTorch's operations
    mine, plain = (layer_and_gradients(pde, u, direction, *how) for how in (("default", dtype), ("plain", f64)))
    largest = max(exact.abs().max() for exact in plain)
    for ours, exact in zip(mine, plain):
        if exact.ndim == 1:
            exact = exact + largest                                        # all pairs' sum, of which little may be left
            ours = ours + largest
        assert_close(ours, exact, allowed)


@pytest.mark.parametrize("tau", [0.3, 1e4])
@pytest.mark.parametrize("terms", [TERMS, *((term,) for term in TERMS)], ids="-".join)
def test_exponents_and_their_gradients(terms, tau):
    """Absent terms, rates that the bound lowers, and shifts of many turns."""
    equation = PDESSM(6, coupling="pairwise", groups=2, terms=terms).equation
    for p in equation.parameters():
        torch.nn.init.normal_(p)
    torch.nn.init.constant_(equation.log_tau, math.log(tau))
    exact = copy.deepcopy(equation).double()
    growth, phase = pytorch.exponents(exact)
    expected = torch.cat([growth, phase], dim=1).unflatten(2, (3, 3)).movedim(1, 0)
    mine, direction = pairs.exponents(equation), torch.randn(6, 2, 3, 3)
    moved = ((mine - expected) * torch.tensor([0.0, 0, 0, 0, 1, 1])[:, None, None, None]).round()   # half a turn is either
    allowed = 1e-6 * expected.abs().amax() + (1e-6 * tau if "convection" in terms else 0)
    assert (mine - expected - moved).abs().max() <= allowed
    names = [name for name, _ in equation.named_parameters() if name not in ("g0", "gx", "gy")]
    gradients = (
        torch.autograd.grad(out, [getattr(owner, name) for name in names], direction.to(out.dtype))
        for out, owner in ((mine, equation), (expected, exact))
    )
    for ours, theirs in zip(*gradients):
        assert_close(ours, theirs, 1e-5)


def symbols(exponents, h, w):
    """G (c, c, h, w // 2 + 1), as the kernel multiplies unit vectors by it, of exponents (6, c, c)."""
    c = exponents.shape[-1]
    units = torch.zeros(1, h * (w // 2 + 1), 2, c, c)
    units[:, :, 0] = torch.eye(c)
    out = torch.empty_like(units)
    pairs.run("green", pairs.packed(units), exponents, out, sizes=(h, w, c, c, 1))
    pairs.fill_conjugates(out, h, w)
    return torch.complex(*out[0].unbind(1)).unflatten(0, (h, -1)).permute(3, 2, 0, 1).to(torch.complex128)


@pytest.mark.parametrize("name", ["log_lx", "log_ly", "shear", "b", "r_slack"])
def test_parameters_that_are_parametrised_are_not_absent(name):
    pde, u = PDESSM(6, coupling="pairwise"), torch.randn(2, 6, 5, 4)
    expected = pde(u)
    torch.nn.utils.parametrize.register_parametrization(pde.equation, name, torch.nn.Identity())
    torch.testing.assert_close(pde(u), expected)


@pytest.mark.parametrize("name", ["log_tau", "log_lx", "b", "r_slack"])
@pytest.mark.parametrize("images", [2, 9])                                 # evaluation folds when there are more than channels
@pytest.mark.parametrize("training", [True, False])
def test_a_coefficient_in_float64_is_not_read_as_float32(name, images, training):
    """As one is that was made from an array of NumPy's."""
    pde, u = PDESSM(6, coupling="pairwise").train(training), torch.randn(images, 6, 5, 4)
    setattr(pde.equation, name, torch.nn.Parameter(getattr(pde.equation, name).double()))
    message = "coefficients of pairs of channels are torch.float64 and tokens are not: cast the layer"
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=message):
        pde(u)
    assert pde.double()(u.double()).isfinite().all()


@pytest.mark.parametrize(("name", "other"), [("log_ly", "log_lx"), ("gy", "gx")])
def test_gradients_that_have_gradients_know_tied_parameters(name, other):
    pde, u = PDESSM(6, coupling="pairwise"), torch.randn(2, 6, 5, 4)
    setattr(pde.equation, name, getattr(pde.equation, other))
    found = []
    for backend in ("default", "plain"):
        pde_ssm.set_backend(backend)
        (first,) = torch.autograd.grad(pde(u).square().sum(), getattr(pde.equation, other), create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), getattr(pde.equation, other))))
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


@torch.no_grad()
def test_a_bias_of_r_stays_in_evaluation():
    pde, u = PDESSM(8, coupling="pairwise").eval(), torch.randn(9, 8, 8, 8)
    pde.R = torch.nn.Linear(8, 8)
    outs = [pde(u) for _ in range(3)]
    pde_ssm.set_backend("plain")
    for out in outs:
        torch.testing.assert_close(out, pde(u), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_deterministic_evaluation_does_not_depend_on_what_came_before(deterministic):
    pde, u = PDESSM(8, coupling="pairwise").eval(), torch.randn(4, 8, 8, 8)
    outs = [pde(u) for _ in range(5)]
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("coupling", ["pairwise", "coupled"])
def test_a_trace_holds_what_the_layer_computes(coupling):
    pde, u = PDESSM(8, coupling=coupling).eval(), torch.randn(2, 8, 5, 4)
    torch.testing.assert_close(torch.jit.trace(pde, u, check_trace=False)(u), pde(u))


@pytest.fixture
def other_defaults():
    torch.set_default_dtype(f64)
    with torch.device("meta"):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("coupling", ["diagonal", "pairwise", "coupled"])
def test_type_and_device_are_those_of_the_layer_whatever_the_default(request, coupling):
    pde, u = PDESSM(8, coupling=coupling).eval(), torch.randn(2, 8, 6, 6)
    expected = copy.deepcopy(pde)(u).detach()
    pairs.conjugates.cache_clear()
    request.getfixturevalue("other_defaults")
    with torch.no_grad():
        for _ in range(3):  # evaluation folds from the second time on
            out = pde(u)
    assert (out.dtype, out.device) == (torch.float32, u.device)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.1, 0.3, 1, 10, 1e3, 1e10])
@pytest.mark.parametrize("grid", [(8, 8), (7, 13), (64, 64), (1, 30), (300, 3)], ids=str)
@pytest.mark.parametrize("r", [1, -70])
def test_symbols_by_recurrences_are_as_near_as_they_say(grid, scale, r):
    """For K of any size, with ridges in any direction, which grow along one axis before they fall."""
    c, u = 8, 2**-24
    K = torch.randn(c, c, 2, 2)
    K[: c // 2, :, 1] *= 0.01                                              # narrow ones
    turn = torch.linalg.qr(torch.randn(c, c, 2, 2)).Q
    K = scale * turn @ K
    K, b = K @ K.mT, torch.rand(2, c, c) - 0.5
    exponents = torch.stack([r - torch.rand(c, c), K[..., 0, 0], K[..., 0, 1], K[..., 1, 1], *b])
    E = exponents.double()
    symmetric = torch.stack([E[1], E[2], E[2], E[3]], dim=-1).unflatten(-1, (2, 2))
    exact = green_symbol(symmetric, E[4:].movedim(0, -1), E[0], torch.ones(c, c, dtype=f64), *grid)
    kx, ky, kx_odd, ky_odd = wave_vectors(*grid, E)
    size = [x[..., None, None].abs() for x in E]
    terms = size[0] + size[1] * kx**2 + 2 * size[2] * (kx_odd * ky_odd).abs() + size[3] * ky**2
    terms = torch.stack([terms.roll(step, 2) for step in range(-7, 8)]).amax(0)      # in the run, or beyond it
    error = (symbols(exponents, *grid) - exact).abs()
    assert (error <= u * (128 + 16 * terms) * exact.abs() + torch.exp(torch.tensor(-79.0))).all()


@pytest.mark.parametrize("r", [-1e4, -60.0, 0.0, 60.0])
def test_growth_of_any_size(r):
    exponents = torch.zeros(6, 3, 3)
    exponents[0] = r
    exponents[4] = 0.25
    assert_close(symbols(exponents, 4, 6).abs(), torch.full((3, 3, 4, 4), max(r, -200), dtype=f64).exp(), 1e-5)


@pytest.mark.parametrize("row", range(6))
def test_what_is_no_number_stays_none(row):
    exponents = torch.zeros(6, 3, 3)
    exponents[row, 1, 2] = float("nan")
    G = symbols(exponents, 5, 4)
    assert G[1].isnan().all()                                              # the sums of which it is part, and no others
    G[1] = 1
    assert G.isfinite().all()


@pytest.mark.parametrize(("coupling", "groups", "c"), [("pairwise", 2, 35), ("coupled", 7, 6)])
def test_no_bit_depends_on_the_number_of_threads(threads, coupling, groups, c):
    """Of what the kernels compute. The products of matrices before and after them are PyTorch's."""
    equation = random_operator(groups * c, 0.1, coupling, groups).float().equation
    v, gradient = torch.randn(2, groups, 45, 2, 3, c)                      # spectra (groups, f, 2, B, c) of 9 x 8 tokens
    with torch.no_grad():
        inputs, results = (v, *equation.embedding(), pairs.exponents(equation), 9, 8, equation.is_system), []
    for number in (1, 2, 5):
        threads(number)
        states, embedded = pairs.evolve_op(*inputs)
        results.append([states, *pairs.evolve_backward_op(gradient, embedded, *inputs)])
    for first, *others in zip(*results):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("coupling", ["pairwise", "coupled"])
def test_functional_transforms_see_pytorchs_operations(coupling):
    equation, (v, dv) = PDESSM(4, coupling=coupling).equation, torch.randn(2, 2, 6, 5, 4)
    _, slope = torch.func.jvp(equation.evolve, (v,), (dv,))                # linear in v
    assert_close(slope, equation.evolve(dv), 1e-5)
    assert_close(torch.vmap(equation.evolve)(torch.stack([v, dv]))[1], slope, 1e-5)


@pytest.mark.parametrize("is_system", [False, True])
def test_as_custom_operators_they_keep_the_rules_of_torch_compile(is_system):
    inputs = torch.randn(2, 12, 2, 3, 5), *torch.randn(3, 2, 5, 5), torch.rand(6, 2, 5, 5) - 0.5
    inputs[4][:4] = 0
    inputs = [x.requires_grad_() for x in inputs]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(pairs.evolve_op, (*inputs, 4, 5, is_system), test_utils=tests)
    states, embedded = pairs.evolve_op(*inputs, 4, 5, is_system)
    arguments = torch.randn_like(states), embedded, *inputs, 4, 5, is_system
    torch.library.opcheck(pairs.evolve_backward_op, arguments, test_utils="test_faketensor")
    with torch.no_grad():
        exact = pairs.evolve_backward(*arguments)
    torch.testing.assert_close(torch.autograd.grad(states, inputs, arguments[0]), exact)


@pytest.mark.parametrize("wrong", [(1, 11, 2, 3, 5), (1, 12, 2, 3, 4), (2, 12, 2, 3, 5)], ids=["grid", "channels", "groups"])
def test_memory_of_others_is_not_read(wrong):
    good = torch.zeros(1, 12, 2, 3, 5), *torch.zeros(3, 1, 5, 5), torch.zeros(6, 1, 5, 5)
    for spectra in (torch.zeros(wrong), good[0].double()):
        with pytest.raises(ValueError, match=r"the kernels need float32 of shapes .* for 4 x 5 tokens; they got"):
            pairs.evolve(spectra, *good[1:], 4, 5)
        with pytest.raises(ValueError, match="the kernels need float32"):
            pairs.evolve_backward(good[0], good[0], spectra, *good[1:], 4, 5)


@pytest.fixture
def evaluated():
    """A layer in evaluation that has seen as many images as make it fold, and its tokens."""
    pde = PDESSM(20, coupling="pairwise", state_dim=19, gate=True).eval()
    for p in pde.parameters():
        torch.nn.init.normal_(p, std=0.1)
    u = torch.randn(5, 20, 6, 7)
    with torch.no_grad():
        for _ in range(4):
            pde(u)
    return pde, u


@torch.no_grad()
def test_evaluation_folds_what_depends_on_parameters_alone_once_it_pays(evaluated, monkeypatch):
    pde, u = evaluated
    expected = copy.deepcopy(pde).double()(u.double())
    monkeypatch.setattr(pairs, "evolve", None)                             # not used any more
    for images in (5, 1, 3):
        assert_close(pde(u[:images]), expected[:images], 1e-5)
    assert kept.bytes_kept() == 6 * 4 * 20 * 8 * -(-19 // pairs.lanes()) * pairs.lanes()


@pytest.mark.parametrize("event", ["R", "exponents", "train", "gradients", "no room", "autocast"])
@torch.no_grad()
def test_folded_products_are_never_stale(evaluated, event, monkeypatch):
    pde, u = evaluated
    pde(u)
    if event == "R":
        pde.R.weight.data.mul_(2)
    elif event == "exponents":
        pde.equation.log_tau.add_(0.5)
    elif event == "train":
        pde.train()
    elif event == "gradients":
        with torch.enable_grad():
            PDESSM(4)(torch.randn(1, 4, 2, 2))
    elif event == "no room":
        monkeypatch.setattr(kept, "KEPT", 2**10)
        kept.forget()
    with torch.autocast("cpu", enabled=event == "autocast"):
        for _ in range(6):
            out = pde(u)
    if event != "autocast":
        assert_close(out, copy.deepcopy(pde).double()(u.double()), 1e-5)
    assert out.dtype == (torch.bfloat16 if event == "autocast" else torch.float32)
    assert (kept.bytes_kept() > 0) == (event not in ("train", "no room"))
