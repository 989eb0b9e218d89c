"""SS2D, VMamba's selective scan of pictures (arXiv 2401.10166): one scan along each of four paths through the grid of tokens.

    [x, z] = in_proj(tokens),     x = silu(conv2d(x)), depthwise, 3 x 3
    dt_k, B_k, C_k = x_proj_k(x_k),     x_k the tokens as path k meets them, k = 1 .. 4
    y_k = selective_scan(x_k, dt_proj_k(dt_k), -exp(A_log_k), B_k, C_k, D_k, bias_k),     y = sum_k y_k, each token at its place
    out = out_proj(layer_norm(y) [* silu(z)])

Parameters at D = 384: 761,088 without the gate z (VMamba's code of today, 1 state), 380,544 with expand = 1, 1,056,000 with a
gate (LaMamba-Diff, arXiv 2408.02615), 1,195,008 with a gate, 16 states and the convolution's bias (the first VMamba); attention
has 591,360.
"""

import math

import torch
from torch import nn
from torch.nn.functional import silu

from machine.flags import positive
from mixers.grid import on_grid, refuse
from mixers.options import SWITCH, Mixer, Option, check_numbers
from mixers.orders import ORDERS, follow, put_back
from mixers.selective_scan import selective_scan
from mixers.time_steps import time_step_biases
from pde_ssm_kernels.modes import full_precision, widen

CHOICES = ("cross", "continuous")


class SS2D(nn.Module):
    """Mixes tokens (B, N, D) of an (h, w) grid, a square unless grid_size says otherwise, along the four paths of an order.

    states is N of the selective scan, expand the channels E of the scan as a multiple of D, gate the factor silu(z), conv_bias
    the bias of the convolution. num_heads and qkv_bias mean nothing to it. ValueError for states or expand below 1.
    """

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, grid_size=None, states=1, expand=2, gate=False, order="cross", conv_bias=False,
    ):  # fmt: skip
        super().__init__()
        check_numbers("ss2d", states=states, expand=expand)
        if order not in CHOICES:
            raise ValueError(f"ss2d knows the orders {', '.join(CHOICES)}; order={order!r}")
        self.grid_size, self.gate, self.paths = grid_size, gate, ORDERS[order]
        E, K, rank = expand * dim, len(self.paths), math.ceil(dim / 16)
        self.sizes = [rank, states, states]
        self.in_proj = nn.Linear(dim, 2 * E if gate else E, bias=False)
        self.conv2d = nn.Conv2d(E, E, 3, padding=1, groups=E, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(K, rank + 2 * states, E).uniform_(-(E**-0.5), E**-0.5))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, E, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.dt_projs_bias = nn.Parameter(time_step_biases(K, E))
        self.A_logs = nn.Parameter(torch.arange(1, states + 1).log().repeat(K * E, 1))
        self.Ds = nn.Parameter(torch.ones(K * E))
        self.out_norm = nn.LayerNorm(E)
        self.out_proj = nn.Linear(E, dim, bias=False)

    def forward(self, tokens, **call):                                     # (B, N, D)
        refuse(tokens, call, "ss2d")
        grid_size = on_grid(tokens, self.grid_size, "ss2d").shape[1:3]
        x = self.in_proj(tokens)                                           # (B, N, E), and as many of the gate
        x, z = x.chunk(2, dim=2) if self.gate else (x, None)
        x = x.contiguous()  # the convolution returns channels last only for a dense input; otherwise later reads are strided
        x = silu(self.conv2d(x.unflatten(1, grid_size).permute(0, 3, 1, 2)))       # (B, E, h, w)
        y = self.scan(x.permute(0, 2, 3, 1).flatten(1, 2), grid_size)      # (B, N, E)
        y = self.out_norm(y.to(self.out_norm.weight.dtype))
        return self.out_proj(y if z is None else y * silu(z))              # (B, N, D)

    def scan(self, x, grid_size):                                          # (B, N, E)
        """Returns the sum of the scans along the paths, in float32 or wider, since the states overflow in half precision."""
        with full_precision(x):
            x = follow(widen(x), self.paths, grid_size)                    # (B, N, 4, E)
            dt, B, C = torch.einsum("bnke,kpe->bnkp", x, widen(self.x_proj_weight)).split(self.sizes, dim=3)
            dt = torch.einsum("bnkr,ker->bnke", dt, widen(self.dt_projs_weight))
            y = selective_scan(
                x.flatten(2).transpose(1, 2), dt.flatten(2).transpose(1, 2), -widen(self.A_logs).exp(), B.permute(0, 2, 3, 1),
                C.permute(0, 2, 3, 1), self.Ds, delta_bias=self.dt_projs_bias.flatten(), delta_softplus=True,
            )  # fmt: skip                                                   (B, 4 E, N)
            return put_back(y.transpose(1, 2).unflatten(2, (len(self.paths), -1)), self.paths, grid_size)


def read(weights):
    """Returns the options of an SS2D with these weights, which do not tell its order; None for another layer's."""
    if "x_proj_weight" not in weights:
        return None
    D, E = weights["out_proj.weight"].shape
    return dict(
        states=weights["A_logs"].shape[1],
        expand=E // D,
        gate=len(weights["in_proj.weight"]) > E,
        conv_bias="conv2d.bias" in weights,
    )


OPTIONS = (
    Option("states", "states of every channel", dict(type=positive)),
    Option("expand", "channels of the scan, as a multiple of the hidden size", dict(type=positive)),
    Option("gate", "multiply by a gate after the norm", SWITCH),
    Option("order", "the four paths: rows and columns from both ends, or snakes", dict(choices=CHOICES), told=False),
    Option("conv_bias", "a bias in the convolution", SWITCH),
)
PRESETS = {
    "ss2d": {},  # VMamba's of today
    "ss2d-lamamba": dict(gate=True, order="continuous"),  # LaMamba-Diff's
    "ss2d-v0": dict(gate=True, states=16, conv_bias=True),  # the first VMamba's
}
MIXER = Mixer("ss2d", SS2D, read, OPTIONS, PRESETS)
