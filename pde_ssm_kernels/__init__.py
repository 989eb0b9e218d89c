"""Fast implementations of the operator of pde_ssm.py, which this folder never imports: C++ for CPUs (cpu.py and cpu.cpp; for
pairs and systems of channels pairs.py and pairs.cpp), Triton for GPUs (gpu.py), and, for couplings of many channels, matrix
products a few wave vectors at a time (pytorch.py). Only this file chooses between them. building.py compiles all C++ kernels,
including those of mixers/.

An implementation is a function (v, equation, time_scale) that maps tokens v (B, h, w, C) to their state, using the equation's
`rows()` or `symbol(h, w)`. The tests compare values and gradients of each with the plain implementation in pde_ssm.py.
"""

import torch

from .modes import observed, traced, transformed

# For each backend, the kernels that it tries, in order.
BACKENDS = {"default": ["cpp"], "torch": [], "cpp": ["cpp"], "triton": ["triton"], "auto": ["triton", "cpp"], "plain": []}
OTHER = "set_backend('auto') takes torch there"
_backend = "default"


def set_backend(name):
    """Selects the implementation that runs PDEs from now on. Results agree up to rounding.

    default: on CPUs the C++ kernels where they apply, PyTorch elsewhere
    torch:   PyTorch
    cpp:     the C++ kernels, or an error where they do not apply
    triton:  the Triton kernels, for GPUs, or an error where they do not apply; layers they do not cover run by PyTorch
    auto:    any kernels that apply, on GPUs up to 128 x 128 tokens
    plain:   the equations as pde_ssm.py writes them: for checks, since pairs of channels take much memory

    C++ covers all couplings, systems in groups of up to 8 or 16 channels; Triton covers the diagonal one without conditioning.
    Under torch.func, torch.compile and torch.export every name selects an implementation that they can trace. ValueError for
    an unknown name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    _backend = name


def backend():
    """Returns the name that `set_backend` was given."""
    return _backend


def choose(v, equation, time_scale=None):
    """Returns the implementation for tokens v (B, h, w, C), or None where only the plain one applies.

    ValueError where the backend names kernels that do not support these tokens.
    """
    if _backend == "plain":
        return None
    tensors = [v, *equation.parameters(), *([] if time_scale is None else [time_scale])]
    exporting = torch.compiler.is_exporting()                              # the program may run where there is no compiler
    followed = exporting or transformed() or (not torch.compiler.is_compiling() and traced(*tensors))
    if hasattr(equation, "is_system"):                                    # Pairwise or Coupled, not Diagonal
        from . import pairs, pytorch

        if not followed and _pairs(v, equation):
            return pairs.evolve_tokens
        if _backend == "cpp" and not (followed or torch.compiler.is_compiling()):
            raise ValueError(f"the backend is cpp, and its kernels are not for coupled channels, {_in_words(v)}; {OTHER}")
        return pytorch.evolve_in_pieces
    if followed:
        return None
    for name in BACKENDS[_backend]:
        kernels = _kernels(name)
        if name == "triton" and time_scale is not None:
            continue
        if kernels and kernels.serves(v):
            return kernels.evolve_tokens
        if _backend == name:
            raise ValueError(f"the backend is {name}, and {why_not(name, v)}; {OTHER}")
    return None


def fold(u, layer):
    """Returns the state of tokens u (B, h, w, dim), computed from the product of R, embedding and symbol at each wave vector
    that evaluation caches for a PDESSM; None where nothing is cached, so that the layer applies them one by one."""
    if torch.is_grad_enabled() or observed() or layer.training or layer.local is not None:
        return None
    if layer.coupling != "pairwise" or not _pairs(u, layer.equation):
        return None
    from . import pairs

    return None if traced(u, *layer.parameters()) or torch.is_autocast_enabled(u.device.type) else pairs.fold(u, layer)


def _pairs(v, equation):
    """Returns whether the C++ kernels of pairs and systems should run on these tokens."""
    if "cpp" not in BACKENDS[_backend] or (equation.is_system and equation.frozen and torch.compiler.is_compiling()):
        return False                                                       # a frozen system's symbol is a compile-time constant
    from . import pairs

    return pairs.serves(v, equation)


def why_not(name, v):
    """Returns why the kernels of that name do not support tokens v (B, h, w, C), or None if they do."""
    kernels = _kernels(name)
    if kernels and kernels.serves(v):
        return None
    return f"its kernels are {f'not for {_in_words(v)}' if kernels else 'not installed'}"


def _in_words(v):
    return f"{v.dtype} of shape {tuple(v.shape)} on {v.device.type}"


def _kernels(name):
    try:
        if name == "cpp":
            from . import cpu as kernels
        else:
            from . import gpu as kernels
    except ImportError:
        return None
    return kernels
