"""The PDE-SSM operator again, without a Fourier transform and without parameters: what the fast path is held against."""

import math

import torch


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


def solve(u, K, b, r, tau, g0, gx, gy):
    """h(tau) for one channel u (h, w): the matrix exponential of the discretised operator, applied to the embedding."""
    h, w = u.shape
    Ix, Iy, I = (torch.eye(n, dtype=torch.float64) for n in (w, h, h * w))
    Dx, Dy = torch.kron(Iy, derivative(w)), torch.kron(derivative(h), Ix)
    Dxx, Dyy = torch.kron(Iy, second_derivative(w)), torch.kron(second_derivative(h), Ix)
    A = K[0, 0] * Dxx + 2 * K[0, 1] * Dx @ Dy + K[1, 1] * Dyy + b[0] * Dx + b[1] * Dy + r * I
    start = g0 * u.flatten() + gx * Dx @ u.flatten() + gy * Dy @ u.flatten()
    return (torch.linalg.matrix_exp(tau * A) @ start).reshape(h, w)
