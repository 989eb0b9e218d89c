"""The C++ kernels of cpu.cpp: irfft2(symbol rfft2(v)) of the diagonal coupling and its gradients, on CPUs.

They are optional and serve speed alone. building.py builds them at their first use; without a compiler, or without OpenMP,
`serves` returns False.

One layer of 384 channels, batch 4, 16 to 4,096 tokens, takes 0.41 to 0.56 of the plain implementation's time forward and 0.43
to 0.50 in both passes (2 threads of an Intel Xeon: `python -m benchmarks.mixer --quick`, without and with CXX=/no/compiler).
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

from .building import address, found, kernel, load
from .modes import differentiable, needs_operations, widen

ROWS = 9                # of a symbol: tau times r, Kxx, Kxy, Kyy, bx and by; then gx, gy and g0
MAX_SIDE = 512
LARGEST_PRIME = 127     # largest prime factor p of a side, at a cost of p^2; larger ones were not timed against FFTs
CHANNELS = 16           # channels in a block, about as many as one vector holds
FIXED_THREADS = 8       # threads among which work is divided where results must not depend on the actual number
BLOCKS_PER_THREAD = 4   # blocks of channels and images per thread: with fewer, threads wait for one another at the end
FLAGS = f"-DROWS={ROWS} -DMAX_SIDE={MAX_SIDE} -DLARGEST_PRIME={LARGEST_PRIME}".split()

SOURCE = Path(__file__).with_name("cpu.cpp")


def largest_prime_factor(n):
    p = 2
    while p * p <= n:
        if n % p:
            p += 1
        else:
            n //= p
    return n


SIDES = frozenset(n for n in range(1, MAX_SIDE + 1) if largest_prime_factor(n) <= LARGEST_PRIME)


def evolve_tokens(v, equation, time_scale=None):
    """Maps tokens v (B, h, w, C) to their state, in the type of v: an implementation for `pde_ssm_kernels.choose`."""
    wide = widen(v)
    rows = equation.rows(time_scale).to(wide.dtype)                        # of an equation in float64
    if torch.compiler.is_compiling():
        return evolve_op(wide, rows).to(v.dtype)
    if torch.is_grad_enabled():
        return Evolution.apply(equation.evolve_plainly, wide, rows).to(v.dtype)
    return evolve(wide, rows).to(v.dtype)


class Evolution(torch.autograd.Function):
    """Runs `evolve` with its gradients; where `needs_operations`, those are of `plainly`(v, rows), which computes the same."""

    @staticmethod
    def forward(ctx, plainly, v, rows):
        ctx.save_for_backward(v, rows)
        ctx.plainly = plainly
        return evolve(v, rows)

    @staticmethod
    def backward(ctx, gradient):
        if needs_operations(gradient):
            return None, *differentiable(ctx.plainly, ctx.saved_tensors, gradient, ctx.needs_input_grad[1:])
        return None, *evolve_backward(gradient, *ctx.saved_tensors)


def serves(v):
    """Returns whether the kernels support tokens v (B, h, w, C): floats of at most 32 bits, on a CPU, with sides in SIDES."""
    if v.device.type != "cpu" or v.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return v.shape[1] in SIDES and v.shape[2] in SIDES and built()


@torch.compiler.assume_constant_result  # for compilers, which cannot look into it
def built():
    """Returns whether there are kernels; warns once if there are none."""
    return found(library)


def evolve(v, rows):
    """Returns the state (B, h, w, C) of v = R u (B, h, w, C); rows (n, 9, C), or one set per image (B, n, 9, C); float32.

    The nine rows are tau times r, Kxx, Kxy, Kyy, bx and by, then gx, gy and g0. The symbol is the sum of G(k) B(k) over the n.
    h and w must be among SIDES. ValueError for other shapes or types.
    """
    v, rows = v.contiguous(), rows.contiguous()
    out = torch.empty_like(v)
    run("evolve", v, rows, out, sizes=sizes(v, rows))
    return out


def evolve_backward(gradient, v, rows):
    """Returns the gradients of v and of rows from that of `evolve`'s result."""
    gradient, v, rows = gradient.to(v.dtype).expand_as(v).contiguous(), v.contiguous(), rows.contiguous()
    v_gradient = torch.empty_like(v)
    sums = rows.new_empty(shares(v, rows), *rows.shape[-3:])
    run("evolve_backward", gradient, v, rows, v_gradient, sums, sizes=sizes(v, rows))
    return v_gradient, sums if rows.ndim == 4 else sums.sum(0)


def shares(v, rows):
    """Returns the number of shares of images into which each block's work is divided: enough to keep all threads busy.

    The gradient of the rows is the sum of the shares', so PyTorch's deterministic mode fixes their number.
    """
    if rows.ndim == 4:
        return len(v)
    blocks = -(-v.shape[3] // CHANNELS)
    threads = FIXED_THREADS if torch.are_deterministic_algorithms_enabled() else torch.get_num_threads()
    return min(len(v), -(-BLOCKS_PER_THREAD * threads // blocks))


def sizes(v, rows):
    """Returns the sizes that both kernels take after the tensors; the last but one is the stride between two shares' rows."""
    expected = *([len(v)] if rows.ndim == 4 else []), *rows.shape[-3:-2], ROWS, v.shape[-1]
    if v.ndim != 4 or rows.ndim not in (3, 4) or rows.shape != expected or not v.dtype == rows.dtype == torch.float32:
        got = f"{v.dtype} of shape {tuple(v.shape)} and {rows.dtype} of shape {tuple(rows.shape)}"
        raise ValueError(f"the kernels need float32 (B, h, w, C) and ([B], n, {ROWS}, C); they got {got}")
    if not {*v.shape[1:3]} <= SIDES:
        limits = f"sides from 1 to {MAX_SIDE} without prime factors above {LARGEST_PRIME}"
        raise ValueError(f"the kernels need {limits}; they got {v.shape[1]} x {v.shape[2]} tokens")
    own = rows.shape[-3:].numel() if rows.ndim == 4 else 0
    return *v.shape, rows.shape[-3], shares(v, rows), own, torch.get_num_threads()


def run(name, *tensors, sizes):
    tensors = [tensor.resolve_neg() for tensor in tensors]                 # PyTorch may negate lazily, in a flag
    kernel(library, name)(*map(address, tensors), *sizes)


@cache
def library():
    """Returns the compiled kernels and None, or None and the reason why there are none."""
    kernels, reason = load(SOURCE, *FLAGS)
    if reason:
        return None, reason
    pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    after_tensors = [long, integer, integer, long, integer, integer, long, integer]
    kernels.evolve.argtypes = [pointer] * 3 + after_tensors
    kernels.evolve_backward.argtypes = [pointer] * 5 + after_tensors
    kernels.evolve.restype = kernels.evolve_backward.restype = None
    return kernels, None


@torch.library.custom_op("pde_ssm::evolve_on_cpu", mutates_args=())
def evolve_op(v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Wraps `evolve` as an operator that compilers treat as opaque."""
    return evolve(v, rows)


@evolve_op.register_fake
def _(v, rows):
    return v.new_empty(v.shape)


@torch.library.custom_op("pde_ssm::evolve_on_cpu_backward", mutates_args=())
def evolve_backward_op(
    gradient: torch.Tensor, v: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return evolve_backward(gradient, v, rows)


@evolve_backward_op.register_fake
def _(gradient, v, rows):
    return v.new_empty(v.shape), rows.new_empty(rows.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    return evolve_backward_op(gradient, *ctx.saved_tensors)


evolve_op.register_autograd(_backward, setup_context=_keep)
