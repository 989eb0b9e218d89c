"""Finds a network's token mixers, and records their inputs on the way from noise to an image."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from diffusion.noise import PerImageNoise, image_seeds

PLACES = {"attn", "mixer", "op"}  # attribute names of mixers in blocks


class Layer(NamedTuple):
    """A mixer as it stands in a network that looks at images."""

    module: nn.Module
    mix: Callable            # tokens (B, N, D) -> (B, N, D), with the layer's other inputs unchanged
    tokens: torch.Tensor     # its input, (B, N, D): `prefix` tokens, and then those of the grid, row by row
    mixed: torch.Tensor      # its result, (B, N, D)
    grid: tuple              # (h, w)
    prefix: int


def observe(model, objective, images, labels, progress, seed=0):
    """Returns the noisy images (B, C, H, W) that a network sees when images of its space are `progress`, 0 to 1, of the way
    from noise, and its mixers, as Layers. ValueError for a network that has none.

    The images get their noise and the network its times as in training.
    """
    device, seen, shown = next(model.parameters()).device, {}, []

    def keep(layer, *call):
        seen[layer] = call

    hooks = [model.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))]
    hooks += [layer.register_forward_hook(keep, with_kwargs=True) for layer in mixers_of(model)]
    noise = PerImageNoise(image_seeds(seed, range(len(images)), "sampling"), device).randn(*images.shape[1:])
    labels = torch.as_tensor(labels, device=device).expand(len(images))
    try:
        with torch.no_grad():
            objective.training_losses(model, images, time_at(objective, progress, images), dict(y=labels), noise)
    finally:
        for hook in hooks:
            hook.remove()
    return shown[0], [_layer(model, *call) for call in seen.items()]


def mixers_of(model):
    """Returns the mixers of a network's blocks, which have a name of PLACES, as some of their parts do. ValueError if there are
    none."""
    named = [(name.split("."), layer) for name, layer in model.named_modules()]
    found = [layer for path, layer in named if path[-1] in PLACES and not {*path[:-1]} & PLACES]
    if not found:
        raise ValueError(f"{type(model).__name__} has no mixers of tokens that could be looked at")
    return found


def time_at(objective, progress, images):
    """Returns the times (B,) of this progress from noise: diffusion's count from the image, a flow's from noise."""
    shares = torch.tensor([progress, 1 - progress], device=images.device, dtype=torch.float64).clamp(0, 0.999)
    times = objective.draw_times(shares)
    rising = objective.progress(times)[0] > objective.progress(times)[1]
    if rising == (progress > 0.5):
        return times[:1].expand(len(images))
    return times[1:].expand(len(images))


def _layer(model, module, call):
    (tokens, *rest), named, mixed = call
    (h, w), prefix = grid_of(module, model, tokens.shape[1])
    return Layer(module, lambda x: module(x, *rest, **named), tokens, mixed, (h, w), prefix)


def grid_of(module, model, count):
    """Returns the grid (h, w) of `count` tokens, the layer's own, the network's or a coarser one, and how many tokens stand
    before it. ValueError if they are on none."""
    h, w = getattr(model, "grid_size", model.input_size)
    grids = [getattr(module, "grid_size", None), (h, w)]
    while h % 2 == w % 2 == 0:
        h, w = h // 2, w // 2
        grids.append((h, w))
    for h, w in filter(None, grids):
        if 0 <= count - h * w <= 2:
            return (h, w), count - h * w
    raise ValueError(f"{type(model).__name__} has {count} tokens in a layer, which are on no grid of {model.input_size}")
