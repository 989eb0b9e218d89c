"""Self-attention within windows of the grid, Swin's (arXiv 2103.14030): timm's layer, on any grid.

Windows do not look at one another. Those of layers with odd numbers are shifted by half a window, so that tokens mix across
their edges from layer to layer, and in no other way: by itself this mixer sees no more than a window.
"""

from math import isqrt

import torch
from timm.models.swin_transformer import WindowAttention, get_relative_position_index, window_partition, window_reverse
from torch.nn.functional import pad, scaled_dot_product_attention

from machine.flags import positive
from mixers.grid import on_grid, refuse
from mixers.options import Mixer, Option, check_numbers
from pde_ssm_kernels.modes import cached_per_device


class Window(WindowAttention):
    """Mixes tokens (B, N, D) of an (h, w) grid, a square unless grid_size says otherwise, within windows of size x size.

    softmax(q k / sqrt(d) + bias of their relative position) v, for num_heads heads of d channels. An axis that is not longer
    than a window has a single one, not shifted; other axes are padded to whole windows with tokens to which those of the grid
    do not attend. ValueError for heads that do not divide D. Parameters at D = 384 with 6 heads: 592,710; attention's are
    591,360.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, grid_size=None, layer=0, size=8):
        check_numbers("window", size=size)
        if dim % num_heads:
            raise ValueError(f"window has {dim} channels, which its {num_heads} heads do not divide")
        super().__init__(dim, num_heads, window_size=size, qkv_bias=qkv_bias)
        self.grid_size, self.size, self.shifted = grid_size, size, layer % 2 == 1

    def forward(self, tokens, **call):                                     # (B, N, D)
        refuse(tokens, call, "window")
        grid = on_grid(tokens, self.grid_size, "window")                   # (B, h, w, D)
        h, w = grid.shape[1:3]
        (H, a, down), (W, b, right) = axes = [layout(n, self.size, self.shifted) for n in (h, w)]
        x = pad(grid, (0, 0, 0, W - w, 0, H - h)).roll((-down, -right), (1, 2))
        x = window_partition(x, (a, b)).flatten(1, 2)                      # (B windows, a b, D)
        qkv = self.qkv(x).view(grid.shape[0], (H // a) * (W // b), a * b, 3, self.num_heads, x.shape[2] // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)                            # (B, windows, heads, a b, d) each
        x = scaled_dot_product_attention(q, k, v, self.bias(a, b, axes, h, w))
        x = self.proj(x.transpose(2, 3).flatten(3)).view(-1, a, b, grid.shape[3])
        x = window_reverse(x, (a, b), H, W).roll((down, right), (1, 2))    # (B, H, W, D)
        return x[:, :h, :w].flatten(1, 2)                                  # (B, N, D)

    def bias(self, a, b, axes, h, w):
        """Returns the bias added to the scores, (heads, a b, a b), or (windows, heads, a b, a b) with -inf between
        tokens of a window that may not attend to each other."""
        table = self.relative_position_bias_table
        bias = table[relative_positions(self.size, a, b, table)].permute(2, 0, 1)
        see = neighbours(tuple(axes), (h, w), bias)
        return bias if see is None else bias.masked_fill(~see[:, None], -torch.inf)


def layout(n, size, shifted):
    """Returns, for an axis of n tokens, its length padded to whole windows, the length of a window, and the windows' shift."""
    window = min(n, size)
    return -(-n // window) * window, window, size // 2 if shifted and n > size else 0


@cached_per_device
def relative_positions(size, a, b, device):
    """Returns the row of the table of biases for every two tokens of a window, cut to a x b, (a b, a b). timm's layer has them
    in a buffer, which stays without values in a model that is made on the meta device."""
    places = get_relative_position_index(size, size, device).view(2 * (size, size))
    return places[:a, :b, :a, :b].reshape(a * b, a * b)


@cached_per_device
def neighbours(axes, grid_size, device):
    """Returns which tokens may attend to which in every window, (windows, a b, a b) bool, or None if all may.

    axes are the layouts of both. Two tokens may if, on each axis, the shift moved both of them or neither around the edge of
    the grid, and both are padding or neither is.
    """
    if all(shift == 0 and length == n for (length, _, shift), n in zip(axes, grid_size)):
        return None
    kinds = []
    for (length, _, shift), n in zip(axes, grid_size):
        place = (torch.arange(length, device=device) + shift) % length
        kinds.append((place < shift) + 2 * (place >= n))
    regions = (4 * kinds[0][:, None] + kinds[1])[None, :, :, None]         # (1, H, W, 1)
    regions = window_partition(regions, tuple(window for _, window, _ in axes)).flatten(1)
    return regions[:, :, None] == regions[:, None]


def read(weights):
    """Returns the options of a Window with these weights; None for another layer's."""
    table = weights.get("relative_position_bias_table")
    return None if table is None else dict(size=(isqrt(len(table)) + 1) // 2)


MIXER = Mixer("window", Window, read, (Option("size", "side of a window in tokens, 8 unless given", dict(type=positive)),))
