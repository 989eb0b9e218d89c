"""One update of the weights, and all that it changes."""

import warnings
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from machine.stops import postponed


@dataclass(eq=False)
class Learner:
    """The model; by decay, averages of its weights; the optimiser; what keeps float16's gradients in range; and how many steps
    they have learnt, None in the middle of an update."""

    model: nn.Module
    averages: dict
    opt: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int | None = 0


def create_learner(model, args, processes):
    """A learner that has learnt nothing yet, on this process's device; with --parallel fsdp, this process's part of one."""
    device = processes.device
    if args.grad_checkpointing:
        model.checkpoint_gradients()
    home = args.ema_device or device
    averages = {decay: deepcopy(model).to(home).eval().requires_grad_(False) for decay in args.ema_decay}
    model.to(device).train()
    if args.parallel == "fsdp":
        for network in (model, *averages.values()):
            shard(network, processes)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        # As the optimiser would at its first step; a checkpoint is read into it.
        opt.state[parameter] = dict(step=torch.zeros((), device=device), exp_avg=torch.zeros_like(parameter))
        opt.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
    if args.compile:
        for layer in getattr(model, "blocks", [model]):  # equal blocks are compiled once
            layer.forward = torch.compile(layer.forward)
    return Learner(model, averages, opt, scaler)


def shard(model, processes):
    """Leaves each process its part of every parameter, which they put together block by block as they compute (FSDP2)."""
    # What a network returns is a view; nobody writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for layer in (*getattr(model, "blocks", ()), model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)          # the root too: averages run without a backward


def replicate(model, args, processes):
    """What to call instead of the model, so that processes add up their gradients."""
    return DistributedDataParallel(model) if processes.size > 1 and args.parallel == "ddp" else model


def exchange_gradients(replica, now):
    """A context for forward and backward passes, in which processes add up their gradients now, or keep them for later."""
    if isinstance(replica, FSDPModule):
        replica.set_requires_gradient_sync(now)
    return replica.no_sync() if isinstance(replica, DistributedDataParallel) and not now else nullcontext()


def update(learner, loss, step, max_norm=None, warmup=True):
    """One step of the optimiser and of the averages with the gradients that are there, scaled down to max_norm.

    Returns False, with nothing changed, if the gradients or the loss, which is the same on every process, are not finite. The
    norm is the root of their squares, so that no gradient passes whose square, which AdamW averages, overflows.
    """
    model, opt, scaler = learner.model, learner.opt, learner.scaler
    scaler.unscale_(opt)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters])
    whole_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite = bool((whole_norm + loss).isfinite())
    if finite and max_norm:
        clip_grads_with_norm_(parameters, max_norm, norm)
    with postponed():                                                      # a signal waits until the step is whole
        learner.step = None
        if finite:
            scaler.step(opt)
            for decay, average in learner.averages.items():
                update_ema(average, model, step, decay_at(step, decay) if warmup else decay)
        scaler.update()
        opt.zero_grad()
        learner.step = step
    return finite


def only_the_scale_falls(learner, loss):
    """Whether a step was skipped for nothing but float16's scale, which begins high and is halved until gradients fit in."""
    return learner.scaler.is_enabled() and bool(loss.isfinite()) and learner.scaler.get_scale() >= 1


def decay_at(step, decay):
    """The decay of an average that starts fast: it rises to `decay`, so that short runs do not average their initial weights.

    The average looks back over about step / 9 steps until then: 1,112 at step 10,000, 5,557 at 50,000, and with a decay of
    0.9999 from step 90,000 on as far as a constant one, 10,000.
    """
    return min(decay, (1 + step) / (10 + step))


def update_ema(ema, model, step, decay):
    """One step of the average of that decay."""
    averaged = list(ema.parameters())
    weights = [weight.detach().to(average.device) for weight, average in zip(model.parameters(), averaged)]
    get_ema_multi_avg_fn(decay)(averaged, weights, step)


@contextmanager
def lent(model, device):
    """The model is on that device for a while, if it is not at home there: averages, with --ema-device."""
    home = next(model.parameters()).device
    if home == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
