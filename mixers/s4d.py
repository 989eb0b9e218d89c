"""A bidirectional, gated S4D (Gu et al., arXiv 2206.11893) over the tokens in raster order, one long line of them."""

import math

import torch
from torch import nn
from torch.nn.functional import gelu

from machine.flags import positive
from mixers.grid import checked_grid, refuse
from mixers.options import Mixer, Option
from mixers.s4nd import Kernel
from pde_ssm_kernels.modes import full_precision, widen


class S4D(nn.Module):
    """Mixes tokens by a state-space model along the raster order, and gates the result, (B, N, D) -> (B, N, D):

        y = u convolved with K, + D u;     out = W3 (gelu(W2 y) * gelu(W1 u))

    K has lags of both signs (`Kernel` of s4nd.py), and the sequence is zero-padded. The gate is that of DiffuSSM's blocks (Yan
    et al., arXiv 2311.18257), without their hourglass; DiffuSSM's code is not public, so this does not reproduce it. The
    convolution is in float32 or wider under any autocast. Parameters: 3 D^2 + D (2 N + 5) + 2 N, at D = 384 with
    N = state_dim = 64 states 493,568.

    On a grid other than the one it was built for, `grid_size`, dt is rescaled so that the whole sequence spans the same time.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, grid_size=None, state_dim=64):
        super().__init__()
        self.grid_size = self.trained_grid = checked_grid(grid_size, "s4d")
        self.D = nn.Parameter(torch.randn(dim))
        self.kernel = Kernel(dim, state_dim, "s4d")
        self.gate, self.state, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, tokens, **call):                                     # (B, N, D)
        refuse(tokens, call, "s4d", len(self.D))
        n = tokens.shape[1]
        with full_precision(tokens):
            u = widen(tokens).mT.contiguous()                              # (B, D, N)
            forward, backward = self.kernel(n, math.prod(self.trained_grid) / n)           # (D, N) each
            symbol = torch.fft.rfft(torch.cat([forward, backward.flip(-1)], dim=-1))       # (D, N + 1)
            y = torch.fft.irfft(torch.fft.rfft(u, 2 * n) * symbol, 2 * n)[..., :n]
            y = torch.addcmul(y, widen(self.D)[:, None], u).mT.to(tokens.dtype)            # (B, N, D)
        return self.out(gelu(self.state(y)) * gelu(self.gate(tokens)))

    def adapted(self, weights, grid):
        """Returns the steps of weights for another grid (h, w), as they are on this one; see `Mixer`."""
        return {"kernel.inv_dt": weights["kernel.inv_dt"] + math.log(math.prod(grid) / math.prod(self.trained_grid))}


def read(weights):
    """Returns the options of an S4D with these weights that they tell, None for another layer's."""
    return dict(state_dim=2 * weights["kernel.A_real"].shape[1]) if "kernel.A_real" in weights else None


MIXER = Mixer("s4d", S4D, read, (Option("state_dim", "states of its kernel, 64 unless given", dict(type=positive)),))
