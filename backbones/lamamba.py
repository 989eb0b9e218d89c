"""LaMamba-Diff (Fu et al., arXiv 2408.02615): a U-Net of pixels whose blocks scan the whole picture, then attend in windows."""

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn

from backbones import Backbone, count_blocks, refuse_mixer, settings_of
from backbones.parts import LabelEmbedder, TimestepEmbedder, grid_embedding, learnt_positions, modulate
from mixers.ss2d import SS2D
from mixers.window import Window

ATTENTION = ("shifted", "unshifted", "global", "none")  # windows, shifted in odd blocks or not; full attention; none


class Block(nn.Module):
    """x += gate ss2d(mod(x)), x += gate window(mod(x)), x += gate mlp(mod(x)), mod(x) = layer_norm(x) (1 + scale) + shift, for
    tokens (B, N, D) and conditioning (B, C), which a linear layer first maps to (B, D) if `project`."""

    def __init__(self, dim, num_heads, window, number, condition, project, attention):
        super().__init__()
        self.condition_projection = nn.Linear(condition, dim) if project else nn.Identity()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if attention == "none" else 9) * dim))
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_swin = None if attention == "none" else nn.LayerNorm(dim)
        self.op = SS2D(dim, gate=True, order="continuous")
        if attention in ("none", "global"):
            self.attn = None if attention == "none" else Attention(dim, num_heads, qkv_bias=True)
        else:
            layer = number if attention == "shifted" else 0
            self.attn = Window(dim, num_heads, qkv_bias=True, layer=layer, size=window)
        self.mlp = Mlp(dim, 4 * dim)                                       # GELU by the error function, not DiT's by tanh

    def forward(self, x, c):                                               # (B, N, D), (B, C)
        branches = [(self.norm, self.op), (self.norm_swin, self.attn), (self.norm2, self.mlp)]
        branches = [(norm, branch) for norm, branch in branches if branch is not None]
        modulation = self.adaLN_modulation(self.condition_projection(c))
        numbers = modulation[:, None].chunk(3 * len(branches), dim=2)      # (B, 1, D) each
        for (norm, branch), shift, scale, gate in zip(branches, numbers[::3], numbers[1::3], numbers[2::3]):
            x = torch.addcmul(x, gate, branch(torch.addcmul(shift, norm(x), 1 + scale)))
        return x


class Merge(nn.Module):
    """Merges 2 x 2 tokens into one, twice as wide: (B, N, D) on a grid -> (B, N / 4, 2 D)."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x, grid_size):
        x = x.unflatten(1, (grid_size[0] // 2, 2, grid_size[1] // 2, 2))   # (B, h, 2, w, 2, D)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)))


class Expand(nn.Module):
    """Expands a token into 2 x 2, half as wide: (B, N / 4, 2 D) -> (B, N, D) on a grid. With factor 1, shapes do not change."""

    def __init__(self, dim, factor=2):
        super().__init__()
        self.factor, self.expand, self.norm = factor, nn.Linear(dim, factor * dim, bias=False), nn.LayerNorm(dim // factor)

    def forward(self, x, grid_size):
        x = self.expand(x).unflatten(2, (self.factor, self.factor, -1))    # (B, N / 4, 2, 2, D)
        x = x.unflatten(1, (grid_size[0] // self.factor, grid_size[1] // self.factor))
        return self.norm(x.transpose(2, 3).flatten(1, 4))


class Stage(nn.Module):
    """Blocks on one grid (h, w), with the upsampling from, or the downsampling to, a coarser grid, if there is one."""

    def __init__(self, blocks, upsample=None, downsample=None):
        super().__init__()
        self.blocks, self.upsample, self.downsample = nn.ModuleList(blocks), upsample, downsample

    def resize(self, grid_size):
        self.grid_size = grid_size
        for block in self.blocks:
            block.op.grid_size = grid_size
            if isinstance(block.attn, Window):
                block.attn.grid_size = grid_size


class LaMamba(Backbone):
    """LaMamba-Diff on images or latents, a token for each pixel.

    Stages of widths hidden_size, twice and four times that at sides s, s/2 and s/4, and a fourth like the third, unless depths
    ends in 0; then middle_depth blocks, and the stages upwards, each one block deeper than its counterpart on the way down,
    whose output is added to its input. depths and num_heads have a number for each of the four. attention, one of ATTENTION, is
    for the paper's ablation. Other arguments are DiT's. ValueError for sides that are not divisible by 4 or that windows do not
    fit at some stage, and for any mixer but attention.
    """

    read_from = ("layers.0.blocks.0.op.A_logs", "y_embedder.embedding_table.weight", "pos_embed", "final_linear.bias")
    stride = 4

    def __init__(
        self, input_size=32, in_channels=4, hidden_size=320, depths=(2, 2, 2, 2), middle_depth=2, num_heads=(16, 16, 16, 16),
        window=8, num_classes=1000, learn_sigma=True, class_dropout_prob=0.1, mixer="attention",
        attention="shifted",
    ):  # fmt: skip
        super().__init__(in_channels, num_classes, learn_sigma)
        refuse_mixer(mixer, "LaMamba")
        self.window = window if attention in ("shifted", "unshifted") else None
        if attention == "unshifted":
            self.register_buffer("unshifted", torch.ones(()))  # marks the weights, which otherwise look like shifted ones
        stages = range(4 if depths[3] else 3)
        widths, whole = [hidden_size, 2 * hidden_size, 4 * hidden_size, 4 * hidden_size], 4 * hidden_size

        def stage(i, depth, project, **change):
            return Stage([Block(widths[i], num_heads[i], window, d, whole, project, attention) for d in range(depth)], **change)

        self.t_embedder = TimestepEmbedder(whole)
        self.y_embedder = LabelEmbedder(num_classes, whole, class_dropout_prob)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(in_channels, hidden_size, 1), norm=nn.LayerNorm(hidden_size)))
        self.layers = nn.ModuleList(
            stage(i, depths[i], widths[i] < whole, downsample=Merge(widths[i]) if i < 2 else None) for i in stages
        )
        self.mid_layer = stage(stages[-1], middle_depth, False)
        self.layers_up = nn.ModuleList(
            stage(i, depths[i] + 1, True, upsample=Expand(widths[i + 1]) if i < 2 else None) for i in reversed(stages)
        )
        self.final_up = Expand(hidden_size, factor=1)
        self.final_condition_projection = nn.Linear(whole, hidden_size)
        self.final_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.final_linear = nn.Linear(hidden_size, self.out_channels)
        self.trained_size = self.resize(input_size).input_size
        self.pos_embed = nn.Parameter(grid_embedding(*self.input_size, hidden_size).unflatten(1, self.input_size))
        self._initialize()
        self.register_load_state_dict_pre_hook(drop_public_buffers)

    @classmethod
    def stride_of(cls, keywords):
        return cls.stride

    @classmethod
    def tokens_of(cls, weights):
        return weights["pos_embed"].shape[1] * weights["pos_embed"].shape[2] // cls.stride**2      # squares of 4 x 4 pixels

    @classmethod
    def read(cls, weights):
        hidden, channels = weights["patch_embed.proj.weight"].shape[:2]
        depths = tuple(count_blocks(weights, f"layers.{i}.blocks") for i in range(4))
        attention = "unshifted" if "unshifted" in weights else "shifted"
        if "layers.0.blocks.0.attn.relative_position_bias_table" not in weights:
            attention = "global" if "layers.0.blocks.0.attn.qkv.weight" in weights else "none"
        size = dict(hidden_size=hidden, depths=depths) | ({} if attention == "shifted" else dict(attention=attention))
        outputs, table = len(weights["final_linear.bias"]), weights["y_embedder.embedding_table.weight"]
        return size, settings_of(channels, outputs, table)

    @property
    def blocks(self):
        return [block for stage in (*self.layers, self.mid_layer, *self.layers_up) for block in stage.blocks]

    def _initialize(self):
        """Initialises linear layers by Xavier's rule, modulations and gates with zero, so that every block starts as the
        identity. As in the public code, the last layer is not zero. Embedders and other layers keep their own initial
        values."""
        parts = (self.layers, self.mid_layer, self.layers_up, self.final_up, self.final_condition_projection, self.final_linear)
        for layer in (m for part in parts for m in part.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for modulation in [self.final_adaLN_modulation[1]] + [block.adaLN_modulation[1] for block in self.blocks]:
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)

    def check_size(self, input_size):
        height, width = super().check_size(input_size)
        for shrink in (1, 2, 4):
            for side in (height // shrink, width // shrink):
                if self.window and side > self.window and side % self.window:
                    raise ValueError(
                        f"input size {height} x {width} does not fit windows of {self.window}: this model comes to a side of "
                        f"{side}, which is more than a window and not whole windows; multiples of {4 * self.window} fit"
                    )
        return height, width

    def resize(self, input_size):
        """Adapts the model to inputs of another size, a side or (height, width), with the same weights, and returns it. On a
        grid other than the trained one, positions are interpolated at each call, bicubically between the pixels' centres."""
        height, width = self.input_size = self.check_size(input_size)
        self.mid_layer.resize((height // 4, width // 4))
        for down, up, shrink in zip(self.layers, reversed(self.layers_up), (1, 2, 4, 4)):
            for stage in (down, up):
                stage.resize((height // shrink, width // shrink))
        return self

    def adapted(self, weights, grid):
        """Returns the positions of weights for pictures of another size, as they are on this one's; see `Backbone`."""
        table, size = weights["pos_embed"], self.trained_size              # of every pixel, (1, H, W, D)
        return dict(pos_embed=learnt_positions(table.flatten(1, 2), table.shape[1:3], size).unflatten(1, size))

    def positions(self):
        """Returns the position of every pixel of the present grid, (1, N, D)."""
        return learnt_positions(self.pos_embed.flatten(1, 2), self.trained_size, self.input_size)

    def forward(self, x, t, y, drop=None):
        """x (B, C, H, W), timesteps t (B,), classes y (B,) -> (B, out_channels, H, W).

        drop (B,) bool marks images whose class is replaced by the null class; if None, training picks them at random.
        """
        c = self.t_embedder(t) + self.y_embedder(y, drop)                  # (B, 4 D)
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)         # (B, N, D), N = H W
        x = self.patch_embed["norm"](x) + self.positions()
        skips = []
        for stage in self.layers:
            x = self.run_stage(stage, x, c)
            skips.append(x)
            x = stage.downsample(x, stage.grid_size) if stage.downsample else x        # (B, N / 4, 2 D)
        x = x + self.run_stage(self.mid_layer, x, c)
        for stage in self.layers_up:
            x = stage.upsample(x, stage.grid_size) if stage.upsample else x
            x = self.run_stage(stage, x + skips.pop(), c)
        shift, scale = self.final_adaLN_modulation(self.final_condition_projection(c)).chunk(2, dim=1)
        x = self.final_linear(modulate(self.final_up(x, self.input_size), shift, scale))       # (B, N, C)
        return x.transpose(1, 2).unflatten(2, self.input_size)             # (B, C, H, W)

    def run_stage(self, stage, x, c):
        for block in stage.blocks:
            x = self.run(block, x, c)
        return x


def drop_public_buffers(model, weights, *_):
    """Removes from a state dict the buffers of public files that are not weights: masks and indices of windows."""
    for name in [name for name in weights if name.endswith((".attn_mask", ".relative_position_index"))]:
        del weights[name]
