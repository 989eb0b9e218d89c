"""PlainMamba (Yang et al., arXiv 2403.17695): one selective scan, with the same weights, along each of four snakes.

    x, z = in_proj(tokens),     x = silu(conv2d(x)), depthwise
    dt, B, C = x_proj(x),     delta = softplus(dt_proj(dt))
    y_k = selective_scan(x_k, delta_k, -exp(A_log), B_k + direction_Bs[d_k], C_k, D),     y = sum_k y_k, each token at its place
    out = out_proj(y silu(z))

x_k and the like are the tokens in the order of snake k, d_k the step that led to each: none, right, left, up or down.

This follows the paper. In its public code only x follows the snakes: delta, B and C stay in raster order, where they belong to
other tokens, and the bias of dt_proj is added twice; the tests compute that variant as well.
"""

import math

import torch
from torch import nn
from torch.nn.functional import silu

from machine.flags import positive
from mixers.grid import on_grid, refuse
from mixers.options import Mixer, Option, check_numbers
from mixers.orders import ORDERS, follow, put_back, steps
from mixers.selective_scan import selective_scan
from mixers.time_steps import initialize_time_steps, product_and_bias
from pde_ssm_kernels.modes import full_precision, widen


class PlainMamba(nn.Module):
    """Mixes tokens (B, N, D) of an (h, w) grid, a square unless grid_size says otherwise, along four snakes.

    states is N of the selective scan, expand the channels E of the scan as a multiple of D, conv_size the odd side of the
    convolution in tokens. num_heads and qkv_bias are ignored. ValueError for numbers below 1 or an even conv_size. Parameters
    at D = 384: 1,000,400 (attention 591,360).
    """

    paths = ORDERS["plain"]

    def __init__(self, dim, num_heads=8, qkv_bias=False, grid_size=None, states=16, expand=2, conv_size=7):
        super().__init__()
        check_numbers("plainmamba", states=states, expand=expand, conv_size=conv_size)
        if conv_size % 2 == 0:
            raise ValueError(f"--plainmamba-conv-size {conv_size}: a side of the convolution is odd, around a token")
        self.grid_size = grid_size
        E, rank = expand * dim, math.ceil(dim / 16)
        self.sizes = [rank, states, states]
        self.in_proj = nn.Linear(dim, 2 * E)
        self.conv2d = nn.Conv2d(E, E, conv_size, padding=conv_size // 2, groups=E)
        self.x_proj = nn.Linear(E, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, E)
        self.A_log = nn.Parameter(torch.arange(1, states + 1).log().repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))
        self.direction_Bs = nn.Parameter(nn.init.trunc_normal_(torch.empty(5, states), std=0.02))
        self.out_proj = nn.Linear(E, dim)
        self.initialize()

    def initialize(self):
        """Sets time steps between 0.001 and 0.1, which a network's own initialisation would overwrite."""
        initialize_time_steps(self.dt_proj)

    def forward(self, tokens, **call):                                     # (B, N, D)
        refuse(tokens, call, "plainmamba")
        grid_size = on_grid(tokens, self.grid_size, "plainmamba").shape[1:3]
        x, z = self.in_proj(tokens).chunk(2, dim=2)                        # (B, N, E) each
        x = silu(self.conv2d(x.contiguous().unflatten(1, grid_size).permute(0, 3, 1, 2)))
        y = self.scan(x.permute(0, 2, 3, 1).flatten(1, 2), grid_size)      # (B, N, E)
        return self.out_proj(y.to(z) * silu(z))                            # (B, N, D)

    def scan(self, x, grid_size):                                          # (B, N, E)
        """Returns the sum of the scans along the snakes, in float32 or wider, since the states overflow in half precision."""
        with full_precision(x):
            x = widen(x)
            dt, B, C = product_and_bias(self.x_proj, x)[0].split(self.sizes, dim=2)
            delta, bias = product_and_bias(self.dt_proj, dt)
            x, delta, B, C = (follow(part, self.paths, grid_size) for part in (x, delta, B, C))    # (B, N, 4, ...)
            B = B + self.direction_Bs[steps(self.paths, grid_size, x)]
            return put_back(self.along(x, delta, B, C, bias), self.paths, grid_size)

    def along(self, x, delta, B, C, bias):                                 # (B, N, 4, E) twice, (B, N, 4, states) twice, (E,)
        """Returns the results of the scans of the four sequences, (B, N, 4, E)."""
        x, delta = (part.flatten(2).transpose(1, 2) for part in (x, delta))
        B, C = (part.permute(0, 2, 3, 1) for part in (B, C))
        A = -widen(self.A_log).exp().repeat(4, 1)
        D, bias = self.D.repeat(4), None if bias is None else bias.repeat(4)
        return selective_scan(x, delta, A, B, C, D, delta_bias=bias, delta_softplus=True).transpose(1, 2).unflatten(2, (4, -1))


def read(weights):
    """Returns the options of a PlainMamba with these weights; None for another layer's."""
    if "direction_Bs" not in weights:
        return None
    E, states = weights["A_log"].shape
    return dict(states=states, expand=E // len(weights["out_proj.bias"]), conv_size=weights["conv2d.weight"].shape[3])


OPTIONS = (
    Option("states", "states of every channel, 16 unless given", dict(type=positive)),
    Option("expand", "channels of the scan, as a multiple of the hidden size, 2 unless given", dict(type=positive)),
    Option("conv_size", "odd side of the convolution in tokens, 7 unless given", dict(type=positive)),
)
MIXER = Mixer("plainmamba", PlainMamba, read, OPTIONS)
