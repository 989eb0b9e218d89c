"""The common base of U-ViT (Bao et al., arXiv 2209.12152) and DiS: timestep and class are tokens before those of the image, and
blocks of the second half receive the outputs of the first half, the last one first."""

import torch
from timm.models.vision_transformer import PatchEmbed
from torch import nn

from backbones import PatchBackbone, count_blocks, refuse_mixer, settings_of
from backbones.parts import learnt_positions


class LongSkips(PatchBackbone):
    """depth/2 in_blocks, a mid_block and depth/2 out_blocks; build(skip) makes one block, with skip=True for the out_blocks.
    Without classes (num_classes=0) there is no class token. Other arguments are DiT's."""

    def __init__(self, build, input_size, patch_size, in_channels, hidden_size, depth, num_classes, learn_sigma, mixer):
        super().__init__(input_size, patch_size, in_channels, num_classes, learn_sigma)
        refuse_mixer(mixer, type(self).__name__)
        self.extras = 2 if num_classes else 1
        self.patch_embed = PatchEmbed(self.input_size, patch_size, in_channels, hidden_size)
        tokens = self.extras + self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden_size))
        self.in_blocks = nn.ModuleList(build(skip=False) for _ in range(depth // 2))
        self.mid_block = build(skip=False)
        self.out_blocks = nn.ModuleList(build(skip=True) for _ in range(depth // 2))

    @classmethod
    def tokens_of(cls, weights):
        return weights["pos_embed"].shape[1] - (2 if any(name.startswith("label_emb.") for name in weights) else 1)

    @classmethod
    def read_settings(cls, weights, outputs):
        """Returns what `read` does, from the name of the last layer."""
        hidden, channels, *_, patch = weights["patch_embed.proj.weight"].shape
        size = dict(hidden_size=hidden, depth=2 * count_blocks(weights, "in_blocks"), patch_size=patch)
        return size, settings_of(channels, len(weights[outputs]) // patch**2, weights.get(cls.class_table))

    @property
    def blocks(self):
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def positions(self):
        """Returns the learnt positions of the extra tokens and of the current grid's tokens, (1, extras + N, D)."""
        return learnt_positions(self.pos_embed, self.trained_grid, self.grid_size, self.extras)

    def adapted(self, weights, grid):
        """Returns the learnt positions of weights for another grid (h, w), as they are on this one; see `Backbone`. There are
        none to adapt if those have other extra tokens."""
        table, places = weights["pos_embed"], self.extras + grid[0] * grid[1]
        return dict(pos_embed=learnt_positions(table, grid, self.trained_grid, self.extras)) if table.shape[1] == places else {}

    def tokens(self, x, *extras):                                          # (B, C, H, W), (B, D) each
        """Returns the extra tokens and those of an image, with their positions: (B, extras + N, D)."""
        return torch.cat([extra[:, None] for extra in extras] + [self.patch_embed(x)], dim=1) + self.positions()
