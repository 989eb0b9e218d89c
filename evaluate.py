"""ADM's metrics between a reference and samples: Inception Score, FID, sFID, precision and recall.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples/<folder>.npz          (as ADM's evaluator.py)
    python evaluate.py photos/test samples/<folder> --features efficientnet-lite0    (where Inception's weights are missing)
    python evaluate.py --make-ref photos/train photos.npz                            (a reference with its statistics)

A side is an .npz with arr_0 (uint8, N x H x W x 3), with statistics (mu, sigma, mu_s, sigma_s) or with both, or a folder
of images. Images pass through the network as a stream; of them only the features stay.
"""

import argparse
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from scipy.special import rel_entr
from tqdm import tqdm

from data import DATASETS
from features import NETWORKS, open_network
from flags import positive
from images import ArrayImages, FolderImages, NpzImages, names, open_npz, write_npz
from parallel import ALONE, launch

BLOCK = 2**26   # distances at a time
STORED = 10_000  # images of a reference, as many as ADM's hold; statistics are of all


class Statistics:
    """Mean (D,) and covariance (D, D) of features that arrive in batches, in float64."""

    def __init__(self):
        self.count, self._mean, self._products = 0, 0, 0

    def add(self, features):
        """features (n, D), n >= 1, an array or a tensor on any device."""
        features = torch.as_tensor(features).detach().double()
        n, mean = len(features), features.mean(0)
        centred, apart = features - mean, mean - self._mean
        if self.count == 0:
            self._products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
        self._products.addmm_(centred.T, centred).addr_(apart, apart, alpha=self.count * n / (self.count + n))
        self.count += n
        self._mean = self._mean + apart * (n / self.count)

    def sum_over_processes(self):
        """Makes the statistics those of the features of all processes, each of which has some."""
        count, total = torch.tensor(self.count, device=self._mean.device), self._mean * self.count
        dist.all_reduce(count)
        dist.all_reduce(total)
        apart = self._mean - total / count
        self._products.addr_(apart, apart, alpha=self.count)
        dist.all_reduce(self._products)
        self.count, self._mean = int(count), total / count

    @property
    def mean(self):
        return self._mean.cpu().numpy()

    @property
    def covariance(self):
        """With N - 1 in the denominator, as np.cov."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images; there are {self.count}")
        return (self._products / (self.count - 1)).cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): of two Gaussians, mu (D,) and sigma (D, D).

    The trace of the root is the sum of the singular values of sigma1^(1/2) sigma2^(1/2). Symmetric roots come from
    eigenvalues and exist for singular covariances too, which need nothing on their diagonals here (ADM adds 1e-6 if its
    general root of the product is not finite). ValueError if shapes differ.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError(f"features of different sizes: {mu1.shape} and {mu2.shape}")
    (values1, vectors1), (values2, vectors2) = np.linalg.eigh(sigma1), np.linalg.eigh(sigma2)
    roots = (vectors1 * np.sqrt(values1.clip(min=0))).T @ (vectors2 * np.sqrt(values2.clip(min=0)))
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)


def inception_score(probabilities, split_size=5000):
    """exp of the mean divergence of p(class | image) (N, classes) from its average, averaged over splits in order."""
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size])
        divergence = rel_entr(p, p.mean(axis=0, keepdims=True)).sum(axis=1)  # p log p is 0 at 0
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


@torch.no_grad()
def precision_recall(ref, sample, k=3, block=None, exact=False, progress=False):
    """(precision, recall) of Kynkaanniemi et al. (2019), features (N, D) and (M, D), arrays or tensors of one device.

    Precision is the share of samples within the distance that some reference has to its k-th nearest other reference;
    recall is the same with the roles exchanged. Distances are ADM's, in float16 where that is finite, or with `exact`
    in float32. Takes memory for `block` rows of distances at a time.
    """
    ref, sample = (torch.as_tensor(a).float() for a in (ref, sample))
    if min(len(ref), len(sample)) <= k:
        raise ValueError(f"precision and recall need more than {k} images a side; there are {len(ref)} and {len(sample)}")
    block = block or max(1, BLOCK // max(len(ref), len(sample)))
    parts = [-(-len(ref) // block), -(-len(sample) // block)]
    bar = tqdm(total=2 * parts[0] + parts[1], desc="Distances", unit="block", disable=not progress)

    def distances(rows, features):
        for part in rows.split(block):
            yield _squared_distances(part, features, exact)
            bar.update()

    def radii(features):  # the nearest of all is the point itself
        return torch.cat([d.topk(k + 1, largest=False).values[:, k] for d in distances(features, features)])

    ref_radii, sample_radii = radii(ref), radii(sample)
    recalled, precise = [], torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
    for d, reach in zip(distances(ref, sample), ref_radii.split(block)):
        recalled.append((d <= sample_radii).any(1))
        precise |= (d <= reach[:, None]).any(0)
    bar.close()
    return precise.float().mean().item(), torch.cat(recalled).float().mean().item()


def _squared_distances(a, b, exact):
    """As ADM has them: in float16, which decides close calls, or in float32 where those are not finite."""
    if exact:
        return torch.cdist(a, b).square()
    half_a, half_b = a.half(), b.half()
    norm_a, norm_b = (x.float().square().sum(1).half() for x in (half_a, half_b))
    d = (half_a.float() @ half_b.float().T).half()
    d = d.mul_(-2).add_(norm_a[:, None]).add_(norm_b).clamp_(min=0)
    return d if d.isfinite().all() else torch.where(d.isfinite(), d.float(), _squared_distances(a, b, exact=True))


def kernel_distance(ref, sample):
    """KID of Binkowski et al. (2018), by torch-fidelity: (mean, standard deviation) over 100 pairs of subsets of at
    most 1,000 images."""
    try:
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    except ImportError as error:
        raise OSError(f"KID needs the package torch-fidelity: pip install torch-fidelity ({error})") from error
    size = min(1000, len(ref), len(sample))
    features = (torch.as_tensor(a).float().cpu() for a in (ref, sample))
    result = kid_features_to_metric(*features, kid_subset_size=size, verbose=False)
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


class Source(NamedTuple):
    """One side before a network has seen it. statistics: of the file, {"pool": (mu, sigma), ...}, or empty."""

    name: str
    images: object
    statistics: dict
    counted: int | None  # images behind the statistics, if the file says so


class Side(NamedTuple):
    """One side of a comparison. pool (N, D): features of its images in order, or None. statistics: {"pool": (mean,
    covariance), perhaps "spatial": ...}. counted: images behind them, None if unknown. sizes: the images' (H, W)."""

    name: str
    pool: torch.Tensor | None
    statistics: dict
    counted: int | None
    sizes: set


def open_source(source, network, crop=None, dataset=None):
    """A path or an array uint8 (N, H, W, 3) as a Source, after a look at its headers only; `crop` and `dataset`
    are for folders.

    Statistics in a file count if they are of the network's features. OSError or ValueError says what is wrong.
    """
    if not isinstance(source, str | os.PathLike):
        return Source("images in memory", ArrayImages(source), {}, None)
    path = Path(source)
    if not path.exists() and source != "digits":
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_file():
        return Source(str(path), FolderImages(str(source), crop, dataset), {}, None)
    with open_npz(path) as archive:
        held = names(archive)
    statistics, counted, misfit = read_statistics(path, network) if "mu" in held else ({}, None, None)
    if not statistics and "arr_0" not in held:
        raise ValueError(f"{path} holds {misfit or 'neither images (arr_0) nor statistics (mu, sigma)'}; it has {_list(held)}")
    return Source(str(path), NpzImages(path) if "arr_0" in held else None, statistics, counted)


def read_statistics(path, network):
    """(statistics, images behind them or None, None) of an .npz, or ({}, None, why they are not of the network)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features = str(arrays["features"]) if "features" in arrays else "inception"
            counted = int(arrays["count"]) if "count" in arrays else None
            keys = dict(pool=("mu", "sigma"), spatial=("mu_s", "sigma_s"))
            statistics = {name: tuple(arrays[k] for k in pair) for name, pair in keys.items() if pair[0] in arrays}
    except Exception as error:  # damaged bytes raise nearly anything
        raise OSError(f"cannot read the statistics in {path} ({error})") from error
    for name, (mu, sigma) in statistics.items():
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"{path}: {name} statistics of shapes {mu.shape} and {sigma.shape} are no mean and covariance")
    dim = len(statistics["pool"][0])
    if (features, dim) != (network.name, network.dim):
        return {}, None, f"statistics of {dim} features of {features}, not of {network.dim} of {network.name}"
    return statistics, counted, None


@torch.no_grad()
def measure(source, network, processes=ALONE, num=None, part=slice(None), batch_size=None):
    """A Source, as the network sees it: a Side, whole on rank 0.

    num takes that many of its images, evenly spread; part a slice of those. Without either, statistics in the file
    are taken as they are, and images serve what needs single ones.
    """
    if source.images is None:
        if num or part != slice(None):
            raise ValueError(f"{source.name} holds statistics and no images to choose from")
        return Side(source.name, None, source.statistics, source.counted, set())
    numbers = range(len(source.images))
    if num and num > len(numbers):
        raise ValueError(f"{source.name} holds {len(numbers):,} images, fewer than --num {num:,}")
    numbers = spread(len(numbers), num)[part]
    if len(numbers) < processes.size:
        raise ValueError(f"the {len(numbers)} images of {source.name} are fewer than the {processes.size} processes")
    batch_size = batch_size or (64 if processes.device.type == "cuda" else 16)
    batch_size = min(batch_size, len(numbers) // processes.size)
    starts = range(0, len(numbers), batch_size)[processes.rank :: processes.size]
    batches = [numbers[start : start + batch_size] for start in starts]

    network.to(processes.device, memory_format=torch.channels_last)
    pool = torch.zeros(len(numbers), network.dim, device=processes.device)
    sums, sizes = {}, set()
    progress = tqdm(source.images.read(batches), source.name, len(batches), unit="batch", disable=processes.rank > 0)
    with full_precision():
        for batch, start in zip(progress, starts):
            sizes |= {image.shape[:2] for image in batch}
            features = see(network, batch, processes.device)
            pool[start : start + len(batch)] = features["pool"]
            if not source.statistics or num or part != slice(None):
                for name, values in features.items():
                    sums.setdefault(name, Statistics()).add(values)
    if processes.size > 1:
        dist.reduce(pool, 0)  # rows that others filled are zero here
        for statistics in sums.values():
            statistics.sum_over_processes()
        everywhere = [None] * processes.size
        dist.all_gather_object(everywhere, sizes)
        sizes = set().union(*everywhere)
    if not sums:
        return Side(source.name, pool, source.statistics, source.counted, sizes)
    statistics = {name: (s.mean, s.covariance) for name, s in sums.items()}
    return Side(source.name, pool, statistics, len(numbers), sizes)


def spread(count, num=None):
    """The numbers of all of `count` images, or of `num` of them, evenly spread."""
    return [i * count // num for i in range(num)] if num else list(range(count))


def see(network, batch, device):
    """The features of a batch of uint8 (H, W, 3), in order; images of one size go together."""
    shapes, features = [image.shape for image in batch], {}
    for shape in dict.fromkeys(shapes):
        rows = [row for row, other in enumerate(shapes) if other == shape]
        images = torch.from_numpy(np.stack([batch[row] for row in rows])).permute(0, 3, 1, 2).to(device)
        for name, values in network(images).items():
            features.setdefault(name, values.new_empty(len(batch), values.shape[1]))[rows] = values
    return features


@contextmanager
def full_precision():
    """Without TF32, which would move features by 1e-3."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@torch.no_grad()
def compare(ref, sample, network, exact=False, kid=False, prefix="", progress=False):
    """Every metric that two Sides allow: a dict of floats by name, in ADM's order.

    The names FID, sFID, KID, precision and recall are for Inception's 2048 features; those of other features say so.
    Other layers of Inception give the distance alone.
    """
    inception, results = network.name == "inception", {}
    full = not (inception and network.label)
    suffix = f"-{network.label}" if network.label else ""
    with full_precision():
        if inception and full and sample.pool is not None and not prefix:
            probabilities = [network.probabilities(part).cpu().numpy() for part in sample.pool.split(5000)]
            results["Inception Score"] = inception_score(np.concatenate(probabilities))
        for features, name in dict(pool=("FID" if inception else "FD") + suffix, spatial="sFID").items():
            if features in ref.statistics and features in sample.statistics:
                results[prefix + name] = frechet_distance(*ref.statistics[features], *sample.statistics[features])
        if full and ref.pool is not None and sample.pool is not None:
            pair = precision_recall(ref.pool, sample.pool, exact=exact, progress=progress)
            results |= {prefix + "Precision" + suffix: pair[0], prefix + "Recall" + suffix: pair[1]}
            if kid:
                name = prefix + ("KID" if inception else "KD") + suffix
                results[name], results[f"{name} std"] = kernel_distance(ref.pool, sample.pool)
    return results


def warnings_of(ref, sample, network):
    """What a reader of the numbers must know: too few images, images of different sizes."""
    found = []
    for side in (ref, sample):
        for features, (mu, _) in side.statistics.items():
            if side.counted is not None and side.counted <= len(mu):
                found.append(
                    f"{side.counted:,} images of {side.name} are not more than the {len(mu):,} {features} features: their "
                    "covariance is singular and the distance biased upwards; compare it only at equal numbers of images"
                )
        if len(side.sizes) > 1:
            found.append(f"{side.name} has images of {len(side.sizes)} sizes, {_sizes(side)}; each is resized for the network")
    if ref.sizes and sample.sizes and ref.sizes != sample.sizes:
        found.append(f"references of {_sizes(ref)} and samples of {_sizes(sample)}; all are resized for the network")
    return found


def report(results, ref, sample, network, to=None):
    """Prints results with what they rest on, one line each, and writes them as JSON to the file `to`, or prints that
    alone if it is "-"."""
    warnings = warnings_of(ref, sample, network)
    layer = f"{network.dim} features of {network.name}"
    row = {"features": layer, "warnings": warnings}
    for role, side in (("reference", ref), ("samples", sample)):
        row[role] = dict(source=side.name, images=0 if side.pool is None else len(side.pool), size=_sizes(side))
        row[role]["images_in_statistics"] = side.counted
    text = json.dumps(results | row, indent=1)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if to == "-":
        print(text)
        return
    print(f"Reference: {_describe(ref)}\nSamples: {_describe(sample)}")
    for name, value in results.items():
        print(f"{name}: {value:<20} ({_basis(name, ref, sample, network)})")
    if to:
        partial = Path(f"{to}.{os.getpid()}.partial")
        partial.write_text(text + "\n")
        os.replace(partial, to)


def _describe(side):
    if side.pool is None:
        return f"{side.name}, statistics only"
    size = f" of {_sizes(side)}" if side.sizes else ""
    return f"{side.name}, {len(side.pool):,} images{size}" + ("" if len(side.pool) == side.counted else ", and statistics")


def _basis(name, ref, sample, network):
    """The images and features that a number rests on."""
    features = f"{2023 if 'sFID' in name else network.dim} features of {network.name}"
    if name == "Inception Score":
        return f"{len(sample.pool):,} samples; {features}"
    by_statistics = name.split()[-1].split("-")[0] in ("FID", "sFID", "FD")
    n, m = (side.counted if by_statistics else len(side.pool) for side in (sample, ref))
    return f"{_count(n)} samples and {_count(m)} references; {features}"


def _count(n):
    return "an unknown number of" if n is None else f"{n:,}"


def _sizes(side):
    ordered = sorted(side.sizes)
    return " to ".join(f"{h} x {w}" for h, w in dict.fromkeys(ordered[:1] + ordered[-1:])) or None


def _list(held):
    return ", ".join(held) or "nothing"


class FeatureFile(NamedTuple):
    """Stands for the network where features were computed elsewhere."""

    name: str
    dim: int
    label: str = "file"


def read_features(path, names_):
    """(FeatureFile, a Side for each name) of an .npz that holds arrays (N, D) by those names."""
    sides = []
    with open_npz(path), np.load(path, allow_pickle=False) as arrays:
        for name in names_:
            if name not in arrays:
                raise ValueError(f"{path} has no array {name!r} of features; it has {_list(arrays.files)}")
            pool = arrays[name]
            if pool.ndim != 2 or pool.dtype.kind != "f" or not np.isfinite(pool).all():
                raise ValueError(f"{name} in {path} is {pool.dtype} {pool.shape}; features are finite floats (N, D)")
            sums = Statistics()
            sums.add(pool)
            pool = torch.from_numpy(pool).float()
            sides.append(Side(f"{name} of {path}", pool, dict(pool=(sums.mean, sums.covariance)), len(pool), set()))
    return FeatureFile(Path(path).name, sides[0].pool.shape[1]), sides


def make_reference(source, path, network, processes, num, batch_size):
    """Writes statistics of a Source, and STORED of its images at most, evenly spread, into an .npz that evaluation and ADM's
    evaluator take as reference."""
    side = measure(source, network, processes, num, batch_size=batch_size)
    if processes.rank > 0:
        return
    if len(side.sizes) > 1:
        raise ValueError(f"{source.name} has images of {len(side.sizes)} sizes, {_sizes(side)}; --image-size crops to one")
    arrays = dict(zip(("mu", "sigma"), side.statistics["pool"]))
    arrays |= dict(zip(("mu_s", "sigma_s"), side.statistics.get("spatial", ())))
    counted = spread(len(source.images), num)
    numbers = [[counted[place]] for place in spread(len(counted), min(STORED, len(counted)))]
    images = (batch[0] for batch in source.images.read(numbers))
    progress = tqdm(images, f"Writing {path}", len(numbers), unit="image")
    write_npz(path, progress, len(numbers), **arrays, features=network.name, count=side.counted)
    stored = f"{len(numbers):,} of them" if len(numbers) < side.counted else "the images"
    print(f"Saved statistics of {side.counted:,} images ({network.name}) and {stored}, {_sizes(side)}, to {path}")


def main(args, processes):
    check(args)
    if args.features.endswith(".npz"):
        network, (ref, sample) = read_features(args.features, (args.ref, args.samples))
    else:
        network = open_network(args.features, args.weights, args.feature_dim)
        if args.make_ref:
            folder, out = args.make_ref
            source = open_source(folder, network, args.image_size, args.dataset)
            say_what_was_left_out([source], processes)
            make_reference(source, out, network, processes, args.num, args.batch_size)
            return
        paths = [args.ref, args.ref] if args.halves else [args.ref, args.samples]
        sources = [open_source(path, network, args.image_size) for path in paths]  # what is wrong shows before the work
        say_what_was_left_out(sources, processes)
        parts = [slice(0, None, 2), slice(1, None, 2)] if args.halves else [slice(None)] * 2
        ref, sample = (
            measure(source, network, processes, args.num, part, args.batch_size) for source, part in zip(sources, parts)
        )
    if processes.rank == 0:
        prefix = "Internal " if args.halves else ""
        results = compare(ref, sample, network, args.exact_distances, args.kid, prefix, progress=True)
        report(results, ref, sample, network, args.json)


def say_what_was_left_out(sources, processes):
    if processes.rank == 0:
        for line in dict.fromkeys(line for source in sources for line in getattr(source.images, "remarks", [])):
            print(line, file=sys.stderr)


def check(args):
    """ValueError for flags that cannot go together."""
    if args.make_ref and (args.ref or args.halves or args.features.endswith(".npz")):
        raise ValueError("--make-ref FOLDER OUT.npz stands alone")
    if args.dataset and not args.make_ref:
        raise ValueError("--dataset says what the FOLDER of --make-ref holds, and means nothing without it")
    if args.halves and args.samples:
        raise ValueError("--halves compares one set with itself; leave SAMPLES out")
    if not args.make_ref and not (args.ref and (args.samples or args.halves)):
        raise ValueError("REF and SAMPLES are needed (or REF --halves, or --make-ref FOLDER OUT.npz)")
    if args.features.endswith(".npz") and (args.halves or args.num or args.weights or args.feature_dim):
        raise ValueError("--halves, --num, --weights and --feature-dim are for networks, not for features in a file")


def add_feature_flags(add):
    others = "an .npz of features from elsewhere, whose arrays REF and SAMPLES name"
    add("--features", default="inception", metavar="NAME", help=f"{', '.join(NETWORKS)}, or {others}")
    add("--weights", metavar="FILE", help="of Inception; by default the file in PyTorch's hub cache")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="ADM's metrics between a reference and samples.")
    add = parser.add_argument
    add("ref", nargs="?", metavar="REF", help=".npz with arr_0, with statistics (mu, sigma, ...) or both; a folder of images")
    add("samples", nargs="?", metavar="SAMPLES", help="the same")
    add_feature_flags(add)
    add("--feature-dim", type=positive, metavar="N", help="layer of Inception by its channels: 64, 192, 768 or 2048 (default)")
    # torchrun takes --num for an abbreviation of an option of its own.
    add("--num", "--num-images", type=positive, metavar="N", help="take so many images of each side, evenly spread")
    add("--dataset", choices=DATASETS, help="which of the paper's data sets the FOLDER of --make-ref holds")
    add("--image-size", type=positive, help="crop a folder's images to squares of that side, as training does")
    add("--halves", action="store_true", help="compare REF's images of even and of odd number: the internal FID")
    add("--kid", action="store_true", help="also the kernel distance, by torch-fidelity")
    add("--exact-distances", action="store_true", help="precision and recall from float32 distances, where ADM has float16")
    add("--make-ref", nargs=2, metavar=("FOLDER", "OUT.npz"), help="write a reference: images and statistics")
    add("--json", metavar="FILE", help="write the numbers there as JSON; - prints nothing else")
    add("--batch-size", type=positive, help="images at a time and process; by default 64 on CUDA and 16 on CPUs")
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
