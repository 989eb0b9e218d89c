"""ZigMa (Hu et al., arXiv 2403.13802): Mamba along eight paths through the picture, a block along each in turn, with adaLN."""

import torch
from timm.models.vision_transformer import PatchEmbed
from torch import nn
from torch.nn.functional import layer_norm

from backbones import PatchBackbone, count_blocks, refuse_mixer, settings_of
from backbones.parts import LabelEmbedder, TimestepEmbedder, learnt_positions, unpatch
from mixers.mamba import Mamba


class Block(nn.Module):
    """Adds the previous block's output to the stream, and returns the normalised stream plus the gated Mamba of it, and the
    stream. So every block adds the whole normalised stream to the stream, as in the public code."""

    def __init__(self, hidden_size, grid_size, layer):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.mixer = Mamba(hidden_size, zigzag=True, grid_size=grid_size, layer=layer)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * hidden_size))
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)

    def forward(self, x, stream, c):                                       # (B, N, D), (B, N, D), (B, D)
        shift, scale, gate = self.adaLN_modulation(c)[:, None].chunk(3, dim=2)
        stream = stream + x
        x = self.norm(stream)
        return torch.addcmul(x, gate, self.mixer(torch.addcmul(shift, x, 1 + scale))), stream


class ZigMa(PatchBackbone):
    """ZigMa on images or latents. Names and shapes are those of its public code, which however has no null class.

    Arguments are DiT's, except that the mixer is its own: ValueError for another. Timesteps run up to 1000; public code takes
    them from 0 to 1 and multiplies by 1000.
    """

    read_from = (
        "blocks.0.mixer.A_log", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed",
        "final_layer.linear.bias",
    )  # fmt: skip

    def __init__(
        self, input_size=32, patch_size=2, in_channels=4, hidden_size=368, depth=24, num_classes=1000, learn_sigma=True,
        class_dropout_prob=0.1, mixer="attention",
    ):  # fmt: skip
        super().__init__(input_size, patch_size, in_channels, num_classes, learn_sigma)
        refuse_mixer(mixer, "ZigMa")
        self.x_embedder = PatchEmbed(self.input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], hidden_size))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(Block(hidden_size, self.grid_size, layer) for layer in range(depth))
        self.norm_f = nn.RMSNorm(hidden_size, eps=1e-5)
        self.final_layer = nn.ModuleDict(dict(linear=nn.Linear(hidden_size, patch_size**2 * self.out_channels)))

    @classmethod
    def read(cls, weights):
        hidden, channels, *_, patch = weights["x_embedder.proj.weight"].shape
        outputs, table = len(weights["final_layer.linear.bias"]) // patch**2, weights["y_embedder.embedding_table.weight"]
        size = dict(hidden_size=hidden, depth=count_blocks(weights, "blocks"), patch_size=patch)
        return size, settings_of(channels, outputs, table)

    def adapted(self, weights, grid):
        """Returns the learnt positions of weights for another grid (h, w), as they are on this one; see `Backbone`."""
        return dict(pos_embed=learnt_positions(weights["pos_embed"], grid, self.trained_grid))

    def forward(self, x, t, y, drop=None):
        """x (B, C, H, W), timesteps t (B,), classes y (B,) -> (B, out_channels, H, W). drop (B,) bool: whose class to leave
        out; None leaves it to chance in training."""
        c = self.t_embedder(t) + self.y_embedder(y, drop)                  # (B, D)
        x = self.x_embedder(x) + learnt_positions(self.pos_embed, self.trained_grid, self.grid_size)       # (B, N, D)
        stream = torch.zeros_like(x)
        for block in self.blocks:
            x, stream = self.run(block, x, stream, c)
        x = self.norm_f(stream + x)
        x = self.final_layer["linear"](layer_norm(x, x.shape[-1:], eps=1e-6))                              # (B, N, p p C)
        return unpatch(x, self.grid_size, self.patch_size)
