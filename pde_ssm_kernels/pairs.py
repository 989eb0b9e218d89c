"""The C++ kernels of pairs.cpp: products of spectra with the matrices of the pairwise coupling, and their gradients, on CPUs.

Never needed for a result, only for speed: pytorch.py computes the same in pieces, on any device and without a compiler. One
layer of 384 channels, both passes, one thread of an Intel Xeon, takes 0.24 of its time for 4 images of 64 tokens, 0.16 for 4
of 256, 0.40 for 16 of 64 and 0.33 for 16 of 256 (`python -m benchmarks.mixer`, without and with CXX=/no/compiler).
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

from . import cpu, pytorch
from .building import load
from .modes import full_precision, widen

SOURCE = Path(__file__).with_name("pairs.cpp")


def evolve_tokens(v, equation, time_scale=None):
    """The road of `pde_ssm_kernels.choose` for Pairwise: tokens v (B, h, w, C) to their state, in the type of v."""
    h, w = v.shape[1:3]
    spectra = pytorch.lanes(pytorch.real_spectrum(widen(v)), equation.groups)      # (groups, f, 2, B, c)
    embedding = torch.stack(equation.embedding(), dim=1)                           # (groups, 3, c, c)
    exponents = torch.cat(pytorch.exponents(equation), dim=1).unflatten(2, equation.g0.shape[1:])  # (groups, 6, c, c)
    if torch.compiler.is_compiling():
        states, _ = evolve_op(spectra, embedding, exponents, h, w)
    elif torch.is_grad_enabled():
        states = Evolution.apply(equation, spectra, embedding, exponents, h, w)
    else:
        states, _ = evolve(spectra, embedding, exponents, h, w)
    return pytorch.from_real_spectrum(pytorch.from_lanes(states, h), h, w).to(v.dtype)


class Evolution(torch.autograd.Function):
    """`evolve` with its gradients; where those need gradients in turn, of pytorch.py, which computes the same."""

    @staticmethod
    def forward(ctx, equation, spectra, embedding, exponents, h, w):
        states, embedded = evolve(spectra, embedding, exponents, h, w)
        ctx.save_for_backward(spectra, embedded, embedding, exponents)
        ctx.equation, ctx.grid = equation, (h, w)
        return states

    @staticmethod
    def backward(ctx, gradient):
        spectra, embedded, embedding, exponents = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, *evolve_backward(gradient, spectra, embedded, embedding, exponents, *ctx.grid), None, None
        inputs = spectra, embedding, exponents
        with full_precision(spectra):                                      # backward() may be called under autocast
            growth, phase = exponents.flatten(2).split([4, 2], dim=1)
            states = pytorch.evolve_spectra(ctx.equation, spectra, embedding.flatten(1, 2), growth, phase, *ctx.grid)
            needed = [x for x, is_needed in zip(inputs, ctx.needs_input_grad[1:4]) if is_needed]
            found = iter(torch.autograd.grad(states, needed, gradient, create_graph=True))
        return None, *(next(found) if is_needed else None for is_needed in ctx.needs_input_grad[1:4]), None, None


def serves(v):
    """Whether the kernels can take these tokens (B, h, w, C): of at most 32 bits, on a CPU."""
    return v.device.type == "cpu" and v.dtype in (torch.float32, torch.bfloat16, torch.float16) and built()


@torch.compiler.assume_constant_result  # for compilers, which cannot look into it
def built():
    """Whether there are kernels; cpu.py says why there are none."""
    return cpu.built() and library()[1] is None


def evolve(spectra, embedding, exponents, h, w):
    """Returns G B v, and B v, at the f wave vectors of an h x w grid.

    spectra v: (groups, f, 2, B, c), real parts before imaginary ones, as both results.
    embedding: (groups, 3, c, c): g0, gx and gy.
    exponents: (groups, 6, c, c): tau times r, Kxx, Kxy, Kyy, bx and by, the last two from -1/2 to 1/2.
    All of them float32, or ValueError.
    """
    check(spectra, embedding, exponents, h, w)
    embedding, exponents = embedding.contiguous(), exponents.contiguous()
    embedded, states = (torch.empty_like(spectra, memory_format=torch.contiguous_format) for _ in range(2))
    run("embed", packed(spectra), embedding, embedded, like=spectra, h=h, w=w)
    run("green", packed(embedded), exponents, states, like=spectra, h=h, w=w)
    return states, embedded


def evolve_backward(gradient, spectra, embedded, embedding, exponents, h, w):
    """Returns the gradients of the spectra, the embedding and the exponents from that of `evolve`'s first result."""
    check(spectra, embedding, exponents, h, w)
    gradient = gradient.to(spectra.dtype).expand_as(spectra)
    inputs = embedded, exponents, spectra, embedding = [x.contiguous() for x in (embedded, exponents, spectra, embedding)]
    of_embedded, of_exponents, of_spectra, of_embedding = found = [torch.empty_like(x) for x in inputs]
    run("green_backward", packed(gradient), *inputs[:2], *found[:2], like=spectra, h=h, w=w)
    run("embed_backward", packed(of_embedded), *inputs[2:], *found[2:], like=spectra, h=h, w=w)
    return of_spectra, of_embedding, of_exponents


def packed(spectra):
    """(groups, f, 2, B, c) -> (groups, f, c, 2, B)"""
    return spectra.permute(0, 1, 4, 2, 3).contiguous()


def check(spectra, embedding, exponents, h, w):
    groups, _, _, B, c = spectra.shape
    shapes = [(groups, h * (w // 2 + 1), 2, B, c), (groups, 3, c, c), (groups, 6, c, c)]
    tensors = spectra, embedding, exponents
    if [tuple(x.shape) for x in tensors] != shapes or any(x.dtype != torch.float32 for x in tensors):
        got = ", ".join(f"{x.dtype} of shape {tuple(x.shape)}" for x in tensors)
        raise ValueError(f"the kernels need float32 of shapes {shapes} for {h} x {w} tokens; they got {got}")


def run(name, *tensors, like, h, w):
    kernels, reason = library()
    if reason:
        raise RuntimeError(reason)                                         # as in a program that was exported elsewhere
    groups, _, _, B, c = like.shape
    getattr(kernels, name)(*(x.data_ptr() for x in tensors), h, w, c, B, groups, torch.get_num_threads())


@cache
def library():
    """The compiled kernels and None, or None and why there are none."""
    kernels, reason = load(SOURCE)
    if reason:
        return None, reason
    for name, tensors in dict(embed=3, green=3, embed_backward=5, green_backward=5).items():
        kernel = getattr(kernels, name)
        kernel.argtypes, kernel.restype = [ctypes.c_void_p] * tensors + [ctypes.c_int] * 6, None
    return kernels, None


@torch.library.custom_op("pde_ssm::evolve_pairs_on_cpu", mutates_args=())
def evolve_op(
    spectra: torch.Tensor, embedding: torch.Tensor, exponents: torch.Tensor, h: int, w: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`evolve` as an operator that compilers do not look into."""
    return evolve(spectra, embedding, exponents, h, w)


@evolve_op.register_fake
def _(spectra, embedding, exponents, h, w):
    return spectra.new_empty(spectra.shape), spectra.new_empty(spectra.shape)


@torch.library.custom_op("pde_ssm::evolve_pairs_on_cpu_backward", mutates_args=())
def evolve_backward_op(
    gradient: torch.Tensor, spectra: torch.Tensor, embedded: torch.Tensor, embedding: torch.Tensor, exponents: torch.Tensor,
    h: int, w: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return evolve_backward(gradient, spectra, embedded, embedding, exponents, h, w)


@evolve_backward_op.register_fake
def _(gradient, spectra, embedded, embedding, exponents, h, w):
    return tuple(x.new_empty(x.shape) for x in (spectra, embedding, exponents))


def _keep(ctx, inputs, output):
    spectra, embedding, exponents, *ctx.grid = inputs
    ctx.save_for_backward(spectra, output[1], embedding, exponents)


def _backward(ctx, gradient, _):
    return *evolve_backward_op(gradient, *ctx.saved_tensors, *ctx.grid), None, None


evolve_op.register_autograd(_backward, setup_context=_keep)
