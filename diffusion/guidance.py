"""Classifier-free guidance (Ho & Salimans, 2022) of a network that can leave the class away."""

from typing import NamedTuple

import torch


class Guidance(NamedTuple):
    """Says how a network is guided."""

    scale: float                                # 1 is no guidance, and 0 leaves the class away
    channels: int | None = 3                    # how many channels are guided, None for all
    interval: tuple[float, float] = (0.0, 1.0)  # on which part of the way from noise, 0, to image, 1


def create_guidance(scale, in_channels, channels=None, interval=(0.0, 1.0)):
    """Returns the Guidance of a network with that many channels.

    channels: "3" or "all" as --cfg-channels has it; without it three of four channels are guided, as in DiT, and all of any
    other number. ValueError for an interval that is empty or leaves 0 to 1.
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"--cfg-interval {low} {high}: it is from 0, noise, to 1, image")
    channels = channels or ("3" if in_channels in (3, 4) else "all")
    return Guidance(scale, None if channels == "all" else 3, (low, high))


def guided(model, objective, guidance):
    """Returns the network (x (B, C, H, W), t (B,), y (B,)) with guidance, which computes both halves of a doubled batch and
    returns one. At a strength of 0 it is the network without classes.

    model: has num_classes, the number of the null class; in_channels; and forward_with_cfg(x, t, y, scale, channels).
    objective: knows by progress(t) how far from noise to image a network is that is shown t.
    """
    scale, channels, (low, high) = guidance
    everywhere = (low, high) == (0, 1)

    def network(x, t, y):
        progress = objective.progress(t.double())
        here = (low <= progress) & (progress <= high) | everywhere         # (B,) bool: samplers may have a t for each image
        null = torch.full_like(y, model.num_classes)
        if scale == 0:
            return model(x, t, torch.where(here, null, y))
        if not (everywhere or here.any()):
            return model(x, t, y)
        strength = scale if everywhere else torch.where(here, scale, 1.0).view(-1, 1, 1, 1)
        doubled = x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, null])
        return model.forward_with_cfg(*doubled, strength, channels or model.in_channels)[: len(x)]

    return network


def guidance_in_words(guidance, model):
    """Says how a model is guided, for a line of output."""
    if guidance.scale == 1 or model.num_classes == 0:
        return "without guidance"
    low, high = guidance.interval
    there, part = model.in_channels, "" if (low, high) == (0, 1) else f" from {low:g} to {high:g} of the way"
    if guidance.scale == 0:
        return f"without classes{part}"
    which = f"{guidance.channels} of" if guidance.channels and guidance.channels < there else "all"
    return f"with guidance of strength {guidance.scale:g} on {which} {there} channels{part}"
