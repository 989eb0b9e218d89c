"""What the benchmarks compare: whole models and layers that differ in the mixer alone, and what is done with them."""

import torch
from timm.models.vision_transformer import Attention
from torch import nn

from mixers import build_mixer
from models import DiT


class NaiveAttention(Attention):
    """timm's attention with the matrix of all pairs of tokens in memory, as the paper timed it."""

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


def build_model(args, mixer, timms_blocks=False, **options):
    """A DiT on args.device; with timms_blocks its blocks are PlainBlocks."""
    torch.manual_seed(0)
    with args.device:
        model = DiT(mixer=mixer, **options)
    if timms_blocks:
        model.blocks = nn.ModuleList(PlainBlock(block) for block in model.blocks)
    return compiled(fill_zeros(model), args)


def count_parameters(**options):
    """Those of the model with attention and with a PDE per channel."""
    with torch.device("meta"):
        models = {side: DiT(mixer=side, **options) for side in ("attention", "pdessm")}
    return {side: sum(p.numel() for p in model.parameters()) for side, model in models.items()}


def fill_zeros(model):
    """Random values where initialisation has zeros: some processors are faster on zeros, and nobody uses them."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def compiled(module, args):
    if args.compile:
        module.forward = torch.compile(module.forward, mode=args.compile, dynamic=False)
    return module


def precision(args):
    """float32 on CPUs, bfloat16 autocast on GPUs."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.device.type == "cuda")


def random_batch(model, batch, args):
    """Images, timesteps and classes."""
    x = torch.randn(batch, model.in_channels, *model.input_size, device=args.device)
    t, y = (torch.randint(n, (batch,), device=args.device) for n in (1000, model.num_classes))
    return x, t, y


def forward_pass(args, batch, **options):
    """The forward pass of a DiT for evaluation, ready to be timed."""
    model = build_model(args, **options).eval()
    inputs = random_batch(model, batch, args)

    @torch.no_grad()
    def run():
        with precision(args):
            model(*inputs)

    return run


def training_step(args, batch, **options):
    """Forward, backward and AdamW on a DiT, ready to be timed. The optimiser is that of train.py."""
    model = build_model(args, **options).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=True)
    inputs = random_batch(model, batch, args)

    def run():
        with precision(args):
            loss = model(*inputs).float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run


def layer_pass(args, mixer, batch, dim, heads, grid, training, **options):
    """One mixer layer on the tokens of a grid: the forward pass for evaluation, or forward and backward."""
    torch.manual_seed(0)
    tokens = torch.randn(batch, grid[0] * grid[1], dim, device=args.device, requires_grad=training)
    with args.device:
        layer = fill_zeros(build_mixer(mixer, dim, heads, grid, **options)).train(training)
    layer = compiled(layer, args)
    inputs = [tokens, *layer.parameters()]
    gradient = torch.randn_like(tokens, dtype=torch.bfloat16 if args.device.type == "cuda" else tokens.dtype)

    def run():
        with precision(args), torch.set_grad_enabled(layer.training):
            out = layer(tokens)
        if layer.training:
            torch.autograd.grad(out, inputs, gradient)

    return run
