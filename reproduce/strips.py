"""Joins the first samples of several runs into one picture, a row with a name for each:

    python -m reproduce.strips OUT.png "attention=SAMPLES.npz" "pdessm=SAMPLES.npz"...

Rows are .npz files of sample_ddp.py, or pictures with samples side by side. Samples of one seed begin with the same noise.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from images.samples import NpzImages
from machine.files import whole_file
from machine.flags import positive
from machine.processes import launch

MARGIN = 150  # pixels for the names


def strip(path, count):
    """Returns the first samples of an .npz side by side: an image."""
    images = NpzImages(path)
    (first,) = images.read([range(min(count, len(images)))])
    return Image.fromarray(np.concatenate(list(first), axis=1))


def sheet(strips, out, colours=256):
    """Writes a picture with one strip below the other; strips: name -> image. ValueError if they differ in size."""
    if len(sizes := {image.size for image in strips.values()}) > 1:
        raise ValueError(f"the rows differ in size: {', '.join(f'{width} x {height}' for width, height in sorted(sizes))}")
    ((width, height),) = sizes
    picture = Image.new("RGB", (MARGIN + width, height * len(strips)), "white")
    for number, (name, image) in enumerate(strips.items()):
        ImageDraw.Draw(picture).text((4, number * height + height // 2 - 6), name, fill="black", font_size=11)
        picture.paste(image, (MARGIN, number * height))
    picture = picture.quantize(colours, dither=Image.Dither.NONE)  # far fewer bytes, as samples of short runs are noisy
    with whole_file(out, "picture") as file:
        picture.save(file, format="png", optimize=True)


def named(row):
    """Splits NAME=FILE, of which the name may contain = as well."""
    name, _, file = row.rpartition("=")
    if not (name and Path(file).is_file()):
        raise argparse.ArgumentTypeError(f"{row} is not NAME=FILE with a file that exists")
    return name, Path(file)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("rows", nargs="+", type=named, metavar="NAME=FILE")
    parser.add_argument("--count", type=positive, default=14, help="samples a row")
    return parser.parse_args(argv)


def main(out, rows, count):
    sheet({name: Image.open(file) if file.suffix == ".png" else strip(file, count) for name, file in rows}, out)


if __name__ == "__main__":
    launch(lambda args, _: main(**vars(args)), parse_args())
