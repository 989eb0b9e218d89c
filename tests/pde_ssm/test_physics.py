"""The operator against analysis: exact solutions, conservation laws, and other ways to solve the same equation."""

import math
from itertools import product

import pytest
import torch
from scipy.integrate import solve_ivp

import oracle
import pde_ssm
from on_gpu import DEVICE
from operators import Solver, random_coefficients, random_operator, without_input_map
from pde_ssm import PDESSM, R_MAX, TERMS, embedding_symbol, green_symbol, wave_numbers

GRIDS = [(1, 1), (1, 8), (8, 1), (2, 2), (5, 7), (7, 5), (8, 8), (9, 16), (12, 20)]
COUPLINGS = [
    dict(coupling="diagonal"),
    dict(coupling="pairwise"),
    dict(coupling="pairwise", groups=2),
    dict(coupling="coupled", groups=1),
    dict(coupling="coupled", groups=2),
]
f64 = torch.float64


def describe(options):
    return "-".join(str(value) for value in options.values())


couplings = pytest.mark.parametrize("options", COUPLINGS, ids=describe)
# The equations as they stand, and what users get: in single precision C++ kernels or Triton, and for pairs of channels pieces.
SOLVERS = [Solver("plain", f64), Solver("default", f64), Solver("default", torch.float32), Solver("plain", torch.float32)]
if DEVICE.type == "cuda":
    SOLVERS += [Solver(backend, torch.float32, "cuda") for backend in ("default", "auto")]
IN_SINGLE_PRECISION = [Solver(backend, torch.float32) for backend in ("default", "torch", "plain")]
DIAGONAL, COUPLED = COUPLINGS[0], COUPLINGS[-1]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "{}x{}".format(*grid))


def solved(*couplings, by=SOLVERS):
    """Parametrises a test by couplings and solvers, but for pairs that repeat the plain equations: for the diagonal coupling
    those are what runs in PyTorch, and in double precision by default."""
    runs = []
    for options, solver in product(couplings, by):
        if options.get("coupling", "diagonal") != "diagonal" or repr(solver) not in ("torch-32-cpu", "default-64-cpu"):
            marks = pytest.mark.gpu if solver.device == "cuda" else ()
            runs.append(pytest.param(options, solver, marks=marks, id=f"{describe(options)}-{solver}"))
    return pytest.mark.parametrize(("options", "solver"), runs)


def apply_symbol(symbol, u):
    return torch.fft.irfft2(symbol * torch.fft.rfft2(u), s=u.shape[-2:])


def axes(h, w):
    return torch.meshgrid(torch.arange(h, dtype=f64) / h, torch.arange(w, dtype=f64) / w, indexing="ij")


def in_groups(pde, u):
    """u (B, C, h, w) as (B, groups, c, h, w), and coefficients and embedding as (groups, c, c, ...) matrices."""
    equation = pde.equation
    g = equation.g0, equation.gx, equation.gy
    K, b, r, tau = pde.coefficients()
    if equation.g0.ndim == 1:
        K, b, r, *g = (x[:, None, None] for x in (K, b, r, *g))
    return u.unflatten(1, (len(g[0]), -1)), zip(K, b, r, tau, *g)


@solved(*COUPLINGS)
@grids
@torch.no_grad()
def test_solves_the_discretised_equation(options, grid, solver):
    pde = random_operator(2 if math.prod(grid) > 100 else 4, **options)
    u = torch.randn(1, pde.dim, *grid, dtype=f64)
    state, groups = in_groups(pde, torch.einsum("dc,bchw->bdhw", pde.R.weight, u))
    expected = []
    for v, (K, b, r, tau, *g) in zip(state[0], groups):
        v = oracle.embed(v, *g)
        if options["coupling"] == "pairwise":  # a PDE per pair of channels, summed like a convolution
            pairs = [[oracle.solve(v[j, None], *(x[i, j, None, None] for x in (K, b, r)), tau)[0] for j in range(len(v))]
                     for i in range(len(v))]  # fmt: skip
            expected += [sum(row) for row in pairs]
        else:
            expected += oracle.solve(v, K, b, r, tau)
    solver.assert_close(solver(pde, u)[0], torch.stack(expected))


@grids
def test_half_spectrum_agrees_with_the_full_complex_transform(grid):
    h, w = grid
    K, b, r, tau = random_coefficients()
    (ky, ky_odd), (kx, kx_odd) = wave_numbers(h, dtype=f64), wave_numbers(w, dtype=f64)
    ky, ky_odd = ky[:, None], ky_odd[:, None]
    square = K[0, 0] * kx**2 + K[1, 1] * ky**2 + 2 * K[0, 1] * kx_odd * ky_odd
    full = torch.exp(tau * (r - square + 1j * (b[0] * kx_odd + b[1] * ky_odd)))
    u = torch.randn(h, w, dtype=f64)
    complex_result = torch.fft.ifft2(full * torch.fft.fft2(u))
    assert complex_result.imag.abs().max() < 1e-12  # Hermitian: a real signal stays real
    torch.testing.assert_close(apply_symbol(green_symbol(K, b, r, tau, h, w), u), complex_result.real)


@pytest.mark.parametrize("m", [(0, 0), (1, 0), (0, 1), (2, -3), (-2, 1)])
def test_a_mode_is_multiplied_by_its_symbol(m):
    h, w = 8, 9
    K, b, r, tau = random_coefficients()
    y, x = axes(h, w)
    k = 2 * math.pi * torch.tensor(m, dtype=f64)
    phase = k[0] * x + k[1] * y
    symbol = torch.exp(tau * torch.complex(r - k @ K @ k, b @ k))
    expected = (symbol * torch.exp(1j * phase)).real
    torch.testing.assert_close(apply_symbol(green_symbol(K, b, r, tau, h, w), phase.cos()), expected)


@solved(dict(coupling="coupled", groups=1))
@torch.no_grad()
def test_a_mode_of_coupled_channels_is_multiplied_by_a_matrix_exponential(options, solver):
    pde = without_input_map(random_operator(3, **options))
    K, b, r, tau = (x[0] for x in pde.coefficients())
    y, x = axes(7, 10)
    k = 2 * math.pi * torch.tensor([3, -2], dtype=f64)
    wave = torch.exp(1j * (k[0] * x + k[1] * y))
    a = torch.randn(3, dtype=f64)
    G = torch.linalg.matrix_exp(tau * torch.complex(r - torch.einsum("i,abij,j", k, K, k), b @ k))
    expected = (torch.einsum("ij,j->i", G, a.to(G.dtype))[:, None, None] * wave).real
    solver.assert_close(solver(pde, (a[:, None, None] * wave.real)[None])[0], expected)


def test_diffusion_spreads_a_gaussian_into_the_analytic_gaussian():
    n, tau = 32, torch.tensor(0.7, dtype=f64)
    K = torch.tensor([[4.0, 2.5], [2.5, 3.0]], dtype=f64) * 1e-3
    y, x = axes(n, n)

    def wrapped_gaussian(covariance):
        total = torch.zeros(n, n, dtype=f64)
        for i in range(-4, 5):
            for j in range(-4, 5):
                d = torch.stack([x - 0.5 + i, y - 0.5 + j], dim=-1)
                total += torch.exp(-torch.einsum("...i,ij,...j", d, covariance.inverse(), d) / 2)
        return total / covariance.det().sqrt()

    start = torch.tensor([[6.0, -1.0], [-1.0, 5.0]], dtype=f64) * 1e-3
    symbol = green_symbol(K, torch.zeros(2, dtype=f64), torch.zeros((), dtype=f64), tau, n, n)
    torch.testing.assert_close(
        apply_symbol(symbol, wrapped_gaussian(start)), wrapped_gaussian(start + 2 * tau * K), rtol=1e-8, atol=1e-8
    )


def convection(b, h, w):
    zero, one = torch.zeros((), dtype=f64), torch.ones((), dtype=f64)
    return green_symbol(torch.zeros(2, 2, dtype=f64), b, zero, one, h, w)


@pytest.mark.parametrize("grid", [(7, 9), (9, 5), (1, 5)])
@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (2, -3)])
def test_convection_by_whole_tokens_is_a_roll(grid, shift):
    h, w = grid
    u = torch.randn(h, w, dtype=f64)
    b = torch.tensor([shift[0] / w, shift[1] / h], dtype=f64)
    # dh/dt = b . grad h carries a value at x + b tau to x.
    torch.testing.assert_close(apply_symbol(convection(b, h, w), u), u.roll((-shift[1], -shift[0]), dims=(0, 1)))


@pytest.mark.parametrize("grid", [(7, 9), (8, 8), (12, 7)])
def test_convection_by_fractions_of_a_token_is_the_band_limited_shift(grid):
    def band_limited(x, y):
        return 0.3 + (2 * math.pi * (2 * x - 3 * y)).cos() - 2 * (2 * math.pi * (x + 2 * y)).sin()

    y, x = axes(*grid)
    b = torch.tensor([0.123, -0.0711], dtype=f64)
    torch.testing.assert_close(apply_symbol(convection(b, *grid), band_limited(x, y)), band_limited(x + b[0], y + b[1]))


def test_reaction_scales_and_time_adds_up():
    K, b, r, tau = random_coefficients(4)
    none = torch.zeros_like(K), torch.zeros_like(b)
    torch.testing.assert_close(
        green_symbol(*none, r, tau, 5, 6), torch.exp(tau * r)[:, None, None].expand(4, 5, 4).to(torch.complex128)
    )
    halves = green_symbol(K, b, r, 0.3 * tau, 5, 6) * green_symbol(K, b, r, 0.7 * tau, 5, 6)
    torch.testing.assert_close(halves, green_symbol(K, b, r, tau, 5, 6))


@solved(DIAGONAL, COUPLED)
@grids
@torch.no_grad()
def test_two_steps_in_time_are_one_long_step(options, grid, solver):
    pde = without_input_map(random_operator(4, **options))
    u = torch.randn(1, 4, *grid, dtype=f64)

    def evolve(u, tau):
        pde.equation.log_tau.fill_(math.log(tau))
        return solver(pde, u)

    solver.assert_close(evolve(evolve(u, 0.3), 0.6), evolve(u, 0.9))


@solved(DIAGONAL, dict(coupling="pairwise"), by=IN_SINGLE_PRECISION)
@torch.no_grad()
def test_turns_around_the_torus_change_nothing(options, solver):
    """Not even in single precision, where their products with wave numbers would be rounded."""
    pde = without_input_map(PDESSM(4, **options).double())
    pde.equation.b.copy_((64 * pde.equation.b).round() / 64)
    u = torch.randn(1, 4, 8, 9, dtype=f64)
    expected = solver(pde, u)
    pde.equation.b.add_(torch.tensor([1024, -512]))
    solver.assert_close(solver(pde, u), expected)


@solved(DIAGONAL, COUPLED)
@torch.no_grad()
def test_no_time_changes_nothing(options, solver):
    pde = without_input_map(random_operator(4, **options))
    u = torch.randn(1, 4, 6, 7, dtype=f64)
    for tau in (1e-4, 1e-6):
        pde.equation.log_tau.fill_(math.log(tau))
        assert (solver(pde, u) - u).abs().max() < (100 * tau + solver.rounding) * u.abs().max()


def test_embedding_differentiates():
    n = 16
    y, x = axes(n, n)
    phase = 2 * math.pi * (2 * x - 3 * y)
    g0, gx, gy = torch.tensor([0.5, -1.5, 2.0], dtype=f64)
    expected = g0 * phase.sin() + 2 * math.pi * (2 * gx - 3 * gy) * phase.cos()
    torch.testing.assert_close(apply_symbol(embedding_symbol(g0, gx, gy, n, n), phase.sin()), expected)


@solved(*COUPLINGS)
@torch.no_grad()
def test_moves_with_the_image(options, solver):
    pde = random_operator(4, **options)
    u = torch.randn(1, 4, 6, 7, dtype=f64)
    solver.assert_close(solver(pde, u.roll((2, 3), (2, 3))), solver(pde, u).roll((2, 3), (2, 3)))


@solved(DIAGONAL, COUPLED)
@grids
@torch.no_grad()
def test_without_reaction_a_contraction_keeps_the_mean(options, grid, solver):
    pde = without_input_map(random_operator(8, spread=0.2, **options, terms=("diffusion", "convection")))
    u = torch.randn(2, 8, *grid, dtype=f64)
    h = solver(pde, u)
    assert h.norm() <= u.norm() * (1 + solver.rounding)
    solver.assert_close(h.mean((2, 3)), u.mean((2, 3)))


@pytest.mark.parametrize("coupling", ["diagonal", "coupled"])
@torch.no_grad()
def test_starts_without_reaction(coupling):
    pde = without_input_map(PDESSM(16, coupling=coupling).double())
    u = torch.randn(2, 16, 6, 8, dtype=f64)
    torch.testing.assert_close(pde(u).mean((2, 3)), u.mean((2, 3)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("terms", [TERMS, ("convection",), ("convection", "reaction")], ids="-".join)
@couplings
@pytest.mark.parametrize("log_tau", [-2, 5, 1000])
@torch.no_grad()
def test_growth_is_bounded_whatever_the_parameters(options, terms, log_tau):
    pde = PDESSM(8, **options, terms=terms).double()
    for parameter in pde.parameters():
        parameter.normal_(std=2)
    pde.equation.log_tau += log_tau
    h, w = 9, 12
    K, _, r, tau = pde.coefficients()
    symbol = torch.fft.rfft2(pde.kernel(h, w)).flatten(-2).unflatten(0, (len(tau), -1))    # (len(tau), ..., f)
    if options["coupling"] == "coupled":
        torch.testing.assert_close(K, K.transpose(1, 2))
        assert (torch.linalg.eigvalsh(r).amax(1) <= (R_MAX / tau).clamp_max(R_MAX) + 1e-9).all()
        k = torch.randn(2, dtype=f64)
        diffusion = torch.einsum("i,gabij,j->gab", k, K, k)
        assert torch.linalg.eigvalsh(diffusion).min() >= -1e-9 * diffusion.abs().max()
        size = torch.linalg.matrix_norm(symbol.movedim(-1, 0), ord=2)      # (f, groups)
    else:
        assert torch.linalg.eigvalsh(K).min() >= -1e-9 * K.abs().max()
        assert (r <= R_MAX).all()
        size = symbol.abs().flatten(1).amax(1)
    # Of 30 squarings: in 30 draws 1e-6 with MKL's own kernels and 1.2e-6 with those that all processors have.
    rounding = 1e-5 if log_tau > 100 and options["coupling"] == "coupled" else 1e-9
    assert (size <= (math.exp(R_MAX) if "reaction" in terms else 1) * (1 + rounding)).all()


def let_grow(pde, log_tau):
    """As fast as the parameters can make it."""
    with torch.no_grad():
        pde.equation.log_tau.fill_(log_tau)
        if pde.coupling == "coupled":
            pde.equation.r_root.mul_(0.1)
        else:
            pde.equation.r_slack.fill_(-10)
    return pde


@solved(*COUPLINGS, dict(conditioned=True), dict(components=2), by=IN_SINGLE_PRECISION)
@pytest.mark.parametrize("log_tau", [math.log(120), 100, 1e30])
def test_no_state_outgrows_the_bound(options, log_tau, solver):
    """In float32, as a layer runs, with a mode that no diffusion damps."""
    pde_ssm.set_backend(solver.backend)
    pde = let_grow(without_input_map(PDESSM(4, **options)), log_tau)
    most, scale = math.exp(R_MAX), {}
    if pde.conditioned:
        most, scale = math.exp(R_MAX * math.exp(2)), dict(time_scale=torch.full((3, 4), math.exp(2)))
    state = pde.equation.evolve(torch.ones(3, 5, 6, 4), **scale)
    assert 0.9 * most < state.abs().max() < 4.1 * most                     # a channel may hear all four
    state.sum().backward()
    assert all(p.grad.isfinite().all() for p in pde.equation.parameters())


def assert_finite_differences(pde, *inputs):
    """Of a layer's result by its inputs and all parameters."""
    names, values = zip(*pde.named_parameters())

    def run(*given):
        inputs, values = given[: -len(names)], given[-len(names) :]
        return torch.func.functional_call(pde, dict(zip(names, values)), inputs)

    assert torch.autograd.gradcheck(run, (*inputs, *values))


@couplings
def test_gradients_agree_with_finite_differences_at_the_bound(options):
    pde = let_grow(random_operator(2, **options), 1.0)
    u = torch.randn(1, 2, 3, 4, dtype=f64, requires_grad=True)
    assert_finite_differences(pde, u)


@couplings
@torch.no_grad()
def test_below_the_bound_r_is_what_its_parameter_says(options):
    """So that weights which were trained before there was a bound keep their numbers."""
    equation = random_operator(4, **options).equation
    equation.log_tau += 0.5
    if options["coupling"] == "coupled":
        root = equation.r_root.mul_(0.85)
        expected = R_MAX * torch.eye(root.shape[-1], dtype=f64) - root @ root.mT
    else:
        expected = R_MAX - torch.nn.functional.softplus(equation.r_slack.sub_(0.5))
    torch.testing.assert_close(equation.coefficients()[2], expected, rtol=0, atol=0)
    equation.log_tau[0] = 5  # which lowers the rates of its own channel or group alone
    kept = equation.coefficients()[2].isclose(expected, rtol=1e-9)
    assert [part.all().item() for part in (kept[:1], kept[1:])] == [False, True]


@pytest.mark.parametrize("coupling", ["pairwise", "coupled"])
@torch.no_grad()
def test_groups_of_one_channel_are_the_diagonal_coupling(coupling):
    diagonal, pde = random_operator(6), PDESSM(6, coupling=coupling, groups=6).double()
    ours, theirs = pde.equation, diagonal.equation
    pde.R.weight.copy_(diagonal.R.weight)
    for name in ("g0", "gx", "gy", "log_tau"):
        getattr(ours, name).copy_(getattr(theirs, name).view_as(getattr(ours, name)))
    if coupling == "pairwise":
        for name in ("log_lx", "log_ly", "shear", "b", "r_slack"):
            getattr(ours, name).copy_(getattr(theirs, name).view_as(getattr(ours, name)))
    else:
        _, b, r, _ = diagonal.coefficients()
        ours.lx.copy_(theirs.log_lx.exp()[:, None, None])
        ours.ly.copy_(theirs.log_ly.exp()[:, None, None])
        ours.shear.copy_((theirs.shear * theirs.log_ly.exp())[:, None, None])
        ours.bx.copy_(b[:, :1, None])
        ours.by.copy_(b[:, 1:, None])
        ours.r_root.copy_((R_MAX - r).sqrt()[:, None, None])
    u = torch.randn(2, 6, 5, 8, dtype=f64)
    torch.testing.assert_close(pde(u), diagonal(u))


def test_coupled_channels_start_uncoupled():
    torch.manual_seed(1)
    diagonal = PDESSM(16, grid_size=(8, 8))
    torch.manual_seed(1)
    coupled = PDESSM(16, grid_size=(8, 8), coupling="coupled")
    u = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(coupled(u), diagonal(u), rtol=1e-4, atol=1e-5)


@solved(DIAGONAL, dict(coupling="coupled", groups=1))
@pytest.mark.parametrize("grid", [(5, 8), (6, 6)])
@torch.no_grad()
def test_agrees_with_stepping_the_spectral_equation_in_time(options, grid, solver):
    pde = without_input_map(random_operator(2, **options))
    u = torch.randn(1, 2, *grid, dtype=f64)
    state, groups = in_groups(pde, u)
    expected = []
    for v, (K, b, r, tau, *_) in zip(state[0], groups):
        A = oracle.generator(K, b, r, *grid).numpy()
        path = solve_ivp(lambda t, y: A @ y, (0, tau.item()), v.flatten().numpy(), method="DOP853", rtol=1e-10, atol=1e-12)  # noqa: B023
        expected.append(torch.from_numpy(path.y[:, -1]).view_as(v))
    solver.assert_close(solver(pde, u)[0], torch.cat(expected))


def smooth(h, w):
    y, x = axes(h, w)
    return torch.exp((2 * math.pi * (x - 0.2)).sin() + (2 * math.pi * (x + y)).cos())


def test_finite_differences_converge_to_it_at_second_order():
    K = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=f64) * 1e-3
    b = torch.tensor([0.15, -0.1], dtype=f64)
    r, tau = torch.tensor(-0.4, dtype=f64), torch.tensor(0.5, dtype=f64)

    def error(n):
        def right_hand_side(t, h):
            h = torch.from_numpy(h).view(n, n)
            east, west, north, south = h.roll(-1, 1), h.roll(1, 1), h.roll(-1, 0), h.roll(1, 0)
            corners = east.roll(-1, 0) - east.roll(1, 0) - west.roll(-1, 0) + west.roll(1, 0)
            second = K[0, 0] * (east - 2 * h + west) + K[1, 1] * (north - 2 * h + south) + K[0, 1] * corners / 2
            first = b[0] * (east - west) + b[1] * (north - south)
            return (second * n**2 + first * n / 2 + r * h).flatten().numpy()

        start = smooth(n, n)
        end = solve_ivp(right_hand_side, (0, tau.item()), start.flatten().numpy(), rtol=1e-8, atol=1e-10).y[:, -1]
        return (apply_symbol(green_symbol(K, b, r, tau, n, n), start).flatten() - torch.from_numpy(end)).abs().max()

    coarse, middle, fine = error(16), error(32), error(64)
    assert coarse < 0.2  # of values up to 7
    assert math.log2(coarse / middle) == pytest.approx(2, abs=0.25)
    assert math.log2(middle / fine) == pytest.approx(2, abs=0.1)


@couplings
@torch.no_grad()
def test_a_finer_grid_sees_the_same_operator(options):
    pde = random_operator(4, **options)
    pde.equation.gx.mul_(0.1), pde.equation.gy.mul_(0.1)

    def solution(n):
        return pde(torch.stack([smooth(n, n).roll(i * n // 8, i % 2) for i in range(4)])[None])[0]

    finest = solution(64)
    errors = [(solution(n) - finest[:, :: 64 // n, :: 64 // n]).abs().max() for n in (8, 16, 32)]
    assert errors[1] < 0.1 * errors[0]
    assert errors[2] < 1e-3 * errors[1]
    assert errors[2] < 1e-6


@solved(*COUPLINGS, by=SOLVERS[:2])
@pytest.mark.parametrize("terms", [TERMS, ("convection",), ("diffusion", "reaction")], ids="-".join)
def test_gradients_agree_with_finite_differences(options, terms, solver):
    pde_ssm.set_backend(solver.backend)
    pde = random_operator(2, **options, terms=terms)
    u = torch.randn(1, 2, 3, 4, dtype=f64, requires_grad=True)
    assert_finite_differences(pde, u)


@pytest.mark.parametrize("grid", [(1, 4), (4, 1), (2, 2), (5, 3)])
def test_gradients_on_small_grids(grid):
    pde = random_operator(2, gate=True, conditioned=True)
    u, c = torch.randn(2, 2, *grid, dtype=f64, requires_grad=True), torch.randn(2, 2, dtype=f64, requires_grad=True)
    assert_finite_differences(pde, u, c)
