"""Triton kernels of the diagonal coupling: irfft2(symbol rfft2(v)) and its gradients.

They are optional and serve speed on GPUs, where nobody has timed them yet, so they run only on request. The transforms
are matrix products with Fourier matrices, first along x, real to half a spectrum, then along y; sides and halves are padded
with zeros to powers of two of at least 16, which tensor cores want.

Up to 32 x 32 tokens one pass does everything: each program holds a few channels of one image on chip, loads them, transforms,
multiplies, transforms back and stores them. Larger grids take three passes, in which each program holds a few channels of one
row or column: along x; along y, times the symbol and back along y, in place; and back along x.
"""

import os
from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl

from .modes import differentiable, needs_operations
from .tiles import room, shared_memory, tile

MAX_SIDE = 128
LONGEST_AT_ONCE = 32  # longest side for which one pass does everything
LEAST = 16  # least side of a matrix product on tensor cores
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on CPUs, for tests; Triton also reads it only at import


def evolve_tokens(v, equation, time_scale=None):
    """Maps tokens v (B, h, w, C) to their state: an implementation for `pde_ssm_kernels.choose`."""
    symbol = equation.symbol(*v.shape[1:3])                                # (C, h, w // 2 + 1)
    return evolve(v, torch.view_as_real(symbol).permute(3, 1, 2, 0))


def evolve(v, symbol):
    """Computes irfft2(symbol rfft2(v)): v (B, h, w, C), symbol (2, h, w // 2 + 1, C), its real and imaginary part. v has a type
    that `serves`, and so has the result. On grids that take three passes v may lie in memory channel after channel."""
    if at_once(*v.shape[1:3]) or not v.movedim(-1, 1).is_contiguous():
        v = v.contiguous()
    return evolve_op(v, symbol.float().contiguous())


def evolve_plainly(v, symbol):
    """Computes the same in PyTorch's operations."""
    v_hat = torch.complex(*symbol) * torch.fft.rfft2(v.float(), dim=(1, 2))                    # (B, h, w // 2 + 1, C)
    return torch.fft.irfft2(v_hat, s=v.shape[1:3], dim=(1, 2)).to(v.dtype)


def serves(v):
    """Returns whether the kernels support tokens v (B, h, w, C): on a GPU with enough shared memory for their grid."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    if not (v.is_cuda or INTERPRETED) or v.dtype not in types or max(v.shape[1:3]) > MAX_SIDE or v.numel() == 0:
        return False
    return not v.is_cuda or shared_memory(*v.shape[1:3]) <= room(v.device)


def at_once(h, w):
    return max(h, w) <= LONGEST_AT_ONCE


@triton.jit
def swapped(x, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """Transposes (M, N C) to (N, M C)."""
    return tl.reshape(tl.permute(tl.reshape(x, (M, N, C)), (1, 0, 2)), (N, M * C))


@triton.jit
def token_places(h, w, C, c0, H: tl.constexpr, W: tl.constexpr, CB: tl.constexpr):
    """Returns the offsets of the entries (W, H CB) of some channels in an image (h, w, C), and a mask of those inside it."""
    x, y, c = tl.arange(0, W)[:, None], (tl.arange(0, H * CB) // CB)[None], (c0 + tl.arange(0, H * CB) % CB)[None]
    return (y * w + x) * C + c, (x < w) & (y < h) & (c < C)


@triton.jit
def load_matrices(matrices, H: tl.constexpr, W: tl.constexpr, F: tl.constexpr):
    """Loads real and imaginary parts of the matrices along x, (F, W), along y, (H, H), and back along x, (W, F)."""
    f, x, y = tl.arange(0, F), tl.arange(0, W), tl.arange(0, H)
    forth, along_y, back = f[:, None] * W + x[None], y[:, None] * H + y[None], x[:, None] * F + f[None]
    xr, xi = tl.load(matrices + forth), tl.load(matrices + F * W + forth)
    matrices += 2 * F * W
    yr, yi = tl.load(matrices + along_y), tl.load(matrices + H * H + along_y)
    matrices += 2 * H * H
    br, bi = tl.load(matrices + back), tl.load(matrices + W * F + back)
    return xr, xi, yr, yi, br, bi


@triton.jit
def rfft2(v, xr, xi, yr, yi, H: tl.constexpr, F: tl.constexpr, CB: tl.constexpr, P: tl.constexpr):
    """Transforms real tokens (W, H CB) to their spectrum (H, F CB), real and imaginary part."""
    ar = swapped(tl.dot(xr, v, input_precision=P), F, H, CB)
    ai = swapped(tl.dot(xi, v, input_precision=P), F, H, CB)
    real = tl.dot(yr, ar, input_precision=P) - tl.dot(yi, ai, input_precision=P)
    imaginary = tl.dot(yr, ai, input_precision=P) + tl.dot(yi, ar, input_precision=P)
    return real, imaginary


@triton.jit
def irfft2(zr, zi, yr, yi, br, bi, H: tl.constexpr, F: tl.constexpr, CB: tl.constexpr, P: tl.constexpr):
    """Transforms a spectrum (H, F CB), real and imaginary part, back to real tokens (W, H CB)."""
    ar = swapped(tl.dot(yr, zr, input_precision=P) + tl.dot(yi, zi, input_precision=P), H, F, CB)
    ai = swapped(tl.dot(yr, zi, input_precision=P) - tl.dot(yi, zr, input_precision=P), H, F, CB)
    return tl.dot(br, ar, input_precision=P) + tl.dot(bi, ai, input_precision=P)


@triton.jit
def spectrum_places(h, f, C, c0, H: tl.constexpr, F: tl.constexpr, CB: tl.constexpr):
    """Returns the offsets of the entries (H, F CB) in an array (h, f, C), and a mask of those inside it."""
    y, x, c = tl.arange(0, H)[:, None], (tl.arange(0, F * CB) // CB)[None], (c0 + tl.arange(0, F * CB) % CB)[None]
    return (y * f + x) * C + c, (y < h) & (x < f) & (c < C)


@triton.jit
def forward_kernel(
    v, symbol, matrices, out, h, w, f, C,
    H: tl.constexpr, W: tl.constexpr, F: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    image, c0 = tl.program_id(0).to(tl.int64) * h * w * C, tl.program_id(1) * CB
    tokens, inside = token_places(h, w, C, c0, H, W, CB)
    xr, xi, yr, yi, br, bi = load_matrices(matrices, H, W, F)
    vr, vi = rfft2(tl.load(v + image + tokens, mask=inside, other=0.0).to(tl.float32), xr, xi, yr, yi, H, F, CB, P)
    places, there = spectrum_places(h, f, C, c0, H, F, CB)
    sr = tl.load(symbol + places, mask=there, other=0.0)
    si = tl.load(symbol + h * f * C + places, mask=there, other=0.0)
    state = irfft2(sr * vr - si * vi, sr * vi + si * vr, yr, yi, br, bi, H, F, CB, P)
    tl.store(out + image + tokens, state.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gradient, v, symbol, matrices, v_gradient, symbol_gradient, images, h, w, f, C,
    H: tl.constexpr, W: tl.constexpr, F: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Computes the tokens' gradient by the same operator with the conjugate symbol, and the symbol's, gradient_hat conj(v_hat),
    summed over this program's images; the caller sums it over programs and weights it."""
    first, c0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * CB
    tokens, inside = token_places(h, w, C, c0, H, W, CB)
    xr, xi, yr, yi, br, bi = load_matrices(matrices, H, W, F)
    places, there = spectrum_places(h, f, C, c0, H, F, CB)
    sr = tl.load(symbol + places, mask=there, other=0.0)
    si = tl.load(symbol + h * f * C + places, mask=there, other=0.0)
    sum_r, sum_i = tl.full((H, F * CB), 0, tl.float32), tl.full((H, F * CB), 0, tl.float32)
    tokens += first * h * w * C
    for _ in range(tl.program_id(0), images, tl.num_programs(0)):
        vr, vi = rfft2(tl.load(v + tokens, mask=inside, other=0.0).to(tl.float32), xr, xi, yr, yi, H, F, CB, P)
        gr, gi = rfft2(tl.load(gradient + tokens, mask=inside, other=0.0).to(tl.float32), xr, xi, yr, yi, H, F, CB, P)
        sum_r += gr * vr + gi * vi
        sum_i += gi * vr - gr * vi
        back = irfft2(sr * gr + si * gi, sr * gi - si * gr, yr, yi, br, bi, H, F, CB, P)
        tl.store(v_gradient + tokens, back.to(v_gradient.dtype.element_ty), mask=inside)
        tokens += tl.num_programs(0).to(tl.int64) * h * w * C
    symbol_gradient += first * 2 * h * f * C
    tl.store(symbol_gradient + places, sum_r, mask=there)
    tl.store(symbol_gradient + h * f * C + places, sum_i, mask=there)


@triton.jit
def along_x_kernel(
    v, matrices, v_hat, image_stride, y_stride, x_stride, c_stride, h, w, f, C,
    W: tl.constexpr, F: tl.constexpr, XB: tl.constexpr, FB: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Transforms one row of v (B, h, w, C), which may have any strides, to v_hat (B, 2, h, f, C)."""
    image, y = (tl.program_id(0) // h).to(tl.int64), tl.program_id(0) % h
    c = tl.program_id(1) * CB + tl.arange(0, CB)[None]
    v += image * image_stride + y * y_stride + c * c_stride
    v_hat += (image * 2 * h + y) * f * C + c
    for first in range(0, f, FB):
        k = first + tl.arange(0, FB)[:, None]
        real, imaginary = tl.full((FB, CB), 0, tl.float32), tl.full((FB, CB), 0, tl.float32)
        for start in range(0, w, XB):
            x = start + tl.arange(0, XB)
            row = tl.load(v + x[:, None] * x_stride, mask=(x[:, None] < w) & (c < C), other=0.0).to(tl.float32)
            real = tl.dot(tl.load(matrices + k * W + x[None]), row, real, input_precision=P)
            imaginary = tl.dot(tl.load(matrices + F * W + k * W + x[None]), row, imaginary, input_precision=P)
        tl.store(v_hat + k * C, real, mask=(k < f) & (c < C))
        tl.store(v_hat + h * f * C + k * C, imaginary, mask=(k < f) & (c < C))


@triton.jit
def some_of_column(v_hat, c, matrices, ky, kx, h, f, C, H: tl.constexpr, YB: tl.constexpr, CB: tl.constexpr, P: tl.constexpr):
    """Transforms a column of v_hat (2, h, f, C) along y, at some ky (KB, 1) and channels c (1, CB): (KB, CB) both."""
    real, imaginary = tl.full((ky.shape[0], CB), 0, tl.float32), tl.full((ky.shape[0], CB), 0, tl.float32)
    for start in range(0, h, YB):
        y = start + tl.arange(0, YB)
        yr, yi = tl.load(matrices + ky * H + y[None]), tl.load(matrices + H * H + ky * H + y[None])
        places, inside = (y[:, None] * f + kx) * C + c, (y[:, None] < h) & (c < C)
        vr = tl.load(v_hat + places, mask=inside, other=0.0)
        vi = tl.load(v_hat + h * f * C + places, mask=inside, other=0.0)
        real = tl.dot(yr, vr, tl.dot(-yi, vi, real, input_precision=P), input_precision=P)
        imaginary = tl.dot(yr, vi, tl.dot(yi, vr, imaginary, input_precision=P), input_precision=P)
    return real, imaginary


@triton.jit
def along_y_kernel(
    v_hat, symbol, matrices, h, f, C,
    H: tl.constexpr, YB: tl.constexpr, CB: tl.constexpr, SIGN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Transforms one column of v_hat (B, 2, h, f, C), multiplies it by the symbol, or with SIGN = -1 by its conjugate, and
    transforms it back, in place."""
    image, kx = (tl.program_id(0) // f).to(tl.int64), tl.program_id(0) % f
    y, c = tl.arange(0, H), tl.program_id(1) * CB + tl.arange(0, CB)[None]
    v_hat += image * 2 * h * f * C
    out_r, out_i = tl.full((H, CB), 0, tl.float32), tl.full((H, CB), 0, tl.float32)
    for first in range(0, h, YB):
        ky = first + tl.arange(0, YB)
        vr, vi = some_of_column(v_hat, c, matrices, ky[:, None], kx, h, f, C, H, YB, CB, P)
        entries, there = (ky[:, None] * f + kx) * C + c, (ky[:, None] < h) & (c < C)
        sr = tl.load(symbol + entries, mask=there, other=0.0)
        si = SIGN * tl.load(symbol + h * f * C + entries, mask=there, other=0.0)
        zr, zi = sr * vr - si * vi, sr * vi + si * vr
        # The matrix is symmetric, so its rows can be read as its columns.
        yr, yi = tl.load(matrices + y[:, None] * H + ky[None]), tl.load(matrices + H * H + y[:, None] * H + ky[None])
        out_r = tl.dot(yr, zr, tl.dot(yi, zi, out_r, input_precision=P), input_precision=P)
        out_i = tl.dot(yr, zi, tl.dot(-yi, zr, out_i, input_precision=P), input_precision=P)
    places, inside = (y[:, None] * f + kx) * C + c, (y[:, None] < h) & (c < C)
    tl.store(v_hat + places, out_r, mask=inside)
    tl.store(v_hat + h * f * C + places, out_i, mask=inside)


@triton.jit
def back_along_x_kernel(
    v_hat, matrices, out, image_stride, y_stride, x_stride, c_stride, h, w, f, C,
    W: tl.constexpr, F: tl.constexpr, FB: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Inverts `along_x_kernel`, with the factor 1 / (h w) of irfft2."""
    image, y = (tl.program_id(0) // h).to(tl.int64), tl.program_id(0) % h
    x, c = tl.arange(0, W)[:, None], tl.program_id(1) * CB + tl.arange(0, CB)[None]
    v_hat += (image * 2 * h + y) * f * C + c
    row = tl.full((W, CB), 0, tl.float32)
    for first in range(0, f, FB):
        k = first + tl.arange(0, FB)
        there = (k[:, None] < f) & (c < C)
        zr = tl.load(v_hat + k[:, None] * C, mask=there, other=0.0)
        zi = tl.load(v_hat + h * f * C + k[:, None] * C, mask=there, other=0.0)
        row = tl.dot(tl.load(matrices + x * F + k[None]), zr, row, input_precision=P)
        row = tl.dot(tl.load(matrices + W * F + x * F + k[None]), zi, row, input_precision=P)
    out += image * image_stride + y * y_stride
    tl.store(out + x * x_stride + c * c_stride, row.to(out.dtype.element_ty), mask=(x < w) & (c < C))


@triton.jit
def correlate_along_y_kernel(
    v_hat, g_hat, matrices, symbol_gradient, images, h, f, C,
    H: tl.constexpr, YB: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Computes the symbol's gradient, as `backward_kernel` does, at some ky of one column, summed over all images."""
    ky, kx = tl.program_id(0) // f * YB + tl.arange(0, YB)[:, None], tl.program_id(0) % f
    c = tl.program_id(1) * CB + tl.arange(0, CB)[None]
    sum_r, sum_i = tl.full((YB, CB), 0, tl.float32), tl.full((YB, CB), 0, tl.float32)
    for _ in range(images):
        vr, vi = some_of_column(v_hat, c, matrices, ky, kx, h, f, C, H, YB, CB, P)
        gr, gi = some_of_column(g_hat, c, matrices, ky, kx, h, f, C, H, YB, CB, P)
        sum_r += gr * vr + gi * vi
        sum_i += gi * vr - gr * vi
        v_hat += 2 * h * f * C
        g_hat += 2 * h * f * C
    entries, there = (ky * f + kx) * C + c, (ky < h) & (c < C)
    tl.store(symbol_gradient + entries, sum_r, mask=there)
    tl.store(symbol_gradient + h * f * C + entries, sum_i, mask=there)


def padded(n):
    return max(LEAST, triton.next_power_of_2(n))


@cache
def fourier_matrices(h, w, device):
    """Returns what `load_matrices` reads: exp(-2 pi i f x / w), exp(-2 pi i y y' / h) and the inverse along x, in one array.

    The inverse takes half a spectrum: its weights are 2 where the other half has a conjugate, and hold the 1 / (h w).
    """
    f = w // 2 + 1
    H, W, F = padded(h), padded(w), padded(f)
    x, y = torch.zeros(F, W, dtype=torch.complex128), torch.zeros(H, H, dtype=torch.complex128)
    x[:f, :w] = fourier_matrix(w)[:f]
    y[:h, :h] = fourier_matrix(h)
    back = (x * half_weights(w, F)[:, None] / (h * w)).T                   # real part of conj(back) z = Re z_r, Im z_i
    parts = [part.flatten() for matrix in (x, y, back) for part in (matrix.real, matrix.imag)]
    return torch.cat(parts).float().to(device)


def matrices_along(h, w, device):
    """Returns the parts of `fourier_matrices` along x, along y and back along x."""
    H, W, F = padded(h), padded(w), padded(w // 2 + 1)
    return fourier_matrices(h, w, device).split([2 * F * W, 2 * H * H, 2 * W * F])


def fourier_matrix(n):
    m = torch.arange(n)
    return torch.exp(-2j * torch.pi / n * (m[:, None] * m % n).double())


def half_weights(w, count):
    """Returns how often each wave number of rfft along w points counts in a sum over all of them, (count,)."""
    weights = torch.full((count,), 2.0, dtype=torch.float64)
    weights[0] = 1
    if w % 2 == 0:
        weights[w // 2] = 1
    return weights


@cache
def irfft2_weights(h, w, device):
    """Returns how much each wave number of half a spectrum counts in irfft2, (w // 2 + 1, 1)."""
    return (half_weights(w, w // 2 + 1) / (h * w)).float().to(device)[:, None]


def constants(kernel, v):
    """Returns the constants of a kernel that holds the whole grid of tokens v (B, h, w, C): padded sizes, channels per program
    and precision of products; and the options of its launch."""
    _, h, w, C = v.shape
    H, W, F = padded(h), padded(w), padded(w // 2 + 1)
    t = tile(kernel, H, W, device=v.device)
    return dict(H=H, W=W, F=F, CB=min(triton.next_power_of_2(C), t.channels), P=precision()), t.options()


def precision():
    """Returns the precision of tensor-core products: three in TF32 are as exact as one in float32; AMD's compiler has none."""
    return "ieee" if torch.version.hip else "tf32x3"


def on(device):
    """Returns a context in which kernels are launched on that device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def along_x(v, matrices):
    """Runs the first pass, (B, h, w, C) -> (B, 2, h, w // 2 + 1, C), real and imaginary part."""
    B, h, w, C = v.shape
    f = w // 2 + 1
    v_hat = v.new_empty(B, 2, h, f, C, dtype=torch.float32)
    W, F, t = padded(w), padded(f), tile("along_x", padded(w), device=v.device)
    along_x_kernel[B * h, triton.cdiv(C, t.channels)](
        v, matrices, v_hat, *v.stride(), h, w, f, C,
        W=W, F=F, XB=min(t.block, W), FB=min(t.block, F), CB=t.channels, P=precision(), **t.options(),
    )  # fmt: skip
    return v_hat


def multiply_along_y(v_hat, symbol, matrices, sign):
    """Runs the second pass, in place."""
    B, _, h, f, C = v_hat.shape
    H, t = padded(h), tile("along_y", padded(h), device=v_hat.device)
    along_y_kernel[B * f, triton.cdiv(C, t.channels)](
        v_hat, symbol, matrices, h, f, C,
        H=H, YB=min(t.block, H), CB=t.channels, SIGN=sign, P=precision(), **t.options(),
    )  # fmt: skip


def back_along_x(v_hat, matrices, out):
    """Runs the third pass, (B, 2, h, w // 2 + 1, C) -> (B, h, w, C), into `out`."""
    B, h, w, C = out.shape
    f = w // 2 + 1
    W, F, t = padded(w), padded(f), tile("back_along_x", padded(w), device=out.device)
    back_along_x_kernel[B * h, triton.cdiv(C, t.channels)](
        v_hat, matrices, out, *out.stride(), h, w, f, C,
        W=W, F=F, FB=min(t.block, F), CB=t.channels, P=precision(), **t.options(),
    )  # fmt: skip


def correlate_along_y(v_hat, g_hat, matrices):
    """Returns the symbol's gradient, (2, h, w // 2 + 1, C), before `irfft2_weights`, from what `along_x` makes of both."""
    B, _, h, f, C = v_hat.shape
    H, t = padded(h), tile("correlate_along_y", padded(h), device=v_hat.device)
    symbol_gradient, YB = v_hat.new_empty(v_hat.shape[1:]), min(t.block, H)
    correlate_along_y_kernel[triton.cdiv(h, YB) * f, triton.cdiv(C, t.channels)](
        v_hat, g_hat, matrices, symbol_gradient, B, h, f, C,
        H=H, YB=YB, CB=t.channels, P=precision(), **t.options(),
    )  # fmt: skip
    return symbol_gradient


@torch.library.custom_op("pde_ssm::evolve", mutates_args=())
def evolve_op(v: torch.Tensor, symbol: torch.Tensor) -> torch.Tensor:
    """Wraps `run` as an operator that compilers treat as opaque. The symbol is contiguous, in float32; for v see `evolve`."""
    with on(v.device):
        return run(v, symbol)


def run(v, symbol):
    """Computes `evolve` on the current device: v (B, h, w, C), symbol (2, h, w // 2 + 1, C)."""
    B, h, w, C = v.shape
    out = v.new_empty(v.shape)
    if at_once(h, w):
        sizes, options = constants("forward", v)
        forward_kernel[B, triton.cdiv(C, sizes["CB"])](
            v, symbol, fourier_matrices(h, w, v.device), out, h, w, w // 2 + 1, C, **sizes, **options,
        )  # fmt: skip
    else:
        x, y, back = matrices_along(h, w, v.device)
        v_hat = along_x(v, x)
        multiply_along_y(v_hat, symbol, y, 1)
        back_along_x(v_hat, back, out)
    return out


@evolve_op.register_fake
def _(v, symbol):
    return v.new_empty(v.shape)


@torch.library.custom_op("pde_ssm::evolve_backward", mutates_args=())
def evolve_backward(gradient: torch.Tensor, v: torch.Tensor, symbol: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Wraps `run_backward` likewise."""
    with on(v.device):
        return run_backward(gradient, v, symbol)


def run_backward(gradient, v, symbol):
    """Returns the gradients of v and symbol, of their shapes and types, on the current device."""
    B, h, w, C = v.shape
    v_gradient = torch.empty_like(v)                                       # its strides are v's, as the fake below promises
    if at_once(h, w):
        sizes, options = constants("backward", v)
        blocks = triton.cdiv(C, sizes["CB"])
        programs = min(B, triton.cdiv(programs_that_fill(v.device), blocks))
        sums = symbol.new_empty(programs, *symbol.shape)
        backward_kernel[programs, blocks](
            gradient, v, symbol, fourier_matrices(h, w, v.device), v_gradient, sums, B, h, w, w // 2 + 1, C,
            **sizes, **options,
        )  # fmt: skip
        symbol_gradient = sums.sum(0)
    else:
        x, y, back = matrices_along(h, w, v.device)
        g_hat = along_x(gradient, x)
        symbol_gradient = correlate_along_y(along_x(v, x), g_hat, y)
        multiply_along_y(g_hat, symbol, y, -1)
        back_along_x(g_hat, back, v_gradient)
    return v_gradient, symbol_gradient * irfft2_weights(h, w, v.device)


@evolve_backward.register_fake
def _(gradient, v, symbol):
    return torch.empty_like(v), torch.empty_like(symbol)


def _backward(ctx, gradient):
    if needs_operations(gradient):
        return differentiable(evolve_plainly, ctx.saved_tensors, gradient, ctx.needs_input_grad)
    return evolve_backward(gradient.contiguous(), *ctx.saved_tensors)


evolve_op.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@cache
def programs_that_fill(device):
    """Returns how many programs keep a device busy: two for each multiprocessor of a GPU. The interpreter runs one by one."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
