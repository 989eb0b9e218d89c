"""PDE-SSM: token mixing by a learnable convection-diffusion-reaction equation, solved in the Fourier domain.

On a grid of h x w tokens, seen as the unit torus, the hidden state follows

    dh/dt = div(K grad h) + b . grad h + r h,     h(0) = (g0 + gx d/dx + gy d/dy) (R u)          (2), (6)

up to time tau. A Fourier mode with wave vector k = 2 pi (m_x, m_y) is multiplied by G(k) B(k), so that

    h = irfft2( G(k) B(k) rfft2(R u) ),     G(k) = exp(tau Lambda(k)),     B(k) = g0 + i (gx kx + gy ky)

costs O(N log N). Equation numbers are those of the PDE-SSM paper. x runs along the width and y along the height:
tensors are (..., h, w), so x is their last axis, while pairs of coefficients are in the order (x, y).
This file needs nothing but torch.
"""

import math
from contextlib import nullcontext
from copy import deepcopy
from functools import cache, lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

TERMS = ("diffusion", "convection", "reaction")
SYMBOL_ROWS = ("r", "Kxx", "Kxy", "Kyy", "bx", "by", "gx", "gy", "g0")  # of (9, C): tau times the first six, and the embedding
EXPONENTS = 6        # the first of those rows
R_MAX = 1.0          # r <= R_MAX and tau r <= R_MAX, so that no mode grows by more than exp(R_MAX)
LARGEST_LOG_TAU = 15  # so that tau times other numbers is finite in float32, wherever an optimiser sends log_tau
CHUNK = 2**20        # entries of a matrix symbol that exist at once in training
LARGEST_WHOLE = 2**25  # entries of the largest matrix symbol that evaluation computes at once, and may keep
GRIDS_KEPT = 2       # grid sizes whose symbols evaluation keeps of a layer
KEPT = 2**31         # bytes that it keeps of all layers together
COMPARED = 2**9     # entries of each parameter by which it sees writes that PyTorch does not count
LONGEST_MATRIX = 32  # sides up to which products with Fourier matrices are no slower than an FFT on CPU
MOST_AT_ONCE = 64    # tokens up to which one matrix for both sides beats two
LEAST_GROWTH = -80   # the exponential of less is nothing in float32, but takes ten times as long where it underflows

# timm's Attention takes these too; none of them has a meaning for a PDE.
_ATTENTION_ARGUMENTS = {
    "attn_head_dim", "qk_norm", "scale_norm", "proj_bias", "attn_drop", "proj_drop", "norm_layer", "gated",
}  # fmt: skip


def wave_numbers(n, half=False, dtype=torch.float32, device=None):
    """Wave numbers 2 pi m of n points on the unit circle, in FFT order; with `half`, those of rfft alone.

    Returns (k, k_odd). They differ at the Nyquist frequency of an even n: it has no partner of the other sign, so
    a real signal admits no odd power of k there, and k_odd is 0 (the derivative of cos(pi n x) vanishes on the grid).
    """
    m = torch.arange(n // 2 + 1, dtype=dtype, device=device)
    if not half:
        m = torch.cat([m[: (n + 1) // 2], torch.arange(-(n // 2), 0, dtype=dtype, device=device)])
    return 2 * math.pi * m, 2 * math.pi * m * (2 * m.abs() != n)


def wave_monomials(h, w, dtype=torch.float32, device=None):
    """What Lambda(k) is linear in, at the f = h (w // 2 + 1) wave vectors of an h x w grid in the order of rfft2.

    Returns (1, -kx^2, -2 kx ky, -ky^2), even in k, as (f, 4), and (kx, ky), odd in k, as (f, 2).
    """
    ky, ky_odd = (k[:, None] for k in wave_numbers(h, dtype=dtype, device=device))
    kx, kx_odd = wave_numbers(w, half=True, dtype=dtype, device=device)
    even = torch.broadcast_tensors(torch.ones_like(kx), -(kx**2), -2 * kx_odd * ky_odd, -(ky**2))
    odd = torch.broadcast_tensors(kx_odd, ky_odd)
    return torch.stack(even, dim=-1).flatten(0, 1), torch.stack(odd, dim=-1).flatten(0, 1)


def axis_monomials(h, w, dtype=torch.float32, device=None):
    """What the symbol of a diagonal coupling is made of, as rows that multiply the first eight of `SYMBOL_ROWS`.

    Along x, w // 2 + 1 rows each: r - Kxx kx^2, -2 Kxy kx, gx kx and bx kx; along y, h rows each: by ky, -Kyy ky^2 and
    gy ky. Returns them, (4 (w // 2 + 1) + 3 h, 8), and the ky by which the second are to be multiplied, (h, 1).
    """
    r, Kxx, Kxy, Kyy, bx, by, gx, gy = torch.eye(8, dtype=dtype, device=device)
    ky, ky_odd = (k[:, None] for k in wave_numbers(h, dtype=dtype, device=device))
    kx, kx_odd = (k[:, None] for k in wave_numbers(w, half=True, dtype=dtype, device=device))
    along_x = r - kx**2 * Kxx, -2 * kx_odd * Kxy, kx_odd * gx, kx_odd * bx
    along_y = ky_odd * by, -(ky**2) * Kyy, ky_odd * gy
    return torch.cat([*along_x, *along_y]), ky_odd


def moments(h, w, dtype=torch.float32, device=None):
    """What sums over wave vectors are taken with for the gradients of a symbol's coefficients: (2, f, 15).

    Real parts with the four even `wave_monomials` and with kx^2, kx ky and ky^2 as products of odd ones; imaginary parts
    with kx and with ky times each even one.
    """
    even, odd = wave_monomials(h, w, dtype, device)
    kx, ky = odd.split(1, dim=1)
    real = torch.cat([even, kx * odd, ky * ky], dim=1)                     # (f, 7)
    imag = torch.cat([kx * even, ky * even], dim=1)                        # (f, 8)
    return torch.stack([nn.functional.pad(real, (0, 8)), nn.functional.pad(imag, (7, 0))])


def on_grid(function, h, w, like):
    """One of the three above, in the precision of a tensor and on its device, kept between calls."""
    return (function if _traced(like) else _keeping(function))(h, w, like.dtype, like.device)


@cache
def _keeping(function):
    @lru_cache(maxsize=16)
    def kept(*arguments):
        with torch.inference_mode(False):  # what is kept outlives the mode that the first caller is in
            return function(*arguments)

    return kept


def polynomial(monomials, coefficients):
    """sum_j monomials_j coefficients_j: (f, n), (..., n, C) -> (..., f, C)"""
    if _by_products(coefficients):
        return monomials @ coefficients
    return (monomials[:, :, None] * coefficients[..., None, :, :]).sum(-2)


def _by_products(x):
    """Whether sums over monomials are products of matrices. GPUs may round those to TF32, and compilers fuse sums."""
    return x.device.type == "cpu" and not _traced(x)


def polynomial_by_channel(monomials, coefficients):
    """The same, channel after channel: (..., C, f)"""
    return coefficients.mT @ monomials.mT if _by_products(coefficients) else polynomial(monomials, coefficients).mT


def adjoint(monomials, gradient):
    """The transpose of `polynomial`: (f, n), (..., f, C) -> (..., n, C)"""
    if _by_products(gradient):
        return monomials.mT @ gradient
    return torch.stack([(column[:, None] * gradient).sum(-2) for column in monomials.unbind(1)], dim=-2)


def green_symbol(K, b, r, tau, h, w):
    """The Green's function in the Fourier domain: G(k) = exp(tau Lambda(k)) with                               (10)

    Lambda(k) = -(Kxx kx^2 + 2 Kxy kx ky + Kyy ky^2) + r + i (bx kx + by ky)                                     (8)

    K (..., 2, 2), b (..., 2), r (...) and tau (...) broadcast over their leading axes and are in units of the torus
    (side 1, whatever h and w). Returns (..., h, w // 2 + 1), complex64, or complex128 for float64 coefficients.
    """
    even, odd = on_grid(wave_monomials, h, w, K)
    r, Kxx, Kxy, Kyy, bx, by = torch.broadcast_tensors(r, K[..., 0, 0], K[..., 0, 1], K[..., 1, 1], *b.unbind(-1))
    growth = polynomial(even, torch.stack([r, Kxx, Kxy, Kyy], dim=-1)[..., None])           # (..., f, 1)
    phase = polynomial(odd, within_a_turn(tau[..., None] * torch.stack([bx, by], dim=-1))[..., None])
    return torch.polar(torch.exp(tau[..., None, None] * growth), phase).unflatten(-2, (h, w // 2 + 1)).squeeze(-1)


def within_a_turn(shift):
    """The same shift of the unit torus, of at most half its side, whose product with wave numbers is rounded less."""
    return shift - shift.round()


def embedding_symbol(g0, gx, gy, h, w):
    """The embedding of the input in the Fourier domain, Eq. (6): B(k) = g0 + i (gx kx + gy ky).

    g0, gx, gy (...) -> (..., h, w // 2 + 1), complex.
    """
    _, odd = on_grid(wave_monomials, h, w, g0)
    g0, gx, gy = torch.broadcast_tensors(g0, gx, gy)
    imag = polynomial(odd, torch.stack([gx, gy], dim=-1)[..., None])                        # (..., f, 1)
    return torch.complex(g0[..., None, None].expand_as(imag), imag).unflatten(-2, (h, w // 2 + 1)).squeeze(-1)


def initial_widths(token, n):
    """n diffusion lengths l with K = l^2, so that the Gaussian's standard deviation at tau = 1 is sqrt(2) l."""
    return torch.logspace(math.log(token / 2), math.log(max(1 / 4, token / 2)), n, base=math.e) / math.sqrt(2)


def initial_shifts(token, shape):
    """Random vectors (*shape, 2) of up to two tokens, in all directions."""
    angle, length = 2 * math.pi * torch.rand(shape), 2 * token * torch.rand(shape)
    return torch.stack([length * angle.cos(), length * angle.sin()], dim=-1)


def by_channel(h, w):
    """Whether tokens and symbols of a grid lie in memory channel after channel, as FFTs want them, not token after token."""
    return max(h, w) > LONGEST_MATRIX


def convolve(v, symbol):
    """irfft2(symbol * rfft2(v)) along h and w, computed in float32 or wider, in the type of v.

    v (B, h, w, C), real. symbol, or one per image with B in front: (2, h, w // 2 + 1, C), its real and imaginary part,
    or complex (C, h, w // 2 + 1), if `by_channel`.
    On CPU the transforms of short sides are matrix products and the gradient is written by hand: see `Convolution`.
    """
    if not _per_image(symbol) and (kernels := _triton_kernels(v)):
        return kernels.evolve(v, symbol)
    if v.device.type == "cpu" and not _traced(v, symbol):
        if torch.is_grad_enabled():
            return Convolution.apply(_widen(v), symbol)[0].to(v.dtype)
        return field(multiply_over(symbol, spectrum(_widen(v))), *v.shape[1:3]).to(v.dtype)
    if _compiled_for_cpu(v):
        return field_op(multiply(symbol, spectrum_op(_widen(v))), *v.shape[1:3]).to(v.dtype)
    v_hat = torch.fft.rfft2(_widen(v).movedim(-1, 1).contiguous())         # (B, C, h, w // 2 + 1)
    # Contiguous, here and elsewhere: for other layouts complex transforms of MKL may write beyond their memory.
    return torch.fft.irfft2(_as_complex(symbol).contiguous() * v_hat, s=v.shape[1:3]).movedim(1, -1).to(v.dtype)


def _traced(*tensors):
    """Whether somebody looks at each operator: torch.compile, vmap and its like, forward-mode differentiation, a mode that
    sees them (as counters of operations do), or tensors of another class (fake, distributed)."""
    if _observed():
        return True
    if any(type(x) not in (torch.Tensor, nn.Parameter) for x in tensors):
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _observed():
    """The part of it that is no matter of the tensors."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()


def _exporting():
    """PyTorch 2.7 and 2.8 say so in torch.compile, too; 2.6 has no such question and cannot export."""
    return torch.compiler.is_compiling() and hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def _compiled_for_cpu(x):
    return x.device.type == "cpu" and torch.compiler.is_compiling()


def _as_complex(symbol):
    """(..., 2, h, w // 2 + 1, C) -> complex (..., C, h, w // 2 + 1)"""
    return symbol if symbol.is_complex() else torch.complex(*symbol.movedim(-1, -3).contiguous().unbind(-4))


class Convolution(torch.autograd.Function):
    """v, symbol -> irfft2(symbol * v_hat) and v_hat, with the gradient by hand: autograd's own pads the spectrum with zeros.

    With the columns weighted by d (1 where kx has no partner of the other sign, 2 elsewhere, divided by h w), irfft2 is
    the transpose of rfft2 d. So the gradient with respect to v is the same convolution with the conjugate symbol, and
    that with respect to the symbol is d conj(v_hat) g_hat summed over the images. v_hat is an output, so that the
    gradient has a gradient.
    """

    @staticmethod
    def forward(ctx, v, symbol):
        ctx.set_materialize_grads(False)
        v_hat = spectrum(v).data  # views that leave a function with two outputs could not be changed in place; this is none
        ctx.save_for_backward(v_hat, symbol)
        ctx.grid = v.shape[1:3]
        return field(multiply(symbol, v_hat), *ctx.grid).data, v_hat

    @staticmethod
    def backward(ctx, g, v_hat_grad):
        v_hat, symbol = ctx.saved_tensors
        v_grad = symbol_grad = None
        with _full_precision(symbol):                                      # backward() may be called under autocast
            if g is not None:
                if torch.is_grad_enabled():                                # create_graph
                    v_grad, g_hat = Convolution.apply(g, conjugate(symbol))
                else:
                    g_hat = spectrum(g)
                if ctx.needs_input_grad[1]:
                    products = multiply_conjugate(v_hat, g_hat) if _per_image(symbol) else correlate(v_hat, g_hat)
                    symbol_grad = column_weights(*ctx.grid, g) * products
                if v_grad is None:
                    v_grad = field(multiply_conjugate_over(symbol, g_hat), *ctx.grid)
            if v_hat_grad is not None:                                     # only under create_graph
                transposed = field(v_hat_grad / column_weights(*ctx.grid, v_hat_grad), *ctx.grid)
                v_grad = transposed if v_grad is None else v_grad + transposed
        return v_grad, symbol_grad


# The steps of a convolution. Spectra of grids with sides up to LONGEST_MATRIX are real (B, 2, h, w // 2 + 1, C), as
# tokens are, and come from one product with a matrix, or two with smaller ones; those of larger grids are complex
# (B, C, h, w // 2 + 1).


def spectrum(v):                                                           # (B, h, w, C)
    B, h, w, C = v.shape
    if by_channel(h, w):
        image = v.movedim(-1, 1)
        if not image.is_contiguous():
            image = v.transpose(2, 3).contiguous().transpose(1, 2)         # row by row is faster than all at once
        return torch.fft.rfft2(image)
    f = w // 2 + 1
    if h * w <= MOST_AT_ONCE:
        whole, _ = fourier_matrix(h, w, v.dtype)
        return torch.bmm(whole.expand(B, -1, -1), v.reshape(B, h * w, C)).view(B, 2, h, f, C)
    along_w, along_h, _ = fourier_matrices(h, w, v.dtype)
    v_hat = torch.bmm(along_w.expand(B * h, -1, -1), v.reshape(B * h, w, C))         # (B h, 2 f, C)
    return torch.bmm(along_h.expand(B, -1, -1), v_hat.view(B, 2 * h, f * C)).view(B, 2, h, f, C)


def field(v_hat, h, w):
    """The inverse of `spectrum`: (B, h, w, C)."""
    if v_hat.is_complex():
        return torch.fft.irfft2(v_hat, s=(h, w)).movedim(1, -1)
    B, _, _, f, C = v_hat.shape
    if h * w <= MOST_AT_ONCE:
        _, back = fourier_matrix(h, w, v_hat.dtype)
        return torch.bmm(back.expand(B, -1, -1), v_hat.reshape(B, 2 * h * f, C)).view(B, h, w, C)
    _, along_h, back_along_w = fourier_matrices(h, w, v_hat.dtype)
    v = torch.bmm(along_h.T.expand(B, -1, -1), v_hat.reshape(B, 2 * h, f * C)).view(B * h, 2 * f, C)
    return torch.bmm(back_along_w.expand(B * h, -1, -1), v).view(B, h, w, C)


# The same as operators that compilers do not look into. PyTorch 2.6 to 2.8 compile FFTs on CPUs as if their results lay in
# memory otherwise than they do: the first learns from wrong gradients, the others stop. As `Convolution` says, each is the
# transpose of the other but for d; with `transpose` it is the transpose of the other.


@torch.library.custom_op("pde_ssm::spectrum", mutates_args=())
def spectrum_op(v: torch.Tensor, transpose: bool = False) -> torch.Tensor:
    v_hat = spectrum(v).contiguous()
    return v_hat.mul_(column_weights(*v.shape[1:3], v_hat)) if transpose else v_hat


@spectrum_op.register_fake
def _(v, transpose=False):
    B, h, w, C = v.shape
    if by_channel(h, w):
        return v.new_empty(B, C, h, w // 2 + 1, dtype=v.dtype.to_complex())
    return v.new_empty(B, 2, h, w // 2 + 1, C)


@torch.library.custom_op("pde_ssm::field", mutates_args=())
def field_op(v_hat: torch.Tensor, h: int, w: int, transpose: bool = False) -> torch.Tensor:
    return field(v_hat / column_weights(h, w, v_hat) if transpose else v_hat, h, w).contiguous()


@field_op.register_fake
def _(v_hat, h, w, transpose=False):
    return v_hat.new_empty(v_hat.shape[0], h, w, v_hat.shape[1 if by_channel(h, w) else -1], dtype=v_hat.real.dtype)


def _keep_for_spectrum(ctx, inputs, output):
    ctx.grid, ctx.transpose = inputs[0].shape[1:3], inputs[1]


def _keep_for_field(ctx, inputs, output):
    ctx.transpose = inputs[3]


def _spectrum_backward(ctx, g):
    return field_op(g, *ctx.grid, not ctx.transpose), None


def _field_backward(ctx, g):
    return spectrum_op(g, not ctx.transpose), None, None, None


spectrum_op.register_autograd(_spectrum_backward, setup_context=_keep_for_spectrum)
field_op.register_autograd(_field_backward, setup_context=_keep_for_field)


def real_spectrum(v):
    """rfft2 along h and w, real and imaginary parts: (B, h, w, C) -> (B, 2, h, w // 2 + 1, C)."""
    B, h, w, C = v.shape
    if B == 0:
        return v.reshape(B, 2, h, w // 2 + 1, C)                           # no view of complex numbers: those have no gradient
    if _compiled_for_cpu(v) or _by_products(v):
        v_hat = (spectrum_op if _compiled_for_cpu(v) else spectrum)(v)
        return torch.view_as_real(v_hat).permute(0, 4, 2, 3, 1) if v_hat.is_complex() else v_hat
    return torch.view_as_real(torch.fft.rfft2(v.movedim(-1, 1).contiguous())).permute(0, 4, 2, 3, 1)


def from_real_spectrum(v_hat, h, w):
    """The inverse of `real_spectrum`."""
    if _compiled_for_cpu(v_hat) or _by_products(v_hat):
        v_hat = _as_complex(v_hat) if by_channel(h, w) else v_hat
        return (field_op if _compiled_for_cpu(v_hat) else field)(v_hat, h, w)
    return torch.fft.irfft2(_as_complex(v_hat), s=(h, w)).movedim(1, -1)


# Complex numbers are complex tensors, or real ones (..., 2, h, w // 2 + 1, C).


def multiply(a, b):
    if a.is_complex():
        return a * b
    product = a.select(-4, 0).unsqueeze(-4) * b
    product.select(-4, 0).addcmul_(b.select(-4, 1), a.select(-4, 1), value=-1)
    product.select(-4, 1).addcmul_(b.select(-4, 0), a.select(-4, 1))
    return product


def multiply_over(a, b):
    """The same, if nobody needs b afterwards."""
    return b.mul_(a) if b.is_complex() else multiply(a, b)


def multiply_conjugate(a, b):
    """conj(a) b"""
    if a.is_complex():
        return a.conj() * b
    product = a.select(-4, 0).unsqueeze(-4) * b
    product.select(-4, 0).addcmul_(b.select(-4, 1), a.select(-4, 1))
    product.select(-4, 1).addcmul_(b.select(-4, 0), a.select(-4, 1), value=-1)
    return product


def multiply_conjugate_over(a, b):
    """The same, if nobody needs b afterwards."""
    return b.mul_(a.conj()) if b.is_complex() else multiply_conjugate(a, b)


def conjugate(a):
    return a.conj() if a.is_complex() else torch.stack([a.select(-4, 0), -a.select(-4, 1)], dim=-4)


def correlate(a, b):
    """The sum of conj(a) b over the images."""
    if a.is_complex():
        total = b.new_zeros(b.shape[1:])
        for a_image, b_image in zip(a, b):                                 # all at once would take as much memory as b
            total = torch.addcmul(total, a_image.conj(), b_image)
        return total
    return multiply_conjugate(a, b).sum(0)


def _per_image(symbol):
    return symbol.ndim > (3 if symbol.is_complex() else 4)


def column_weights(h, w, like):
    """d of `Convolution`, (w // 2 + 1) for complex numbers by channel, (w // 2 + 1, 1) for those by token."""
    d = _kept_weights(h, w, like.real.dtype, like.device)
    return d if by_channel(h, w) else d[:, None]


@lru_cache(maxsize=16)
def _kept_weights(h, w, dtype, device):
    with torch.inference_mode(False):  # what is kept outlives the mode that the first caller is in
        weights = torch.full((w // 2 + 1,), 2 / (h * w), dtype=dtype, device=device)
        weights[0] = 1 / (h * w)
        if w % 2 == 0:
            weights[-1] = 1 / (h * w)
        return weights


@lru_cache(maxsize=16)
def fourier_matrix(h, w, dtype):
    """The whole transform, (2 h (w // 2 + 1), h w), all real parts before all imaginary ones, and its inverse."""
    with torch.inference_mode(False), torch.device("cpu"):
        units = torch.eye(h * w, dtype=torch.float64).view(h * w, h, w)
        whole = torch.view_as_real(torch.fft.rfft2(units)).permute(3, 1, 2, 0)             # (2, h, w // 2 + 1, h w)
        weights = _kept_weights(h, w, torch.float64, torch.device("cpu"))[:, None]
        back = (whole * weights).flatten(0, 2).T
        return whole.reshape(-1, h * w).to(dtype), back.to(dtype, memory_format=torch.contiguous_format)


@lru_cache(maxsize=16)
def fourier_matrices(h, w, dtype):
    """The real transform along w, (2 (w // 2 + 1), w), the complex one along h as a real matrix, (2 h, 2 h), and the inverse
    along w, (w, 2 (w // 2 + 1)), which makes up for the scale of both; along h the inverse is the transpose.

    The first gives real parts, then imaginary parts. The second takes pairs of them, row by row, and returns all real
    parts before all imaginary ones.
    """
    with torch.inference_mode(False), torch.device("cpu"):  # what is kept outlives the mode that the first caller is in
        along_w = torch.view_as_real(torch.fft.rfft(torch.eye(w, dtype=torch.float64)))  # (w, w // 2 + 1, 2)
        F = torch.fft.fft(torch.eye(h, dtype=torch.float64))               # symmetric, (h, h)
        along_h = torch.stack([torch.stack([F.real, -F.imag], dim=-1), torch.stack([F.imag, F.real], dim=-1)])
        weights = _kept_weights(h, w, torch.float64, torch.device("cpu"))[:, None]
        back_along_w = (along_w * weights).transpose(1, 2).reshape(w, -1)
        along_w = along_w.permute(2, 1, 0).reshape(-1, w)
        return along_w.to(dtype), along_h.reshape(2 * h, 2 * h).to(dtype), back_along_w.to(dtype)


def embedded_green(h, w, rows):
    """G(k) B(k), as `convolve` takes it, and G(k) alone, of rows (..., 9, C) that are `SYMBOL_ROWS`.

    All but the size of G(k) is made of sums and products of what depends on kx or on ky alone: one exponential for each wave
    vector, and no sine.
    """
    f, (monomials, ky) = w // 2 + 1, on_grid(axis_monomials, h, w, rows)
    growth, shift, gradient, g0 = rows.split([4, 2, 2, 1], dim=-2)
    coefficients = torch.cat([growth, within_a_turn(shift), gradient], dim=-2)
    if by_channel(h, w):
        parts, axis, g0, number = polynomial_by_channel(monomials, coefficients), -1, g0.mT[..., None], torch.complex
    else:
        parts, axis, g0, number = polynomial(monomials, coefficients), -2, g0[..., None, :, :], _real_number
        ky = ky[:, :, None]
    growth_x, cross_x, B_x, phases, growth_y, B_y = parts.split([f, f, f, f + h, h, h], dim=axis)
    (cos_x, cos_y), (sin_x, sin_y) = (wave.split([f, h], dim=axis) for wave in (phases.cos(), phases.sin()))
    growth_x, cross_x, B_x, cos_x, sin_x = (part.unsqueeze(axis - 1) for part in (growth_x, cross_x, B_x, cos_x, sin_x))
    growth_y, B_y, cos_y, sin_y = (part.unsqueeze(axis) for part in (growth_y, B_y, cos_y, sin_y))

    size = torch.addcmul(growth_x + growth_y, cross_x, ky).clamp_min(LEAST_GROWTH).exp()
    G = torch.addcmul(cos_x * cos_y, sin_x, sin_y, value=-1) * size
    G_imag = torch.addcmul(sin_x * cos_y, cos_x, sin_y) * size
    B_imag = B_x + B_y
    symbol = torch.addcmul(G * g0, G_imag, B_imag, value=-1), torch.addcmul(G * B_imag, G_imag, g0)
    return number(*symbol), number(G, G_imag)


def _real_number(real, imag):
    return torch.stack([real, imag], dim=-4)


class EmbeddedGreen(torch.autograd.Function):
    """G(k) B(k) of `embedded_green`, with the gradient by hand: two passes and sums instead of a chain of thirty."""

    @staticmethod
    def forward(ctx, h, w, rows):
        symbol, G = embedded_green(h, w, rows)
        ctx.save_for_backward(G, rows)
        ctx.grid = h, w
        return symbol

    @staticmethod
    def backward(ctx, gradient):
        G, rows = ctx.saved_tensors
        if torch.is_grad_enabled():                                        # create_graph: the gradient of the plain way
            with _full_precision(G):                                       # backward() may be called under autocast
                symbol, _ = embedded_green(*ctx.grid, rows)
                return None, None, *torch.autograd.grad(symbol, rows, gradient, create_graph=True)
        # With P = conj(G) times the gradient, the gradient with respect to B is P, and that with respect to the exponent
        # conj(B) P, where B = g0 + i (gx kx + gy ky): sums of P's parts times products of wave numbers are enough.
        P, weights = multiply_conjugate(G, gradient), on_grid(moments, *ctx.grid, rows)
        if P.is_complex():
            P, weights = torch.view_as_real(P).flatten(-3).mT, weights.transpose(0, 1)     # (..., 2 f, C)
        else:
            P = P.flatten(-4, -2)
        with _full_precision(P):
            sums = adjoint(weights.flatten(0, 1), P)                       # (..., 15, C)
        even, squares, kx_even, ky_even = sums.split([4, 3, 4, 4], dim=-2)
        odd = sums[..., 7::4, :]                                           # of the imaginary parts with kx and ky
        gx, gy, g0 = rows[..., EXPONENTS:, :].split(1, dim=-2)
        growth_grad = torch.addcmul(torch.addcmul(g0 * even, gx, kx_even), gy, ky_even)
        phase_grad = g0 * odd - gx * squares[..., :2, :] - gy * squares[..., 1:, :]
        return None, None, torch.cat([growth_grad, phase_grad, odd, even[..., :1, :]], dim=-2)


class SymbolRows(torch.autograd.Function):
    """`Diagonal.plain_rows` of the equation whose parameters these are, None for absent terms, with the gradient by hand:
    twenty small operations instead of fifty."""

    @staticmethod
    def forward(ctx, equation, log_tau, log_lx, log_ly, shear, b, r_slack, gx, gy, g0):
        rows = equation.plain_rows()
        ctx.save_for_backward(log_tau, log_lx, log_ly, shear, b, r_slack, rows)
        return rows

    @staticmethod
    def backward(ctx, gradient):                                           # (..., 9, C)
        log_tau, log_lx, log_ly, shear, b, r_slack, rows = ctx.saved_tensors
        log_lx_grad = log_ly_grad = shear_grad = b_grad = r_slack_grad = None
        tau, products = bounded_tau(log_tau), (gradient * rows)[..., 1:EXPONENTS, :]
        log_tau_grad = products.sum(-2)
        if log_lx is not None:                                             # tau K = tau (lx^2, lx shear ly, (1 + shear^2) ly^2)
            xx, xy, yy, _, _ = products.unbind(-2)
            log_lx_grad, log_ly_grad = torch.add(xy, xx, alpha=2), torch.add(xy, yy, alpha=2)
            lx, ly, shear = _widen(log_lx).exp(), _widen(log_ly).exp(), _widen(shear)
            shear_grad = tau * ly * torch.addcmul(lx * gradient[..., 2, :], shear * ly, gradient[..., 3, :], value=2)
        if b is not None:
            b_grad = (tau[..., None, :] * gradient[..., 4:EXPONENTS, :]).mT
        if r_slack is not None:
            r, r_grad = rows.select(-2, 0), gradient.select(-2, 0)         # times tau; at its bound it depends on nothing,
            r_grad = r_grad.masked_fill(r > R_MAX * (1 - 1e-6), 0)         # and there may be less by rounding
            log_tau_grad = torch.addcmul(log_tau_grad, r, r_grad)
            r_slack_grad = -tau * r_grad * torch.sigmoid(_widen(r_slack))
        embedding = gradient[..., EXPONENTS:, :].unbind(-2)
        log_tau_grad = log_tau_grad * (log_tau <= LARGEST_LOG_TAU)
        return None, log_tau_grad, log_lx_grad, log_ly_grad, shear_grad, b_grad, r_slack_grad, *embedding


class Evolution(torch.autograd.Function):
    """What pde_ssm_kernels.cpu evolves, with its gradients: v (B, h, w, C), rows ([B], n, 9, C) -> (B, h, w, C)."""

    @staticmethod
    def forward(ctx, kernels, v, rows):
        ctx.save_for_backward(v, rows)
        ctx.kernels = kernels
        return kernels.evolve(v, rows)

    @staticmethod
    def backward(ctx, gradient):
        v, rows = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, *ctx.kernels.evolve_backward(gradient, v, rows)
        needed = [x for x, is_needed in zip((v, rows), ctx.needs_input_grad[1:]) if is_needed]
        with _full_precision(v):                                           # create_graph: the gradient of the plain way
            symbol, _ = embedded_green(*v.shape[1:3], rows)
            state, _ = Convolution.apply(v, sum_of_components(symbol))
            found = iter(torch.autograd.grad(state, needed, gradient, create_graph=True))
        return None, *(next(found) if is_needed else None for is_needed in ctx.needs_input_grad[1:])


def bounded_tau(log_tau):
    return _widen(log_tau).clamp_max(LARGEST_LOG_TAU).exp()


def sum_of_components(symbol):
    """G(k) B(k) of several PDEs together: ([B], n, 2, h, w // 2 + 1, C), or complex ([B], n, C, h, w // 2 + 1)."""
    return symbol.sum(-4 if symbol.is_complex() else -5)


def evolve_by_kernels(kernels, v, rows):
    """What `convolve` makes of v (B, h, w, C), by pde_ssm_kernels.cpu; rows ([B], n, 9, C)."""
    if torch.compiler.is_compiling():
        return kernels.evolve_op(v, rows)
    return Evolution.apply(kernels, v, rows) if torch.is_grad_enabled() else kernels.evolve(v, rows)


_kept = WeakKeyDictionary()  # what evaluation keeps between calls: by layer, by grid; see `Diagonal.kept`


def forget(*_):
    """Drops all that evaluation has kept, of every layer: training goes on, which changes parameters and needs the memory."""
    if not torch.compiler.is_compiling() and _kept:
        _kept.clear()


register_optimizer_step_post_hook(forget)


def _bytes_kept():
    return sum(entry[0].nbytes for layer in _kept.data.copy().values() for entry in layer.copy().values())


def symmetric(A):
    return (A + A.mT) / 2


class Diagonal(nn.Module):
    """Each of `dim` channels follows a PDE of its own, or, with `components`, is the sum of so many that do.

    Parameters, (dim,) unless said otherwise: g0, gx, gy; log_tau; log_lx, log_ly and shear, which give K = L L^T with
    L = [[lx, 0], [shear ly, ly]]; b (dim, 2); r_slack, which gives r = min(R_MAX - softplus(r_slack), R_MAX / tau). So K is
    positive definite and tau r <= R_MAX whatever an optimiser does: |G(k)| <= exp(R_MAX), or exp(e^2 R_MAX) in a conditioned
    layer, whose time goes up to e^2 tau. The bound is a minimum, which leaves every r below it as it is; where it acts, which
    takes tau > 1, r_slack has no gradient. tau itself ends at e^LARGEST_LOG_TAU. Those of absent terms do not exist.
    With one token's width 1 / max(h, w), they start at

    - tau = 1, r = 0, g0 = 1, gx = gy = 0: a contraction that keeps the mean;
    - K isotropic, its Gaussian (variance 2 tau K) with a standard deviation that runs log-uniformly over the channels
      from half a token, the finest that the grid resolves, to 1/4, beyond which the torus looks flat: as S4 spreads
      its time scales, so that every range is there before training;
    - b tau: shifts of up to two tokens in all directions, so that first neighbours are told apart.

    With more than one component all of these are (components, dim, ...), the widths are shuffled within a component, and
    all components but the first, whose g0 is 1, have a random g0 of standard deviation 1/2: one PDE alone can only
    smooth, shift and differentiate, several make band-pass filters.

    All are plain parameters, not layers: initialisers that walk over a model's layers leave them alone.
    """

    def __init__(self, dim, groups, components, grid_size, terms):
        super().__init__()
        self.dim, self.groups, self.components, self.terms = dim, groups, components, terms
        self.create_parameters(1 / max(grid_size))
        self._names = tuple(self._parameters)

    def create_parameters(self, token):
        shape, log_l = (self.dim,), initial_widths(token, self.dim).log()
        self.g0 = nn.Parameter(torch.ones(shape))
        if self.components > 1:
            shape = (self.components, self.dim)
            log_l = torch.stack([log_l[torch.randperm(self.dim)] for _ in range(self.components)])
            others = torch.randn(self.components - 1, self.dim) / 2
            self.g0 = nn.Parameter(torch.cat([self.g0.detach()[None], others]))
        self.log_tau = nn.Parameter(torch.zeros(shape))
        self.create_scalar_pdes(token, log_l, r=torch.zeros(shape))

    def create_scalar_pdes(self, token, log_l, r):
        shape = log_l.shape
        self.gx = nn.Parameter(torch.zeros(shape))
        self.gy = nn.Parameter(torch.zeros(shape))
        if "diffusion" in self.terms:
            self.log_lx = nn.Parameter(log_l)
            self.log_ly = nn.Parameter(log_l.clone())
            self.shear = nn.Parameter(torch.zeros(shape))
        if "convection" in self.terms:
            self.b = nn.Parameter(initial_shifts(token, shape))
        if "reaction" in self.terms:
            self.r_slack = nn.Parameter((R_MAX - r).expm1().log())

    def coefficients(self):
        """K (..., 2, 2), b (..., 2), r (...) and tau, in float32 or wider; zero for absent terms.

        Their leading axes are (dim,) or (components, dim); where channels are coupled, (groups, c, c) with tau (groups,).
        """
        r, Kxx, Kxy, Kyy, bx, by, tau = self.scalars()
        return torch.stack([Kxx, Kxy, Kxy, Kyy], dim=-1).unflatten(-1, (2, 2)), torch.stack([bx, by], dim=-1), r, tau

    def scalars(self):
        """r, Kxx, Kxy, Kyy, bx, by and tau."""
        tau = bounded_tau(self.log_tau)
        r = Kxx = Kxy = Kyy = bx = by = self.zero()
        if "diffusion" in self.terms:
            lx, ly, shear = _widen(self.log_lx).exp(), _widen(self.log_ly).exp(), _widen(self.shear)
            lyx = shear * ly
            Kxx, Kxy, Kyy = lx.square(), lx * lyx, torch.addcmul(ly.square(), lyx, lyx)
        if "convection" in self.terms:
            bx, by = _widen(self.b).unbind(-1)
        if "reaction" in self.terms:
            r = R_MAX - nn.functional.softplus(_widen(self.r_slack))
            r = torch.minimum(r, R_MAX * (tau if tau.ndim == r.ndim else tau[:, None, None]).reciprocal())
        return r, Kxx, Kxy, Kyy, bx, by, tau

    def zero(self):
        """A coefficient of an absent term."""
        return None if len(self.terms) == len(TERMS) else _widen(self.g0).new_zeros(()).expand(self.g0.shape)

    def symbol(self, h, w):
        """What `evolve` multiplies by on an h x w grid: see `compute_symbol`."""
        return self.kept(self.compute_symbol, h, w)

    def rows(self):
        """What kernels make symbols of: see `compute_rows`."""
        return self.kept(self.compute_rows)

    def kept(self, compute, *grid):
        """compute(*grid), which depends on parameters alone: evaluation without gradients computes it once per grid size and
        reuses it until a parameter changes, an optimiser steps or a forward pass has gradients.

        A write through `parameter.data` escapes PyTorch's version counter. On CPUs the first entries of each parameter are
        compared, too; on other devices, where that would wait for them, train() or eval() makes such a write known.
        """
        if self.training or torch.is_grad_enabled() or _observed():
            return compute(*grid)
        entry, state = _kept.get(self, {}).get(grid), self._state()
        if entry is None or entry[1] != state or not all(map(torch.equal, *entry[2])):
            entry = compute(*grid), state
            self._keep(grid, *entry)
        return entry[0]

    def _state(self):
        """What changes with every change of a parameter that PyTorch counts; None where that cannot be told."""
        try:
            return [(id(p), p.data_ptr(), p._version) for p in self._parameters.values()]
        except RuntimeError:  # inference tensors count no versions, and some tensors have no address
            return None

    def _keep(self, grid, result, state):
        """Adds to `_kept` if there is room, at the expense of this layer's other grids alone: layers that take turns would
        throw out each other's for ever."""
        own, parameters = _kept.setdefault(self, {}), list(self._parameters.values())
        own.pop(grid, None)
        if state is None or tuple(self._parameters) != self._names or _traced(*parameters):
            return  # inference tensors; parametrised or replicated, with values elsewhere; of another class
        while own and (len(own) == GRIDS_KEPT or _bytes_kept() + result.nbytes > KEPT):
            own.pop(next(iter(own)))
        if _bytes_kept() + result.nbytes > KEPT:
            return
        # As long as the parameters and their memory are held, no others can have their identity and their address.
        values = [p.data.flatten()[:COMPARED] if p.is_contiguous() else p.data for p in parameters]
        compared = values if result.device.type == "cpu" else []
        own[grid] = result, state, (compared, [x.clone() for x in compared]), (parameters, values)

    def plain_rows(self):
        """`SYMBOL_ROWS` of these parameters, (..., 9, C)."""
        *scalars, tau = self.scalars()
        exponents = tau[..., None, :] * torch.stack(scalars, dim=-2)
        return torch.cat([exponents, *(_widen(x).unsqueeze(-2) for x in (self.gx, self.gy, self.g0))], dim=-2)

    def compute_rows(self, time_scale=None):
        """The same, by the faster way to its gradients if they are wanted; one for each image with time_scale (B, dim)."""
        names = ("log_tau", "log_lx", "log_ly", "shear", "b", "r_slack", "gx", "gy", "g0")
        parameters = [getattr(self, name, None) for name in names]
        by_hand = torch.is_grad_enabled() and not _traced(*(x for x in parameters if x is not None))
        rows = SymbolRows.apply(self, *parameters) if by_hand else self.plain_rows()
        if time_scale is None:
            return rows
        exponents, embedding = rows.split([EXPONENTS, len(SYMBOL_ROWS) - EXPONENTS], dim=-2)
        time_scale = time_scale[:, None] if self.components == 1 else time_scale[:, None, None]
        return torch.cat([time_scale * exponents, embedding.expand(time_scale.shape[0], *embedding.shape)], dim=-2)

    def compute_symbol(self, h, w, time_scale=None):
        """G(k) B(k) as `convolve` takes it; one per image with time_scale (B, dim)."""
        rows = self.compute_rows(time_scale)
        by_hand = torch.is_grad_enabled() and not _traced(rows)
        symbol = EmbeddedGreen.apply(h, w, rows) if by_hand else embedded_green(h, w, rows)[0]
        return symbol if self.components == 1 else sum_of_components(symbol)

    def evolve(self, v, time_scale=None):                                  # (B, h, w, dim), (B, dim) or None
        """From R u to the state at time tau; time_scale multiplies tau."""
        h, w = v.shape[1:3]
        if kernels := _cpp_kernels(v):
            rows = self.rows() if time_scale is None else self.compute_rows(time_scale)
            if torch.compiler.is_compiling() or not _traced(v, rows):
                rows = rows if self.components > 1 else rows.unsqueeze(-3)
                return evolve_by_kernels(kernels, _widen(v), rows).to(v.dtype)
        symbol = self.symbol(h, w) if time_scale is None else self.compute_symbol(h, w, time_scale)
        return convolve(v, symbol)

    def kernel(self, h, w):
        return torch.fft.irfft2(green_symbol(*self.coefficients(), h, w), s=(h, w))

    def _apply(self, fn, recurse=True):                                    # new storage
        _kept.pop(self, None)
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        _kept.pop(self, None)
        return super().train(mode)


# Complex matrices and their products are real ones, with real parts before imaginary ones along an axis: real products
# run on tensor cores, and PyTorch's complex exponential is slow on CPUs.


def multiply_by_matrices(G, v):
    """G v at each wave vector: (groups, f, 2 c, c), (groups, f, 2 B, c) -> (groups, f, 2, c, B)."""
    B, c = v.shape[2] // 2, v.shape[3]  # said, as there may be no images
    products = (G @ v.mT).unflatten(3, (2, B)).unflatten(2, (2, c))        # (groups, f, 2, c, 2, B)
    (rr, ir), (ri, ii) = (product.unbind(2) for product in products.unbind(4))   # of G's real or imaginary part with v's
    return torch.stack([rr - ii, ri + ir], dim=2)


def complex_exponential(growth, phase):
    """exp(growth + i phase), real part, then imaginary part: (..., n), (..., n) -> (..., 2, n)."""
    size = growth.clamp_min(LEAST_GROWTH).exp()
    return torch.stack([size * phase.cos(), size * phase.sin()], dim=-2)


class ComplexExponential(torch.autograd.Function):
    """`complex_exponential`, which keeps nothing but its result for the gradient."""

    @staticmethod
    def forward(ctx, growth, phase):
        result = complex_exponential(growth, phase)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        (real, imag), (g_real, g_imag) = (x.unbind(-2) for x in (*ctx.saved_tensors, gradient))
        growth_grad = torch.addcmul(real * g_real, imag, g_imag)
        return growth_grad, torch.addcmul(real * g_imag, imag, g_real, value=-1)


class Pairwise(Diagonal):
    """Every pair of channels of a group has a PDE, whose Green's function takes the one to the other: Algorithm 1.

    With c = dim / groups channels in a group, g0, gx, gy and the parameters of K, b and r are those of `Diagonal` with
    the shape (groups, c, c), output channels before input channels; log_tau is (groups,). The exponential is taken
    entry by entry: h_i = sum_j G_ij * (B R u)_j, like a convolution of as many channels, in O(N c dim).

    A pair of a channel with itself starts as in `Diagonal`. Between two channels r starts at -log c, so that a channel
    hears all the others together about as loud as itself; without the reaction term g0 starts at 1 / c instead of 1.
    """

    def create_parameters(self, token):
        c = self.dim // self.groups
        shape, own = (self.groups, c, c), torch.eye(c).expand(self.groups, c, c)
        self.g0 = nn.Parameter(own / (1 if "reaction" in self.terms else c))
        self.log_tau = nn.Parameter(torch.zeros(self.groups))
        log_l = initial_widths(token, math.prod(shape)).log().view(shape)
        self.create_scalar_pdes(token, log_l, r=math.log(c) * (own - 1))

    def symbol_at(self, even, odd, growth, phase):
        """G(k), real parts above imaginary ones, (groups, f, 2 c, c), at f wave vectors of which these are the monomials."""
        return self.exponential(polynomial(even, growth), polynomial(odd, phase)).unflatten(-1, self.g0.shape[1:]).flatten(2, 3)

    def exponential(self, growth, phase):                                  # (groups, f, c c), same -> (groups, f, 2, c c)
        return (complex_exponential if _traced(growth) else ComplexExponential.apply)(growth, phase)

    def exponents(self):
        """tau times the coefficients of growth, (groups, 4, c c), and of phase, (groups, 2, c c)."""
        *scalars, tau = self.scalars()
        growth, shift = (tau[:, None, None] * torch.stack(scalars, dim=1).flatten(2)).split([4, 2], dim=1)
        return growth, self.shortest(shift)

    def shortest(self, shift):
        return within_a_turn(shift)

    def compute_symbol(self, h, w):
        """G(k) at all wave vectors; see `symbol_at`."""
        exponents = self.exponents()
        return self.symbol_at(*on_grid(wave_monomials, h, w, exponents[0]), *exponents)

    def evolve(self, v):                                                   # (B, h, w, dim)
        h, w = v.shape[1:3]
        even, odd = on_grid(wave_monomials, h, w, _widen(self.g0))
        embedded = self.embed(real_spectrum(_widen(v)), odd)               # (groups, f, 2 B, c)
        if not torch.is_grad_enabled() and len(even) * self.g0.numel() <= LARGEST_WHOLE:
            states = multiply_by_matrices(self.symbol(h, w), embedded)     # (groups, f, 2, c, B)
        else:
            at_once, exponents = max(1, CHUNK // self.g0.numel()), self.exponents()
            pieces = list(zip(embedded.split(at_once, dim=1), even.split(at_once), odd.split(at_once)))
            run = self.evolve_some if len(pieces) == 1 else self.evolve_and_forget
            states = torch.cat([run(*piece, *exponents) for piece in pieces], dim=1)
        h_hat = states.permute(4, 2, 1, 0, 3).flatten(3).unflatten(2, (h, -1))   # (B, 2, h, w // 2 + 1, dim)
        return from_real_spectrum(h_hat, h, w).to(v.dtype)

    def evolve_some(self, embedded, *monomials_and_exponents):
        """A few wave vectors alone."""
        return multiply_by_matrices(self.symbol_at(*monomials_and_exponents), embedded)

    def evolve_and_forget(self, *arguments):
        """The same, but training keeps nothing of the symbol: it is computed again for the gradients."""
        return checkpoint(self.evolve_some, *arguments, use_reentrant=False, preserve_rng_state=False)

    def embed(self, v_hat, odd):
        """B(k) v_hat with B(k) = g0 + i (gx kx + gy ky): (B, 2, h, w // 2 + 1, dim) -> (groups, f, 2 B, c)."""
        g = torch.cat([_widen(self.g0), _widen(self.gx), _widen(self.gy)], dim=1)     # (groups, 3 c, c)
        v_hat = v_hat.flatten(2, 3).unflatten(-1, (self.groups, -1)).permute(3, 2, 1, 0, 4)
        parts = v_hat.flatten(1, 3) @ g.mT                                 # (groups, f 2 B, 3 c)
        v, v_x, v_y = parts.view(*v_hat.shape[:-1], g.shape[1]).chunk(3, dim=-1)     # (groups, f, 2, B, c)
        kx, ky = odd[:, :, None, None, None].unbind(1)
        (real, imag), (dx_real, dx_imag) = v.unbind(2), (kx * v_x + ky * v_y).unbind(2)
        return torch.cat([real - dx_imag, imag + dx_real], dim=2)

    def kernel(self, h, w):
        real, imag = self.compute_symbol(h, w).chunk(2, dim=2)             # (groups, f, c, c)
        G = torch.complex(real, imag).permute(0, 2, 3, 1).flatten(0, 1)
        return torch.fft.irfft2(G.unflatten(-1, (h, w // 2 + 1)), s=(h, w))


class Coupled(Pairwise):
    """The channels of a group follow one system of PDEs: G(k) is the matrix exponential of tau Lambda(k).

    With c = dim / groups, matrices (groups, c, c) unless said otherwise: g0, gx, gy; log_tau (groups,); lx, ly and
    shear, of which K(k) = P P^T with P = [kx lx + ky shear, ky ly], the matrix form of the Cholesky factor of
    `Diagonal`; bx and by, of which the symmetric parts count; r = R_MAX - r_root r_root^T, minus what is needed to bring
    its eigenvalues, as far out as Gershgorin's circles may have them, below R_MAX / tau. K(k) is positive semi-definite,
    i k . b is anti-Hermitian and tau r <= R_MAX, so the 2-norm of G(k) is at most exp(R_MAX), but for rounding, which
    grows with the size of tau k . b. Starts as `Diagonal` does, without coupling.
    """

    def create_parameters(self, token):
        c = self.dim // self.groups
        own = torch.eye(c).expand(self.groups, c, c)
        self.g0 = nn.Parameter(own.clone())
        self.gx = nn.Parameter(torch.zeros_like(own))
        self.gy = nn.Parameter(torch.zeros_like(own))
        self.log_tau = nn.Parameter(torch.zeros(self.groups))
        if "diffusion" in self.terms:
            l = torch.diag_embed(initial_widths(token, self.dim).view(self.groups, c))
            self.lx = nn.Parameter(l)
            self.ly = nn.Parameter(l.clone())
            self.shear = nn.Parameter(torch.zeros_like(l))
        if "convection" in self.terms:
            bx, by = initial_shifts(token, (self.groups, c)).unbind(-1)
            self.bx = nn.Parameter(torch.diag_embed(bx))
            self.by = nn.Parameter(torch.diag_embed(by))
        if "reaction" in self.terms:
            self.r_root = nn.Parameter(math.sqrt(R_MAX) * own)

    def scalars(self):
        tau = bounded_tau(self.log_tau)
        r = Kxx = Kxy = Kyy = bx = by = self.zero()
        if "diffusion" in self.terms:
            lx, ly, shear = _widen(self.lx), _widen(self.ly), _widen(self.shear)
            Kxx, Kxy, Kyy = lx @ lx.mT, symmetric(lx @ shear.mT), shear @ shear.mT + ly @ ly.mT
        if "convection" in self.terms:
            bx, by = symmetric(_widen(self.bx)), symmetric(_widen(self.by))
        if "reaction" in self.terms:
            root = _widen(self.r_root)
            one = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
            r = R_MAX * one - root @ root.mT
            own = r.diagonal(dim1=-2, dim2=-1)
            largest = (own + r.abs().sum(-1) - own.abs()).amax(-1)         # no eigenvalue is larger
            r = r - (largest.clamp_max(R_MAX) - R_MAX / tau).clamp_min(0)[:, None, None] * one
        return r, Kxx, Kxy, Kyy, bx, by, tau

    def shortest(self, shift):
        return shift  # entries of a matrix under an exponential have no period

    def exponential(self, growth, phase):
        G = torch.linalg.matrix_exp(torch.complex(growth, phase).unflatten(-1, self.g0.shape[1:])).flatten(-2)
        return torch.stack([G.real, G.imag], dim=2)


EQUATIONS = {"diagonal": Diagonal, "pairwise": Pairwise, "coupled": Coupled}
COUPLINGS = tuple(EQUATIONS)


class Projection(nn.Linear):
    """A linear layer on the channels of a grid, whose result lies in memory as the convolution after it wants it.

    Not where gradients are to come, for they would lie as it does.
    """

    def forward(self, u):                                                  # (B, h, w, D) -> (B, h, w, C)
        if not by_channel(*u.shape[1:3]) or torch.is_grad_enabled() or _cpp_kernels(u):
            return super().forward(u)
        weight = self.weight.expand(len(u), -1, -1)                        # lest matmul makes one product of all images
        v = torch.bmm(weight, u.flatten(1, 2).mT).unflatten(2, u.shape[1:3])         # (B, C, h, w)
        return (v if self.bias is None else v + self.bias[:, None, None].to(v.dtype)).movedim(1, -1)


class PDESSM(nn.Module):
    """The PDE-SSM operator: (B, dim, h, w) -> (B, dim, h, w), for any h and w.

    grid_size:   (h, w) of the tokens it will see; only the initial values depend on it.
    coupling:    "diagonal", "pairwise" or "coupled": which channels share a PDE; see `Diagonal`, `Pairwise`, `Coupled`.
    groups:      into how many groups the channels of the last two fall, as attention's into heads. By default 1 for
                 pairwise, as in the paper, and groups of 8 channels for coupled, whose exponential costs O(c^3).
    state_dim:   channels of the PDE, if not `dim`; a linear layer then leads back.
    expand:      the same in multiples of dim, where state_dim is not given.
    terms:       which of "diffusion", "convection", "reaction" the PDE has; an absent term has no parameters.
    components:  not the paper's: so many PDEs per channel, whose states are summed. For the diagonal coupling alone.
    activation:  not the paper's: silu(R u + bias) in place of R u.
    gate:        not the paper's: the state times silu of a second projection of u, then a linear layer.
    conditioned: not the paper's: forward takes a vector c (B, dim) too, and each channel's tau is multiplied by exp of
                 a linear map of it, zero at the start and bounded to +-2. For the diagonal coupling alone.

    R is a linear layer (a 1 x 1 convolution). Transform and symbol are computed in float32 (float64 for
    float64 inputs) under any autocast; the result has the type of R u. ValueError for options that do not fit.
    """

    def __init__(
        self, dim, *, grid_size=(16, 16), coupling="diagonal", groups=None, state_dim=None, expand=1.0, terms=TERMS,
        components=1, activation=False, gate=False, conditioned=False,
    ):  # fmt: skip
        super().__init__()
        if coupling not in EQUATIONS:
            raise ValueError(f"unknown coupling {coupling!r}; known: {', '.join(EQUATIONS)}")
        terms = (terms,) if isinstance(terms, str) else tuple(terms)
        if not terms or set(terms) - set(TERMS):
            raise ValueError(f"terms must be some of {', '.join(TERMS)}, not {terms!r}")
        if conditioned and coupling != "diagonal":
            raise ValueError(f"conditioned needs coupling='diagonal'; {coupling!r} has too large a symbol for one per image")
        if components < 1 or (components > 1 and coupling != "diagonal"):
            raise ValueError(f"components is {components}, with coupling {coupling!r}; it is 1, or more if diagonal")
        if coupling == "diagonal" and groups not in (None, 1):
            raise ValueError(f"groups is {groups}, with coupling 'diagonal', which has a PDE for each channel and no groups")
        C = round(expand * dim) if state_dim is None else state_dim
        if groups is None:
            groups = C // math.gcd(C, 8) if coupling == "coupled" else 1
        if groups < 1 or C < 1 or C % groups:
            raise ValueError(f"{C} channels cannot be split into {groups} equal groups")
        self.dim, self.coupling, self.conditioned = dim, coupling, conditioned
        self.activation = activation
        self.R = Projection(dim, C, bias=activation)
        terms = tuple(term for term in TERMS if term in terms)
        self.equation = EQUATIONS[coupling](C, groups, components, grid_size, terms)
        self.gate = Projection(dim, C, bias=False) if gate else None
        self.out = nn.Linear(C, dim, bias=False) if gate or dim != C else None
        for layer in filter(None, (self.R, self.gate, self.out)):
            nn.init.xavier_uniform_(layer.weight)
        if activation:
            nn.init.zeros_(self.R.bias)
        if conditioned:
            self.log_time_scale = nn.Parameter(torch.zeros(C, dim))

    def forward(self, u, c=None):                                          # (B, D, h, w), (B, D) or None
        if u.ndim != 4 or u.shape[1] != self.dim or not u.is_floating_point():
            raise ValueError(f"PDESSM needs a real (B, {self.dim}, h, w); it got {u.dtype} of shape {tuple(u.shape)}")
        if (c is not None) != self.conditioned:
            raise ValueError(f"PDESSM has conditioned={self.conditioned} and got {'no vector' if c is None else 'a vector'} c")
        if c is not None and (c.ndim != 2 or c.shape[0] != u.shape[0] or c.shape[1] != self.dim):
            raise ValueError(f"c is {tuple(c.shape)}, not one vector per image, {(len(u), self.dim)}")
        if torch.is_grad_enabled():
            forget()
        u = u.movedim(1, -1)                                               # (B, h, w, D)
        v = self.R(u)                                                      # (B, h, w, C)
        if self.activation:
            v = nn.functional.silu(v)
        with _full_precision(u):
            options = {"time_scale": self.time_scale(c)} if self.conditioned else {}
            state = self.equation.evolve(v, **options)                     # (B, h, w, C)
        if self.gate is not None:
            state = state * nn.functional.silu(self.gate(u))               # (B, h, w, C)
        if self.out is not None:
            state = self.out(state)                                        # (B, h, w, D)
        return state.movedim(-1, 1)                                        # (B, D, h, w)

    def time_scale(self, c):                                               # (B, D)
        return (2 * torch.tanh(_widen(c) @ _widen(self.log_time_scale).T / 2)).exp()   # (B, C), from e^-2 to e^2

    def coefficients(self):
        """K, b, r and tau of the PDE; see `Diagonal.coefficients`."""
        with _full_precision(self.R.weight):
            return self.equation.coefficients()

    def kernel(self, h, w):
        """The Green's function in space, real: what a unit impulse at token (0, 0) has become at time tau, without R and B.

        (C, h, w) for the diagonal coupling, (components, C, h, w) if there are several. For the others
        (C, C / groups, h, w), output channels before input channels, as the weight of a grouped, circular convolution.
        """
        with _full_precision(self.R.weight):
            return self.equation.kernel(h, w)

    def extra_repr(self):
        equation = self.equation
        shape = f"groups={equation.groups}, components={equation.components}"
        return f"{self.dim}, coupling={self.coupling!r}, {shape}, terms={equation.terms}"


def receptive_field(kernel):
    """How far a token sees, in tokens: the root mean square of the distance on the torus, weighted by |kernel|.

    kernel (..., h, w), as of `PDESSM.kernel` -> (...). For convection alone it is the length of the shift, for
    isotropic diffusion of standard deviation s it is sqrt(2) s.
    """
    h, w = kernel.shape[-2:]
    y, x = (n * torch.fft.fftfreq(n, dtype=kernel.dtype, device=kernel.device) for n in (h, w))
    weight = kernel.abs()
    return ((weight * (x**2 + y[:, None] ** 2)).sum((-2, -1)) / weight.sum((-2, -1))).sqrt()


class PDESSMBlock(nn.Module):
    """PDE-SSM on tokens, (B, N, D) -> (B, N, D): stands where timm's Attention stood and takes its arguments.

    num_heads, qkv_bias and most other arguments of attention mean nothing to a PDE and are ignored; device and dtype are
    those of the parameters, and dim_out, if given, must be dim.
    grid_size is the (h, w) of the h w tokens of the grid, row by row; without it, their number must be a square.
    The other options are those of `PDESSM`.

    prefix_tokens is the number of tokens before the grid's that have no place on it, such as a class token. To them the
    torus is one well-stirred vessel: each is a uniform field, which diffusion and convection leave as it is, so their
    mean after a linear layer is added to every token of the grid, and the mean of the grid's result to each of them.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, *, grid_size=None, prefix_tokens=0, coupling="diagonal",
                 groups=None, state_dim=None, expand=1.0, terms=TERMS, components=1, activation=False, gate=False,
                 conditioned=False, dim_out=None, device=None, dtype=None, **ignored):  # fmt: skip
        super().__init__()
        if dim_out not in (None, dim):
            raise ValueError(f"dim_out={dim_out}: PDESSMBlock returns as many channels as it gets, {dim}")
        if unknown := set(ignored) - _ATTENTION_ARGUMENTS:
            raise TypeError(f"PDESSMBlock has no option {', '.join(sorted(unknown))}")
        self.grid_size, self.prefix_tokens = tuple(grid_size) if grid_size else None, prefix_tokens
        self.pde = PDESSM(
            dim, grid_size=self.grid_size or (16, 16), coupling=coupling, groups=groups, state_dim=state_dim,
            expand=expand, terms=terms, components=components, activation=activation, gate=gate, conditioned=conditioned,
        )  # fmt: skip
        self.conditioned = conditioned
        self.prefix = nn.Linear(dim, dim, bias=False) if prefix_tokens else None
        self.to(device=device, dtype=dtype)

    def forward(self, tokens, c=None, **call):                             # (B, P + N, D), (B, D) or None
        """`call` is what callers pass to attention: rope is ignored, since a PDE knows where tokens are; a mask, a context
        or anything else but None and False is a ValueError."""
        if given := [name for name, value in call.items() if value is not None and value is not False and name != "rope"]:
            raise ValueError(f"PDESSMBlock mixes a grid of tokens and cannot follow {', '.join(given)}")
        if tokens.ndim != 3:
            raise ValueError(f"PDESSMBlock needs tokens (B, N, {self.pde.dim}); it got the shape {tuple(tokens.shape)}")
        prefix, tokens = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        N = tokens.shape[1]
        h, w = self.grid_size or (math.isqrt(N), math.isqrt(N))
        if N == 0 or h * w != N:
            grid = f"{h} x {w} = {h * w} tokens" if self.grid_size else "a square number of tokens (pass grid_size=(h, w))"
            prefix = f" after {self.prefix_tokens} prefix_tokens" if self.prefix_tokens else ""
            raise ValueError(f"PDESSMBlock got {N} tokens on the grid{prefix}; it expects {grid}")
        u = tokens.transpose(1, 2).unflatten(2, (h, w))                    # (B, D, h, w)
        mixed = self.pde(u, c).flatten(2).transpose(1, 2)                  # (B, N, D)
        if self.prefix is None:
            return mixed
        uniform = self.prefix(prefix)                                      # (B, P, D)
        return torch.cat([uniform + mixed.mean(1, keepdim=True), mixed + uniform.mean(1, keepdim=True)], dim=1)


# What makes a mixer of PDESSMBlock, by name. The first has the paper's PDE, one per channel. The second is ours, with at most
# as many parameters as attention from 88 channels on: 3.5 D^2 + 48 D against 4 D^2 + 4 D.
PRESETS = {
    "pdessm": {},
    "pdessm-g": {"gate": True, "activation": True, "components": 4, "expand": 7 / 6},
}


def options_from_weights(weights):
    """The options of the PDESSMBlock without prefix tokens that has these weights, a state dict: build it, then load them.

    KeyError if the weights are not those of a PDESSMBlock.
    """
    g0 = weights["pde.equation.g0"]
    names = {name.removeprefix("pde.equation.") for name in weights}
    found = {
        "diffusion": names & {"log_lx", "lx"},
        "convection": names & {"b", "bx"},
        "reaction": names & {"r_slack", "r_root"},
    }
    state_dim, dim = weights["pde.R.weight"].shape
    return {
        "coupling": "diagonal" if g0.ndim < 3 else "coupled" if names & {"lx", "bx", "r_root"} else "pairwise",
        "groups": len(g0) if g0.ndim == 3 else 1,
        "state_dim": state_dim if state_dim != dim else None,
        "terms": tuple(term for term in TERMS if found[term]),
        "components": len(g0) if g0.ndim == 2 else 1,
        "activation": "pde.R.bias" in weights,
        "gate": "pde.gate.weight" in weights,
        "conditioned": "pde.log_time_scale" in weights,
    }


def replace_attention(model, mixer="pdessm", grid_size=None, **options):
    """Replaces every self-attention layer of `model` by a PDESSMBlock, in place, prints how many, and returns the model.

    model:     anything with global self-attention as timm has it (`qkv`, `proj`, `num_heads`: timm's ViTs, DiT, SiT) or
               as diffusers has it (`to_q`, `to_k`, `to_v`, `to_out`). Cross-attention, attention in windows and attention
               over channels stay.
    mixer:     a name in PRESETS, or a class with the constructor of PDESSMBlock.
    grid_size: (h, w) of the tokens; by default the model's, if it has a `grid_size` or its `patch_embed` has one. For
               other inputs later, set `grid_size` of the blocks.
    options:   of PDESSMBlock; prefix_tokens is by default the model's `num_prefix_tokens`.

    The new layers have new weights, on the device and of the type of the old. ValueError if there is no such layer, or if
    the model's tokens are not on that grid in all of them, as where a model merges tokens on the way; it then stays as it was.
    """
    if isinstance(mixer, str):
        if mixer not in PRESETS:
            raise ValueError(f"unknown mixer {mixer!r}; known: {', '.join(PRESETS)}")
        mixer, options = PDESSMBlock, PRESETS[mixer] | options
    if options.get("conditioned"):
        raise ValueError("conditioned needs blocks that pass a conditioning vector to their mixer, as DiT of this project does")
    options.setdefault("prefix_tokens", getattr(model, "num_prefix_tokens", 0))
    for owner in (model, getattr(model, "patch_embed", None)):
        grid_size = grid_size or getattr(owner, "grid_size", None)

    windows = (owner for owner in model.modules() if hasattr(owner, "partition_size") or hasattr(owner, "window_size"))
    inside = {layer for owner in windows for layer in owner.modules() if layer is not owner}
    replacements = {}
    for layer in model.modules():
        if layer not in inside and (dim := _attention_width(layer)):
            weight = next(layer.parameters())
            new = mixer(dim, grid_size=grid_size, **options).to(weight.device, weight.dtype)
            replacements[layer] = new.train(layer.training)
    if not replacements:
        parts = "qkv and proj, or to_q, to_k, to_v and to_out"
        raise ValueError(f"{type(model).__name__} has no layer of self-attention over all tokens with {parts}")
    names = [(name, layer) for name, layer in model.named_modules(remove_duplicate=False) if layer in replacements]
    for name, layer in names:
        model.set_submodule(name, replacements[layer])
    if reason := _misfit(model):
        for name, layer in names:
            model.set_submodule(name, layer)
        raise ValueError(f"the tokens of {type(model).__name__} are not on one grid in all layers of attention: {reason}")
    print(f"replaced {len(replacements)} attention layers of {type(model).__name__} by {getattr(mixer, '__name__', mixer)}")
    return model


def _attention_width(layer):
    """The channels of a global self-attention layer, timm's or diffusers'; 0 for any other module."""
    if isinstance(getattr(layer, "qkv", None), nn.Linear) and hasattr(layer, "proj") and hasattr(layer, "num_heads"):
        return layer.qkv.in_features if _sees_all_tokens(layer) else 0
    if all(hasattr(layer, name) for name in ("to_q", "to_k", "to_v", "to_out")) and not layer.is_cross_attention:
        return layer.to_q.in_features
    return 0


@torch.no_grad()
def _sees_all_tokens(layer):
    """Whether attention in timm's manner takes every token to every other one, (1, N, D) -> (1, N, D), when all queries are
    zero. Attention over channels then takes a token nowhere, and others want more than tokens."""
    bias = getattr(layer, "relative_position_index", None)                 # (N, N), with a class token if not of a window
    if hasattr(layer, "window_size") and (bias is None or len(bias) != math.prod(layer.window_size) + 1):
        return False
    if layer.qkv.weight.is_meta:                                           # nothing can be computed
        return True
    layer, width = deepcopy(layer).to("cpu", torch.float32).eval(), layer.qkv.in_features
    for parameter in filter(lambda p: p is not None, (layer.qkv.weight, layer.qkv.bias, getattr(layer, "q_bias", None))):
        parameter[:width] = 0
    n = 5 if bias is None else len(bias)
    tokens = torch.arange(n * width, dtype=torch.float32).sin().view(1, n, width)          # no random numbers are drawn
    other = torch.cat([tokens[:, :-1], tokens[:, -1:] + 1], dim=1)
    try:
        moved = (layer(tokens) - layer(other)).abs()
    except Exception:  # it is not called with tokens alone
        return False
    return moved.shape == tokens.shape and bool((moved[0, :-1].amax(-1) > 0).all())


def _misfit(model):
    """What a PDESSMBlock says of the tokens that it gets for an image of the size that timm built the model for, or None.
    Shapes alone are computed."""
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None) or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", [None])[1:]
    if not size or not hasattr(model, "pretrained_cfg"):
        return None
    try:
        with torch.no_grad():
            deepcopy(model).to("meta").eval()(torch.empty(1, getattr(model, "in_chans", 3), *size, device="meta"))
    except ValueError as error:
        return str(error) if str(error).startswith("PDESSMBlock") else None
    except Exception:  # of the model, or of what computes shapes
        return None


_backend = "default"
BACKENDS = ("default", "torch", "cpp", "triton", "auto")


def set_backend(name):
    """What runs the diagonal coupling. Results agree up to rounding.

    default: on CPUs the C++ kernels of pde_ssm_kernels where they can, PyTorch elsewhere
    torch:   PyTorch
    cpp:     the C++ kernels, or an error where they cannot
    triton:  the Triton kernels of pde_ssm_kernels, for GPUs, or an error where they cannot; not for conditioned layers
    auto:    whatever kernels can, up to 128 x 128 tokens on GPUs
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    _backend = name


def _triton_kernels(v):
    """The module pde_ssm_kernels.gpu if it is to evolve v (B, h, w, C)."""
    if _backend not in ("triton", "auto"):
        return None
    try:
        from pde_ssm_kernels import gpu as kernels
    except ImportError:
        kernels = None
    return _if_they_can("triton", kernels, v)


def _cpp_kernels(v):
    """The module pde_ssm_kernels.cpu if it is to evolve v (B, h, w, C); not in exported programs, which need no compiler."""
    if _backend in ("torch", "triton") or _exporting() or _triton_kernels(v):
        return None
    try:
        from pde_ssm_kernels import cpu as kernels
    except ImportError:
        kernels = None
    return _if_they_can("cpp", kernels, v)


def _if_they_can(backend, kernels, v):
    if kernels and kernels.serves(v):
        return kernels
    if _backend == backend:
        where = "not installed" if kernels is None else f"not for {v.dtype} of shape {tuple(v.shape)} on {v.device.type}"
        raise ValueError(f"the backend is {backend}, and its kernels are {where}; set_backend('auto') takes torch there")
    return None


def _full_precision(x):
    """A context without autocast on the device of x; the meta device has none."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def _widen(x):
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))
