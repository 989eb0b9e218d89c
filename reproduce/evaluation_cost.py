"""What evaluation costs, on made-up data (Linux):

    python reproduce/evaluation_cost.py network       time per image in Inception with random weights
    python reproduce/evaluation_cost.py metrics       all five metrics on features of 50,000 samples and 10,000 references

Both print wall-clock time, processor time (which other processes do not stretch) and the peak memory of the process.
"""

import argparse
import resource
import sys
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluation.features import Inception
from evaluation.metrics import Statistics
from evaluation.report import compare
from evaluation.sides import Side, measure, open_source
from machine.flags import positive


def network(args):
    images = np.random.default_rng(0).integers(0, 256, (args.images, args.side, args.side, 3), dtype=np.uint8)
    inception = Inception().eval()
    source = open_source(images, inception)
    wall, busy = perf_counter(), process_time()
    measure(source, inception)
    wall, busy = ((end - start) / args.images for end, start in ((perf_counter(), wall), (process_time(), busy)))
    print(f"{args.images:,} images of side {args.side}: {wall:.3f} s and {busy:.3f} core seconds an image")
    print(f"50,000 images: {50_000 * wall / 3600:.2f} hours, {50_000 * busy / 3600:.2f} core hours")


def metrics(args):
    ref, sample = (made_up(n, seed) for seed, n in enumerate((args.references, args.samples)))
    wall, busy = perf_counter(), process_time()
    for name, value in compare(ref, sample, Inception().eval(), progress=True).items():
        print(f"{name}: {value:.4f}")
    wall, busy = perf_counter() - wall, process_time() - busy
    print(f"{args.samples:,} samples and {args.references:,} references: {wall:.0f} s, {busy:.0f} core seconds")


def made_up(n, seed):
    """A Side whose features are random: positive, as Inception's are."""
    generator = torch.Generator().manual_seed(seed)
    pool, sums = torch.empty(n, 2048), dict(pool=Statistics(), spatial=Statistics())
    for part in pool.split(1000):
        part.copy_(torch.randn(part.shape, generator=generator).square_())
        sums["pool"].add(part)
        sums["spatial"].add(part[:, :2023])
    return Side("made up", pool, {name: (s.mean, s.covariance) for name, s in sums.items()}, n, set())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time and memory of evaluation.")
    parser.add_argument("what", choices=["network", "metrics"])
    parser.add_argument("--images", type=positive, default=2000)
    parser.add_argument("--side", type=positive, default=32)
    parser.add_argument("--samples", type=positive, default=50_000)
    parser.add_argument("--references", type=positive, default=10_000)
    parser.add_argument("--threads", type=positive, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dict(network=network, metrics=metrics)[args.what](args)
    print(f"{args.threads} threads, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")
