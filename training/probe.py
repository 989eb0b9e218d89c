"""A Frechet distance during training: a few samples from the averaged weights against a few of the run's images, by the first
64 features of a network, as in the PDE-SSM paper's ablation. It shows a trend; FID takes 50,000 samples, 2,048 features."""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from diffusion.drawing import AT_ONCE, draw_numbered
from diffusion.guidance import Guidance
from evaluation.features import open_network
from evaluation.metrics import Statistics, frechet_distance
from evaluation.sides import evenly_spread, features_of, without_tf32
from images.latents import holds_latents
from images.samples import FolderImages

PROBED = 256  # samples, and as many images if there are
FEATURES = 64


class Probe(NamedTuple):
    """A measurement of the Frechet distance. name: fd<features>_<network>_<samples>. samples, images: their numbers. reference:
    mean (D,) and covariance (D, D) of the images' features."""

    name: str
    network: nn.Module
    samples: int
    images: int
    reference: tuple

    def describe(self):
        """Returns a line for the log that says what it compares."""
        features = len(self.reference[0])
        few = f"; those are not more than {features} features, which biases it upwards" if self.images <= features else ""
        return f"{self.name} compares {self.samples:,} samples with {self.images:,} images{few}"


def open_probe(path, held_out_path, image_size, dataset, features, weights, processes):
    """Returns a Probe against held-out images, or else training images, evenly spread over the data set. dataset: its name, if
    it has one. features, weights: arguments of open_network. OSError or ValueError if something is missing."""
    path, held_out = held_out_path or path, bool(held_out_path)
    if path and holds_latents(path):
        raise ValueError(f"--probe-every compares with images, and {path} holds latents; name images with --val-path")
    network = open_network(features, weights, FEATURES if features == "inception" else None)
    network.to(processes.device, memory_format=torch.channels_last)
    images = FolderImages(path, image_size, dataset, held_out=held_out)
    samples, least = max(PROBED, processes.size), max(2, processes.size)
    if len(images) < least:
        holds = f"{path or 'digits'} holds {len(images)}"
        raise ValueError(f"--probe-every compares with {least} images or more, one a process; {holds}")
    count = min(samples, len(images))
    mine, sums = evenly_spread(len(images), count)[processes.rank :: processes.size], Statistics()
    for batch in images.read([mine[start : start + AT_ONCE] for start in range(0, len(mine), AT_ONCE)]):
        add(sums, np.stack(batch), network, processes)
    reference = in_all(sums, processes)
    return Probe(f"fd{len(reference[0])}_{network.name}_{samples}", network, samples, count, reference)


@torch.no_grad()
def add(sums, images, network, processes):
    """Adds the first features of uint8 images (n, H, W, 3) to the sums."""
    with without_tf32():
        sums.add(features_of(network, images, processes.device)["pool"][:, :FEATURES])


def in_all(sums, processes):
    """Returns mean and covariance of all processes' features. ValueError, on all of them, if those are not finite."""
    if processes.size > 1:
        sums.sum_over_processes()
    if not np.isfinite(sums.mean).all():
        raise ValueError("features are not finite")
    return sums.mean, sums.covariance


def distance(probe, model, space, objective, sampler, processes):
    """Returns the Frechet distance between a probe's images and samples of random classes without guidance, from the same noise
    in every call. Every process draws its share. ValueError, on all of them, where one has no samples."""
    model.eval()  # drops cached symbols: sharded parameters change without a version count
    mine = range(processes.rank, probe.samples, processes.size)
    parts = -(-probe.samples // (AT_ONCE * processes.size))  # the same number on every process, as a sharded model needs

    sums, problem = Statistics(), None
    for part in range(parts):
        try:
            images = draw_numbered(model, space, objective, sampler, mine[part::parts], 0, Guidance(1))
            add(sums, images.numpy(), probe.network, processes)
        except (ValueError, RuntimeError) as error:  # others wait for this process's share of a sharded model
            problem = str(error).partition("\n")[0]
    if any(processes.any(problem is not None)):
        raise ValueError(problem or "another process has no samples")
    return frechet_distance(*probe.reference, *in_all(sums, processes))
