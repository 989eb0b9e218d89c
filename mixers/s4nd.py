"""S4ND (Nguyen et al., arXiv 2210.06583): a state-space model along each axis of the grid, their kernels multiplied."""

import math

import torch
from torch import nn
from torch.nn.functional import gelu

from machine.flags import above_zero, positive
from mixers.grid import checked_grid, on_grid, refuse
from mixers.options import Mixer, Option, check_numbers
from pde_ssm_kernels.modes import full_precision, widen
from pde_ssm_kernels.products import matmul


class Kernel(nn.Module):
    """The kernels along one axis, two for each of D channels: c = 0 for the lags 0, 1, ..., c = 1 for -1, -2, ...

        a = dt A,    K_c[l] = 2 Re sum_n B_n C_cn (exp(a_n) - 1) / A_n exp(a_n l)

    N states in conjugate pairs, of which N / 2 are kept, A and B one for all channels. Names are the public ones: `inv_dt` is
    log dt, `A_real` log(-Re A), `A_imag` -Im A, and `B` and `C` are pairs of real numbers. Initial values are S4D-Lin's:
    A_n = -1/2 - i pi n, B = 1, C complex normal, dt log-uniform from 0.001 to 0.1.
    """

    def __init__(self, dim, state_dim, name="s4nd"):
        """Raises a ValueError, which names the mixer, unless state_dim is even and at least 2."""
        super().__init__()
        check_numbers(name, state_dim=state_dim)
        if state_dim % 2:
            raise ValueError(f"--{name}-state-dim {state_dim}: states come in conjugate pairs, so their number is even")
        half = state_dim // 2
        self.inv_dt = nn.Parameter(torch.empty(dim, 1).uniform_(math.log(0.001), math.log(0.1)))
        self.A_real = nn.Parameter(torch.full((1, half), math.log(0.5)))
        n = torch.arange(half, dtype=torch.get_default_dtype())[None]
        self.A_imag = nn.Parameter(torch.pi * n.clamp(min=1e-4 / torch.pi))
        self.B = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(1, 1, half, 1))
        self.C = nn.Parameter(math.sqrt(0.5) * torch.randn(2, dim, half, 2))

    def forward(self, length, rate=1.0, bandlimit=None):
        """Returns the kernels (2, D, length), with the steps dt multiplied by rate. With bandlimit, states that oscillate at
        that fraction of the tokens' highest frequency, or faster, are left out."""
        B, C = (torch.view_as_complex(widen(x).contiguous()) for x in (self.B[0], self.C))
        A = torch.complex(-widen(self.A_real).exp(), -widen(self.A_imag))                  # (1, N / 2)
        dt = rate * widen(self.inv_dt).exp()                                               # (D, 1)
        a = dt * A                                                                         # (D, N / 2)
        gain = B * C * (torch.expm1(a) / A)                                                # (2, D, N / 2)
        if bandlimit:
            gain = gain * (dt * A.imag.abs() / (2 * torch.pi) < bandlimit / 2)
        waves = torch.exp(a[..., None] * torch.arange(length, device=a.device))            # (D, N / 2, length)
        return 2 * matmul(gain.transpose(0, 1), waves).transpose(0, 1).real                # (2, D, length)


class S4ND(nn.Module):
    """S4ND with S4D-Lin kernels, bidirectional, (B, h w, D) -> (B, h w, D), on a zero-padded grid:

        y = u convolved with K^0 (x) K^1, + D u;     out = GLU(Linear(gelu(y)))

    The kernel is separable, so the convolution is one along the columns and one along the rows, each a product with a matrix
    of its lags, in float32 or wider under any autocast: h + w multiply-adds per number, and no Fourier transform, which would
    need the zero padding. Parameters: 2 D^2 + D (4 N + 5) + 4 N, at D = 384 with N = state_dim = 64 states 395,392. Public code
    trains dt, A and B at a learning rate of 0.001 of their own; here all parameters have the same.

    On a grid other than the one it was built for, `grid_size`, the steps dt are rescaled to tokens that lie closer or wider in
    the same picture. bandlimit: see `Kernel`.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, grid_size=None, state_dim=64, bandlimit=None):
        super().__init__()
        self.grid_size = self.trained_grid = checked_grid(grid_size, "s4nd")
        self.bandlimit = bandlimit
        self.D = nn.Parameter(torch.randn(1, dim))
        self.kernel = nn.ModuleList(Kernel(dim, state_dim) for _ in range(2))
        self.output_linear = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GLU(dim=-1))

    def forward(self, tokens, **call):                                     # (B, h w, D)
        refuse(tokens, call, "s4nd", self.D.shape[1])
        u = on_grid(tokens, self.grid_size, "s4nd")
        with full_precision(u):
            u = widen(u)
            y = torch.addcmul(self.convolve(u).contiguous(), widen(self.D), u)             # (B, h, w, D)
        return self.output_linear(gelu(y).flatten(1, 2).to(tokens.dtype))

    def convolve(self, u):
        """Computes y[i, j] = sum_kl K^0[i - k] K^1[j - l] u[k, l] in each channel, (B, h, w, D) -> (B, h, w, D)."""
        u = u.permute(3, 1, 0, 2)                                          # (D, h, B, w)
        y = matmul(self.lags(0), u.flatten(2))                             # (D, h, B w)
        y = matmul(y.view(u.shape).flatten(1, 2), self.lags(1).mT)         # (D, h B, w)
        return y.view(u.shape).permute(2, 1, 3, 0)                         # (B, h, w, D)

    def adapted(self, weights, grid):
        """Returns the steps of weights for another grid (h, w), as they are on this one; see `Mixer`."""
        steps = (f"kernel.{axis}.inv_dt" for axis in range(2))
        return {name: weights[name] + math.log(n / own) for name, n, own in zip(steps, grid, self.trained_grid)}

    def lags(self, axis):
        """Returns the kernel of an axis of n tokens from every place to every other: [d, i, j] = K_d[i - j], (D, n, n)."""
        n = self.grid_size[axis]
        forward, backward = self.kernel[axis](n, self.trained_grid[axis] / n, self.bandlimit)
        kernel = torch.cat([backward.flip(-1), forward], dim=-1)           # of the lags -n to n - 1
        place = torch.arange(n, device=kernel.device)
        return kernel[:, place[:, None] - place + n]


def read(weights):
    """Returns the options of an S4ND with these weights that they tell, None for another layer's."""
    return dict(state_dim=2 * weights["kernel.0.A_real"].shape[1]) if "kernel.0.inv_dt" in weights else None


OPTIONS = (
    Option("state_dim", "states of each kernel, 64 unless given", dict(type=positive)),
    Option(
        "bandlimit", "drop states that oscillate at this fraction of the highest frequency or above", dict(type=above_zero),
        told=False,
    ),
)  # fmt: skip
MIXER = Mixer("s4nd", S4ND, read, OPTIONS)
