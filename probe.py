"""A Frechet distance while a run trains: a few samples from its averaged weights against a few of its images, by the first
64 features of a network, as in the PDE-SSM paper's ablation. It shows where a run goes; FID takes 50,000 and 2,048."""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from diffusion.samplers import PerImageNoise, image_seeds
from evaluate import Statistics, frechet_distance, full_precision, see, spread
from features import open_network
from images import FolderImages
from latents import holds_latents
from sample import AT_ONCE, Guidance, generate

PROBED = 256  # samples, and as many images if there are
FEATURES = 64


class Probe(NamedTuple):
    """name: fd<features>_<network>_<samples>. reference: mean (D,) and covariance (D, D) of the images."""

    name: str
    network: nn.Module
    samples: int
    reference: tuple


def open_probe(args, processes):
    """A Probe against the images of --val-path, or else of --data-path, evenly spread. OSError or ValueError says what is
    missing for it."""
    path = args.val_path or args.data_path or "digits"
    if path != "digits" and holds_latents(path):
        raise ValueError(f"--probe-every compares with images, and {path} holds latents; name images with --val-path")
    network = open_network(args.features, args.weights, FEATURES if args.features == "inception" else None)
    network.to(processes.device, memory_format=torch.channels_last)
    images = FolderImages(path, args.image_size, args.dataset, held_out=bool(args.val_path))
    samples = max(PROBED, processes.size)
    mine = spread(len(images), min(samples, len(images)))[processes.rank :: processes.size]
    batches = [mine[start : start + AT_ONCE] for start in range(0, len(mine), AT_ONCE)]
    reference = statistics(map(np.stack, images.read(batches)), network, processes)
    return Probe(f"fd{len(reference[0])}_{network.name}_{samples}", network, samples, reference)


@torch.no_grad()
def statistics(batches, network, processes):
    """Mean and covariance of the first features of all processes' images, in batches of uint8 arrays (n, H, W, 3)."""
    sums = Statistics()
    for batch in batches:
        with full_precision():
            sums.add(see(network, batch, processes.device)["pool"][:, :FEATURES])
    if processes.size > 1:
        sums.sum_over_processes()
    return sums.mean, sums.covariance


def distance(probe, model, space, objective, sampler, processes):
    """Of samples without guidance, of random classes, the same noise in every call. Every process draws its share."""
    model.eval()  # which drops kept symbols: sharded parameters change without telling
    mine = range(processes.rank, probe.samples, processes.size)
    parts = -(-probe.samples // (AT_ONCE * processes.size))  # for every process the same number, as a sharded model needs

    def draw(numbers):
        noise = PerImageNoise(image_seeds(0, numbers, "sampling"), processes.device)
        labels = (noise.rand() * model.trained_classes).long()
        return generate(model, space, objective, sampler, labels, noise, Guidance(1), progress=False).numpy()

    samples = statistics((draw(mine[part::parts]) for part in range(parts)), probe.network, processes)
    return frechet_distance(*probe.reference, *samples)
