"""Classifier-free guidance (Ho & Salimans, 2022) of a network that has a null class, and autoguidance (Karras et al., 2024) by
a weaker network."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Guidance(NamedTuple):
    """Says how a network is guided."""

    scale: float                                # 1 is no guidance, and 0 drops the class
    channels: int | None = 3                    # how many channels are guided, None for all
    interval: tuple[float, float] = (0.0, 1.0)  # on which part of the way from noise, 0, to image, 1
    guide: Callable | None = None               # autoguidance's weaker network, with num_classes
    guide_scale: float = 1                      # strength of autoguidance; 1 is none

    @property
    def drops_classes(self):
        """Whether the network never sees a class."""
        return self.scale == 0 and self.interval == (0, 1)


def create_guidance(scale, in_channels, channels=None, interval=(0.0, 1.0)):
    """Returns the Guidance of a network with that many channels.

    channels: "3" or "all", as in --cfg-channels; by default three of four channels are guided, as in DiT, and all of any
    other number. ValueError for an interval that is empty or not within 0 to 1.
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"--cfg-interval {low} {high}: it is from 0, noise, to 1, image")
    channels = channels or ("3" if in_channels in (3, 4) else "all")
    return Guidance(scale, None if channels == "all" else 3, (low, high))


def guided(model, objective, guidance):
    """Returns the network (x (B, C, H, W), t (B,), y (B,)) with those of the two kinds of guidance that are on."""
    unguided = guidance.scale == 1 or model.num_classes == 0
    network = model if unguided else with_classes(model, objective, guidance)
    return network if guidance.guide is None else led_away(network, objective, guidance)


def led_away(network, objective, guidance):
    """Returns the network with autoguidance: guide + w (network - guide) on all C channels of x. Its other output channels pass
    through."""
    guide, w = guidance.guide, guidance.guide_scale

    def led(x, t, y):
        out = network(x, t, y)                                             # (B, C or 2 C, H, W)
        strength = torch.where(acts(guidance, objective, t), w, 1.0).view(-1, 1, 1, 1)
        seen = y.clamp(max=guide.num_classes) if guidance.scale else torch.full_like(y, guide.num_classes)
        weak = guide(x, t, seen)                                           # class 0 is all that a guide without classes has
        c = x.shape[1]
        return torch.cat([torch.lerp(weak[:, :c].to(out.dtype), out[:, :c], strength.to(out.dtype)), out[:, c:]], dim=1)

    return led


def acts(guidance, objective, t):
    """Returns whether guidance acts at the times t (B,) that a network is shown: (B,) bool."""
    (low, high), progress = guidance.interval, objective.progress(t.double())
    return (low <= progress) & (progress <= high) | ((low, high) == (0, 1))


def with_classes(model, objective, guidance):
    """Returns the network (x (B, C, H, W), t (B,), y (B,)) with classifier-free guidance, which computes both halves of a
    doubled batch and returns one. At a strength of 0 it is the network without classes.

    model: has num_classes, the number of the null class; in_channels; and forward_with_cfg(x, t, y, scale, channels).
    objective: progress(t) gives the progress from noise, 0, to image, 1, at the t that a network sees.
    """
    scale, channels, everywhere = guidance.scale, guidance.channels, guidance.interval == (0, 1)

    def network(x, t, y):
        here = acts(guidance, objective, t)                                # (B,) bool: samplers may have a t for each image
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
    """Returns how a model is guided, in words, for a line of output."""
    low, high = guidance.interval
    there, part = model.in_channels, "" if (low, high) == (0, 1) else f" from {low:g} to {high:g} of the way"
    away = f"led away from a weaker model with strength {guidance.guide_scale:g}{part}" if guidance.guide else ""
    if guidance.scale == 1 or model.num_classes == 0:
        return away or "without guidance"
    part += f", {away}" if away else ""
    if guidance.scale == 0:
        return f"without classes{part}"
    which = f"{guidance.channels} of" if guidance.channels and guidance.channels < there else "all"
    return f"with guidance of strength {guidance.scale:g} on {which} {there} channels{part}"
