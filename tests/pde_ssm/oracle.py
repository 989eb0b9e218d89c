"""The PDE-SSM operator again, without a Fourier transform and without parameters: what the fast path is held against."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def derivative(n):
    """Spectral differentiation on n points of the unit circle, (n, n), in closed form (Trefethen, 2000, chapter 3)."""
    j = torch.arange(n, dtype=torch.float64)
    angle = math.pi * (j[:, None] - j) / n
    sign = 1 - 2 * ((j[:, None] - j) % 2)
    return sign * math.pi / (angle.tan() if n % 2 == 0 else angle.sin()).fill_diagonal_(math.inf)


def second_derivative(n):
    """Its second derivative, which for even n is not the square of the first: it keeps the Nyquist frequency."""
    if n % 2:
        return derivative(n) @ derivative(n)
    j = torch.arange(n, dtype=torch.float64)
    sine = (math.pi * (j[:, None] - j) / n).sin().fill_diagonal_(1)
    sign = 1 - 2 * ((j[:, None] - j) % 2)
    return (2 * math.pi) ** 2 * (-sign / (2 * sine**2)).fill_diagonal_(-(n**2) / 12 - 1 / 6)


def operators(h, w):
    """I, Dx, Dy, Dxx, Dxy and Dyy on an h x w grid, each (h w, h w)."""
    Ix, Iy = (torch.eye(n, dtype=torch.float64) for n in (w, h))
    Dx, Dy = torch.kron(Iy, derivative(w)), torch.kron(derivative(h), Ix)
    Dxx, Dyy = torch.kron(Iy, second_derivative(w)), torch.kron(second_derivative(h), Ix)
    return torch.kron(Iy, Ix), Dx, Dy, Dxx, Dx @ Dy, Dyy


def generator(K, b, r, h, w):
    """The right-hand side of the PDE of c channels as one matrix (c h w, c h w); K (c, c, 2, 2), b (c, c, 2), r (c, c)."""
    I, Dx, Dy, Dxx, Dxy, Dyy = operators(h, w)
    parts = (K[..., 0, 0], Dxx), (2 * K[..., 0, 1], Dxy), (K[..., 1, 1], Dyy), (b[..., 0], Dx), (b[..., 1], Dy), (r, I)
    return sum(torch.kron(coefficient, D) for coefficient, D in parts)


def embed(u, g0, gx, gy):
    """(g0 + gx d/dx + gy d/dy) u of c channels u (c, h, w), each of g0, gx and gy (c, c)."""
    I, Dx, Dy, *_ = operators(*u.shape[1:])
    return (sum(torch.kron(g, D) for g, D in ((g0, I), (gx, Dx), (gy, Dy))) @ u.flatten()).view(u.shape)


def solve(u, K, b, r, tau):
    """The state at time tau from the state u (c, h, w) at time 0: the exponential of the whole discretised system."""
    return (torch.linalg.matrix_exp(tau * generator(K, b, r, *u.shape[1:])) @ u.flatten()).view(u.shape)


def random_rows(*shape, dtype=torch.float32):
    """The rows (..., 9, C) of `pde_ssm.evolve_plainly` for shape (..., C); Lambda(k) is about 1 at the lowest wave vectors."""
    *leading, C = shape
    rows = torch.randn(*leading, 9, C, dtype=dtype)
    K = 0.05 * torch.randn(*leading, C, 2, 2, dtype=dtype)
    K = K @ K.mT
    rows[..., 1:4, :] = torch.stack([K[..., 0, 0], K[..., 0, 1], K[..., 1, 1]], dim=-2)
    return rows * torch.tensor([0.3, 1, 1, 1, 0.1, 0.1, 0.02, 0.02, 1], dtype=dtype)[:, None]


class FourierTransforms(TorchDispatchMode):
    """The axes of the complex ones that PyTorch is asked for, and whether the numbers lie in memory one after the other."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_fft" in str(function) and args[0].is_complex():
            self.seen.append((args[0].ndim, list(args[1]), args[0].is_contiguous()))
        return function(*args, **kwargs or {})


# Options of a PDESSM, one for each kind of code that it runs.
VARIANTS = [
    dict(coupling="diagonal"),
    dict(coupling="pairwise"),
    dict(coupling="coupled"),
    dict(gate=True),
    dict(conditioned=True),
    dict(components=3, activation=True),
    dict(local=True),
]
