"""Networks to train: each maps x (B, C, H, W), timesteps t (B,) and classes y (B,) to (B, out_channels, H, W)."""

import torch
from timm.models.vision_transformer import PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint

from backbones.pretrained import Pretrained


class Backbone(nn.Module, Pretrained):
    """The base of all networks. Class num_classes is the null class; the first trained_classes (by default all) are those with
    training images, from which samplers draw; class_names is a list of their names, or None.

    Besides its size the constructor takes input_size, in_channels, num_classes, learn_sigma and mixer, which all but DiT refuse
    (`refuse_mixer`). A backbone has in_channels, out_channels, num_classes, input_size (height, width), stride, by which both
    sides must be divisible, and resize(input_size). Its forward(x, t, y, drop=None) replaces the classes marked in drop (B,)
    bool by the null class; if drop is None, it replaces random ones in training. If random_numbers is positive, forward takes
    that many more uniform numbers in [0, 1) per image in training, as chance (B, random_numbers), or draws them itself if
    chance is None. It also runs on the meta device, where operations are counted. The state dict holds floating-point numbers;
    other buffers are registered with persistent=False.

    A part of a network, or the network, may have adapted(weights, grid): from the weights of such a part on a grid of (h, w)
    tokens, a dict, it returns those that depend on the grid, as they are on its own grid.

    Three class methods need no instance. stride_of(keywords) returns the stride of a network with these arguments.
    read(weights) returns, from a state dict, the arguments that distinguish the named sizes, a dict, and another of mixer,
    mixer_options, num_classes, in_channels and learn_sigma. tokens_of(weights) returns the number of image tokens for which the
    weights have positions, or None if they fit any number. read_from names the weights that these methods need; no other
    backbone has the first of them. class_table names the weight with one row per class and one for the null class.
    """

    class_table = "y_embedder.embedding_table.weight"

    recompute = False
    random_numbers = 0
    class_names = None

    def __init__(self, in_channels, num_classes, learn_sigma):
        super().__init__()
        self.in_channels, self.learn_sigma = in_channels, learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes = self.trained_classes = num_classes

    @classmethod
    def tokens_of(cls, weights):
        return weights["pos_embed"].shape[1] if "pos_embed" in weights else None

    def checkpoint_gradients(self):
        """Makes training store only the inputs of each block, and recompute the rest when it needs gradients."""
        self.recompute = True

    def run(self, block, *inputs, **named):
        """Returns the result of a block, which training computes twice after `checkpoint_gradients`."""
        twice = self.recompute and self.training
        return checkpoint(block, *inputs, use_reentrant=False, **named) if twice else block(*inputs, **named)

    def forward_with_cfg(self, x, t, y, cfg_scale, channels=3):
        """Applies classifier-free guidance: y holds n classes and then n null classes, and only the first half of x is used.

        Guides the first `channels` channels, by default three, as for the public DiT samples; the others pass through.
        cfg_scale is a number, or one per image (n, 1, 1, 1). Returns (2 n, out_channels, H, W), the guided half twice.
        """
        n, channels = len(x) // 2, min(channels, self.in_channels)         # the channels after in_channels are variances
        out = self(x[:n].repeat(2, 1, 1, 1), t, y)                         # (2n, out_channels, H, W)
        cfg_scale = cfg_scale.to(out.dtype) if isinstance(cfg_scale, torch.Tensor) else cfg_scale
        guided = torch.lerp(out[n:, :channels], out[:n, :channels], cfg_scale)     # (n, channels, H, W)
        return torch.cat([guided.repeat(2, 1, 1, 1), out[:, channels:]], dim=1)

    def check_size(self, input_size):
        """Returns (height, width) from a side or a pair. ValueError unless both are divisible by the stride."""
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if height % self.stride or width % self.stride:
            raise ValueError(f"input size {height} x {width} is not divisible by {self.stride}, as this model needs")
        return height, width


class PatchBackbone(Backbone):
    """A backbone whose tokens are patches of patch_size x patch_size pixels on a grid of grid_size (h, w), built for
    trained_grid. `resize` keeps the weights and passes the new grid to the mixers that have one."""

    def __init__(self, input_size, patch_size, in_channels, num_classes, learn_sigma):
        super().__init__(in_channels, num_classes, learn_sigma)
        self.patch_size = self.stride = patch_size
        height, width = self.input_size = self.check_size(input_size)
        self.grid_size = self.trained_grid = (height // patch_size, width // patch_size)

    @classmethod
    def stride_of(cls, keywords):
        return keywords["patch_size"]

    def resize(self, input_size):
        """Adapts the model to inputs of another size, a side or (height, width), with the same weights, and returns it."""
        height, width = self.input_size = self.check_size(input_size)
        self.grid_size = (height // self.patch_size, width // self.patch_size)
        for layer in self.modules():
            if isinstance(layer, PatchEmbed):
                layer.set_input_size(self.input_size)
        for block in self.blocks:
            for mixer in (layer for layer in block.children() if hasattr(layer, "grid_size")):
                mixer.grid_size = self.grid_size
        return self


def settings_of(channels, outputs, table=None, **more):
    """Returns the settings that `read` gives besides a size, for a network with that many input and output channels, whose
    table of classes, if it has one, ends in a row for the null class."""
    classes = 0 if table is None else len(table) - 1
    settings = dict(mixer="attention", mixer_options={}, num_classes=classes, in_channels=channels)
    return settings | dict(learn_sigma=outputs != channels) | more


def count_blocks(weights, name):
    """Returns how many blocks the list of that name has in a state dict."""
    return len({key.removeprefix(f"{name}.").partition(".")[0] for key in weights if key.startswith(f"{name}.")})


def drop_labels(y, drop, null, probability):
    """Returns classes y (B,), those marked in drop (B,) bool, or random ones if it is None, replaced by the null class."""
    if drop is None and probability > 0:
        drop = torch.rand(len(y), device=y.device) < probability
    return y if drop is None else y.masked_fill(drop, null)


def refuse_mixer(mixer, name):
    """Raises a ValueError for any --mixer but the default; `name` is the network's, which has a mixer of its own."""
    if mixer != "attention":
        raise ValueError(f"{name} has no mixer to swap, so mixer={mixer!r} means nothing to it")
