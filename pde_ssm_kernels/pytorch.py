"""Couplings of all pairs of channels, a few wave vectors at a time, in real arithmetic.

The plain implementation needs the symbol of all wave vectors at once, N c D complex numbers for groups of c channels, and
complex exponentials and products. One layer of 384 channels in one group, both passes, one thread of an Intel Xeon, takes, in
seconds, plain complex arithmetic in the same pieces / this file: 4 images of 8 x 8 tokens 0.45 / 0.15, of 16 x 16 1.58 / 0.47;
16 images of 16 x 16 1.73 / 1.03. Real parts precede imaginary parts along one axis, since real products run on tensor cores.
"""

from functools import lru_cache

import torch
from torch.utils.checkpoint import checkpoint

from .modes import cached_per_device, traced, transformed, widen
from .products import matmul, matrix_exp

CHUNK = 2**20            # entries of a symbol that exist at once in training
LARGEST_WHOLE = 2**25    # entries of the largest symbol that evaluation computes at once, and may keep
LONGEST_MATRIX = 128     # sides up to which products with Fourier matrices are no slower than FFTs
LEAST_GROWTH = -80       # exp of anything smaller is negligible in float32, and is ten times slower where it underflows


def evolve_in_pieces(v, equation, time_scale=None):
    """Maps tokens v (B, h, w, C) to their state: for Pairwise and Coupled, an implementation for `pde_ssm_kernels.choose`."""
    h, w = v.shape[1:3]
    spectra, embedding = lanes(real_spectrum(widen(v)), equation.groups), torch.cat(equation.embedding(), dim=1)
    even, odd = monomials(equation, h, w)
    # shape[0], since len() is a plain number, which would fix the grid of an exported graph
    if not torch.is_grad_enabled() and even.shape[0] * equation.g0.numel() <= LARGEST_WHOLE:
        states = multiply(equation.symbol(h, w), embed(embedding, spectra, odd))
    else:
        states = evolve_spectra(equation, spectra, embedding, *exponents(equation), h, w)
    return from_real_spectrum(from_lanes(states, h), h, w).to(v.dtype)


def evolve_spectra(equation, spectra, embedding, growth, phase, h, w):
    """Returns G B v of spectra v (groups, f, 2, B, c), in the same shape."""
    even, odd = monomials(equation, h, w)
    embedded = embed(embedding, spectra, odd)                              # (groups, f, 2 B, c)
    at_once = max(1, CHUNK // equation.g0.numel())
    pieces = list(zip(embedded.split(at_once, dim=1), even.split(at_once), odd.split(at_once)))
    run = evolve_piece if len(pieces) == 1 or transformed() else evolve_and_forget         # torch.func knows no checkpoints
    return torch.cat([run(equation, *piece, growth, phase) for piece in pieces], dim=1)


def symbol(equation, h, w):
    """Returns G(k) at all wave vectors of a grid: see `symbol_at`."""
    return symbol_at(equation, *monomials(equation, h, w), *exponents(equation))


def monomials(equation, h, w):
    """Returns the monomials of the exponent, Eq. (8), at the f = h (w // 2 + 1) wave vectors of a grid: (f, 4) and (f, 2)."""
    like = widen(equation.g0)
    return _monomials(equation.wave_vectors, h, w, like.dtype, like)


@cached_per_device
def _monomials(wave_vectors, h, w, dtype, device):
    kx, ky, kx_odd, ky_odd = wave_vectors(h, w, torch.empty(0, dtype=dtype, device=device))
    even = torch.broadcast_tensors(torch.ones_like(kx), -(kx**2), -2 * kx_odd * ky_odd, -(ky**2))
    odd = torch.broadcast_tensors(kx_odd, ky_odd)
    return torch.stack(even, dim=-1).flatten(0, 1), torch.stack(odd, dim=-1).flatten(0, 1)


def exponents(equation):
    """Returns tau times the coefficients of growth, r, Kxx, Kxy and Kyy, (groups, 4, c c), and of phase, (groups, 2, c c)."""
    tau, (r, *others) = equation.tau(), equation.entries()
    entries = tau[:, None, None] * torch.stack([equation.bound(r, tau), *others], dim=1).flatten(2)
    growth, shift = entries.split([4, 2], dim=1)
    return growth, shift if equation.is_system else shift - shift.round()  # a matrix under an exponential has no period


def evolve_piece(equation, embedded, even, odd, growth, phase):
    """Returns G B v at a few wave vectors, (groups, f, 2, B, c)."""
    return multiply(symbol_at(equation, even, odd, growth, phase), embedded)


def evolve_and_forget(*arguments):
    """Returns what `evolve_piece` does, but stores no symbol in training: it is computed again for the gradients."""
    return checkpoint(evolve_piece, *arguments, use_reentrant=False, preserve_rng_state=False)


# On CPUs, short sides are transformed by products with Fourier matrices, whose results lie in memory as the next product needs
# them. With FFTs instead, both transforms of 384 channels and their gradients take 3.9 times as long for 40 x 40 tokens,
# 2.5 times for 64 x 64 (batch 4), 2.0 for 96 x 96 and 1.7 for 128 x 128 (batch 1; one thread of an Intel Xeon).


def real_spectrum(v):
    """Computes rfft2 along h and w, real and imaginary parts: (B, h, w, C) -> (B, 2, h, w // 2 + 1, C)."""
    B, h, w, C = v.shape
    if B == 0:
        return v.reshape(B, 2, h, w // 2 + 1, C)                           # no view of complex numbers: those have no gradient
    if by_matrices(v, h, w):
        along_w, along_h, _ = fourier_matrices(h, w, v.dtype)
        v_hat = torch.bmm(along_w.expand(B * h, -1, -1), v.reshape(B * h, w, C))       # (B h, 2 (w // 2 + 1), C)
        return torch.bmm(along_h.expand(B, -1, -1), v_hat.view(B, 2 * h, -1)).view(B, 2, h, -1, C)
    return torch.view_as_real(torch.fft.rfft2(v.movedim(-1, 1).contiguous())).permute(0, 4, 2, 3, 1)


def from_real_spectrum(v_hat, h, w):
    """Inverts `real_spectrum`."""
    B, _, _, _, C = v_hat.shape
    if by_matrices(v_hat, h, w) and B:
        _, along_h, back = fourier_matrices(h, w, v_hat.dtype)
        rows = torch.bmm(along_h.T.expand(B, -1, -1), v_hat.reshape(B, 2 * h, -1))     # its inverse, but for the scale
        return torch.bmm(back.expand(B * h, -1, -1), rows.view(B * h, -1, C)).view(B, h, w, C)
    v_hat = torch.complex(*v_hat.movedim(-1, -3).contiguous().unbind(1))
    return torch.fft.irfft2(v_hat, s=(h, w)).movedim(1, -1)


def by_matrices(x, h, w):
    return x.device.type == "cpu" and max(h, w) <= LONGEST_MATRIX and not traced(x)


@lru_cache(maxsize=16)
def fourier_matrices(h, w, dtype):
    """Returns the real transform along w, (2 (w // 2 + 1), w), the complex one along h as a real matrix, (2 h, 2 h), and the
    inverse along w, (w, 2 (w // 2 + 1)), which includes the factor 1 / (h w) of both.

    The first gives real parts, then imaginary parts. The second takes pairs of them, row by row, and gives all real parts
    before all imaginary ones.
    """
    with torch.inference_mode(False), torch.device("cpu"):               # the cached result outlives its first caller's mode
        f = w // 2 + 1
        forth = torch.view_as_real(torch.fft.rfft(torch.eye(w, dtype=torch.float64)))  # (w, f, 2)
        F = torch.fft.fft(torch.eye(h, dtype=torch.float64))                           # symmetric, (h, h)
        along_h = torch.stack([torch.stack([F.real, -F.imag], dim=-1), torch.stack([F.imag, F.real], dim=-1)])
        counted = torch.full((f, 1), 2 / (h * w), dtype=torch.float64)
        counted[0] = 1 / (h * w)                                           # kx = 0 has no partner of opposite sign, nor does
        counted[w // 2 : f if w % 2 == 0 else w // 2] = 1 / (h * w)        # the Nyquist frequency of an even w
        back = (forth * counted).transpose(1, 2).reshape(w, -1)
        forth = forth.permute(2, 1, 0).reshape(-1, w)
        return forth.to(dtype), along_h.reshape(2 * h, 2 * h).to(dtype), back.to(dtype)


def lanes(v_hat, groups):
    """Returns a spectrum (B, 2, h, w // 2 + 1, C) with channels by groups and wave vectors in a row, (groups, f, 2, B, c)."""
    return v_hat.flatten(2, 3).unflatten(-1, (groups, -1)).permute(3, 2, 1, 0, 4)


def from_lanes(spectra, h):
    """Inverts `lanes`."""
    return spectra.permute(3, 2, 1, 0, 4).flatten(3).unflatten(2, (h, -1))


def embed(g, spectra, odd):
    """Multiplies by B(k) = g0 + i (gx kx + gy ky): g (groups, 3 c, c), (groups, f, 2, B, c) -> (groups, f, 2 B, c).     (6)"""
    parts = matmul(spectra.flatten(1, 3), g.mT)                            # (groups, f 2 B, 3 c)
    v, v_x, v_y = parts.view(*spectra.shape[:-1], g.shape[1]).chunk(3, dim=-1)   # (groups, f, 2, B, c)
    kx, ky = odd[:, :, None, None, None].unbind(1)
    (real, imag), (dx_real, dx_imag) = v.unbind(2), (kx * v_x + ky * v_y).unbind(2)
    return torch.cat([real - dx_imag, imag + dx_real], dim=2)


def symbol_at(equation, even, odd, growth, phase):
    """Returns G(k) at the f wave vectors of these monomials, real parts above imaginary ones: (groups, f, 2 c, c)."""
    exponential = matrix_exponential if equation.is_system else entrywise_exponential
    G = exponential(polynomial(even, growth), polynomial(odd, phase))      # (groups, f, 2, c c)
    return G.unflatten(-1, equation.g0.shape[1:]).flatten(2, 3)


def polynomial(monomials, coefficients):
    """Computes sum_j monomials_j coefficients_j: (f, n), (groups, n, C) -> (groups, f, C)."""
    alone = coefficients.device.type == "cpu" and not traced(coefficients)         # compilers fuse sums
    if alone and torch.backends.mkldnn.matmul.fp32_precision not in ("tf32", "bf16"):      # these settings round products
        return monomials @ coefficients
    return (monomials[:, :, None] * coefficients[..., None, :, :]).sum(-2)


def multiply(G, v):
    """Computes G v at each wave vector: (groups, f, 2 c, c), (groups, f, 2 B, c) -> (groups, f, 2, B, c)."""
    B, c = v.shape[2] // 2, v.shape[3]  # stated, because unflatten cannot infer a size where there are no images
    products = matmul(G, v.mT).unflatten(3, (2, B)).unflatten(2, (2, c))   # (groups, f, 2, c, 2, B)
    (rr, ir), (ri, ii) = (product.unbind(2) for product in products.unbind(4))   # ri: G's real part times v's imaginary one
    return torch.stack([rr - ii, ri + ir], dim=2).mT


def matrix_exponential(growth, phase):
    """Computes exp of c x c matrices growth + i phase, real part, then imaginary part: (..., c c) twice -> (..., 2, c c)."""
    c = round(int(growth.shape[-1]) ** 0.5)                                 # int(): torch.jit.trace makes sizes tensors
    G = matrix_exp(torch.complex(growth, phase).unflatten(-1, (c, c))).flatten(-2)
    return torch.stack([G.real, G.imag], dim=-2)


def entrywise_exponential(growth, phase):
    """Computes exp(growth + i phase) of each entry, real part, then imaginary part: (..., n) twice -> (..., 2, n)."""
    return _exponential(growth, phase) if traced(growth) else Exponential.apply(growth, phase)


def _exponential(growth, phase):
    size = growth.clamp_min(LEAST_GROWTH).exp()
    return torch.stack([size * phase.cos(), size * phase.sin()], dim=-2)


class Exponential(torch.autograd.Function):
    """`entrywise_exponential`, which keeps nothing but its result for the gradient."""

    @staticmethod
    def forward(ctx, growth, phase):
        result = _exponential(growth, phase)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        (real, imag), (g_real, g_imag) = (x.unbind(-2) for x in (*ctx.saved_tensors, gradient))
        growth_grad = torch.addcmul(real * g_real, imag, g_imag)
        return growth_grad, torch.addcmul(real * g_imag, imag, g_real, value=-1)
