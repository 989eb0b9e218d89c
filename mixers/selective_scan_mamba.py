"""mamba_ssm's own kernel of the selective scan, for CUDA, used where that package is installed and agrees with the equations.

It is optional. Nobody has run it on a GPU from this project yet, so its results are compared before it is used.
"""

import warnings
from functools import cache
from importlib import import_module

import torch

from pde_ssm_kernels import backend

DEVICE = "cuda"
MOST_STATES = 256             # of a channel
MOST_CHANNELS = 2**16 - 1     # of an image: each has a block of its own, in a direction in which CUDA has no more
MOST_NUMBERS = 2**31 - 1      # of a tensor: offsets have 32 bits, and beyond them it would use other memory without a word
PART = 2048                   # tokens, for each of which it keeps the states of all channels
TOLERANCE = 1e-3              # relative to the largest entry, in float32: its exponentials are approximate


def serves(inputs, reference):
    """Returns whether the kernel takes these inputs, and agrees with `reference`, the equations, on their device."""
    u, _, A, B, *_ = inputs
    (batch, E, L), N = u.shape, A.shape[1]
    fits = u.device.type == DEVICE and u.dtype == torch.float32 and N <= MOST_STATES and E <= MOST_CHANNELS
    fits = fits and 0 < max(u.numel(), B.numel(), batch * E * -(-L // PART) * N) <= MOST_NUMBERS
    return fits and backend() not in ("torch", "plain") and agrees(u.device, reference)


def function():
    """Finds the function of that package. ImportError where there is none."""
    return import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn


@cache
def agrees(device, reference):
    """Compares values and all gradients, once; a warning says what is wrong with a package that is installed."""
    try:
        worst = difference(function(), reference, device)
        trouble = "" if worst <= TOLERANCE else f"differs from our equations by {worst:.1e} of the largest value"
    except (ImportError, AttributeError, OSError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "mamba_ssm":
            return False
        trouble = f"fails: {str(error).partition(chr(10))[0]}"             # often its kernels are for another PyTorch
    if trouble:
        warnings.warn(f"mamba_ssm's selective scan {trouble}; scans run by our own code", stacklevel=2)
    return not trouble


def difference(theirs, reference, device):
    """Returns the largest difference of values and gradients, relative to the largest entry of each. The length of the sequence
    is not a multiple of any chunk's."""
    generator, (batch, E, L, N) = torch.Generator().manual_seed(0), (2, 64, 77, 16)
    shapes = [(batch, E, L), (batch, E, L), (E, N), (batch, 2, N, L), (batch, 2, N, L), (E,), (batch, E, L), (E,)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[2] = -inputs[2].exp()
    inputs = [x.to(device).requires_grad_() for x in inputs]
    weights = torch.randn(batch, E, L, generator=generator).to(device)
    found = []
    with torch.enable_grad():
        for scan in (theirs, reference):
            out = scan(*inputs, delta_softplus=True)
            found.append([out.detach(), *torch.autograd.grad(out, inputs, weights)])
    differences = [(mine - exact).abs().max() / exact.abs().max() for mine, exact in zip(*found)]
    return torch.stack(differences).max().item()                           # NaN where one is
