"""On which images and how reproduce/denoising.py asks a network."""

import torch

from checkpoints.build import save_checkpoint
from reproduce import denoising


def test_a_network_is_asked_as_it_was_trained(checkpoint):
    """Of which SiT's see times that are not multiplied."""
    path = checkpoint(objective="flow")
    contents = torch.load(path)
    save_checkpoint(path, **contents | dict(args=contents["args"] | dict(time_scale=1, predict="x", path="cosine")))
    _, flow, _ = denoising.open_network(path)
    assert (flow.time_scale, flow.predict, flow.path.__name__) == (1, "x", "cosine")


def test_images_are_of_all_classes_of_a_folder(checkpoint, images, monkeypatch):
    """Which lie there one after the other."""
    seen = []
    monkeypatch.setattr(denoising, "errors", lambda model, flow, pixels, labels, time: seen.append(labels.tolist()) or (0, 0))
    denoising.measure(images, "a", checkpoint(objective="flow"), 4)
    assert seen == len(denoising.TIMES) * [[0, 0, 1, 2]]
