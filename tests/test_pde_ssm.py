import copy
import math

import pytest
import torch

import oracle
from pde_ssm import PDESSM, R_MAX, TERMS, PDESSMBlock, embedding_symbol, green_symbol, wave_numbers

GRIDS = [(1, 1), (1, 8), (8, 1), (2, 2), (5, 7), (7, 5), (8, 8), (6, 9)]
f64 = torch.float64


def random_coefficients(*shape):
    """K, b, r, tau with some diffusion in every direction, over `shape`."""
    L = 0.05 * torch.randn(*shape, 2, 2, dtype=f64)
    return L @ L.mT, 0.2 * torch.randn(*shape, 2, dtype=f64), torch.randn(shape, dtype=f64), 0.5 + torch.rand(shape, dtype=f64)


def apply_symbol(symbol, u):
    return torch.fft.irfft2(symbol * torch.fft.rfft2(u), s=u.shape[-2:])


def random_operator(dim, **options):
    """A PDESSM in float64 whose every coefficient is random."""
    pde = PDESSM(dim, **options).double()
    with torch.no_grad():
        for parameter in pde.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return pde


@pytest.mark.parametrize("grid", GRIDS)
def test_solves_the_discretised_equation(grid):
    pde = random_operator(3, grid_size=(8, 8))
    u = torch.randn(2, 3, *grid, dtype=f64)
    v = torch.einsum("dc,bchw->bdhw", pde.R.weight, u)
    h = pde(u)
    K, b, r, tau = pde.coefficients()
    for c in range(3):
        for i in range(2):
            expected = oracle.solve(v[i, c], K[c], b[c], r[c], tau[c], pde.g0[c], pde.gx[c], pde.gy[c])
            torch.testing.assert_close(h[i, c], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("grid", GRIDS)
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
    y, x = torch.meshgrid(torch.arange(h, dtype=f64) / h, torch.arange(w, dtype=f64) / w, indexing="ij")
    k = 2 * math.pi * torch.tensor(m, dtype=f64)
    phase = k[0] * x + k[1] * y
    symbol = torch.exp(tau * torch.complex(r - k @ K @ k, b @ k))
    expected = (symbol * torch.exp(1j * phase)).real
    torch.testing.assert_close(apply_symbol(green_symbol(K, b, r, tau, h, w), phase.cos()), expected)


def test_diffusion_spreads_a_gaussian_into_the_analytic_gaussian():
    n, tau = 32, torch.tensor(0.7, dtype=f64)
    K = torch.tensor([[4.0, 2.5], [2.5, 3.0]], dtype=f64) * 1e-3
    axis = torch.arange(n, dtype=f64) / n
    y, x = torch.meshgrid(axis, axis, indexing="ij")

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


@pytest.mark.parametrize("grid", [(7, 9), (9, 5), (1, 5)])
@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (2, -3)])
def test_convection_by_whole_tokens_is_a_roll(grid, shift):
    h, w = grid
    u = torch.randn(h, w, dtype=f64)
    b = torch.tensor([shift[0] / w, shift[1] / h], dtype=f64)
    zero, one = torch.zeros((), dtype=f64), torch.ones((), dtype=f64)
    moved = apply_symbol(green_symbol(torch.zeros(2, 2, dtype=f64), b, zero, one, h, w), u)
    # dh/dt = b . grad h carries a value at x + b tau to x.
    torch.testing.assert_close(moved, u.roll((-shift[1], -shift[0]), dims=(0, 1)))


def test_reaction_scales_and_time_adds_up():
    K, b, r, tau = random_coefficients(4)
    none = torch.zeros_like(K), torch.zeros_like(b)
    torch.testing.assert_close(
        green_symbol(*none, r, tau, 5, 6), torch.exp(tau * r)[:, None, None].expand(4, 5, 4).to(torch.complex128)
    )
    halves = green_symbol(K, b, r, 0.3 * tau, 5, 6) * green_symbol(K, b, r, 0.7 * tau, 5, 6)
    torch.testing.assert_close(halves, green_symbol(K, b, r, tau, 5, 6))


def test_embedding_differentiates():
    n = 16
    y, x = torch.meshgrid(*2 * [torch.arange(n, dtype=f64) / n], indexing="ij")
    phase = 2 * math.pi * (2 * x - 3 * y)
    g0, gx, gy = torch.tensor([0.5, -1.5, 2.0], dtype=f64)
    expected = g0 * phase.sin() + 2 * math.pi * (2 * gx - 3 * gy) * phase.cos()
    torch.testing.assert_close(apply_symbol(embedding_symbol(g0, gx, gy, n, n), phase.sin()), expected)


def test_moves_with_the_image():
    pde = random_operator(4)
    u = torch.randn(1, 4, 6, 7, dtype=f64)
    torch.testing.assert_close(pde(u.roll((2, 3), (2, 3))), pde(u).roll((2, 3), (2, 3)))


@pytest.mark.parametrize("grid", GRIDS)
def test_starts_as_a_contraction_that_keeps_the_mean(grid):
    pde = PDESSM(16).double()
    v = torch.randn(2, 16, *grid, dtype=f64)
    pde.R.weight.data = torch.eye(16, dtype=f64)
    assert pde.symbol(*grid).abs().max() <= 1 + 1e-6
    torch.testing.assert_close(pde(v).mean((2, 3)), v.mean((2, 3)), rtol=1e-6, atol=1e-6)


def test_growth_is_bounded_whatever_the_parameters():
    pde = PDESSM(64).double()
    for parameter in pde.parameters():
        parameter.data.normal_(std=5)
    with torch.no_grad():
        K, _, r, tau = pde.coefficients()
        assert torch.linalg.eigvalsh(K).min() >= -1e-9 * K.abs().max()
        assert (r <= R_MAX).all()
        green = green_symbol(*pde.coefficients(), 9, 12).abs().amax((1, 2))
        assert (green <= torch.exp(tau * R_MAX)).all()


def test_initial_scales_span_half_a_token_to_a_quarter_of_the_image():
    n, tokens = 256, 16
    pde = PDESSM(32, grid_size=(tokens, tokens)).double()
    with torch.no_grad():
        pde.b.zero_()
        kernel = pde.kernel(n, n)
        distance = (torch.fft.fftfreq(n, dtype=f64)).expand(n, n)
        width = (kernel * distance**2).sum((1, 2)).sqrt()
    assert width[0] == pytest.approx(0.5 / tokens, rel=1e-3)
    assert width[-1] == pytest.approx(0.25, rel=0.1)  # the torus cuts the tails of the widest
    ratios = width[1:20] / width[:19]
    torch.testing.assert_close(ratios, ratios[:1].expand(19), rtol=1e-3, atol=0)
    shifts = PDESSM(4096, grid_size=(tokens, tokens)).b * tokens
    assert shifts.norm(dim=1).max() <= 2
    assert (shifts.mean(0).abs() < 0.1).all()


def test_kernel_is_what_an_impulse_becomes():
    pde = random_operator(2)
    with torch.no_grad():
        pde.g0.fill_(1), pde.gx.zero_(), pde.gy.zero_(), pde.R.weight.copy_(torch.eye(2))
    impulse = torch.zeros(1, 2, 5, 6, dtype=f64)
    impulse[..., 0, 0] = 1
    torch.testing.assert_close(pde(impulse)[0], pde.kernel(5, 6))


@pytest.mark.parametrize("terms", [("diffusion",), ("convection",), ("reaction",), ("diffusion", "convection"), TERMS])
def test_absent_terms_have_no_parameters(terms):
    pde = random_operator(3, terms=terms)
    K, b, r, _ = pde.coefficients()
    assert K.any() == ("diffusion" in terms)
    assert b.any() == ("convection" in terms)
    assert r.any() == ("reaction" in terms)
    per_channel = 4 + 3 * ("diffusion" in terms) + 2 * ("convection" in terms) + ("reaction" in terms)
    assert sum(p.numel() for p in pde.parameters()) == 9 + 3 * per_channel
    pde(torch.randn(1, 3, 4, 5, dtype=f64)).square().sum().backward()
    assert all(p.grad is not None for p in pde.parameters())


@pytest.mark.parametrize("grid", [(1, 4), (3, 4), (5, 3)])
def test_gradients_agree_with_finite_differences(grid):
    pde = random_operator(2)
    u = torch.randn(1, 2, *grid, dtype=f64, requires_grad=True)
    names, values = zip(*pde.named_parameters())

    def run(u, *values):
        return torch.func.functional_call(pde, dict(zip(names, values)), u)

    assert torch.autograd.gradcheck(run, (u, *values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_half_precision_keeps_a_float32_core(dtype, scale):
    block = PDESSMBlock(64, grid_size=(5, 6))
    tokens = (scale * torch.randn(2, 30, 64)).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = block(tokens)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert tokens.grad.isfinite().all()
    expected = block.double()(tokens.double())
    error = (out.double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_block_puts_tokens_on_the_grid_row_by_row():
    block = PDESSMBlock(8, num_heads=2, qkv_bias=True, proj_drop=0.0, grid_size=(3, 4)).double()
    u = torch.randn(2, 8, 3, 4, dtype=f64)
    tokens = u.flatten(2).transpose(1, 2)
    torch.testing.assert_close(block(tokens), block.pde(u).flatten(2).transpose(1, 2))
    square = PDESSMBlock(8).double()
    assert square(torch.randn(1, 25, 8, dtype=f64)).shape == (1, 25, 8)


def test_the_symbol_is_kept_for_inference(monkeypatch):
    pde, computed = PDESSM(4).eval(), []
    monkeypatch.setattr(PDESSM, "_symbol", lambda self, h, w, f=PDESSM._symbol: computed.append((h, w)) or f(self, h, w))
    with torch.no_grad():
        for grid in [(4, 4), (4, 4), (3, 5), (4, 4), (3, 5)]:
            pde(torch.randn(1, 4, *grid))
    assert computed == [(4, 4), (3, 5)]


def change_in_place(pde):
    pde.log_tau.add_(0.5)
    return pde


def step_optimiser(pde):
    for p in pde.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(pde.parameters(), lr=0.1).step()
    return pde


def load_other_weights(pde):
    pde.load_state_dict(PDESSM(4, grid_size=(2, 2)).state_dict())
    return pde


def assign_other_weights(pde):
    pde.load_state_dict(PDESSM(4, grid_size=(2, 2)).state_dict(), assign=True)
    return pde


def replace_parameters(pde):
    for shift in (0.2, 0.3):  # the second may lie where the first one lay
        pde.log_tau = torch.nn.Parameter(torch.full((4,), shift))
    return pde


def average_with_another(pde):
    torch._foreach_lerp_(list(pde.parameters()), list(PDESSM(4, grid_size=(2, 2)).parameters()), 0.5)
    return pde


def go_through_half(pde):
    return pde.half().float()


def change_a_copy(pde):
    twin = copy.deepcopy(pde)
    for _ in range(5):
        twin.log_tau.add_(0.1)
    return twin


def edit_behind_autograd(pde):
    pde.log_tau.data.add_(0.5)
    return pde.train().eval()


CHANGES = [
    change_in_place, step_optimiser, load_other_weights, assign_other_weights, replace_parameters, average_with_another,
    go_through_half, change_a_copy, edit_behind_autograd,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_the_kept_symbol_is_never_stale(change):
    pde = PDESSM(4).eval()
    pde.log_tau.add_(0.1)
    pde.symbol(4, 6)
    pde = change(pde)
    fresh = PDESSM(4)
    fresh.load_state_dict(pde.state_dict())
    torch.testing.assert_close(pde.symbol(4, 6), fresh.symbol(4, 6), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PDESSM(4, terms=()), "terms must be some of"),
        (lambda: PDESSM(4, terms=("advection",)), "advection"),
        (lambda: PDESSM(4, coupling="none"), "known: diagonal"),
        (lambda: PDESSMBlock(4)(torch.randn(1, 5, 4)), "5 tokens"),
        (lambda: PDESSMBlock(4, grid_size=(2, 3))(torch.randn(1, 5, 4)), r"2 x 3 = 6 tokens"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="term"):
        PDESSMBlock(4, term="diffusion")
