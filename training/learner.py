"""A model in training: its weights, averages and optimiser, and one update of them all.

accelerate's Accelerator is not used: under FSDP2 its prepare() refuses a second model, such as an average; its checkpoints
are not in DiT's format, and load_state unpickles whatever is in them; and it clips gradients before it returns their norm.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from checkpoints.build import initialize
from checkpoints.lengths import exponent
from download import find_checkpoint
from machine.stops import postponed
from pde_ssm import PDE


@dataclass(eq=False)
class Learner:
    """A model; averages of its weights, by decay; the optimiser; the scaler that keeps float16's gradients in range; and the
    number of steps taken, None in the middle of an update."""

    model: nn.Module
    averages: dict
    opt: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int | None = 0
    rate: Callable | None = None  # the learning rate of a step; the optimiser's own unless given


def create_learner(
    model, processes, lr, decays, average_device=None, sharded=False, float16=False, betas=(0.9, 0.999), weight_decay=0.0,
    lr_coefficients=1.0,
):  # fmt: skip
    """Returns a new Learner on this process's device.

    decays: of the averages, kept on average_device, by default the model's. sharded: it is this process's part of the whole
    (FSDP2). float16: gradients are scaled to stay in float16's range. lr, betas, weight_decay: of AdamW.
    lr_coefficients: factor of the learning rate for the coefficients of PDEs.
    """
    device = processes.device
    home = average_device or device
    averages = {decay: deepcopy(model).to(home).eval().requires_grad_(False) for decay in decays}
    model.to(device).train()
    if sharded:
        for network in (model, *averages.values()):
            shard(network, processes)
    learnt = model.parameters() if lr_coefficients == 1 else groups_by_rate(model, lr, lr_coefficients)
    opt = torch.optim.AdamW(learnt, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=float16)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        # Created here, as the optimiser would at its first step, so that a checkpoint can be read into it.
        opt.state[parameter] = dict(step=torch.zeros((), device=device), exp_avg=torch.zeros_like(parameter))
        opt.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
    return Learner(model, averages, opt, scaler)


def groups_by_rate(model, lr, factor):
    """Returns AdamW's groups of a model's parameters: the coefficients of its PDEs, which learn at lr times factor, and others.
    ValueError for a model without PDEs.

    A group holds consecutive parameters, so that every parameter keeps the index under which checkpoints store its moments.
    """
    coefficients = {p for layer in model.modules() if isinstance(layer, PDE) for p in layer.parameters()}
    if not coefficients:
        raise ValueError(f"--lr-coefficients {factor:g} is for the coefficients of PDEs, and the model has none")
    rows = groupby(model.parameters(), key=lambda p: factor if p in coefficients else 1)
    return [dict(params=list(row), lr=lr * times, times=times) for times, row in rows]


def start_from(checkpoint, model, settings, processes):
    """Initialises the model from a checkpoint for fine-tuning; returns lines that describe it. settings: the run's, a dict."""
    with processes.main_process_first():  # so that it is fetched once, if it must be fetched
        path = find_checkpoint(checkpoint)
    return initialize(model, path, settings)


def shard(model, processes):
    """Leaves each process its part of every parameter, which they put together block by block as they compute (FSDP2)."""
    # The network returns a view, and no code writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for layer in (*getattr(model, "blocks", ()), model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)          # the root too: averages run without a backward


def replicate(model, processes):
    """Wraps the model so that processes sum their gradients, and returns the wrapper; a sharded model does so by itself."""
    if processes.size == 1 or isinstance(model, FSDPModule):
        return model
    # After its first step DDP would reorder the gradients, and so the order in which those of three or more processes are
    # summed; a resumed run would then differ in its last bits. With find_unused_parameters it does not reorder them.
    return DistributedDataParallel(model, find_unused_parameters=processes.size > 2)


def sync_gradients(replica, now):
    """Returns a context for forward and backward passes, in which processes add up gradients now, or keep them for later."""
    if isinstance(replica, FSDPModule):
        replica.set_requires_gradient_sync(now)
    return replica.no_sync() if isinstance(replica, DistributedDataParallel) and not now else nullcontext()


def accumulate_gradients(scaler, replica, loss_of, parts, images, labels, step):
    """Adds up the gradients of a batch in that many parts, and returns its loss on this process. loss_of(images, labels, step,
    part) is what a part adds to that loss."""
    losses = []
    for part, (x, y) in enumerate(zip(images.chunk(parts), labels.chunk(parts))):
        with sync_gradients(replica, part == parts - 1):
            loss = loss_of(x, y, step, part)
            scaler.scale(loss).backward()
        losses.append(loss.detach())
    return sum(losses)


def update(learner, loss, step, max_norm=None, warmup=True):
    """Takes one step of the optimiser and of the averages with the present gradients, clipped to max_norm.

    Returns False, without changing weights, if the gradients or the loss, which is the same on every process, are not finite.
    The norm overflows with the sum of squares, so no gradient passes whose square, which AdamW averages, would overflow.
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
        if learner.rate:
            for parameters_of in opt.param_groups:
                parameters_of["lr"] = learner.rate(step) * parameters_of.get("times", 1)
        if finite:
            scaler.step(opt)
            for decay, average in learner.averages.items():
                update_ema(average, model, step, decay_at(step, decay, warmup))
        scaler.update()
        opt.zero_grad()
        learner.step = step
    return finite


def only_the_scale_falls(learner, loss):
    """Returns whether a step was skipped only because float16's scale, which starts high and is halved, was still too large."""
    return learner.scaler.is_enabled() and bool(loss.isfinite()) and learner.scaler.get_scale() >= 1


def decay_at(step, decay, warmup=True):
    """Returns the decay of an average at a step. With `warmup` it rises to `decay` from a small value, so that short runs
    forget their initial weights. With a length in place of a decay it rises for ever: see checkpoints/lengths.py.
    """
    if isinstance(decay, str):
        return (1 - 1 / step) ** (exponent(float(decay.removeprefix("length_"))) + 1)
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def update_ema(ema, model, step, decay):
    """Takes one step of an average of that decay."""
    averaged = list(ema.parameters())
    weights = [weight.detach().to(average.device) for weight, average in zip(model.parameters(), averaged)]
    get_ema_multi_avg_fn(decay)(averaged, weights, step)


@contextmanager
def moved_to(device, model):
    """Moves a model to that device for a while, and back at the end: used for averages with --ema-device."""
    home = next(model.parameters()).device
    if home == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
