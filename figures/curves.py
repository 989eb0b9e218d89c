"""Losses and probes of runs, as their log.jsonl has them."""

import re
from pathlib import Path

from figures.page import COLOURS, logarithmic, new_page, tidy
from machine.files import read_rows

LOSSES = ("loss", "held_out_loss")


def read_curves(path):
    """Returns the curves of a run's folder, {name: [(step, value), ...]}: loss, held_out_loss and the distances of probes,
    without those that were not finite. ValueError for a folder that logged none."""
    curves = {}
    for row in read_rows(Path(path, "log.jsonl")):
        for name, value in row.items():
            if (name in LOSSES or re.match(r"fd\d", name)) and value is not None:
                curves.setdefault(name, []).append((row["step"], value))
    if not curves:
        raise ValueError(f"{path} is no folder of a run: it has no log.jsonl with losses")
    return curves


def draw_curves(runs):
    """Draws {label: curves of a run}: the losses in one panel, those of training as lines and held-out ones with points, and
    each distance in a panel of its own."""
    probes = sorted({name for curves in runs.values() for name in curves if name not in LOSSES})
    heading = "Losses of training and of held-out images" + (", and distances of samples" if probes else "")
    figure, axes = new_page(1, 1 + len(probes), 4.6, 3.6, heading)
    for number, (label, curves) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        for name, style in zip(LOSSES, (dict(linewidth=1.2), dict(marker="o", markersize=4, linestyle="--"))):
            if name in curves:
                what = "held out" if name == "held_out_loss" else "training"
                axes[0, 0].plot(*zip(*curves[name]), color=colour, label=f"{label}, {what}", **style)
        for axis, name in zip(axes[0, 1:], probes):
            if name in curves:
                axis.plot(*zip(*curves[name]), color=colour, marker="o", markersize=4, label=label)
    for axis, name in zip(axes[0], ["loss", *probes]):
        logarithmic(axis)
        tidy(axis, xlabel="step", ylabel="loss" if name == "loss" else f"Frechet distance ({name})")
        axis.legend(frameon=False, fontsize=7)
    return figure
