"""Says how much Frechet distances of a few samples differ by chance alone:

    python -m reproduce.chance REF.npz SAMPLES.npz... [--num 256] [--features efficientnet-lite0] [--json FILE]

REF.npz is a reference of `evaluate.py --make-ref`. The samples of each file, and the reference's own images, are dealt out at
random into as many sets of --num as there are, and each set is compared with the reference's statistics. A row has the mean of
their distances, its standard deviation from set to set and the range, and the distance of all samples together.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from evaluation.features import add_feature_flags, open_network
from evaluation.metrics import Statistics, frechet_distance
from evaluation.sides import measure, open_source
from machine.files import write_json
from machine.flags import positive
from machine.processes import launch


def distances(pool, reference, num, seed=0):
    """Deals features (N, D) out at random into sets of num, and returns the Frechet distance of each from the statistics
    (mean (D,), covariance (D, D)). ValueError if they do not fill two sets."""
    if len(pool) < 2 * num:
        raise ValueError(f"{len(pool):,} images do not make two sets of {num:,}: a smaller --num may")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return [distance(pool[part], reference) for part in order.split(num) if len(part) == num]


def distance(pool, reference):
    """Returns the Frechet distance of features (N, D) from the statistics (mean (D,), covariance (D, D))."""
    statistics = Statistics()
    statistics.add(pool)
    return frechet_distance(statistics.mean, statistics.covariance, *reference)


def main(ref, samples, num, features, weights, feature_dim, json):
    network = open_network(features, weights, feature_dim)
    real = measure(open_source(ref, network), network)
    rows = {}
    print(f"| {num:,} of | sets | mean distance | standard deviation | range | all together |", "|---" * 6 + "|", sep="\n")
    for path in (ref, *samples):
        pool = real.pool if path == ref else measure(open_source(path, network), network).pool
        if pool is None:
            raise ValueError(f"{path} holds statistics without images; `evaluate.py --make-ref` keeps both")
        of_sets, whole = distances(pool, real.statistics["pool"], num), distance(pool, real.statistics["pool"])
        row = dict(sets=len(of_sets), mean=np.mean(of_sets), standard_deviation=np.std(of_sets, ddof=1))
        row |= dict(least=min(of_sets), most=max(of_sets), whole=whole, images=len(pool))
        rows[str(path)] = row
        numbers = [f"{row[name]:.4g}" for name in ("mean", "standard_deviation")]
        cells = [path, row["sets"], *numbers, f"{row['least']:.4g} to {row['most']:.4g}", f"{whole:.4g}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if json:
        write_json(json, dict(num=num, features=f"{network.dim} features of {network.name}", rows=rows), "distances")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("ref", metavar="REF.npz")
    add("samples", metavar="SAMPLES.npz", nargs="*")
    add("--num", type=positive, default=256, help="images in a set")
    add_feature_flags(add)
    add("--feature-dim", type=positive, metavar="N", help="layer of Inception by its channels")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(lambda args, _: main(**vars(args)), parse_args())
