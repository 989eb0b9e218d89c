"""Networks to train: each maps x (B, C, H, W), timesteps t (B,) and classes y (B,) to (B, out_channels, H, W)."""

import torch
from torch import nn

from backbones.pretrained import Pretrained


class Backbone(nn.Module, Pretrained):
    """What they share. Class num_classes is the null class; the first trained_classes, all unless set otherwise, are those of
    which there were images, and which samplers draw; class_names is a list of their names, or None.

    A backbone has in_channels, out_channels, num_classes, input_size (height, width), stride, by which both sides must be
    divisible, and resize(input_size); its forward(x, t, y, drop=None) replaces the classes that drop (B,) bool says by the
    null class, or leaves it to chance in training. A positive random_numbers says that training takes so many more numbers of
    every image, uniform in [0, 1), which forward then takes as chance (B, random_numbers), or draws without.

    Three class methods speak of networks that are not built: stride_of(keywords) is the stride of one with these arguments,
    read(weights) tells from a state dict what it was built with, a dict of the arguments that tell the named sizes apart and
    one of mixer, mixer_options, num_classes, in_channels and learn_sigma, and tokens_of(weights) for how many tokens of an
    image there are positions, None for any number. read_from names the weights that they need; the first of them no other
    backbone has.
    """

    recompute = False
    random_numbers = 0
    class_names = None

    @classmethod
    def tokens_of(cls, weights):
        return weights["pos_embed"].shape[1] if "pos_embed" in weights else None

    def checkpoint_gradients(self):
        """From now on training keeps what enters a block only, and computes the rest again when it needs gradients."""
        self.recompute = True

    def forward_with_cfg(self, x, t, y, cfg_scale, channels=3):
        """Classifier-free guidance: y holds n classes and then n null classes, and only the first half of x counts.

        Guides the first three channels, as the public DiT samples were made, or so many; the rest passes through. cfg_scale
        is a number, or one for each image (n, 1, 1, 1).
        """
        n = len(x) // 2
        out = self(x[:n].repeat(2, 1, 1, 1), t, y)                         # (2n, out_channels, H, W)
        guided = torch.lerp(out[n:, :channels], out[:n, :channels], cfg_scale)     # (n, channels, H, W)
        return torch.cat([guided.repeat(2, 1, 1, 1), out[:, channels:]], dim=1)

    def check_size(self, input_size):
        """(height, width) of a side or a pair, if both are divisible by the stride; else ValueError."""
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if height % self.stride or width % self.stride:
            raise ValueError(f"input size {height} x {width} is not divisible by {self.stride}, as this model needs")
        return height, width


def drop_labels(y, drop, null, probability):
    """Classes y (B,) with those of drop (B,) bool, or if that is None some at random, replaced by the null class."""
    if drop is None and probability > 0:
        drop = torch.rand(len(y), device=y.device) < probability
    return y if drop is None else y.masked_fill(drop, null)


def refuse_mixer(mixer, name):
    """Raises a ValueError for any --mixer but the default, of a network by that name which brings its own."""
    if mixer != "attention":
        raise ValueError(f"{name} has no mixer to swap, so mixer={mixer!r} means nothing to it")
