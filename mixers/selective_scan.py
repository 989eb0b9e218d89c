"""The selective scan of Mamba (Gu and Dao, arXiv 2312.00752), with the input term that its public code has:

    delta = softplus(delta + bias)                               per channel and token
    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t               N states of each channel
    y_t = sum_n C_t h_t + D u_t,     out = y silu(z)

`selective_scan_reference` computes that, a token at a time. `selective_scan` gives the same numbers by one operator: in C++ on
CPUs (selective_scan_cpu.py), elsewhere in chunks of CHUNK tokens, time first: all exponentials of a chunk at once, then one
multiply-add per token, then one matrix product. Its hand-written gradient goes through the chunks in reverse and recomputes
their states, so that memory holds the states of every CHUNK-th token instead of all. Neither divides by products of
exponentials, which underflow where delta A is large. In chunks the scan takes 0.06 to 0.29 of the reference's time (768
channels, 64 to 1,024 tokens, 2 threads of an Intel Xeon: `python -m benchmarks.selective_scan --quick`). On CUDA, mamba_ssm's
kernel may be used (selective_scan_mamba.py). Under vmap and in forward-mode differentiation, for which operators have no rules,
the reference runs instead.
"""

from functools import partial, reduce

import torch
from torch.nn.functional import silu, softplus
from torch.utils.flop_counter import register_flop_formula

from mixers import selective_scan_cpu, selective_scan_mamba
from mixers.selective_scan_cpu import CHUNK
from pde_ssm_kernels.modes import differentiable, full_precision, has_tangents, needs_operations, traced, transformed


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, reverse=False
):  # fmt: skip
    """Returns out (B, E, L) in the type of u, and with return_last_state h_L (B, E, N) too; computed in float32 or wider.

    u, delta, z (B, E, L); A (E, N); B, C (B, N, L), or (B, G, N, L) for G equal groups of the E channels; D, delta_bias (E,).
    They may have any layout; out has delta's layout in memory. reverse: scan from the last token to the first; the tokens stay
    in their places. ValueError for shapes that do not match.
    """
    if transformed() or (not torch.compiler.is_compiling() and has_tangents(u, delta, A, B, C, D, z, delta_bias)):
        how = delta_softplus, return_last_state, reverse
        return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, *how)
    inputs = checked(u, delta, A, B, C, D, z, delta_bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    with full_precision(u):
        watched = torch.compiler.is_compiling() or traced(*(x for x in inputs if x is not None))
        if watched:
            out, last, _ = scan(*inputs, delta_softplus, reverse, keep)
        elif not return_last_state and selective_scan_mamba.serves(inputs, selective_scan_reference):
            out = selective_scan_mamba.function()(*time_reversed(inputs, reverse), delta_softplus)  # asked for no last state
            out = out.flip(2) if reverse else out
        else:
            out, last = Scan.apply(*inputs, delta_softplus, reverse, keep)
        return (out.to(u.dtype), last) if return_last_state else out.to(u.dtype)


def selective_scan_reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, reverse=False
):  # fmt: skip
    """Returns the same by the equations, under autograd, which keeps all states."""
    kind, E = u.dtype, u.shape[1]
    u, delta, A, B, C, D, z, delta_bias = time_reversed(checked(u, delta, A, B, C, D, z, delta_bias), reverse)
    with full_precision(u):
        delta = delta if delta_bias is None else delta + delta_bias[:, None]
        delta = softplus(delta) if delta_softplus else delta
        B, C = (x.repeat_interleave(E // x.shape[1], dim=1) for x in (B, C))                   # (B, E, N, L)
        h, y = u.new_zeros(*u.shape[:2], A.shape[1]), []
        for delta_t, u_t, B_t, C_t in zip(*(x.unbind(-1) for x in (delta, u, B, C))):
            h = torch.exp(delta_t[..., None] * A) * h + delta_t[..., None] * B_t * u_t[..., None]
            y.append((C_t * h).sum(-1))
        y = torch.stack(y, dim=-1)
        y = y if D is None else y + D[:, None] * u
        out = (y if z is None else y * silu(z)).to(kind)
        out = out.flip(2) if reverse else out
    return (out, h) if return_last_state else out


def checked(u, delta, A, B, C, D, z, delta_bias):
    """Returns the inputs in one type, float32 or wider, with B and C (B, G, N, L). ValueError for shapes that do not fit, and
    for tensors that are not real floating-point numbers."""
    given = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    given = {name: x for name, x in given.items() if x is not None}
    groups = B.shape[1] if B.ndim == 4 else 1
    fits = u.ndim == 3 and A.ndim == 2 and B.shape == C.shape and B.ndim in (3, 4)
    fits = fits and (B.shape[0], *B.shape[-2:], len(A)) == (u.shape[0], A.shape[1], u.shape[2], u.shape[1])
    fits = fits and groups > 0 and u.shape[1] % groups == 0 and all(x.shape == u.shape for x in (delta, z) if x is not None)
    fits = fits and all(x.shape == u.shape[1:2] for x in (D, delta_bias) if x is not None)
    if not fits or not all(x.is_floating_point() for x in given.values()):
        found = ", ".join(f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for name, x in given.items())
        expected = "u, delta and z are (B, E, L), A (E, N), B and C (B, N, L) or (B, G, N, L) with G dividing E"
        raise ValueError(f"{expected}, D and delta_bias (E,), all floating-point; they are {found}")
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    wide = reduce(torch.promote_types, (x.dtype for x in given.values()), torch.float32)
    return [None if x is None else x.to(wide).resolve_neg() for x in (u, delta, A, B, C, D, z, delta_bias)]


def time_reversed(inputs, reverse):
    """Returns the inputs with tokens in the opposite order if `reverse`."""
    u, delta, A, B, C, D, z, bias = inputs
    u, delta, B, C, z = (x.flip(-1) if reverse and x is not None else x for x in (u, delta, B, C, z))
    return u, delta, A, B, C, D, z, bias


class Scan(torch.autograd.Function):
    """Runs the scan in eager mode without PyTorch's dispatch of custom operators, which saves a fifth of a millisecond."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = run_scan(*inputs)
        _keep(ctx, inputs, outputs)
        return outputs[:2]

    @staticmethod
    def backward(ctx, out_grad, last_grad):
        return gradients_of(run_scan_backward, ctx, out_grad, last_grad)


def run_scan(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    z: torch.Tensor | None, bias: torch.Tensor | None, softplus: bool, reverse: bool, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns out (B, E, L), h_L (B, E, N) and, with `keep`, the states before every chunk (chunks, B, N, E), which
    gradients need. Its inputs are as `checked` returns them."""
    implementation = selective_scan_cpu.forward if selective_scan_cpu.serves(u) else forward
    return implementation(u, delta, A, B, C, D, z, bias, softplus, reverse, keep)


def run_scan_backward(
    out_grad: torch.Tensor, last_grad: torch.Tensor, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
    C: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None, bias: torch.Tensor | None, softplus: bool,
    reverse: bool, chunk_states: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """Returns the gradients of u, delta, A, B and C, and of D, z and bias where given, from those of out and h_L."""
    implementation = selective_scan_cpu.backward if selective_scan_cpu.serves(u) else backward
    gradients = implementation(out_grad, last_grad, u, delta, A, B, C, D, z, bias, softplus, reverse, chunk_states)
    return [x for x, given in zip(gradients, (u, delta, A, B, C, D, z, bias)) if given is not None]


# The scan as a custom operator of PyTorch, which compilers treat as opaque, so that they do not unroll its L steps.
scan = torch.library.custom_op("pde_ssm_dit::selective_scan", run_scan, mutates_args=())
scan_backward = torch.library.custom_op("pde_ssm_dit::selective_scan_backward", run_scan_backward, mutates_args=())


@scan.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus, reverse, keep):
    (batch, E, L), N = u.shape, A.shape[1]
    return torch.empty_like(delta), u.new_empty(batch, E, N), u.new_empty(-(-L // CHUNK) if keep else 0, batch, N, E)


@scan_backward.register_fake
def _(out_grad, last_grad, u, delta, A, B, C, D, z, bias, softplus, reverse, chunk_states):
    columns = [u.new_empty(*B.shape[:2], B.shape[3], B.shape[2]).mT for _ in range(2)]
    given = (u, delta, A, *columns, D, z, bias)
    return [torch.empty_like(x) for x in given if x is not None]


def _keep(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, out_grad, last_grad, _):
    return gradients_of(scan_backward, ctx, out_grad, last_grad)


def gradients_of(run, ctx, *gradients):
    """Returns the gradients of a scan's arguments by `run`; where `needs_operations`, by the reference, which computes the
    same."""
    *tensors, chunk_states = ctx.saved_tensors
    if needs_operations(*gradients):
        plainly = partial(selective_scan_reference, delta_softplus=ctx.softplus, return_last_state=True, reverse=ctx.reverse)
        return *differentiable(plainly, tensors, gradients, ctx.needs_input_grad[:8]), None, None, None
    found = iter(run(*gradients, *tensors, ctx.softplus, ctx.reverse, chunk_states))
    return *(None if x is None else next(found) for x in tensors), None, None, None


scan.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.pde_ssm_dit.selective_scan)
def scan_flops(u, delta, A, B, C, D, z, *_, **__):
    """Counts 9 multiply-adds for each state of each channel and token, as fvcore does for Mamba's scan, one for D u and one for
    the gate; two operations each."""
    batch, E, L = u
    return 2 * batch * E * L * (9 * A[1] + (D is not None) + (z is not None))


@register_flop_formula(torch.ops.pde_ssm_dit.selective_scan_backward)
def scan_backward_flops(out_grad, last_grad, *inputs, **__):
    """Counts twice as many, as PyTorch does for matrix products; states that are computed again count once."""
    return 2 * scan_flops(*inputs)


# PyTorch's operations, on any device.


def forward(u, delta, A, B, C, D, z, bias, softplus, reverse, keep):
    if reverse:
        out, *states = forward(*time_reversed((u, delta, A, B, C, D, z, bias), True), softplus, False, keep)
        return out.flip(2), *states
    steps, x, B, C = time_first(u, delta, B, C, bias, softplus)
    L, batch, E = x.shape
    y, h, chunk_states = torch.empty_like(x), x.new_zeros(batch, E, A.shape[1]), []
    for start in range(0, L, CHUNK):
        part = slice(start, start + CHUNK)
        chunk_states += [h.mT] if keep else []
        _, states = states_of(steps[part], x[part], A, B[part], h)
        y[part] = outputs_of(states, C[part])
        h = states[-1]
    y = y.permute(1, 2, 0)
    y = y if D is None else y + D[:, None] * u
    out = torch.empty_like(delta).copy_(y if z is None else y * silu(z))
    return out, h.clone(), torch.stack(chunk_states) if keep else x.new_empty(0, batch, A.shape[1], E)


def time_first(u, delta, B, C, bias, is_softplus):
    """Returns delta and delta u (L, B, E), and B and C (L, B, G, N)."""
    B, C = (x.permute(3, 0, 1, 2).contiguous() for x in (B, C))
    steps = delta.permute(2, 0, 1)
    steps = steps if bias is None else steps + bias
    steps = (softplus(steps) if is_softplus else steps).contiguous()
    return steps, steps * u.permute(2, 0, 1), B, C


def states_of(delta, x, A, B, h):
    """Returns exp(delta A) and h_t of some tokens (c, B, E, N), from the state h before them."""
    decay = torch.exp(delta[..., None] * A)
    states = (in_groups(x, B)[..., None] * B[:, :, :, None]).flatten(2, 3)
    for decay_t, state in zip(decay, states):
        h = state.addcmul_(decay_t, h)
    return decay, states


def outputs_of(states, C):
    """Computes sum_n C h of states (c, B, E, N) and C (c, B, G, N): (c, B, E)."""
    return (in_groups(states, C) @ C.unsqueeze(-1)).flatten(2)


def in_groups(x, B):
    """Returns x (c, B, E, ...) with the channels of each group of B (c, B, G, N) together, (c, B, G, E / G, ...)."""
    return x.unflatten(2, (B.shape[2], -1))


def backward(out_grad, last_grad, u, delta, A, B, C, D, z, bias, softplus, reverse, chunk_states):
    """Returns the gradients of all inputs, None for those not given. With g_t the gradient of h_t and dy that of y,

    g_t = C_t dy_t + exp(delta_(t+1) A) g_(t+1),    dx = g B,    dB = g x,    dC = h dy,    d(delta A) = g h_(t-1) exp(delta A)

    where x = delta u.
    """
    if reverse:
        inputs = time_reversed((u, delta, A, B, C, D, z, bias), True)
        u, delta, A, B, C, D, z, bias = backward(out_grad.flip(2), last_grad, *inputs, softplus, False, chunk_states)
        return time_reversed((u, delta, A, B, C, D, z, bias), True)
    steps, x, B, C = time_first(u, delta, B, C, bias, softplus)
    u, out_grad = (t.permute(2, 0, 1) for t in (u, out_grad))
    dy = (out_grad if z is None else out_grad * silu(z.permute(2, 0, 1))).contiguous()
    steps_grad, x_grad, B_grad, C_grad, y = (torch.empty_like(t) for t in (steps, x, B, C, x))
    A_grad, carry = torch.zeros_like(A), last_grad.clone()
    for number in reversed(range(len(chunk_states))):
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        h = chunk_states[number].mT
        decay, states = states_of(steps[part], x[part], A, B[part], h)
        y[part] = outputs_of(states, C[part])
        dy_part = in_groups(dy[part], B)[..., None]                                            # (c, B, G, E / G, 1)
        C_grad[part] = (in_groups(states, C) * dy_part).sum(3)
        g = (dy_part * C[part][:, :, :, None]).flatten(2, 3)
        for decay_t, g_t in zip(reversed(decay.unbind()), reversed(g.unbind())):
            g_t += carry
            carry = decay_t * g_t
        x_grad[part] = outputs_of(g, B[part])
        B_grad[part] = (in_groups(g, B) * in_groups(x[part], B)[..., None]).sum(3)
        exponent_grad = decay.mul_(g)
        exponent_grad[0] *= h
        exponent_grad[1:] *= states[:-1]
        steps_grad[part] = (exponent_grad * A).sum(-1)
        A_grad += (exponent_grad * steps[part][..., None]).sum((0, 1))
    steps_grad += x_grad * u
    if softplus:
        steps_grad *= -torch.expm1(-steps)                                                     # sigmoid(delta)
    u_grad = x_grad * steps if D is None else x_grad * steps + D * dy
    z_grad = None
    if z is not None:
        s = torch.sigmoid(z)
        y = y.permute(1, 2, 0) if D is None else (y + D * u).permute(1, 2, 0)
        z_grad = out_grad.permute(1, 2, 0) * y * s * (1 + z * (1 - s))
    return (
        laid_out_as(u_grad.permute(1, 2, 0), u.permute(1, 2, 0)), laid_out_as(steps_grad.permute(1, 2, 0), delta), A_grad,
        B_grad.permute(1, 2, 0, 3).contiguous().mT, C_grad.permute(1, 2, 0, 3).contiguous().mT, (dy * u).sum((0, 1)),
        None if z is None else laid_out_as(z_grad, z), steps_grad.sum((0, 1)),
    )  # fmt: skip


def laid_out_as(x, other):
    """Returns a copy of x with the memory layout of another tensor."""
    return torch.empty_like(other).copy_(x)
