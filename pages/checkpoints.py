"""Checkpoints that may be opened, and mistakes as one sentence."""

import os
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.build import load_model
from checkpoints.pipelines import INDEX
from checkpoints.sharded import SETTINGS
from diffusion.samplers import FLOW_SAMPLERS, SAMPLERS
from images.autoencoder import load_trained_space
from machine.flags import class_label
from machine.processes import explain
from mixers.running import prepare_to_sample

ENDINGS = {".pt", ".pth", ".ckpt", ".safetensors"}


class Opened(NamedTuple):
    """A checkpoint that can be drawn from."""

    path: str
    model: Any
    settings: dict  # as `load_model` returns them
    space: Any

    def classes(self):
        """Returns (name, text) of each class, where text names it in commands: its number if its name reads as a number or is
        not unique, else its name."""
        names = self.model.class_names or [str(number) for number in range(self.model.trained_classes)]
        plain = [class_label(name.strip()) == name and names.count(name) == 1 for name in names]
        return [(name, name if unique else str(number)) for number, (name, unique) in enumerate(zip(names, plain))]

    def samplers(self):
        """Returns the names of the samplers of its objective, the usual one first."""
        return list(SAMPLERS if self.settings["objective"] == "diffusion" else FLOW_SAMPLERS)

    def in_words(self):
        """Says what it is, in a line of Markdown."""
        (h, w), factor = self.model.input_size, self.space.factor
        size, millions = f"{h * factor} x {w * factor}", sum(p.numel() for p in self.model.parameters()) / 1e6
        kind = f"{self.settings['model']}, mixer {self.settings['mixer']}, {self.settings['objective']}"
        return f"{kind}, {size} pixels, {self.model.trained_classes} classes, {millions:.3g} million parameters"


def checkpoints_in(folders):
    """Returns the paths of all checkpoints within folders, sorted; a folder of one is listed as such. Links that lead out of a
    folder are left out."""
    found = []
    for top in folders:
        for folder, below, files in os.walk(top):
            below.sort()
            if not {INDEX, SETTINGS}.isdisjoint(files):
                found.append(folder)
                below.clear()
                continue
            found += [os.path.join(folder, name) for name in sorted(files) if Path(name).suffix in ENDINGS]
    return [path for path in found if is_within(path, folders)]


def is_within(path, folders):
    """Tells whether a path, its links followed, lies in one of the folders."""
    return any(Path(path).resolve().is_relative_to(Path(folder).resolve()) for folder in folders)


def open_checkpoint(path, folders, device):
    """Returns the Opened checkpoint at a path within the folders; the last few are cached. ValueError for a path outside them,
    or a checkpoint that cannot be sampled."""
    if not path:
        raise ValueError("choose a checkpoint first")
    if not is_within(path, folders):
        raise ValueError(f"{path} is not within {' or '.join(folders)}, and nothing else is opened; --folders names others")
    return _open(str(path), Path(path).stat().st_mtime_ns, device)


@lru_cache(maxsize=4)
def _open(path, changed, device):
    model, settings = load_model(path, {}, "mse")
    prepare_to_sample(model, device)
    space = load_trained_space(settings["vae"], device, settings.get("vae_digest"))
    return Opened(path, model, settings, space)


@contextmanager
def one_sentence():
    """Shows a visitor's mistake as one sentence in the page, without a traceback in the shell."""
    import gradio

    try:
        yield
    except Exception as error:
        reason = explain(error)
        if reason is None:
            raise
        raise gradio.Error(reason, duration=20, print_exception=False) from None
