"""The fastest attention on a GPU, as PDE-SSM's opponent: for each shape, the fastest of PyTorch's kernels (flash, cuDNN,
memory-efficient) and FlashAttention-3's, where that is installed.
"""

import math
from functools import cache, partial

import torch
from timm.models.vision_transformer import Attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import noted, sample_ms, warm_up

chosen = {}  # {"4 x 6 x 256 x 64, forward": "flash"}


class FastestAttention(Attention):
    """timm's attention without its options, by the kernel that is fastest for the shape, type and pass at hand."""

    def forward(self, tokens):                                             # (B, N, D)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        kernel = kernels()[fastest(q.shape, q.dtype, q.device, torch.is_grad_enabled())]
        return self.proj(kernel(q, k, v).transpose(1, 2).flatten(2))


@cache
def kernels():
    """Returns the kernels that there may be, by name: functions of q, k and v (B, heads, N, d)."""
    found = {"default": scaled_dot_product_attention}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        found[backend.name.removesuffix("_ATTENTION").lower()] = partial(by_backend, backend)
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return found
    return found | {"flash-attention-3": partial(by_third, flash_attn_func)}


def by_backend(backend, q, k, v):
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def by_third(flash_attn_func, q, k, v):
    """FlashAttention-3 has tokens before heads, and returns more than the state in some versions."""
    state = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (state[0] if isinstance(state, tuple) else state).transpose(1, 2)


@cache
def fastest(shape, dtype, device, training):
    """Times the kernels on random numbers of a shape, and returns the name of the fastest of those that take it."""
    times, failed = {}, {}
    for name, kernel in kernels().items():
        with noted(name, failed):  # one that does not take the type or the head's size, or does not fit
            call = attend(kernel, shape, dtype, device, training)
            warm_up(call, device)
            times[name] = min(sample_ms(call, 3, device) for _ in range(5))
    times = dict.fromkeys(failed, math.inf) | times
    best = min(times, key=times.get)
    chosen[f"{' x '.join(map(str, shape))}, {'both passes' if training else 'forward'}"] = best
    return best


def attend(kernel, shape, dtype, device, training):
    """Returns a function that attends: forward, or with `training` forward and backward."""
    q, k, v, gradient = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    if not training:
        return torch.no_grad()(partial(kernel, q, k, v))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(kernel(*inputs), inputs, gradient)
