"""Measures the peak memory of training one pairwise layer, above what was resident before (Linux):

    export MALLOC_MMAP_THRESHOLD_=65536             glibc hands freed memory back; what it keeps varies by 0.2 GB
    python -m benchmarks.pairwise_memory            as it is
    python -m benchmarks.pairwise_memory plain      the equations as they are written: all wave vectors at once

256 tokens, 384 channels, batch 8.
"""

import argparse

import torch

from machine.cost import peak_memory
from machine.processes import ALONE
from pde_ssm import PDESSM, set_backend

CHANNELS, SIDE, BATCH = 384, 16, 8


def main(plain=False):
    if plain:
        set_backend("plain")
    PDESSM(16, coupling="pairwise")(torch.randn(1, 16, 4, 4)).mean().backward()  # loads the libraries
    layer = PDESSM(CHANNELS, coupling="pairwise")
    u = torch.randn(BATCH, CHANNELS, SIDE, SIDE, requires_grad=True)
    before = peak_memory(ALONE.device)
    layer(u).square().mean().backward()
    print(f"{(peak_memory(ALONE.device) - before) / 2**30:.2f} GB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("how", nargs="?", choices=["plain"])
    torch.set_num_threads(1)
    main(plain=parser.parse_args().how == "plain")
