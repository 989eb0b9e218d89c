"""The convolutional U-Net as a baseline: diffusers' UNet2DModel with the interface of DiT."""

import re
from functools import partial

from . import Backbone, drop_labels, refuse_mixer, settings_of


class UNet(Backbone):
    """channels has one entry per resolution, each half of the one before, with `layers` residual blocks; those numbered
    in attention_levels have self-attention. Other arguments are DiT's; ValueError for any mixer but attention."""

    class_table = "net.class_embedding.weight"
    read_from = ("net.conv_in.weight", "net.conv_out.weight", "net.class_embedding.weight")

    def __init__(
        self, input_size=32, in_channels=4, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True, mixer="attention",
        *, channels, layers, attention_levels,
    ):  # fmt: skip
        from diffusers import UNet2DModel

        super().__init__(in_channels, num_classes, learn_sigma)
        refuse_mixer(mixer, "a U-Net")
        self.class_dropout_prob = class_dropout_prob
        self.stride = self.stride_of(dict(channels=channels))
        self.resize(input_size)
        kinds = ["Attn" if level in attention_levels else "" for level in range(len(channels))]
        self.net = UNet2DModel(
            in_channels=in_channels,
            out_channels=self.out_channels,
            block_out_channels=channels,
            layers_per_block=layers,
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            attention_head_dim=32,
            num_class_embeds=num_classes + 1,
        )

    @classmethod
    def stride_of(cls, keywords):
        return 2 ** (len(keywords["channels"]) - 1)

    @classmethod
    def read(cls, weights):
        ends = re.compile(r"net\.down_blocks\.\d+\.resnets\.0\.conv2\.weight")
        channels = weights["net.conv_in.weight"].shape[1]
        size = dict(channels=tuple(len(w) for name, w in weights.items() if ends.fullmatch(name)))
        return size, settings_of(channels, len(weights["net.conv_out.weight"]), weights["net.class_embedding.weight"])

    def resize(self, input_size):
        """Sets the input size, a side or (height, width), and returns the model: a convolutional network runs at any size."""
        self.input_size = self.check_size(input_size)
        return self

    def checkpoint_gradients(self):
        super().checkpoint_gradients()
        for block in (*self.net.down_blocks, self.net.mid_block, *self.net.up_blocks):
            for layer in (*block.resnets, *getattr(block, "attentions", ())):  # diffusers' own checkpoints leave attention out
                layer.forward = partial(self.run, layer.forward)

    def forward(self, x, t, y, drop=None):                                 # (B, C, H, W), (B,), (B,), (B,) bool or None
        y = drop_labels(y, drop, self.num_classes, self.class_dropout_prob * self.training)
        return self.net(x, t, y).sample                                    # (B, out_channels, H, W)
