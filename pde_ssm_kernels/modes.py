"""Detects tracers and transforms that observe tensors, and decides in which types the operator computes."""

from contextlib import nullcontext
from functools import lru_cache, wraps

import torch
from torch import nn
from torch.autograd import forward_ad


def traced(*tensors):
    """Returns whether anything observes each operator: torch.compile, vmap and other torch.func transforms, forward-mode
    differentiation, a dispatch mode (as flop counters use), or tensors of another class (fake, distributed)."""
    return observed() or any(type(x) not in (torch.Tensor, nn.Parameter) for x in tensors) or has_tangents(*tensors)


def observed():
    """Returns whether anything observes each operator, whatever the tensors are: `traced` without its checks of tensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed() or torch._C._len_torch_dispatch_stack()


def transformed():
    """Returns whether a torch.func transform is active, also under a compiler: our operators have no rules for it."""
    return torch._C._are_functorch_transforms_active()


def has_tangents(*tensors):
    """Returns whether one of the tensors, which may be None, carries a forward-mode tangent."""
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def runs_alone(layer, kind):
    """Returns whether a call of a layer runs the forward pass of its class, kind, and nothing else: it has no hooks, and is no
    adapter around such a layer."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    own = type(layer).forward is kind.forward and "forward" not in vars(layer)
    return own and not any(hooks) and not nn.modules.module._has_any_global_hook()


def needs_operations(*gradients):
    """Returns whether a backward pass must take PyTorch's operations, because our kernels have no rules for these gradients:
    they are to be differentiated again, batched (is_grads_batched), of a torch.func transform, or carry tangents."""
    batched = map(torch._C._functorch.is_legacy_batchedtensor, gradients)
    return torch.is_grad_enabled() or transformed() or any(batched) or has_tangents(*gradients)


def differentiable(plainly, inputs, gradients, needed):
    """Returns the gradients of plainly(*inputs) that are needed, None for others. They use PyTorch's operations, so they serve
    where `needs_operations`. gradients: those of its result, one tensor or a tuple of several."""
    again = torch.is_grad_enabled()

    def of_wanted(*wanted):
        given = iter(wanted)
        return plainly(*(next(given) if is_needed else x for x, is_needed in zip(inputs, needed)))

    with torch.enable_grad(), full_precision(inputs[0]):                   # backward() may be called under autocast
        wanted = [x for x, is_needed in zip(inputs, needed) if is_needed]
        if transformed():                                                  # for which requires_grad_ is an error
            found = iter(torch.func.vjp(of_wanted, *wanted)[1](gradients))
        else:
            # Separate tensors, since two inputs may be one tensor, or one be computed from another.
            wanted = [x.view_as(x) if again else x.detach().requires_grad_() for x in wanted]
            found = iter(torch.autograd.grad(of_wanted(*wanted), wanted, gradients, create_graph=again))
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
