"""The C++ kernels of selective_scan.cpp, on CPUs: the whole scan, with softplus and gate, the convolution that mixers have
before it, and their gradients.

They are optional and serve speed alone; like the kernels of pde_ssm_kernels, they are built at first use and replaced by
PyTorch where that fails. They take tensors in any layout without copying. Any number of threads gives the same bits.

The scan of 768 channels, 64 to 1,024 tokens, takes 0.13 to 0.18 of the time of PyTorch's operations in selective_scan.py,
forward and in both passes (2 threads of an Intel Xeon: `python -m benchmarks.selective_scan --quick`).
"""

import ctypes
from functools import cache, partial
from pathlib import Path

import torch

from pde_ssm_kernels import backend
from pde_ssm_kernels.building import address, found, kernel, load
from pde_ssm_kernels.modes import differentiable, needs_operations

SOURCE = Path(__file__).with_name("selective_scan.cpp")
CHUNK = 16  # tokens
SHARE = 64  # channels


def serves(u):
    """Returns whether the kernels support u: float32 or float64 on a CPU, unless the backend is torch or plain."""
    wanted = u.device.type == "cpu" and u.dtype in (torch.float32, torch.float64) and backend() not in ("torch", "plain")
    return wanted and built()


def built():
    """Returns whether there are kernels; warns if there are none."""
    return found(library, "selective scans")


@cache
def library():
    """Returns the compiled kernels and None, or None and the reason why there are none."""
    return load(SOURCE, f"-DCHUNK={CHUNK}", f"-DSHARE={SHARE}")


def forward(u, delta, A, B, C, D, z, bias, softplus, reverse, keep):
    """Returns out as delta lies in memory, the last states (B, E, N) and, with `keep`, those before each chunk (chunks, B, N,
    E)."""
    (batch, E, L), N = u.shape, A.shape[1]
    out, last = torch.empty_like(delta), u.new_empty(batch, E, N)
    chunk_states = u.new_empty(-(-L // CHUNK) if keep else 0, batch, N, E)
    call("forward", (u, delta, z, out, None, None, None), (B, C), (A, D, bias, last, chunk_states), softplus, reverse)
    return out, last, chunk_states


def backward(out_grad, last_grad, u, delta, A, B, C, D, z, bias, softplus, reverse, chunk_states):
    """Returns the gradients of u, delta, A, B, C, D, z and bias from those of out and the last states."""
    (batch, E, L), (_, G, N, _) = u.shape, B.shape
    out_grad, last_grad = out_grad.resolve_neg(), last_grad.resolve_neg()  # PyTorch may negate lazily, in a flag
    rows = [None if x is None else torch.empty_like(x) for x in (u, delta, z)]
    shares = -(-(E // G) // SHARE)
    whole = [u.new_empty(batch, *shape) for shape in ((E, N), (E,), (E,))]
    whole += [u.new_empty(shares, batch, G, L, N) for _ in range(2)]
    call("backward", (u, delta, z, out_grad, *rows), (B, C), (A, D, bias, last_grad, chunk_states, *whole), softplus, reverse)
    A_grad, D_grad, bias_grad, B_grad, C_grad = map(sum_of, whole)
    if reverse:
        B_grad, C_grad = B_grad.flip(2), C_grad.flip(2)                    # the kernel writes them in the order of its steps
    return rows[0], rows[1], A_grad, B_grad.mT, C_grad.mT, D_grad, rows[2], bias_grad


class Convolution(torch.autograd.Function):
    """silu of the convolution of every channel over a token and those before it; with `reverse`, over those after it.

    x (B, E, L), weight (E, 1, width), the last of which is for the token itself, bias (E,) -> (B, E, L). plainly: the same in
    PyTorch's operations.
    """

    @staticmethod
    def forward(ctx, plainly, x, weight, bias, reverse):
        out = torch.empty_like(x)
        x, weight, bias = x.resolve_neg(), weight.contiguous(), bias.contiguous()
        rows = *located(x, reverse), *located(out, reverse), *located(None, reverse)
        run("convolve", x.dtype, [*rows, address(weight), address(bias), 0, 0, *x.shape, weight.shape[2]])
        ctx.save_for_backward(x, weight, bias)
        ctx.plainly, ctx.reverse = plainly, reverse
        return out

    @staticmethod
    def backward(ctx, out_grad):
        if needs_operations(out_grad):
            plainly = partial(ctx.plainly, reverse=ctx.reverse)
            return None, *differentiable(plainly, ctx.saved_tensors, out_grad, ctx.needs_input_grad[1:4]), None
        (x, weight, bias), out_grad = ctx.saved_tensors, out_grad.resolve_neg()
        x_grad, weight_grad, bias_grad = torch.empty_like(x), *(p.new_empty(len(x), *p.shape) for p in (weight, bias))
        rows = [number for tensor in (x, out_grad, x_grad) for number in located(tensor, ctx.reverse)]
        whole = [*map(address, (weight, bias, weight_grad, bias_grad))]
        run("convolve_backward", x.dtype, [*rows, *whole, *x.shape, weight.shape[2]])
        return None, x_grad, sum_of(weight_grad), sum_of(bias_grad), None


def call(name, rows, columns, whole, softplus, reverse):
    """Runs a kernel of the scan; its argument is the Scan of selective_scan.cpp."""
    u, (B, _), (A, *_) = rows[0], columns, whole
    whole = [None if x is None else x.contiguous() for x in whole]
    members = [number for x in (*rows, *columns) for number in located(x, reverse)]
    members += [*map(address, whole)] + [0] * (10 - len(whole))
    run(name, u.dtype, members + [*u.shape, A.shape[1], B.shape[1], softplus])


def run(name, dtype, members):
    """Runs a kernel, whose only argument has these members of 8 bytes each, and then the number of threads."""
    kernel(library, f"{name}{8 * dtype.itemsize}")((ctypes.c_int64 * (len(members) + 1))(*members, torch.get_num_threads()))


def located(x, reverse):
    """Returns the address of a tensor's first token, or with `reverse` its last, and the strides from there; zeros for None."""
    if x is None:
        return 0, 0, 0, 0
    *others, token = x.stride()
    first = address(x) + ((x.shape[-1] - 1) * token * x.itemsize if reverse else 0)
    return first, *others, -token if reverse else token


def sum_of(rows):
    """Adds up the rows of a tensor, in their order whatever the number of threads."""
    if len(rows) == 1:
        return rows[0]
    if not len(rows):                                                      # there are no images
        return rows.sum(0)
    total = torch.empty_like(rows[0])
    numbers = rows.data_ptr(), total.data_ptr(), len(rows), total.numel(), torch.get_num_threads()
    kernel(library, f"sum{8 * rows.itemsize}")(*map(ctypes.c_int64, numbers))
    return total
