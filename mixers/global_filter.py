"""A learnt filter over the frequencies of the grid, as in GFNet (Rao et al., arXiv 2107.00645)."""

import torch
from torch import nn

from mixers.grid import checked_grid, on_grid, refuse
from mixers.options import SWITCH, Mixer, Option
from pde_ssm_kernels.modes import full_precision, widen


class GlobalFilter(nn.Module):
    """Multiplies every frequency of every channel by a number of its own: y = irfft2(W rfft2(x)), (B, h w, D) -> the same.

    A PDE-SSM is such a filter, whose W(k) has ten numbers per channel instead of one or two per frequency; with projection
    the filter has the PDE's linear layer R before it, and the two differ in W alone. As in GFNet, W = 0.02 (a + i b) at first,
    a and b normal.

    Parameters: 2 h (w // 2 + 1) D, at D = 384 and 16 x 16 tokens 110,592; 258,048 with projection, which has no bias.

    On a grid other than the one it was built for, `grid_size`, W is interpolated between its frequencies: the filter's kernel
    in space has the lags -h/2 to h/2, in tokens, and its Fourier series gives W at any frequency. So a larger grid has the same
    kernel, zero-padded, and on a smaller one the kernel wraps around. GFNet interpolates W itself, bicubically, ignoring its
    symmetry.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, grid_size=None, projection=False):
        super().__init__()
        h, w = self.grid_size = self.trained_grid = checked_grid(grid_size, "global-filter")
        self.complex_weight = nn.Parameter(0.02 * torch.randn(h, w // 2 + 1, dim, 2))
        self.R = nn.Linear(dim, dim, bias=False) if projection else None

    def forward(self, tokens, **call):                                     # (B, h w, D)
        refuse(tokens, call, "global-filter", self.complex_weight.shape[2])
        x = on_grid(tokens if self.R is None else self.R(tokens), self.grid_size, "global-filter")
        with full_precision(x):
            # Channels come first because MKL's transforms along inner axes may write out of bounds on grids of few rows.
            modes = torch.fft.rfft2(widen(x).movedim(-1, 1).contiguous())  # (B, D, h, w // 2 + 1)
            modes = modes * self.filter().movedim(-1, 0)
            y = torch.fft.irfft2(modes.contiguous(), self.grid_size).movedim(1, -1)            # (B, h, w, D)
        return y.flatten(1, 2).to(x.dtype)

    def filter(self):
        """Returns W on the grid of the tokens, complex (h, w // 2 + 1, D)."""
        W = torch.view_as_complex(widen(self.complex_weight).contiguous())
        return interpolated(W, self.trained_grid, self.grid_size)

    def adapted(self, weights, grid):
        """Returns W of weights for another grid (h, w), as it is on this one; see `Mixer`."""
        W = torch.view_as_complex(widen(weights["complex_weight"]).contiguous())
        return dict(complex_weight=torch.view_as_real(interpolated(W, grid, self.trained_grid)))


def interpolated(W, trained_grid, grid_size):
    """Returns the filter W (h, w // 2 + 1, D) of one grid on another, complex."""
    if tuple(grid_size) == trained_grid:
        return W
    kernel = torch.fft.irfft2(W.movedim(-1, 0).contiguous(), trained_grid)                     # (D, h, w) of the trained grid
    rows, columns = (fourier_series(n, to, kernel) for n, to in zip(trained_grid, grid_size))
    return torch.einsum("jy,kx,dyx->jkd", rows, columns[: grid_size[1] // 2 + 1], kernel.to(rows.dtype))


def fourier_series(lags, n, like):
    """Returns (n, lags): exp(-2 pi i j l / n) for the frequencies j of n tokens and the lags l of a kernel, as fft orders them.
    With an even number of lags, the middle one counts half as -lags/2 and half as lags/2."""
    lag = torch.fft.fftfreq(lags, 1 / lags, dtype=like.dtype, device=like.device)
    angles = -2 * torch.pi / n * torch.outer(torch.arange(n, dtype=like.dtype, device=like.device), lag)
    return torch.complex(angles.cos(), angles.sin() * (2 * lag.abs() < lags))


def read(weights):
    """Returns the options of a GlobalFilter with these weights, None for another layer's."""
    return dict(projection="R.weight" in weights) if "complex_weight" in weights else None


WITH_R = "a linear layer before the filter, as the PDE has one (not in GFNet)"
MIXER = Mixer("global-filter", GlobalFilter, read, (Option("projection", WITH_R, SWITCH),))
