"""Chooses how much of a grid each Triton kernel takes at once, and with how many warps. On GPUs where
`python -m benchmarks.tiles` has timed them, these are the fastest, read from tiles.json; on others, they are small enough that
registers hold most values, as far as `python -m benchmarks.kernel_resources` can tell without a GPU.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("tiles.json")
ON_CHIP = dict(forward=2**14, backward=2**13)  # bytes of tokens in a program that holds a whole grid, padding included
# Bytes of shared memory per program, by the longest side of the grid in tokens (from `python -m benchmarks.kernel_resources`).
SHARED = {16: 61_440, 32: 98_304, 128: 49_152}


class Tile(NamedTuple):
    """Holds a program's channels; the points or wave numbers that it takes at once in passes over large grids; its warps; and
    the pipeline stages of its loads."""

    channels: int
    block: int
    warps: int
    stages: int

    def options(self):
        return dict(num_warps=self.warps, num_stages=self.stages)


def tile(kernel, *sides, device):
    """Returns the Tile of a kernel on padded sides: (H, W) where a program holds all of a grid, else that of its axis."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return tuned(name).get(key(kernel, *sides)) or untuned(kernel, *sides)


def key(kernel, *sides):
    """Names a kernel on a grid in the table."""
    return f"{kernel} {' x '.join(map(str, sides))}"


def untuned(kernel, *sides):
    if kernel in ON_CHIP:
        return Tile(max(1, ON_CHIP[kernel] // (4 * sides[0] * sides[1])), 0, 8, 3)
    return Tile(32, 32, 8, 2 if kernel.endswith("along_x") else 1)


@cache
def tuned(name):
    """Returns the tiles of the GPU of that name, {key: Tile}."""
    tiles = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return {kernel: Tile(*values) for kernel, values in tiles.get(name, {}).items()}


def shared_memory(h, w):
    """Returns how many bytes of shared memory the kernels take on a grid of h x w tokens."""
    return SHARED[next(side for side in SHARED if max(h, w) <= side)]


@torch.compiler.assume_constant_result
@cache
def room(device):
    """Returns how many bytes of shared memory a program may have on a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
