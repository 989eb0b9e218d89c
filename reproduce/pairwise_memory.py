"""Peak memory of training one pairwise layer, 256 tokens, 384 channels, batch 8, above what was resident before (Linux):

    export MALLOC_MMAP_THRESHOLD_=65536            glibc hands freed memory back; what it keeps varies by 0.2 GB
    python reproduce/pairwise_memory.py            as it is
    python reproduce/pairwise_memory.py plain      all wave vectors at once, autograd keeping everything
"""

import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import pde_ssm


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


torch.set_num_threads(1)
if sys.argv[1:] == ["plain"]:
    pde_ssm.CHUNK = 2**62
pde_ssm.PDESSM(16, coupling="pairwise")(torch.randn(1, 16, 4, 4)).mean().backward()  # loads the libraries
layer, u = pde_ssm.PDESSM(384, coupling="pairwise"), torch.randn(8, 384, 16, 16, requires_grad=True)
before = peak()
layer(u).square().mean().backward()
print(f"{peak() - before:.2f} GB")
