"""Triton kernels of the diagonal coupling: irfft2(symbol rfft2(v)) in one pass over the tokens, and its gradients in another.

Never needed for a result, only for speed on GPUs; `reference` is what they compute. For grids of up to 32 x 32 tokens each
program holds a few channels of one image on chip: load, transform, multiply, transform back, store. The transforms are
matrix products with small Fourier matrices, first along x, real to half a spectrum, then along y; sides and halves are
padded with zeros to powers of two of at least 16, which tensor cores want.
"""

import os
from functools import cache

import torch
import triton
import triton.language as tl

MAX_SIDE = 32
LEAST = 16  # of a matrix product on tensor cores
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on CPUs, for tests; Triton reads it now, too


def reference(v, symbol):
    """v (B, h, w, C), symbol (2, h, w // 2 + 1, C), its real and imaginary part -> (B, h, w, C), in v's type, computed in
    float32."""
    h, w = v.shape[1:3]
    v_hat = torch.fft.rfft2(v.float(), dim=(1, 2))
    return torch.fft.irfft2(torch.complex(*symbol) * v_hat, s=(h, w), dim=(1, 2)).to(v.dtype)


def evolve(v, symbol):
    """The same as `reference`, on a GPU. float32, bfloat16 or float16, with h and w up to MAX_SIDE; see `serves`."""
    return evolve_op(v.contiguous(), symbol.float().contiguous())


def serves(v):
    """Whether the kernels can take these tokens (B, h, w, C)."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    return (v.is_cuda or INTERPRETED) and v.dtype in types and max(v.shape[1:3]) <= MAX_SIDE and v.numel() > 0


@triton.jit
def swapped(x, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """(M, N C) -> (N, M C)"""
    return tl.reshape(tl.permute(tl.reshape(x, (M, N, C)), (1, 0, 2)), (N, M * C))


@triton.jit
def token_places(h, w, C, c0, H: tl.constexpr, W: tl.constexpr, CB: tl.constexpr):
    """Where the entries (W, H CB) of some channels lie in an image (h, w, C), and which of them it has."""
    x, y, c = tl.arange(0, W)[:, None], (tl.arange(0, H * CB) // CB)[None], (c0 + tl.arange(0, H * CB) % CB)[None]
    return (y * w + x) * C + c, (x < w) & (y < h) & (c < C)


@triton.jit
def load_matrices(matrices, H: tl.constexpr, W: tl.constexpr, F: tl.constexpr):
    """Real and imaginary parts of the matrices along x, (F, W), along y, (H, H), and back along x, (W, F)."""
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
    """(W, H CB) real -> (H, F CB), real and imaginary part."""
    ar = swapped(tl.dot(xr, v, input_precision=P), F, H, CB)
    ai = swapped(tl.dot(xi, v, input_precision=P), F, H, CB)
    real = tl.dot(yr, ar, input_precision=P) - tl.dot(yi, ai, input_precision=P)
    imaginary = tl.dot(yr, ai, input_precision=P) + tl.dot(yi, ar, input_precision=P)
    return real, imaginary


@triton.jit
def irfft2(zr, zi, yr, yi, br, bi, H: tl.constexpr, F: tl.constexpr, CB: tl.constexpr, P: tl.constexpr):
    """(H, F CB), real and imaginary part, -> (W, H CB) real."""
    ar = swapped(tl.dot(yr, zr, input_precision=P) + tl.dot(yi, zi, input_precision=P), H, F, CB)
    ai = swapped(tl.dot(yr, zi, input_precision=P) - tl.dot(yi, zr, input_precision=P), H, F, CB)
    return tl.dot(br, ar, input_precision=P) + tl.dot(bi, ai, input_precision=P)


@triton.jit
def spectrum_places(h, f, C, c0, H: tl.constexpr, F: tl.constexpr, CB: tl.constexpr):
    """Where the entries (H, F CB) lie in an array (h, f, C), and which of them it has."""
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
    """The tokens' gradient: the same operator with the conjugate symbol. The symbol's: gradient_hat conj(v_hat), summed here
    over the images that fall to this program, to be weighed and summed over the programs afterwards."""
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


def padded(n):
    return max(LEAST, triton.next_power_of_2(n))


@cache
def fourier_matrices(h, w, device):
    """What `load_matrices` reads: exp(-2 pi i f x / w), exp(-2 pi i y y' / h), and the inverse along x, in one array.

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


def fourier_matrix(n):
    m = torch.arange(n)
    return torch.exp(-2j * torch.pi / n * (m[:, None] * m % n).double())


def half_weights(w, count):
    """How often each wave number of rfft along w points counts in a sum over all of them, (count,)."""
    weights = torch.full((count,), 2.0, dtype=torch.float64)
    weights[0] = 1
    if w % 2 == 0:
        weights[w // 2] = 1
    return weights


@cache
def irfft2_weights(h, w, device):
    """How much each wave number of half a spectrum counts in irfft2, (w // 2 + 1, 1)."""
    return (half_weights(w, w // 2 + 1) / (h * w)).float().to(device)[:, None]


def constants(v, most_bytes):
    """Those of the kernels for tokens v (B, h, w, C): padded sizes, channels of a program, precision of products."""
    _, h, w, C = v.shape
    H, W, F = padded(h), padded(w), padded(w // 2 + 1)
    CB = min(triton.next_power_of_2(C), max(1, most_bytes // (H * W * v.element_size())))
    return dict(H=H, W=W, F=F, CB=CB, P=precision(v))


# So many bytes of tokens in a program, padding included, so that all of its arrays, float32 and complex, stay on chip: of
# these backward holds more, and three products in place of one take more registers.
FORWARD_BYTES, BACKWARD_BYTES = 2**14, 2**13
WARPS = 8


def precision(v):
    """Of products on tensor cores: TF32 rounds no more than the 16-bit types, three of its products are float32's."""
    return "tf32x3" if v.dtype == torch.float32 else "tf32"


@torch.library.custom_op("pde_ssm::evolve", mutates_args=())
def evolve_op(v: torch.Tensor, symbol: torch.Tensor) -> torch.Tensor:
    """v (B, h, w, C), symbol (2, h, w // 2 + 1, C), real and imaginary part, in float32; both contiguous."""
    B, h, w, C = v.shape
    sizes = constants(v, FORWARD_BYTES)
    out = torch.empty_like(v)
    forward_kernel[B, triton.cdiv(C, sizes["CB"])](
        v, symbol, fourier_matrices(h, w, v.device), out, h, w, w // 2 + 1, C,
        **sizes, num_warps=WARPS,
    )  # fmt: skip
    return out


@evolve_op.register_fake
def _(v, symbol):
    return torch.empty_like(v)


@torch.library.custom_op("pde_ssm::evolve_backward", mutates_args=())
def evolve_backward(gradient: torch.Tensor, v: torch.Tensor, symbol: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of v and symbol, of their shapes and types."""
    B, h, w, C = v.shape
    sizes = constants(v, BACKWARD_BYTES)
    blocks = triton.cdiv(C, sizes["CB"])
    programs = min(B, triton.cdiv(programs_that_fill(v.device), blocks))
    v_gradient, sums = torch.empty_like(v), symbol.new_empty(programs, *symbol.shape)
    backward_kernel[programs, blocks](
        gradient, v, symbol, fourier_matrices(h, w, v.device), v_gradient, sums, B, h, w, w // 2 + 1, C,
        **sizes, num_warps=WARPS,
    )  # fmt: skip
    return v_gradient, sums.sum(0) * irfft2_weights(h, w, v.device)


@evolve_backward.register_fake
def _(gradient, v, symbol):
    return torch.empty_like(v), torch.empty_like(symbol)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    return evolve_backward(gradient.contiguous(), *ctx.saved_tensors)


evolve_op.register_autograd(_backward, setup_context=_keep)


@cache
def programs_that_fill(device):
    """Two programs for every multiprocessor of a GPU; the interpreter has one at a time."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
