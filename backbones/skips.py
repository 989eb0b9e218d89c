"""What U-ViT (Bao et al., arXiv 2209.12152) and DiS share: timestep and class are tokens before those of the image, and blocks
of the second half get what those of the first half passed on, the last one first."""

import torch
from timm.models.vision_transformer import PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

from backbones import Backbone, refuse_mixer
from backbones.parts import learnt_positions


class LongSkips(Backbone):
    """depth/2 in_blocks, a mid_block and depth/2 out_blocks; build(skip) makes one, for which skip says whether it is of the
    last. Without classes (num_classes=0) there is no token of a class. Other arguments are DiT's."""

    def __init__(self, build, input_size, patch_size, in_channels, hidden_size, depth, num_classes, learn_sigma, mixer):
        super().__init__()
        refuse_mixer(mixer, type(self).__name__)
        self.in_channels, self.patch_size, self.stride, self.learn_sigma = in_channels, patch_size, patch_size, learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes = self.trained_classes = num_classes
        height, width = self.input_size = self.check_size(input_size)
        self.grid_size = self.trained_grid = (height // patch_size, width // patch_size)
        self.extras = 2 if num_classes else 1
        self.patch_embed = PatchEmbed(self.input_size, patch_size, in_channels, hidden_size)
        tokens = self.extras + self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, hidden_size))
        self.in_blocks = nn.ModuleList(build(skip=False) for _ in range(depth // 2))
        self.mid_block = build(skip=False)
        self.out_blocks = nn.ModuleList(build(skip=True) for _ in range(depth // 2))

    @classmethod
    def stride_of(cls, keywords):
        return keywords["patch_size"]

    @classmethod
    def tokens_of(cls, weights):
        return weights["pos_embed"].shape[1] - (2 if any(name.startswith("label_emb.") for name in weights) else 1)

    @classmethod
    def read_settings(cls, weights, table, outputs):
        """Returns what `read` does, from the names of the table of classes and of the last layer."""
        hidden, channels, *_, patch = weights["patch_embed.proj.weight"].shape
        depth = 2 * len({name.split(".")[1] for name in weights if name.startswith("in_blocks.")})
        return dict(hidden_size=hidden, depth=depth, patch_size=patch), {
            "mixer": "attention",
            "mixer_options": {},
            "num_classes": len(weights[table]) - 1 if table in weights else 0,
            "in_channels": channels,
            "learn_sigma": len(weights[outputs]) != channels * patch**2,
        }

    @property
    def blocks(self):
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def resize(self, input_size):
        """The same weights for inputs of another size, a side or (height, width): returns the model. Positions are interpolated
        where they are used, and stay those of the trained grid."""
        height, width = self.input_size = self.check_size(input_size)
        self.grid_size = (height // self.patch_size, width // self.patch_size)
        self.patch_embed.set_input_size(self.input_size)
        return self

    def positions(self):
        """Learnt positions of the extra tokens and of those of the present grid, (1, extras + N, D)."""
        return learnt_positions(self.pos_embed, self.trained_grid, self.grid_size, self.extras)

    def tokens(self, x, *extras):                                          # (B, C, H, W), (B, D) each
        """Returns the extra tokens and those of an image, with their positions: (B, extras + N, D)."""
        return torch.cat([extra[:, None] for extra in extras] + [self.patch_embed(x)], dim=1) + self.positions()

    def run(self, block, *inputs):
        """Calls a block, which training with checkpoint_gradients computes twice."""
        return checkpoint(block, *inputs, use_reentrant=False) if self.recompute and self.training else block(*inputs)
