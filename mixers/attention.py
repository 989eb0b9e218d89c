"""timm's self-attention, as in DiT, optionally with normalised queries and keys or with rotary position embedding."""

import torch
from timm.layers import AttentionRope, RmsNorm, build_rotary_pos_embed
from timm.models.vision_transformer import Attention

from mixers.grid import checked_grid, on_grid, refuse
from mixers.options import SWITCH, Mixer, Option
from pde_ssm_kernels.modes import cached_per_device, widen

BASE = 100  # base of RoPE, whose periods run from 2 pi to 2 pi BASE tokens; language models use 10,000


class HeadNorm(RmsNorm):
    """Divides the channels of a head by their root mean square, and multiplies them by weights; in float32 at least."""

    def forward(self, x):                                                  # (B, heads, N, d)
        return super().forward(widen(x)).type_as(x)


class SelfAttention(Attention):
    """timm's self-attention, for callers that pass more than tokens: rope, and masks or a context that are None."""

    def forward(self, x, attn_mask=None, **call):                          # (B, N, D)
        refuse(x, call, "attention")
        return super().forward(x, attn_mask=attn_mask)


class RotaryAttention(AttentionRope):
    """Self-attention whose queries and keys are rotated by angles proportional to their position (RoPE, Su et al., 2021), so
    that scores depend on relative positions alone: half of a head's channels by row, half by column (Heo et al., 2024).

    On a grid other than the one it was built for, tokens keep their place in the picture. ValueError if the number of channels
    per head is not divisible by 4.
    """

    rotary = True

    def __init__(self, dim, num_heads=8, grid_size=None, prefix_tokens=0, **options):
        if dim % (4 * num_heads):
            raise ValueError(f"--positions rope needs heads of 4, 8, 12 ... channels; here they have {dim / num_heads:g}")
        super().__init__(dim, num_heads, num_prefix_tokens=prefix_tokens, **options)
        self.grid_size = self.trained_grid = checked_grid(grid_size, "attention with rope")

    def forward(self, x, **call):                                          # (B, N, D)
        refuse(x, call, "attention with rope")
        on_grid(x[:, self.num_prefix_tokens :], self.grid_size, "attention with rope")
        return super().forward(x, rope=rotations(tuple(self.grid_size), self.trained_grid, x.shape[2] // self.num_heads, x))


@cached_per_device
def rotations(grid_size, trained_grid, dim, device):
    """Returns the sines and cosines of the angles by which each token's channels are rotated, (N, 2 dim)."""
    how = dict(in_pixels=False, temperature=BASE, ref_feat_shape=list(trained_grid), device=device)
    return torch.cat(build_rotary_pos_embed(list(grid_size), dim=dim, **how), dim=-1)


def build(dim, num_heads=8, qkv_bias=False, grid_size=None, qk_norm=False, positions="sincos", prefix_tokens=0):
    """Builds an attention layer: timm's, or RotaryAttention if positions is "rope", where the first prefix_tokens tokens
    have no position. qk_norm: normalise queries and keys, by a HeadNorm each."""
    options = dict(qkv_bias=qkv_bias, qk_norm=qk_norm, norm_layer=HeadNorm if qk_norm else None)
    if positions != "rope":
        return SelfAttention(dim, num_heads, **options)
    return RotaryAttention(dim, num_heads, grid_size, prefix_tokens, **options)


def read(weights):
    """Returns the options that an attention layer's weights tell; None for another layer's."""
    if "qkv.weight" not in weights or "relative_position_bias_table" in weights:  # a window's
        return None
    return dict(qk_norm="q_norm.weight" in weights)


OPTIONS = (
    Option("qk_norm", "of attention: divide queries and keys by their root mean square", SWITCH, True, "--qk-norm"),
    Option(
        "positions", "of attention: position embedding, sincos (added to tokens) or rope (rotates queries and keys); "
        "sincos unless given", dict(choices=("sincos", "rope")), True, "--positions",
    ),
)  # fmt: skip
MIXER = Mixer("attention", build, read, OPTIONS)
