"""Measures what evaluation costs, on made-up data (Linux):

    python -m benchmarks.evaluation_cost network       time per image in Inception with random weights
    python -m benchmarks.evaluation_cost metrics       all five metrics on features of 50,000 samples and 10,000 references

Both print wall-clock time, processor time (which other processes do not stretch) and the peak memory of the process.
"""

import argparse
from time import perf_counter, process_time

import numpy as np
import torch

from evaluation.features import Inception
from evaluation.metrics import Statistics
from evaluation.report import compare
from evaluation.sides import Side, measure, open_source
from machine.cost import peak_memory
from machine.flags import positive
from machine.processes import ALONE


def network(count, side):
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    inception = Inception().eval()
    source = open_source(images, inception)
    wall, busy = perf_counter(), process_time()
    measure(source, inception)
    wall, busy = ((end - start) / count for end, start in ((perf_counter(), wall), (process_time(), busy)))
    print(f"{count:,} images of side {side}: {wall:.3f} s and {busy:.3f} core seconds an image")
    print(f"50,000 images: {50_000 * wall / 3600:.2f} hours, {50_000 * busy / 3600:.2f} core hours")


def metrics(samples, references):
    ref, sample = (made_up(n, seed) for seed, n in enumerate((references, samples)))
    wall, busy = perf_counter(), process_time()
    for name, value in compare(ref, sample, Inception().eval(), progress=True).items():
        print(f"{name}: {value:.4f}")
    wall, busy = perf_counter() - wall, process_time() - busy
    print(f"{samples:,} samples and {references:,} references: {wall:.0f} s, {busy:.0f} core seconds")


def made_up(n, seed):
    """Makes a Side whose features are random and positive, as Inception's are."""
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
    if args.what == "network":
        network(args.images, args.side)
    else:
        metrics(args.samples, args.references)
    print(f"{args.threads} threads, peak memory {peak_memory(ALONE.device) / 2**30:.2f} GB")
