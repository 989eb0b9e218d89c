"""Mamba (Gu and Dao, arXiv 2312.00752) as a token mixer, and Vim (Zhu et al., arXiv 2401.09417), which scans both ways:

    x, z = W_in tokens                                           E = expand D channels each
    x = silu(conv1d(x))                                          per channel, over a token and the d_conv - 1 before it
    delta, B, C = W_x x                                          R = ceil(D / 16), N and N numbers for each token
    y = silu(z) (scan(x, softplus(W_dt delta + bias), -exp(A_log), B, C) + D x)              (mixers/selective_scan.py)
    out = W_out y

Vim has everything but W_in and W_out twice, the second time for the tokens in reverse, and takes the mean of both y; DiS (Fei
et al., arXiv 2402.05608) takes their sum. In Mamba a token sees only those before it. ZigMa (Hu et al., arXiv 2403.13802) is
Mamba along eight paths through the picture, each block along the next one.
"""

import math

import torch
from torch import nn
from torch.nn.functional import conv2d, pad, silu

from machine.flags import positive
from mixers.grid import checked_grid, on_grid, refuse
from mixers.options import SWITCH, Mixer, Option, check_numbers
from mixers.orders import ORDERS, follow, put_back
from mixers.selective_scan import selective_scan
from mixers.selective_scan_cpu import Convolution, serves
from mixers.time_steps import initialize_time_steps, product_and_bias
from pde_ssm_kernels.modes import runs_alone, traced, widen


class Mamba(nn.Module):
    """The Mamba block, tokens (B, L, D) -> (B, L, D): a drop-in replacement for timm's Attention, with its arguments, of which
    num_heads and qkv_bias are ignored. The names of its weights are the public ones.

    expand: channels of the scan, as a multiple of D; d_state: N; d_conv: tokens under the convolution. bidirectional is Vim,
    and with summed its two directions are added up as in DiS. zigzag is ZigMa: tokens lie on a grid of grid_size (h, w),
    and `layer` is the block's number. ValueError for numbers below 1, summed without bidirectional, or tokens off the grid.

    Parameters at D = 384: 963,840; 1,042,944 with two directions, and then 521,472 with expand=1.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, *, expand=2, d_state=16, d_conv=4, bidirectional=False, summed=False,
                 zigzag=False, grid_size=None, layer=0, prefix_tokens=0):  # fmt: skip
        super().__init__()
        check_numbers("Mamba", expand=expand, d_state=d_state, d_conv=d_conv)
        if summed and not bidirectional:
            raise ValueError("summed adds up two directions and Mamba has one; with bidirectional, which is Vim, it has both")
        if zigzag and prefix_tokens:
            raise ValueError(f"zigzag paths go through a grid, on which {prefix_tokens} prefix_tokens have no place")
        self.grid_size, self.path = grid_size, ORDERS["zigzag"][layer % 8] if zigzag else None
        E, N, R = expand * dim, d_state, math.ceil(dim / 16)
        self.ways = ("", "_b") if bidirectional else ("",)                 # as the names of weights tell directions apart
        self.summed = summed
        self.in_proj = nn.Linear(dim, 2 * E, bias=False)
        for b in self.ways:
            setattr(self, f"conv1d{b}", nn.Conv1d(E, E, d_conv, groups=E))
            setattr(self, f"x_proj{b}", nn.Linear(E, R + 2 * N, bias=False))
            setattr(self, f"dt_proj{b}", nn.Linear(R, E))
            setattr(self, f"A{b}_log", nn.Parameter(torch.empty(E, N)))
            setattr(self, f"D{b}", nn.Parameter(torch.empty(E)))
        self.out_proj = nn.Linear(E, dim, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Sets the values that a network's own initialisation would overwrite: time steps between 0.001 and 0.1, in both
        directions, and states that decay at rates 1 to N. (Vim's public code leaves its second direction's steps at 0.69.)"""
        for b in self.ways:
            A_log, dt_proj = getattr(self, f"A{b}_log"), getattr(self, f"dt_proj{b}")
            A_log.copy_(torch.arange(1, A_log.shape[1] + 1, dtype=torch.float32).log().expand_as(A_log))
            nn.init.ones_(getattr(self, f"D{b}"))
            initialize_time_steps(dt_proj)

    def forward(self, tokens, **call):                                     # (B, L, D)
        refuse(tokens, call, "Mamba")
        if self.path is None:
            return self.read(tokens)
        grid = checked_grid(self.grid_size, "Mamba along zigzags")
        on_grid(tokens, grid, "Mamba along zigzags")
        along = follow(tokens, (self.path,), grid).squeeze(2)
        return put_back(self.read(along).unsqueeze(2), (self.path,), grid)

    def read(self, tokens):                                                # (B, L, D)
        x, z = self.in_proj(tokens).chunk(2, dim=2)                        # (B, L, E) twice
        y = self.scan(x, z, "")
        if len(self.ways) == 2:
            back = self.scan(x, z, "_b")
            y = y + back if self.summed else (y + back) / 2
        return self.out_proj(y)                                            # (B, L, D)

    def scan(self, x, z, b):                                               # (B, L, E) twice -> (B, L, E)
        conv1d, x_proj, dt_proj = (getattr(self, f"{name}{b}") for name in ("conv1d", "x_proj", "dt_proj"))
        A_log, D = getattr(self, f"A{b}_log"), getattr(self, f"D{b}")
        reverse = b == "_b"
        x = convolve_by(conv1d, x.transpose(1, 2), reverse)                # (B, E, L)
        numbers = x_proj(x.transpose(1, 2))                                # (B, L, R + 2 N)
        delta, B, C = numbers.tensor_split((-2 * A_log.shape[1], -A_log.shape[1]), dim=2)
        delta, bias = product_and_bias(dt_proj, delta)
        delta, B, C, z = (part.transpose(1, 2) for part in (delta, B, C, z))
        y = selective_scan(x, delta, -widen(A_log).exp(), B, C, D, z, bias, delta_softplus=True, reverse=reverse)
        return y.transpose(1, 2)


def convolve_by(conv1d, x, reverse):                                       # (B, E, L)
    """Returns what `convolve` does with the weights of a layer; one with hooks or adapters is called instead."""
    if runs_alone(conv1d, nn.Conv1d):
        return convolve(x, conv1d.weight, conv1d.bias, reverse)
    x = x.flip(2) if reverse else x
    x = silu(conv1d(pad(x, (conv1d.weight.shape[2] - 1, 0))))
    return x.flip(2) if reverse else x


def convolve(x, weight, bias, reverse):                                    # (B, E, L)
    """Returns silu of the convolution of every channel over a token and those before it, or with `reverse` after it."""
    alike = x.dtype == weight.dtype == bias.dtype
    if alike and not torch.compiler.is_compiling() and not traced(x, weight, bias) and serves(x):
        return Convolution.apply(convolve_plainly, x, weight, bias, reverse)
    return convolve_plainly(x, weight, bias, reverse)


def convolve_plainly(x, weight, bias, reverse):
    """Returns what `convolve` does, in PyTorch's operations."""
    # conv2d sees a picture one pixel high with channels last, the layout in memory; conv1d would transpose it twice.
    before = weight.shape[2] - 1
    x = pad(x.transpose(1, 2), (0, 0, 0, before) if reverse else (0, 0, before, 0)).transpose(1, 2).unsqueeze(2)
    weight = weight.flip(2) if reverse else weight
    return silu(conv2d(x, weight.unsqueeze(2), bias, groups=len(bias)).squeeze(2))


OPTIONS = (
    Option("expand", "channels of the scan, as a multiple of the hidden size; 2 unless given", dict(type=positive)),
    Option("d_state", "states of each channel; 16 unless given", dict(type=positive)),
    Option("d_conv", "tokens under the convolution; 4 unless given", dict(type=positive)),
    Option("bidirectional", "also read the tokens in reverse, as --mixer vim does", SWITCH),
    Option("summed", "add up the two directions, as DiS does, instead of taking their mean", SWITCH, told=False),
    Option("zigzag", "read along eight paths, each block along the next, as --mixer zigzag does", SWITCH, told=False),
)
PRESETS = {"mamba": {}, "vim": {"bidirectional": True}, "zigzag": {"zigzag": True}}


def read(weights):
    """Returns the options that a Mamba's weights reveal, all but summed and zigzag; None for another layer's weights."""
    if not {"A_log", "conv1d.weight"} <= weights.keys():
        return None
    (E, d_state), dim = weights["A_log"].shape, len(weights["out_proj.weight"])
    return dict(
        expand=E // dim, d_state=d_state, d_conv=weights["conv1d.weight"].shape[2], bidirectional="A_b_log" in weights
    )  # fmt: skip


MIXER = Mixer("mamba", Mamba, read, OPTIONS, PRESETS)
