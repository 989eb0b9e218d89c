"""Prints the power of samples by spatial frequency, relative to that of real images:

    python -m reproduce.detail IMAGES SAMPLES.npz...

IMAGES is a folder of images of one size, of which every fourth counts. A row has the mean squared Fourier coefficients of an
.npz of samples, divided by those of the images, in bands of cycles an image.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from images.samples import NpzImages
from machine.processes import launch

BANDS = (0.5, 2, 4, 8, 12, 16, 23)  # cycles an image; at most 32 / sqrt(2) at 32 x 32


def main(folder, samples):
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")][::4]
    if not paths:
        raise FileNotFoundError(f"{folder}: no images (.jpg, .jpeg or .png)")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    if len(sizes := {image.shape for image in images}) > 1:
        raise ValueError(f"{folder} has images of {len(sizes)} sizes; those to compare with are of one")
    real = power(np.stack(images))
    print("  ".join(f"{low:g}-{high:g}" for low, high in pairwise(BANDS)))
    for path in samples:
        found = NpzImages(path)
        if found.shape[1:] != images[0].shape:
            (h, w, _), (height, width, _) = found.shape[1:], images[0].shape
            raise ValueError(f"{path} has samples of {h} x {w} pixels, and {folder} images of {height} x {width}")
        (pixels,) = found.read([range(len(found))])
        ratios = power(pixels) / real
        print("  ".join(f"{ratio:.3f}" for ratio in ratios), path)


def power(images):
    """Returns the mean squared Fourier coefficients of images (N, n, n, 3) in each of BANDS."""
    n = images.shape[1]
    squares = (np.abs(np.fft.fft2(images / 127.5 - 1, axes=(1, 2), norm="ortho")) ** 2).mean((0, 3))     # (n, n)
    k = np.fft.fftfreq(n, 1 / n)
    cycles = np.hypot(k[:, None], k)
    return np.array([squares[(cycles >= low) & (cycles < high)].mean() for low, high in pairwise(BANDS)])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="IMAGES")
    parser.add_argument("samples", nargs="+", metavar="SAMPLES.npz")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(lambda args, _: main(**vars(args)), parse_args())
