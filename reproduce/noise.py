"""Writes images of uniform noise, 32 x 32, as an .npz that evaluate.py reads:

    python -m reproduce.noise NUM OUT.npz
"""

import sys

import numpy as np

from machine.files import whole_file


def main(num, out):
    images = np.random.default_rng(0).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
    with whole_file(out, "images") as file:
        np.savez(file, arr_0=images)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
