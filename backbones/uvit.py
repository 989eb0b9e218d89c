"""U-ViT (Bao et al., arXiv 2209.12152): a vision transformer that gets timestep and class as tokens, with long skips."""

from functools import partial

import torch
from timm.models.vision_transformer import Attention, Mlp
from torch import nn

from backbones import drop_labels
from backbones.parts import timestep_waves, unpatch
from backbones.skips import LongSkips


class Block(nn.Module):
    """A block of a vision transformer, which begins with a linear layer if it gets a skip."""

    def __init__(self, hidden_size, num_heads, skip):
        super().__init__()
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=False)
        self.mlp = Mlp(hidden_size, 4 * hidden_size)

    def forward(self, x, skip):                                            # (B, L, D) twice
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(LongSkips):
    """U-ViT on images or latents: depth/2 blocks, one, and depth/2 with skips. Names and shapes are those of its public code.

    Arguments are DiT's, except that the mixer is attention: ValueError for another. num_classes=0 leaves out the class token.
    conv: end with a convolution of 3 x 3 pixels. Weights of linear layers, positions and class embeddings start as truncated
    normal numbers of standard deviation 0.02, as in vision transformers.
    """

    class_table = "label_emb.weight"
    read_from = (
        "in_blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "pos_embed", "decoder_pred.bias", "mid_block.norm1.weight"
    )  # fmt: skip

    def __init__(
        self, input_size=32, patch_size=2, in_channels=4, hidden_size=512, depth=12, num_heads=8, num_classes=1000,
        learn_sigma=True, class_dropout_prob=0.1, conv=True, mixer="attention",
    ):  # fmt: skip
        build = partial(Block, hidden_size, num_heads)
        super().__init__(build, input_size, patch_size, in_channels, hidden_size, depth, num_classes, learn_sigma, mixer)
        self.class_dropout_prob = class_dropout_prob
        self.label_emb = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.norm = nn.LayerNorm(hidden_size)
        self.decoder_pred = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        self.final_layer = nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1) if conv else nn.Identity()
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear | nn.Embedding)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @classmethod
    def read(cls, weights):
        size, settings = cls.read_settings(weights, "decoder_pred.bias")
        return size | dict(conv="final_layer.weight" in weights), settings

    def forward(self, x, t, y, drop=None):
        """x (B, C, H, W), timesteps t (B,), classes y (B,) -> (B, out_channels, H, W). drop (B,) bool: whose class to leave
        out; None leaves it to chance in training."""
        extras = [timestep_waves(t, self.pos_embed.shape[2]).to(self.pos_embed.dtype)]                         # (B, D)
        if self.num_classes:
            y = drop_labels(y, drop, self.num_classes, self.class_dropout_prob * self.training)
            extras.insert(0, self.label_emb(y))
        x, skips, half = self.tokens(x, *extras), [], len(self.in_blocks)                                      # (B, L, D)
        for number, block in enumerate(self.blocks):
            x = self.run(block, x, skips.pop() if number > half else None)
            skips += [x] if number < half else []
        x = self.decoder_pred(self.norm(x))[:, self.extras :]                                                  # (B, N, p p C)
        return self.final_layer(unpatch(x, self.grid_size, self.patch_size))
