"""A small DiT as other people might have written it: timm's attention, and weights that one function sets at the end."""

import math

import torch
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import nn
from torch.nn.functional import layer_norm


class SelfAttention(nn.Module):
    """Not timm's."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, tokens):
        q, k, v = self.to_qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.merge(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, attention):
        super().__init__()
        self.attn = attention
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU("tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        a = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + a[2] * self.attn(layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + a[1]) + a[0])
        return x + a[5] * self.mlp(layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + a[4]) + a[3])


class Times(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angles = t[:, None] * torch.exp(torch.arange(128) * (-math.log(10000) / 128))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class Labels(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)


class Last(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class Net(nn.Module):
    def __init__(self, input_size=8, patch=4, width=96, depth=6, own=False, num_classes=10):
        super().__init__()
        self.in_channels, self.patch = 3, patch
        self.x_embedder = PatchEmbed(input_size, patch, 3, width)
        self.t_embedder = Times(width)
        self.y_embedder = Labels(num_classes, width)
        self.pos_embed = nn.Parameter(torch.randn(1, self.x_embedder.num_patches, width), requires_grad=False)
        layers = [SelfAttention(width, 3) if own else Attention(width, num_heads=3, qkv_bias=True) for _ in range(depth)]
        self.blocks = nn.ModuleList(Block(width, layer) for layer in layers)
        self.final_layer = Last(width, patch * patch * 6)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.05)
                nn.init.constant_(layer.bias, 0)  # every Linear here has one

    def forward(self, x, t, y):
        h, w = (side // self.patch for side in x.shape[2:])
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        x = self.final_layer.linear(layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        x = x.unflatten(2, (self.patch, self.patch, 6)).unflatten(1, (h, w))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class Strip(nn.Module):
    """Two tokens beside each other, which nobody says."""

    def __init__(self, input_size=None):
        super().__init__()
        self.attn = Attention(96, num_heads=3)

    def forward(self, x, t, y):
        return self.attn(x.reshape(len(x), -1).unflatten(1, (2, 96)))


Tiny_models = {
    "DiT-N/4": Net,
    "DiT-N/2": lambda **options: Net(patch=2, **options),
    "Own-N/4": lambda **options: Net(own=True, **options),
    "Strip": Strip,
}
