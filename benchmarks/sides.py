"""The sides that benchmarks compare: whole models and layers that differ in the mixer alone, ready to be timed."""

import torch
from timm.models.vision_transformer import Attention
from torch import nn

from benchmarks.attention import FastestAttention
from mixers import build_mixer
from models import SIZES, DiT


class NaiveAttention(Attention):
    """timm's attention with the matrix of all pairs of tokens in memory."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fused_attn = False


class Floor(nn.Module):
    """The least that a diagonal PDE-SSM can cost: R, and one read and one write of its result, in backward too."""

    def __init__(self, dim, num_heads=8, qkv_bias=False):
        super().__init__()
        self.R = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens):                                             # (B, N, D)
        return ReadAndWrite.apply(self.R(tokens))


class ReadAndWrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


class PlainBlock(nn.Module):
    """A DiT block in PyTorch's and timm's ready parts, one operation after the other, with the weights of ours."""

    def __init__(self, block):
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = block.attn, block.mlp, block.adaLN_modulation
        self.norm = nn.LayerNorm(self.attn.qkv.in_features, elementwise_affine=False, eps=1e-6)

    def forward(self, x, c):                                               # (B, N, D), (B, D)
        m = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + m[2] * self.attn(self.norm(x) * (1 + m[1]) + m[0])
        return x + m[5] * self.mlp(self.norm(x) * (1 + m[4]) + m[3])


# pdessm is the diagonal coupling, a PDE per channel.
SIDES = {"attention": "attention", "naive": NaiveAttention, "pdessm": "pdessm", "floor": Floor}


def build_model(device, compile=None, timms_blocks=False, build=DiT, **options):
    """Builds a DiT, or what `build` makes of the options, on a device; with timms_blocks its blocks are PlainBlocks. compile:
    a mode of torch.compile, or None."""
    torch.manual_seed(0)
    if "mixer" in options and not timms_blocks:
        options["mixer"] = at_its_best(options["mixer"], device, compile)
    with device:
        model = build(**options)
    if timms_blocks:
        model.blocks = nn.ModuleList(PlainBlock(block) for block in model.blocks)
    return compiled(fill_zeros(model), compile)


def of_size(size, side, patch=2):
    """Returns the options of build_model for a DiT of a size in SIZES, on inputs of that side."""
    hidden, depth, heads = SIZES[size]
    return dict(input_size=side, patch_size=patch, hidden_size=hidden, depth=depth, num_heads=heads)


def at_its_best(mixer, device, compile):
    """Returns the mixer; for attention on a GPU the fastest kernel's, unless it is compiled: compilers choose."""
    return FastestAttention if mixer == "attention" and device.type == "cuda" and not compile else mixer


def count_parameters(**options):
    """Counts the parameters of a DiT with attention and with a PDE per channel."""
    with torch.device("meta"):
        models = {side: DiT(mixer=side, **options) for side in ("attention", "pdessm")}
    return {side: sum(p.numel() for p in model.parameters()) for side, model in models.items()}


def fill_zeros(model):
    """Replaces the zeros of initialisation by random values, since some processors are faster on zeros."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def compiled(module, mode):
    if mode:
        module.forward = torch.compile(module.forward, mode=mode, dynamic=False)
    return module


def precision(device):
    """Returns the context of a pass: float32 on CPUs, bfloat16 autocast on GPUs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def random_batch(model, batch, device):
    """Draws images, timesteps and classes; without classes all are the null class."""
    x = torch.randn(batch, model.in_channels, *model.input_size, device=device)
    t, y = (torch.randint(n, (batch,), device=device) for n in (1000, max(1, model.num_classes)))
    return x, t, y


def forward_pass(device, batch, **options):
    """Returns a function that runs the forward pass of a DiT for evaluation. options: those of build_model."""
    model = build_model(device, **options).eval()
    inputs = random_batch(model, batch, device)

    @torch.no_grad()
    def run():
        with precision(device):
            model(*inputs)

    return run


def training_step(device, batch, **options):
    """Returns a function that runs forward, backward and AdamW, as train.py has it. options: those of build_model."""
    model = build_model(device, **options).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=True)
    inputs = random_batch(model, batch, device)

    def run():
        with precision(device):
            loss = model(*inputs).float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run


def layer_pass(device, mixer, batch, dim, heads, grid, training, compile=None, **options):
    """Returns a function that runs one mixer layer on the tokens of a grid: the forward pass for evaluation, or with
    `training` forward and backward. options: those of the mixer."""
    torch.manual_seed(0)
    tokens = torch.randn(batch, grid[0] * grid[1], dim, device=device, requires_grad=training)
    mixer = at_its_best(mixer, device, compile)
    with device:
        layer = fill_zeros(build_mixer(mixer, dim, heads, grid, 0, **options)).train(training)
    layer = compiled(layer, compile)
    inputs = [tokens, *layer.parameters()]
    gradient = torch.randn_like(tokens, dtype=torch.bfloat16 if device.type == "cuda" else tokens.dtype)

    def run():
        with precision(device), torch.set_grad_enabled(layer.training):
            out = layer(tokens)
        if layer.training:
            torch.autograd.grad(out, inputs, gradient)

    return run
