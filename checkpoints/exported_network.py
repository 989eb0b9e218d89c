"""A diffusion transformer whose tokens mix by a PDE or by attention, for diffusers. PDEs need the package pde-ssm."""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention


def modulate(x, shift, scale):
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Sequential):
    """(B, D) -> parts of (B, D) each, which shift, scale and gate."""

    def __init__(self, dim, parts):
        super().__init__(nn.SiLU(), nn.Linear(dim, parts * dim))


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):                                                  # (B, N, D)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, mixer, dim, hidden):
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = mixer, Mlp(dim, hidden), Modulation(dim, 6)

    def forward(self, x, c):                                               # (B, N, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        conditioning = [c] if getattr(self.attn, "conditioned", False) else []
        x = x + gate1[:, None] * self.attn(modulate(x, shift1, scale1), *conditioning)
        return x + gate2[:, None] * self.mlp(modulate(x, shift2, scale2))


class DiT(ModelMixin, ConfigMixin):
    """(B, C, H, W), timesteps (B,) and classes (B,), num_classes being none, to (B, C or 2 C, H, W).

    sample_size: (H, W). pde: options of PDESSMBlock; None for attention. intervals: over how many steps the 128 frequencies of
    timesteps fall from 1 to 1 / 10000.
    """

    @register_to_config
    def __init__(
        self, sample_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, learn_sigma=True,
        pde=None, intervals=128,
    ):  # fmt: skip
        super().__init__()
        grid = tuple(side // patch_size for side in sample_size)

        def mixer():
            if pde is None:
                return Attention(hidden_size, num_heads)
            from pde_ssm import PDESSMBlock

            return PDESSMBlock(hidden_size, grid_size=grid, **pde)

        def part(**layers):
            return nn.ModuleDict(layers)

        linear = nn.Linear(hidden_size, hidden_size)
        self.x_embedder = part(proj=nn.Conv2d(in_channels, hidden_size, patch_size, patch_size))
        self.t_embedder = part(mlp=nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), linear))
        self.y_embedder = part(embedding_table=nn.Embedding(num_classes + 1, hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(grid), hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(mixer(), hidden_size, 4 * hidden_size) for _ in range(depth))
        channels = in_channels * (2 if learn_sigma else 1)
        self.final_layer = part(
            linear=nn.Linear(hidden_size, patch_size**2 * channels), adaLN_modulation=Modulation(hidden_size, 2)
        )
        self.grid = grid

    def forward(self, x, t, y):
        (h, w), p = self.grid, self.config.patch_size
        frequencies = torch.exp(torch.arange(128, device=x.device) * (-math.log(10000) / self.config.intervals))
        angles = t.float()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
        c = self.t_embedder["mlp"](waves) + self.y_embedder["embedding_table"](y)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        last = self.final_layer
        x = last["linear"](modulate(x, *last["adaLN_modulation"](c).chunk(2, dim=1)))
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (h, w))                # (B, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
