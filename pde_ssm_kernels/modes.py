"""Detects tracers and transforms that observe tensors, and decides in which types the operator computes."""

from contextlib import nullcontext
from functools import lru_cache, wraps

import torch
from torch import nn
from torch.autograd import forward_ad


def traced(*tensors):
    """Returns whether anything observes each operator: torch.compile, vmap and other torch.func transforms, forward-mode
    differentiation, a dispatch mode (as flop counters use), or tensors of another class (fake, distributed)."""
    if observed() or any(type(x) not in (torch.Tensor, nn.Parameter) for x in tensors):
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def observed():
    """Returns whether anything observes each operator, whatever the tensors are: `traced` without its checks of tensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed() or torch._C._len_torch_dispatch_stack()


def transformed():
    """Returns whether a torch.func transform is active, also under a compiler: our operators have no rules for it."""
    return torch._C._are_functorch_transforms_active()


def batched(gradient):
    """Returns whether a gradient is batched (is_grads_batched), for which kernels have no rules."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def differentiable(plainly, inputs, gradients, needed):
    """Returns the gradients of plainly(*inputs) that are needed, None for others. They use PyTorch's operations, so they can be
    differentiated again or batched. gradients: those of its result, one tensor or several."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), full_precision(inputs[0]):                   # backward() may be called under autocast
        # Separate tensors, since two inputs may be one tensor, or one be computed from another.
        inputs = [x if x is None else x.view_as(x) if again else x.detach().requires_grad_() for x in inputs]
        wanted = [x for x, is_needed in zip(inputs, needed) if is_needed]
        found = iter(torch.autograd.grad(plainly(*inputs), wanted, gradients, create_graph=again))
    return tuple(next(found) if is_needed else None for is_needed in needed)


def cached_per_device(compute):
    """Decorates compute(..., device), which makes tensors from plain values, so that it takes a tensor in place of its device
    and returns the cached result for these values; where anything observes each operator, it computes them again."""

    @lru_cache(maxsize=64)
    def remember(*values):
        with torch.inference_mode(False):                                  # cached tensors outlive their first caller's mode
            return compute(*values)

    @wraps(compute)
    def look_up(*values):
        *values, like = values
        return (compute if traced(like) else remember)(*values, like.device)

    return look_up


def full_precision(x):
    """Returns a context without autocast on the device of x; the meta device has no autocast."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def widen(x):
    """Returns x in float32, or unchanged where its type is wider."""
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))
