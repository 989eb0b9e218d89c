"""The C++ kernels of pairs.cpp: products of spectra with the matrices of the pairwise coupling and, in groups of few channels,
of the coupled one, and their gradients, on CPUs.

They are optional and serve speed alone: pytorch.py computes the same in pieces, on any device and without a compiler. One
layer of 384 channels, both passes, one thread of an Intel Xeon, takes 0.17 of its time for 4 images of 64 tokens, 0.14 for 4
of 256, 0.29 for 16 of 64 and 0.30 for 16 of 256 (`python -m benchmarks.pairwise`, without and with CXX=/no/compiler). A coupled
layer takes 0.19 of its time for 4 images of 64 or 256 tokens, and 0.33 and 0.37 for 16 (AMD EPYC, one thread).
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional as F

from . import cpu, pytorch
from .building import address, found, kernel, load
from .kept import kept, room
from .modes import differentiable, needs_operations, runs_alone, widen

SOURCE = Path(__file__).with_name("pairs.cpp")
AT_ONCE = 64             # columns of G B R that `folded` computes at once
CHUNK = 1024             # pairs over which the kernels sum the gradient of tau


def evolve_tokens(v, equation, time_scale=None):
    """Maps tokens v (B, h, w, C) to their state, in their type: for Pairwise and Coupled, used by `pde_ssm_kernels.choose`."""
    h, w = v.shape[1:3]
    spectra = pytorch.lanes(pytorch.real_spectrum(widen(v)), equation.groups).contiguous()         # (groups, f, 2, B, c)
    return pytorch.from_real_spectrum(pytorch.from_lanes(evolve_spectra(spectra, equation, h, w), h), h, w).to(v.dtype)


def evolve_spectra(spectra, equation, h, w):
    """Returns G B v of spectra v (groups, f, 2, B, c), in the same shape."""
    compiling, is_system = torch.compiler.is_compiling(), equation.is_system
    evaluating = not (compiling or torch.is_grad_enabled() or equation.training)
    if is_system and evaluating and len(spectra[0]) * equation.g0.numel() <= pytorch.LARGEST_WHOLE:
        states, matrices = torch.empty_like(spectra), symbol_of_system(equation, h, w)
        run("multiply_by", matrices, packed(spectra), states, sizes=(len(matrices), *equation.g0.shape[1:], spectra.shape[3]))
        return states
    inputs = spectra, *equation.embedding(), exponents(equation)
    if torch.is_grad_enabled() and not compiling:
        return Evolution.apply(equation, h, w, *inputs)
    return (evolve_op if compiling else evolve)(*inputs, h, w, is_system)[0]


class Folding:
    """Holds what evaluation caches for a layer on a grid: how many images it has seen there, and, once these outnumber the
    layer's channels, G(k) B(k) R at each wave vector, (f, blocks, dim, 2, lanes). Computing that product costs about as much as
    that many images, so a layer takes at most twice the time of one that knows the number of images in advance.

    With it 384 channels take 4.1 ms instead of 11.4 for 4 images of 64 tokens, 13.6 instead of 30.1 for 4 of 256 and 43 instead
    of 90 for 16 (with `fold` and with its None, medians of 9 in turns, one thread of an AMD EPYC)."""

    device = torch.device("cpu")

    def __init__(self):
        self.images, self.matrices = 0, None

    @property
    def nbytes(self):
        return 0 if self.matrices is None else self.matrices.nbytes


@kept
def _folding(layer, h, w):
    return Folding()


def fold(u, layer):
    """Returns the state of tokens u (B, h, w, dim) by the cached product of a PDESSM's G, B and R, or None if there is none."""
    h, w = u.shape[1:3]
    plain = type(layer.R) is torch.nn.Linear and layer.R.bias is None and not layer.activation
    plain = plain and all(runs_alone(part, type(part)) for part in (layer.R, layer.equation))
    if not plain or layer.equation.groups > 1 or u.dtype != torch.float32 or layer.R.weight.dtype != torch.float32:
        return None
    folding, c = _folding(layer, h, w), layer.equation.dim
    folding.images += len(u)
    size = 8 * h * (w // 2 + 1) * layer.dim * -(-c // lanes()) * lanes()   # bytes
    # Folding changes the order of sums, and so the last bits, by how many images came before: not in deterministic mode.
    pays = folding.images > c and not torch.are_deterministic_algorithms_enabled()
    if folding.matrices is None and pays and size <= room():
        folding.matrices = folded(layer, h, w)
    if folding.matrices is None:
        return None
    v = pytorch.lanes(pytorch.real_spectrum(u), 1).contiguous()            # (1, f, 2, B, dim)
    states = v.new_empty(*v.shape[:-1], c)
    run("multiply_by", folding.matrices, packed(v), states, sizes=(v.shape[1], layer.dim, c, len(u)))
    return pytorch.from_real_spectrum(pytorch.from_lanes(states, h), h, w)


def folded(layer, h, w):
    """Returns G(k) B(k) R of a PDESSM at the f wave vectors of a grid: (f, blocks, dim, 2, lanes)."""
    equation, (_, odd) = layer.equation, pytorch.monomials(layer.equation, h, w)
    g0, gx, gy = ((g[0] @ layer.R.weight).T for g in equation.embedding())         # (dim, c)
    c, rows = equation.dim, exponents(equation)
    blocks = -(-c // lanes())
    matrices = g0.new_zeros(len(odd), blocks, layer.dim, 2, lanes())
    for part in torch.arange(layer.dim, device=g0.device).split(AT_ONCE):
        kx, ky = odd[:, :, None, None].unbind(1)
        embedded = torch.stack([g0[part].expand(len(odd), -1, -1), kx * gx[part] + ky * gy[part]], dim=1)[None]
        states = torch.empty_like(embedded)                                # (1, f, 2, part, c)
        run("green", packed(embedded), rows, states, sizes=(h, w, c, len(part), 1))
        fill_conjugates(states, h, w)
        padded = F.pad(states[0], (0, blocks * lanes() - c)).unflatten(-1, (blocks, -1))
        matrices[:, :, part] = padded.permute(0, 3, 2, 1, 4)
    return matrices


@kept
def symbol_of_system(equation, h, w):
    """Returns G(k) B(k) of Coupled at the f wave vectors of a grid, (groups f, c, 2, lanes), input channels before outputs."""
    groups, c, _ = equation.g0.shape
    units = torch.zeros(groups, h * (w // 2 + 1), 2, c, c, dtype=torch.float32, device=equation.g0.device)
    units[:, :, 0].diagonal(dim1=-2, dim2=-1).fill_(1)
    states, _ = evolve(units, *equation.embedding(), exponents(equation), h, w, True)
    return F.pad(states, (0, lanes() - c)).transpose(2, 3).flatten(0, 1).contiguous()


def exponents(equation):
    """Returns what `pytorch.exponents` does as the kernels want it, (6, groups, c, c)."""
    if equation.is_system:
        return torch.cat(pytorch.exponents(equation), dim=1).movedim(1, 0).view(6, *equation.g0.shape)
    lx, ly, shear, b, slack = (getattr(equation, name, None) for name in ("log_lx", "log_ly", "shear", "b", "r_slack"))
    r = None if slack is None else 1 - F.softplus(widen(slack))            # 1 is R_MAX; `bound` comes with tau, below
    inputs = equation.tau(), *(None if x is None else widen(x) for x in (lx, ly, shear, b)), r
    return exponents_plainly(*inputs) if torch.compiler.is_compiling() else Exponents.apply(*inputs)


def exponents_plainly(tau, log_lx, log_ly, shear, b, r):
    """Returns the same from tau (groups,) and parameters (groups, c, c), None for absent terms, in PyTorch's operations."""
    tau, rows = tau[:, None, None], [next(x for x in (log_lx, b, r) if x is not None).new_zeros(())] * 6
    if r is not None:
        rows[0] = (tau * r).clamp_max(1)
    if log_lx is not None:
        lx, ly = log_lx.exp(), log_ly.exp()
        rows[1:4] = tau * lx * lx, tau * lx * ly * shear, tau * ly * ly * (1 + shear * shear)
    if b is not None:
        shift = tau[..., None] * b
        rows[4:] = (shift - shift.round()).unbind(-1)
    return torch.stack(torch.broadcast_tensors(*rows))


class Evolution(torch.autograd.Function):
    """Runs `evolve` with its gradients; where `needs_operations`, those are of pytorch.py, which computes the same."""

    @staticmethod
    def forward(ctx, equation, h, w, *inputs):
        states, embedded = evolve(*inputs, h, w, equation.is_system)
        ctx.save_for_backward(*inputs, embedded)
        ctx.equation, ctx.grid = equation, (h, w)
        return states

    @staticmethod
    def backward(ctx, gradient):
        *inputs, embedded = ctx.saved_tensors
        if not needs_operations(gradient):
            return None, None, None, *evolve_backward(gradient, embedded, *inputs, *ctx.grid, ctx.equation.is_system)

        def plainly(spectra, g0, gx, gy, exponents):
            growth, phase = exponents.movedim(0, 1).flatten(2).split([4, 2], dim=1)
            return pytorch.evolve_spectra(ctx.equation, spectra, torch.cat([g0, gx, gy], dim=1), growth, phase, *ctx.grid)

        return None, None, None, *differentiable(plainly, inputs, gradient, ctx.needs_input_grad[3:])


class Exponents(torch.autograd.Function):
    """`exponents_plainly` in one pass over memory, with its gradients."""

    @staticmethod
    def forward(ctx, tau, *parameters):
        ctx.save_for_backward(tau, *parameters)
        return make_exponents(tau, *parameters)

    @staticmethod
    def backward(ctx, gradient):
        if needs_operations(gradient):
            return differentiable(exponents_plainly, ctx.saved_tensors, gradient, ctx.needs_input_grad)
        return exponents_backward(gradient, *ctx.saved_tensors)


def serves(v, equation):
    """Returns whether the kernels support v (B, h, w, C): floats of at most 32 bits, on a CPU; systems must fit one vector."""
    if v.device.type != "cpu" or v.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not built():
        return False
    return not equation.is_system or equation.g0.shape[-1] <= lanes()


@torch.compiler.assume_constant_result  # for compilers, which cannot look into it
def built():
    """Returns whether there are kernels; warns if there are none."""
    return cpu.built() and found(library)


def evolve(spectra, g0, gx, gy, exponents, h, w, is_system=False):
    """Returns G B v, and B v unless it is a system's, at the f wave vectors of an h x w grid.

    spectra v:  (groups, f, 2, B, c), real parts before imaginary ones, as both results.
    g0, gx, gy: (groups, c, c).
    exponents:  (6, groups, c, c): tau times r, Kxx, Kxy, Kyy, bx and by, the last two from -1/2 to 1/2.
    All of them float32, or ValueError.
    """
    sizes, inputs = check(spectra, g0, gx, gy, exponents, h, w, is_system)
    embedded, states = (torch.empty_like(inputs[0]) for _ in range(2))
    if is_system:
        run("systems", packed(spectra), *inputs[1:], states, sizes=sizes)
        return fill_conjugates(states, h, w), spectra.new_empty(0)
    run("embed", packed(spectra), *inputs[1:4], embedded, sizes=sizes)
    run("green", packed(embedded), inputs[4], states, sizes=sizes)
    return fill_conjugates(states, h, w), embedded


def evolve_backward(gradient, embedded, spectra, g0, gx, gy, exponents, h, w, is_system=False):
    """Returns the gradients of the spectra, the embedding and the exponents from that of `evolve`'s first result; embedded is
    its second."""
    sizes, inputs = check(spectra, g0, gx, gy, exponents, h, w, is_system)
    gradient, found = gradient.to(spectra.dtype).expand_as(spectra), [torch.empty_like(x) for x in inputs]
    gradient = packed(add_conjugates(gradient, h, w))
    if is_system:
        run("systems_backward", gradient, *inputs, *found, sizes=sizes)
    else:
        embedded = embedded.expand_as(spectra).contiguous()
        of_embedded = torch.empty_like(embedded)
        run("green_backward", gradient, embedded, inputs[4], of_embedded, found[4], sizes=sizes)
        run("embed_backward", packed(of_embedded), *inputs[:4], *found[:4], sizes=sizes)
    found[0][:, conjugates(h, w)[0]] = 0
    return tuple(found)


def check(*arguments):
    """Returns the sizes that kernels take after the tensors, and contiguous inputs of `evolve`."""
    *inputs, h, w, is_system = arguments
    groups, _, _, B, c = inputs[0].shape
    shapes = [(groups, h * (w // 2 + 1), 2, B, c), *[(groups, c, c)] * 3, (6, groups, c, c)]
    if [tuple(x.shape) for x in inputs] != shapes or any(x.dtype != torch.float32 for x in inputs):
        got = ", ".join(f"{x.dtype} of shape {tuple(x.shape)}" for x in inputs)
        raise ValueError(f"the kernels need float32 of shapes {shapes} for {h} x {w} tokens; they got {got}")
    if is_system and c > lanes():
        raise ValueError(f"the kernels take systems of at most {lanes()} channels; they got {c}")
    return (h, w, c, B, groups), [x.contiguous() for x in inputs]


@cache
def conjugates(h, w):
    """Returns the wave vectors that the kernels skip, and those of which they are the complex conjugates: in the
    columns of kx = 0 and of the Nyquist frequency, the spectrum of real tokens at -ky is the conjugate of that at ky."""
    f = w // 2 + 1
    columns = [0] if w % 2 or w == 0 else [0, w // 2]
    y, x = torch.arange(1, (h + 1) // 2, device="cpu")[:, None], torch.tensor(columns, device="cpu")
    return ((h - y) * f + x).flatten(), (y * f + x).flatten()


def fill_conjugates(spectra, h, w):
    """Fills in, by conjugation, the wave vectors that the kernels leave out of spectra (groups, f, 2, B, c)."""
    theirs, mine = conjugates(h, w)
    spectra[:, theirs, 0], spectra[:, theirs, 1] = spectra[:, mine, 0], -spectra[:, mine, 1]
    return spectra


def add_conjugates(gradient, h, w):
    """Returns the gradient of the input of `fill_conjugates` from that of its result."""
    theirs, mine = conjugates(h, w)
    gradient = gradient.clone(memory_format=torch.contiguous_format)
    gradient[:, mine, 0] += gradient[:, theirs, 0]
    gradient[:, mine, 1] -= gradient[:, theirs, 1]
    return gradient


def packed(spectra):
    """Returns spectra (groups, f, 2, B, c) as the kernels read them, (groups, f, c, 2 B)."""
    return spectra.flatten(2, 3).mT.contiguous()                           # copying two axes takes half as long as three


def make_exponents(tau, *parameters):
    """Computes `exponents_plainly` by the kernel. ValueError for parameters that are not float32."""
    if kinds := {x.dtype for x in (tau, *parameters) if x is not None} - {torch.float32}:
        cast = "cast the layer by float(), or layer and tokens by double()"
        raise ValueError(f"coefficients of pairs of channels are {', '.join(map(str, kinds))} and tokens are not: {cast}")
    like = next(x for x in reversed(parameters) if x is not None)          # r, b or shear: all begin with (groups, c)
    groups, c = like.shape[:2]
    out = like.new_empty(6, groups, c, c)
    run("exponents", tau, *(None if x is None else x.contiguous() for x in parameters), out, sizes=(c * c, groups))
    return out


def exponents_backward(gradient, tau, *parameters):
    """Returns the gradients of tau and the parameters from that of `make_exponents`' result."""
    _, groups, c, _ = gradient.shape
    parameters = [None if x is None else x.contiguous() for x in parameters]
    of_tau, found = tau.new_zeros(groups, -(-c * c // CHUNK)), [None if x is None else torch.empty_like(x) for x in parameters]
    run("exponents_backward", gradient.contiguous(), tau, *parameters, of_tau, *found, sizes=(c * c, groups))
    return of_tau.sum(1), *found


def run(name, *tensors, sizes):
    tensors = [None if x is None else x.resolve_neg() for x in tensors]    # PyTorch may negate lazily, in a flag
    kernel(library, name)(*map(address, tensors), *sizes, torch.get_num_threads())


@torch.compiler.assume_constant_result
def lanes():
    """Returns the number of channels in one vector, into which a system's group must fit."""
    return library()[0].lanes()


@cache
def library():
    """Returns the compiled kernels and None, or None and the reason why there are none."""
    kernels, reason = load(SOURCE)
    if reason:
        return None, reason
    counts = dict(embed=(5, 6), green=(3, 6), embed_backward=(9, 6), green_backward=(5, 6), multiply_by=(3, 5))
    counts |= dict(systems=(6, 6), systems_backward=(11, 6))
    for name, (tensors, sizes) in (counts | dict(exponents=(7, 3), exponents_backward=(13, 3))).items():
        getattr(kernels, name).argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_int] * sizes
        getattr(kernels, name).restype = None
    return kernels, None


Tensor = torch.Tensor


@torch.library.custom_op("pde_ssm::evolve_pairs_on_cpu", mutates_args=())
def evolve_op(
    spectra: Tensor, g0: Tensor, gx: Tensor, gy: Tensor, exponents: Tensor, h: int, w: int, is_system: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Wraps `evolve` as an operator that compilers treat as opaque."""
    return evolve(spectra, g0, gx, gy, exponents, h, w, is_system)


@evolve_op.register_fake
def _(spectra, g0, gx, gy, exponents, h, w, is_system=False):
    return spectra.new_empty(spectra.shape), spectra.new_empty(0 if is_system else spectra.shape)


@torch.library.custom_op("pde_ssm::evolve_pairs_on_cpu_backward", mutates_args=())
def evolve_backward_op(
    gradient: Tensor, embedded: Tensor, spectra: Tensor, g0: Tensor, gx: Tensor, gy: Tensor, exponents: Tensor, h: int, w: int,
    is_system: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return evolve_backward(gradient, embedded, spectra, g0, gx, gy, exponents, h, w, is_system)


@evolve_backward_op.register_fake
def _(gradient, embedded, *inputs_and_grid):
    return tuple(x.new_empty(x.shape) for x in inputs_and_grid[:5])


def _keep(ctx, inputs, output):
    *inputs, h, w, is_system = inputs
    ctx.save_for_backward(output[1], *inputs)
    ctx.grid = h, w, is_system


def _backward(ctx, gradient, _):
    return *evolve_backward_op(gradient, *ctx.saved_tensors, *ctx.grid), None, None, None


evolve_op.register_autograd(_backward, setup_context=_keep)
