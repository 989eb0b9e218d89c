"""Parts of DiT and other networks on patches: embeddings of positions, timesteps and classes, and adaLN."""

import math

import torch
from torch import nn
from torch.nn.functional import interpolate, layer_norm, rms_norm

from backbones import drop_labels

NORMS = {"layer": layer_norm, "rms": rms_norm}


def sincos_position(positions, dim):
    """Returns sines and cosines of positions (N,), their periods geometric from 2 pi to 2 pi 10000: (N, dim)."""
    frequencies = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def grid_embedding(h, w, dim, trained_grid=None):
    """Returns the position embedding of an h x w grid, (1, h w, dim): one half for a token's column, the other for its row.

    On a grid other than the trained one, tokens keep the place of their centres in the picture, between the trained ones.
    """
    if dim % 4:
        raise ValueError(f"hidden_size must be divisible by 4 for the positional embedding; it is {dim}")
    places = [(torch.arange(n) + 0.5) * (trained / n) - 0.5 for n, trained in zip((h, w), trained_grid or (h, w))]
    row, column = torch.meshgrid(*places, indexing="ij")
    halves = [sincos_position(axis.flatten(), dim // 2) for axis in (column, row)]
    return torch.cat(halves, dim=1).float()[None]


def modulate(x, shift, scale, norm=layer_norm):                            # (B, N, D), (B, D), (B, D)
    """Applies adaLN: `norm` without weights of its own, then a shift and scale computed from the conditioning."""
    x = norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def timestep_frequencies(n, device, intervals=None):
    """Returns n geometric frequencies from 1 down, which reach 1 / 10000 after `intervals` steps. By default these are n, so
    the last frequency is just above it; diffusers has n - 1."""
    return torch.exp(torch.arange(n, dtype=torch.float32, device=device) * (-math.log(10000) / (intervals or n)))


def timestep_waves(t, dim, intervals=None):                                # (B,)
    """Returns cosines, then sines of timesteps at the frequencies of `timestep_frequencies`: (B, dim) float32. dim is even."""
    angles = t.float()[:, None] * timestep_frequencies(dim // 2, t.device, intervals)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """Embeds timesteps (B,), which may be fractional, as (B, D)."""

    def __init__(self, hidden_size, intervals=None):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        for i in (0, 2):
            nn.init.normal_(self.mlp[i].weight, std=0.02)
            nn.init.zeros_(self.mlp[i].bias)
        self.intervals = intervals

    def forward(self, t):                                                  # (B,)
        waves = timestep_waves(t, 256, self.intervals)                     # (B, 256)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))                # (B, D)


class LabelEmbedder(nn.Module):
    """Embeds classes (B,) as (B, D). Class num_classes is the null class, which replaces some labels at random in training."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y, drop=None):                                       # (B,), (B,) bool or None
        y = drop_labels(y, drop, self.num_classes, self.dropout_prob * self.training)
        return self.embedding_table(y)                                     # (B, D)


def learnt_positions(table, trained_grid, grid_size, extras=0):            # (1, extras + N, D)
    """Returns a learnt table of positions, whose first `extras` tokens are off the grid, adapted from the trained grid to
    another, bicubically between the tokens' centres: (1, extras + h w, D)."""
    if grid_size == trained_grid:
        return table
    extra, image = table.split([extras, table.shape[1] - extras], dim=1)
    image = image.transpose(1, 2).unflatten(2, trained_grid)               # (1, D, h, w)
    image = interpolate(image, grid_size, mode="bicubic", align_corners=False)
    return torch.cat([extra, image.flatten(2).transpose(1, 2)], dim=1)


def unpatch(x, grid_size, patch_size):                                     # (B, N, p p C), N = h w
    """Puts every token's pixels in their place, (B, C, h p, w p)."""
    p = patch_size
    x = x.unflatten(2, (p, p, -1)).unflatten(1, grid_size)                 # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
