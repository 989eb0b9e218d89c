"""Writes images of uniform noise, 32 x 32, as an .npz that evaluate.py reads:

    python -m reproduce.noise NUM OUT.npz
"""

import argparse

import numpy as np

from machine.files import whole_file
from machine.flags import positive
from machine.processes import launch


def main(num, out):
    images = np.random.default_rng(0).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
    with whole_file(out, "images") as file:
        np.savez(file, arr_0=images)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num", type=positive, metavar="NUM")
    parser.add_argument("out", metavar="OUT.npz")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(lambda args, _: main(**vars(args)), parse_args())
