"""DiS (Fei et al., arXiv 2402.05608): U-ViT with Vim, whose two directions are added up, in place of attention and MLP."""

from functools import partial

import torch
from torch import nn
from torch.nn.functional import layer_norm

from backbones.parts import LabelEmbedder, modulate, timestep_waves, unpatch
from backbones.skips import LongSkips
from mixers.mamba import Mamba


class Block(nn.Module):
    """Adds the previous block's output, merged with any skip, to the stream; returns (Vim of the normalised stream, stream)."""

    def __init__(self, hidden_size, skip):
        super().__init__()
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None
        self.norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.mixer = Mamba(hidden_size, bidirectional=True, summed=True)

    def forward(self, hidden, stream, skip, scale):                         # (B, L, D) three times, (B, 1, 1) or None
        if skip is not None:
            hidden = self.skip_linear(torch.cat([hidden, skip], dim=2))
        stream = stream + (hidden if scale is None else scale * hidden)
        return self.mixer(self.norm(stream)), stream


class FinalLayer(nn.Module):
    """Maps tokens (B, L, D) to the pixels of their patches, modulated by timestep and class if there are classes."""

    def __init__(self, hidden_size, outputs, conditioned):
        super().__init__()
        self.linear = nn.Linear(hidden_size, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size)) if conditioned else None

    def forward(self, x, c):                                               # (B, L, D), (B, D) or None
        if c is None:
            return self.linear(layer_norm(x, x.shape[-1:], eps=1e-6))
        return self.linear(modulate(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


class DiS(LongSkips):
    """DiS on images or latents: depth/2 blocks, one, and depth/2 with skips. Names and shapes are those of its public code.

    Arguments are DiT's, except that the mixer is its own: ValueError for another. num_classes=0 leaves out classes, the class
    token and the modulation in the final layer.

    In training, a block's input is dropped from the stream with a probability rising from 0 to 0.1, and is otherwise divided by
    the probability of being kept (stochastic depth), by random numbers per image: see random_numbers.
    """

    class_table = "label_emb.embedding_table.weight"
    read_from = (
        "in_blocks.0.mixer.A_log", "patch_embed.proj.weight", "pos_embed", "time_embed.0.weight", "final_layer.linear.bias"
    )  # fmt: skip

    def __init__(
        self, input_size=32, patch_size=2, in_channels=4, hidden_size=368, depth=24, num_classes=1000, learn_sigma=True,
        class_dropout_prob=0.1, mixer="attention",
    ):  # fmt: skip
        build = partial(Block, hidden_size)
        super().__init__(build, input_size, patch_size, in_channels, hidden_size, depth, num_classes, learn_sigma, mixer)
        self.time_embed = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.SiLU(), nn.Linear(4 * hidden_size, hidden_size)
        )  # fmt: skip
        self.label_emb = LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None
        self.norm_f = nn.RMSNorm(hidden_size, eps=1e-5)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, bool(num_classes))
        rates = torch.cat([torch.zeros(1), torch.linspace(0, 0.1, depth), torch.full((1,), 0.1)])
        self.register_buffer("drop_rates", rates, persistent=False)        # of the blocks' inputs, and of the last one's output
        self.random_numbers = len(rates)
        self.initialize(depth)

    @torch.no_grad()
    def initialize(self, depth):
        """Zeroes biases of linear layers, except the first direction's time steps, and divides out_proj by sqrt(depth)."""
        steps = {block.mixer.dt_proj for block in self.blocks}
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear) and m not in steps and m.bias is not None):
            nn.init.zeros_(layer.bias)
        for block in self.blocks:
            block.mixer.out_proj.weight /= depth**0.5

    @classmethod
    def read(cls, weights):
        return cls.read_settings(weights, "final_layer.linear.bias")

    def forward(self, x, t, y, drop=None, chance=None):
        """x (B, C, H, W), timesteps t (B,), classes y (B,) -> (B, out_channels, H, W).

        drop (B,) bool marks images whose class is dropped. chance (B, random_numbers), in [0, 1): where it is below a block's
        rate, the block's input is dropped. Training draws both itself where they are None.
        """
        time = self.time_embed(timestep_waves(t, self.norm_f.weight.numel()).to(self.norm_f.weight.dtype))     # (B, D)
        label = self.label_emb(y, drop) if self.num_classes else None
        hidden = self.tokens(x, *([time] if label is None else [label, time]))                                 # (B, L, D)
        stream, skips, half = torch.zeros_like(hidden), [], len(self.in_blocks)
        scales = self.depth_scales(len(x), chance) if self.training else [None] * self.random_numbers
        for number, block in enumerate(self.blocks):
            skip = skips.pop() if number > half else None
            hidden, stream = self.run(block, hidden, stream, skip, scales[number])
            skips += [hidden] if number < half else []
        x = self.norm_f(stream + (hidden if scales[-1] is None else scales[-1] * hidden))
        x = self.final_layer(x, None if label is None else time + label)
        return unpatch(x[:, self.extras :], self.grid_size, self.patch_size)

    def depth_scales(self, images, chance):
        """Returns the factor of each block's input, 0 or at least 1: (blocks + 1, B, 1, 1)."""
        if chance is None:
            chance = torch.rand(images, self.random_numbers, device=self.drop_rates.device)
        return ((chance >= self.drop_rates) / (1 - self.drop_rates)).T[:, :, None, None]
