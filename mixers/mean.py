"""Mixing by the mean alone: attention in which every token attends to all tokens equally."""

from torch import nn

from mixers.grid import refuse
from mixers.options import Mixer


class Mean(nn.Module):
    """Gives every token the mean of all: proj(mean of v(x)), (B, N, D) -> (B, N, D), for any positions and number of tokens.

    That is attention with equal scores. Queries and keys would get no gradient, so there are none, and half of attention's
    parameters: 295,680 at D = 384. Further linear layers around the mean would add nothing, since they compose to these.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, grid_size=None, prefix_tokens=0):
        super().__init__()
        self.v, self.proj = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, tokens, **call):                                     # (B, N, D)
        refuse(tokens, call, "mean")
        return self.proj(self.v(tokens.mean(1, keepdim=True))).expand_as(tokens).contiguous()


def read(weights):
    """Returns the options of a Mean with these weights, of which it has none; None for another layer's."""
    return {} if {"v.weight", "proj.weight"} <= weights.keys() and "qkv.weight" not in weights else None


MIXER = Mixer("mean", Mean, read)
