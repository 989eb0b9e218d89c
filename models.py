"""DiT, the diffusion transformer, with a choice of how tokens mix: mixer="attention" is DiT itself.

Names, shapes, state-dict keys and initial values are those of the public DiT checkpoints."""

from argparse import ArgumentTypeError
from functools import partial

import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import Mlp, PatchEmbed
from torch import nn

from backbones import PatchBackbone, count_blocks, settings_of
from backbones.dis import DiS
from backbones.lamamba import LaMamba
from backbones.parts import NORMS, LabelEmbedder, TimestepEmbedder, grid_embedding, modulate, unpatch
from backbones.unet import UNet
from backbones.uvit import UViT
from backbones.zigma import ZigMa
from mixers import build_mixer, kind_of, mixer_options, read_mixer
from mixers.pde import read_hybrid


def gelu_mlp(dim, hidden):
    """Returns DiT's own MLP, W2 gelu(W1 x)."""
    return Mlp(dim, hidden, act_layer=partial(nn.GELU, approximate="tanh"))


def swiglu_mlp(dim, hidden):
    """Returns W3 (silu(W1 x) * W2 x), with as many weights as an MLP with that many hidden channels (Shazeer, 2020)."""
    return SwiGLU(dim, 2 * hidden // 3)


MLPS = {"gelu": gelu_mlp, "swiglu": swiglu_mlp}


class DiTBlock(nn.Module):
    """Mixing of tokens, then an MLP on each, both modulated and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, mixer, hidden_size, mlp_ratio, mlp="gelu", norm="layer"):
        super().__init__()
        self.attn = mixer
        self.conditioned_mixer = getattr(mixer, "conditioned", False)
        self.mlp, self.norm = MLPS[mlp](hidden_size, int(mlp_ratio * hidden_size)), NORMS[norm]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):                                               # (B, N, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        mixed = self.attn(modulate(x, shift1, scale1, self.norm), *([c] if self.conditioned_mixer else []))
        x = torch.addcmul(x, gate1[:, None], mixed)
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(x, shift2, scale2, self.norm)))


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches: (B, N, D) -> (B, N, patch_size^2 out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels, norm="layer"):
        super().__init__()
        self.norm = NORMS[norm]
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):                                               # (B, N, D), (B, D)
        return self.linear(modulate(x, *self.adaLN_modulation(c).chunk(2, dim=1), self.norm))


class DiT(PatchBackbone):
    """A diffusion transformer on images or latents.

    input_size is a side or (height, width), divisible by patch_size. mixer is a name in mixers.MIXERS or a class;
    further keyword arguments are options of that mixer. learn_sigma doubles the output channels. mlp is one of MLPS, norm one
    of NORMS, time_intervals an argument of `timestep_frequencies`. Mixers that are `rotary` know places, so that none are added
    to their tokens. ValueError for sizes that do not fit and for unknown mixers or options.
    """

    read_from = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed", "final_layer.linear.bias")

    # fmt: off
    def __init__(
        self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
        class_dropout_prob=0.1, num_classes=1000, learn_sigma=True, mixer="attention", mlp="gelu", norm="layer",
        time_intervals=None, **mixer_options,
    ):
        # fmt: on
        super().__init__(input_size, patch_size, in_channels, num_classes, learn_sigma)
        self.num_heads = num_heads
        self.x_embedder = PatchEmbed(self.input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, intervals=time_intervals)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        mixers = [build_mixer(mixer, hidden_size, num_heads, self.grid_size, i, **mixer_options) for i in range(depth)]
        self.rotary = any(getattr(mixer, "rotary", False) for mixer in mixers)
        self.pos_embed = nn.Parameter(self.positions(hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(m, hidden_size, mlp_ratio, mlp, norm) for m in mixers)
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, norm)
        self._initialize()

    @classmethod
    def read(cls, weights):
        hidden, channels, *_, patch = weights["x_embedder.proj.weight"].shape
        first = "blocks.0.attn."
        mixer, options = read_mixer({name.removeprefix(first): w for name, w in weights.items() if name.startswith(first)})
        if mixer == "attention" and not (weights["pos_embed"].is_meta or weights["pos_embed"].any()):
            options["positions"] = "rope"
        if mixer == "pdessm":
            options |= read_hybrid(weights, first)
        mlp = "swiglu" if "blocks.0.mlp.fc1_g.weight" in weights else "gelu"
        outputs, table = len(weights["final_layer.linear.bias"]) // patch**2, weights["y_embedder.embedding_table.weight"]
        size = dict(hidden_size=hidden, depth=count_blocks(weights, "blocks"), patch_size=patch)
        return size, settings_of(channels, outputs, table, mixer=mixer, mixer_options=options, mlp=mlp)

    def positions(self, hidden_size):
        """Returns the position embedding of the current grid's tokens, (1, h w, D); zeros if the mixers are rotary."""
        added = grid_embedding(*self.grid_size, hidden_size, self.trained_grid)
        return torch.zeros_like(added) if self.rotary else added

    def _initialize(self):
        """Initialises layers by Xavier's rule, and the modulation, gate and final layers with zero, so that every block starts
        as the identity. A mixer whose layers must start differently has a method `initialize`, which sets them again."""
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.flatten(1))
        nn.init.zeros_(patches.bias)
        for layer in filter(lambda m: isinstance(m, nn.Linear), self.blocks.modules()):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for block in self.blocks:
            if hasattr(block.attn, "initialize"):
                block.attn.initialize()
        for last in [b.adaLN_modulation[1] for b in (*self.blocks, self.final_layer)] + [self.final_layer.linear]:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def resize(self, input_size):
        """Adapts the model to inputs of another size, a side or (height, width), with the same weights, and returns it.

        Only the positional embedding changes: it is computed for the new grid, whose tokens lie between those of the
        grid that the model was built for. Every mixer runs on any grid.
        """
        super().resize(input_size)
        self.pos_embed = nn.Parameter(self.positions(self.pos_embed.shape[2]).to(self.pos_embed), requires_grad=False)
        return self

    def forward(self, x, t, y, drop=None):
        """x (B, C, H, W), timesteps t (B,), classes y (B,) -> (B, out_channels, H, W).

        drop (B,) bool marks images whose class is replaced by the null class; if None, training picks them at random.
        """
        c = self.t_embedder(t) + self.y_embedder(y, drop)                  # (B, D)
        # Made contiguous because the convolution may return channels first, which every block would read with large strides.
        x = (self.x_embedder(x) + self.pos_embed).contiguous()             # (B, N, D), N = h w
        for block in self.blocks:
            x = self.run(block, x, c)
        x = self.final_layer(x, c)                                         # (B, N, p p C)
        return unpatch(x, self.grid_size, self.patch_size)                 # (B, C, H, W)


# name: hidden_size, depth, num_heads
SIZES = {
    "XL": (1152, 28, 16),
    "L": (1024, 24, 16),
    "B": (768, 12, 12),
    "M": (512, 12, 8),  # the PDE-SSM paper's size for churches and flowers; DiT has no such size
    "S": (384, 12, 6),
    "Ti": (192, 12, 3),
    "N": (96, 6, 3),
    "N64": (64, 6, 2),  # N at other widths, to measure how the loss scales with size
    "N128": (128, 6, 4),
    "N192": (192, 6, 6),
}
DiT_models = {
    f"DiT-{size}/{patch}": partial(DiT, patch_size=patch, hidden_size=hidden, depth=depth, num_heads=heads)
    for size, (hidden, depth, heads) in SIZES.items()
    for patch in (1, 2, 4, 8, 16)
}
UNets = {
    "UNet-S": partial(UNet, channels=(128, 192, 256, 256), layers=2, attention_levels=(1, 2)),
    "UNet-N": partial(UNet, channels=(32, 64, 96), layers=1, attention_levels=(1,)),
}
# The last is ours, for CPUs.
LaMamba_models = {
    "LaMamba-XL": partial(LaMamba, hidden_size=320, depths=(2, 2, 2, 2), middle_depth=2, num_heads=(16, 16, 16, 16), window=8),
    "LaMamba-B": partial(LaMamba, hidden_size=192, depths=(2, 2, 2, 0), middle_depth=1, num_heads=(8, 8, 8, 8), window=8),
    "LaMamba-S": partial(LaMamba, hidden_size=96, depths=(2, 2, 2, 0), middle_depth=1, num_heads=(8, 8, 8, 8), window=8),
    "LaMamba-N": partial(LaMamba, hidden_size=20, depths=(1, 1, 1, 0), middle_depth=1, num_heads=(4, 4, 4, 4), window=4),
}
LaMamba_models |= {  # of the paper's Table 3
    f"LaMamba-{size}-{attention}": partial(LaMamba, **LaMamba_models[f"LaMamba-{size}"].keywords, attention=attention)
    for size in "SN"
    for attention in ("none", "unshifted", "global")
}
# name: hidden_size, depth; the last of each is ours, for CPUs
MAMBA_SIZES = {"H": (1536, 48), "L": (1024, 48), "M": (768, 48), "B": (768, 24), "S": (368, 24), "N": (96, 8)}
DiS_models, ZigMa_models = (
    {
        f"{build.__name__}-{size}/{patch}": partial(build, patch_size=patch, hidden_size=hidden, depth=depth)
        for size, (hidden, depth) in MAMBA_SIZES.items()
        for patch in patches
    }
    for build, patches in ((DiS, (2, 4, 8)), (ZigMa, (1, 2, 4, 8)))
)
UViT_SIZES = {"H": (1152, 28, 16), "L": (1024, 20, 16), "M": (768, 16, 12), "S": (512, 12, 8), "N": (96, 6, 3)}
UViT_models = {
    f"U-ViT-{size}/{patch}": partial(UViT, patch_size=patch, hidden_size=hidden, depth=depth, num_heads=heads, conv=size != "H")
    for size, (hidden, depth, heads) in UViT_SIZES.items()
    for patch in (2, 4, 8)
}
FAMILIES = (DiT_models, UNets, LaMamba_models, DiS_models, UViT_models, ZigMa_models)
MODELS = {name: build for family in FAMILIES for name, build in family.items()}


def families():
    """Returns the names in MODELS, abbreviated by family, as in DiT-{XL,L}/{1,2}."""
    together = []
    for names in FAMILIES:
        sizes, patches = (dict.fromkeys(name.partition("/")[i] for name in names) for i in (0, 2))
        family = next(iter(sizes)).rpartition("-")[0] + "-"
        sizes = ",".join(size.removeprefix(family) for size in sizes)
        together.append(f"{family}{{{sizes}}}" + ("" if "" in patches else f"/{{{','.join(patches)}}}"))
    return ", ".join(together)


def model_name(text):
    """Returns a name in MODELS, as an argparse type; argparse's own `choices` would list all names in the error."""
    if text not in MODELS:
        raise ArgumentTypeError(f"{text} is no model; they are {families()}")
    return text


BACKBONES = tuple(dict.fromkeys(build.func for build in (ZigMa_models | MODELS).values()))  # ZigMa first: it has DiT's names


def backbone_of(weights):
    """Returns the class in BACKBONES whose weights these are, or None."""
    return next((backbone for backbone in BACKBONES if backbone.read_from[0] in weights), None)


def stride(name):
    """Returns the number by which both sides of the named model's input must be divisible."""
    return MODELS[name].func.stride_of(MODELS[name].keywords)


def add_network_flags(add):
    """Adds the flags for a network's parts other than its mixer: `add` is add_argument of a command's parser."""
    add("--mlp", choices=MLPS, help="of DiT; swiglu is gated, with as many parameters; gelu unless given")
    add("--norm", choices=NORMS, help="of DiT: by the deviation of channels, or their root mean square; layer unless given")


def network_options(model, mixer, settings):
    """Returns the options of the named network and of its mixer that `settings`, a dict of a command's flags, sets. ValueError
    for options of other networks or mixers."""
    given, options = {name: settings[name] for name in ("mlp", "norm") if settings.get(name)}, mixer_options(mixer, settings)
    if MODELS[model].func is DiT:
        return given | options
    if given or options:
        flags = [f"--{name}" for name in given] + [kind_of(mixer).flag_of(name) for name in options]
        raise ValueError(f"{', '.join(flags)} means nothing to --model {model}")
    return {}
