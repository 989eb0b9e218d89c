"""Prints the velocity's error of networks of flow matching on held-out images, by the time from noise, 0, to image, 1:

    python -m reproduce.denoising IMAGES NAME=CKPT... [--num 256] [--json FILE]

IMAGES is a folder of images; all networks see the same of them, with the same noise. A cell has the mean square of the error,
which training makes small, and in brackets the part of it that is the error of the means of an image's channels: a network
that draws every image too bright or too dark by itself has nothing else.
"""

import argparse
from pathlib import Path

import torch

from checkpoints.build import load_model
from diffusion import create_objective
from images.dataset import load_dataset
from machine.files import write_json
from machine.flags import positive
from machine.processes import launch
from reproduce.strips import named

TIMES = (0.05, 0.25, 0.5, 0.75, 0.85, 0.95)


@torch.no_grad()
def errors(model, flow, images, labels, time, batch=64):
    """Returns the mean square of the velocity's error on images (N, C, H, W) of classes labels (N,) at a time below 1, and the
    part of it that is the error of their channels' means: two floats."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    whole = of_means = 0.0
    for u, z, y in zip(images.split(batch), noise.split(batch), labels.split(batch), strict=True):
        t = torch.full((len(u),), time)
        alpha, sigma, d_alpha, d_sigma = flow.coefficients(t, u)
        error = flow.velocity(model, alpha * u + sigma * z, t, dict(y=y)) - (d_alpha * u + d_sigma * z)
        whole += error.square().mean((1, 2, 3)).sum().item()
        of_means += error.mean((2, 3)).square().mean(1).sum().item()
    return whole / len(images), of_means / len(images)


def open_network(checkpoint):
    """Returns the averaged network of a checkpoint, its flow and its settings. ValueError if it was trained otherwise."""
    model, settings = load_model(checkpoint, {}, "none")
    if settings["objective"] != "flow" or settings["vae"] != "none":
        raise ValueError(f"{checkpoint} has --objective {settings['objective']} --vae {settings['vae']}, not flow on pixels")
    flow = {name: settings[name] for name in ("path", "predict", "time_scale")}
    return model, create_objective("flow", **flow), settings


def measure(images, name, checkpoint, num):
    """Prints a network's row of the table, and returns its errors, as `errors` does, at each of TIMES."""
    model, flow, settings = open_network(checkpoint)
    dataset = load_dataset(images, settings["image_size"], uncond=not model.num_classes, held_out=True)
    count = min(num, len(dataset))
    pixels, labels = zip(*(dataset[number * len(dataset) // count] for number in range(count)))
    pixels, labels = torch.stack(pixels), torch.tensor(labels)
    row = [errors(model, flow, pixels, labels, time) for time in TIMES]
    print(f"| {name} | {' | '.join(f'{whole:.4f} ({part:.4f})' for whole, part in row)} |", flush=True)
    return row


def main(images, networks, num, json):
    print(f"| t | {' | '.join(map(str, TIMES))} |", "|---" * (len(TIMES) + 1) + "|", sep="\n")
    rows = {name: measure(images, name, checkpoint, num) for name, checkpoint in networks}
    if json:
        write_json(json, dict(most_images=num, times=TIMES, rows=rows), "errors")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", metavar="IMAGES")
    parser.add_argument("networks", nargs="+", type=named, metavar="NAME=CKPT")
    parser.add_argument("--num", type=positive, default=256, help="images (default: 256)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(lambda args, _: main(**vars(args)), parse_args())
