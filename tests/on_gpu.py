"""Where tests of the mark `gpu` run: on a GPU, or else on the CPU. There the suite tries a few of them, and `python -m
benchmarks.gpu --rehearse`, which sets REHEARSE, all, so that no mistyped word is found on a GPU alone."""

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0 if torch.cuda.is_available() else None)
CPU = pytest.mark.skipif(DEVICE.type == "cuda", reason="of what stands for a GPU")
CUDA = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
NEEDS_ONE = pytest.mark.skipif(DEVICE.type == "cpu" and "REHEARSE" not in os.environ, reason="needs a GPU, or REHEARSE")
BACKEND = "auto" if DEVICE.type == "cuda" else "default"  # Triton's kernels, which the interpreter makes slow


def first_everywhere(names):
    """Parameters of which all but the first need a GPU."""
    first, *others = names
    return [first, *(pytest.param(other, marks=NEEDS_ONE) for other in others)]
