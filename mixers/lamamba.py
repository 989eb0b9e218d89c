"""The two mixers of a LaMamba-Diff block (arXiv 2408.02615) as one: ss2d for the whole picture, then attention in windows.

In that block each is a branch of its own, x += gate ss2d(norm(x)), then x += gate' window(norm(x)). A mixer receives only the
normalised tokens u, and its block adds its result to x once. So here u takes the place of the stream between the two:

    a = ss2d(u),     out = a + window(layer_norm(u + a))
"""

from torch import nn

from machine.flags import positive
from mixers import window
from mixers.options import Mixer, Option
from mixers.ss2d import SS2D


class LaMambaMixer(nn.Module):
    """Mixes tokens (B, N, D) of an (h, w) grid, a square unless grid_size says otherwise, by ss2d as LaMamba-Diff has it (one
    state, gate, snakes), then in windows of window_size x window_size, shifted in odd layers.

    Parameters at D = 384 with 6 heads: 1,649,478, of which the windows have 592,710; attention has 591,360.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, grid_size=None, layer=0, window_size=8):
        super().__init__()
        self.op = SS2D(dim, gate=True, order="continuous")
        self.norm_swin = nn.LayerNorm(dim)
        self.attn = window.Window(dim, num_heads, qkv_bias, layer=layer, size=window_size)
        self.grid_size = grid_size

    @property
    def grid_size(self):
        return self.op.grid_size

    @grid_size.setter
    def grid_size(self, grid_size):
        self.op.grid_size = self.attn.grid_size = grid_size

    def forward(self, tokens, **call):                                     # (B, N, D)
        scanned = self.op(tokens, **call)
        return scanned + self.attn(self.norm_swin(tokens + scanned))       # (B, N, D)


def read(weights):
    """Returns the options of a LaMambaMixer with these weights; None for another layer's."""
    told = window.read({name.removeprefix("attn."): weight for name, weight in weights.items() if name.startswith("attn.")})
    return told and dict(window_size=told["size"])


OPTIONS = (Option("window_size", "side of a window in tokens, 8 unless given", dict(type=positive)),)
MIXER = Mixer("lamamba", LaMambaMixer, read, OPTIONS)
