"""ADM's metrics between a reference and samples: Inception Score, FID, sFID, precision and recall.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples/<folder>.npz          (as ADM's evaluator.py)
    python evaluate.py photos/test samples/<folder> --features efficientnet-lite0    (where Inception's weights are missing)
    python evaluate.py --make-ref photos/train photos.npz                            (a reference with its statistics)

A side is an .npz with arr_0 (uint8, N x H x W x 3), with statistics (mu, sigma, mu_s, sigma_s) or with both, or a folder
of images. Images pass through the network as a stream; of them only the features stay.
"""

import argparse
import json
import math
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

from evaluation.features import NETWORKS, open_network
from images.named import DATASETS
from images.samples import ArrayImages, FolderImages, NpzImages, names, open_npz, write_npz
from machine.files import whole_file
from machine.flags import positive
from machine.processes import ALONE, launch

NEAREST = 3      # of the neighbours whose distance is a radius in precision and recall
BLOCK = 10_000   # rows and columns of distances at a time, ADM's
SPLIT = 5000     # images of a split of the Inception Score
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
    general root of the product is not finite). What rounding makes negative is 0. ValueError if shapes differ or values are
    not finite.
    """
    mu1, sigma1, mu2, sigma2 = given = [np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2)]
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError(f"features of different sizes: {mu1.shape} and {mu2.shape}")
    if not all(np.isfinite(a).all() for a in given):
        raise ValueError("a mean or a covariance is not finite")
    (values1, vectors1), (values2, vectors2) = np.linalg.eigh(sigma1), np.linalg.eigh(sigma2)
    roots = (vectors1 * np.sqrt(values1.clip(min=0))).T @ (vectors2 * np.sqrt(values2.clip(min=0)))
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    return max(float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap), 0.0)


def inception_score(probabilities, split_size=SPLIT):
    """exp of the mean divergence of p(class | image) (N, classes) from its average, averaged over splits in order."""
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size])
        divergence = rel_entr(p, p.mean(axis=0, keepdims=True)).sum(axis=1)  # p log p is 0 at 0
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


@torch.no_grad()
def precision_recall(ref, sample, k=NEAREST, block=BLOCK, exact=False, progress=False):
    """(precision, recall) of Kynkaanniemi et al. (2019), features (N, D) and (M, D), arrays or tensors of one device.

    Precision is the share of samples within the distance that some reference has to its k-th nearest other reference;
    recall is the same with the roles exchanged. Distances are ADM's, in float16 or, in blocks where one of them is not
    finite there, in float32; with `exact` they have float64's precision. Takes memory for block x block of them.
    """
    ref, sample = map(torch.as_tensor, (ref, sample))
    if min(len(ref), len(sample)) <= k:
        raise ValueError(f"precision and recall need more than {k} images a side; there are {len(ref)} and {len(sample)}")
    if exact:  # from the middle, so that a common offset costs no digits
        middle, block = ref.double().mean(0), min(block, 2000)
        ref, sample = ref - middle, sample - middle
    refs, samples = ref.split(block), sample.split(block)
    blocks = len(refs) ** 2 + len(samples) ** 2 + len(refs) * len(samples)
    bar = tqdm(total=blocks, desc="Distances", unit="block", disable=not progress)

    def distances(rows, columns):
        bar.update()
        d = (_exact_distances if exact else _distances)(rows, columns)
        if not d.isfinite().all():
            raise ValueError("precision and recall: features are too large for their squared distances to be finite")
        return d

    def radii(parts):  # the nearest of all is the point itself
        for rows in parts:
            near = [distances(rows, part).topk(min(k + 1, len(part)), largest=False).values for part in parts]
            yield torch.cat(near, 1).topk(k + 1, largest=False).values[:, k]

    ref_radii, sample_radii = list(radii(refs)), list(radii(samples))
    recalled = [torch.zeros(len(part), dtype=torch.bool, device=ref.device) for part in refs]
    precise = [torch.zeros(len(part), dtype=torch.bool, device=ref.device) for part in samples]
    for i, rows in enumerate(refs):
        for j, columns in enumerate(samples):
            d = distances(rows, columns)
            recalled[i] |= (d <= sample_radii[j]).any(1)
            precise[j] |= (d <= ref_radii[i][:, None]).any(0)
    bar.close()
    return tuple(torch.cat(inside).double().mean().item() for inside in (precise, recalled))


def _distances(a, b):
    """(n, m), squared. float16 decides close calls in ADM's, and one entry beyond it takes the whole block to float32; here
    products are summed in float64, so that equal features have equal distances."""
    for dtype in (torch.float16, torch.float32):
        wide_a, wide_b = (x.to(dtype).double() for x in (a, b))
        norm_a, norm_b = (x.square().sum(1).to(dtype) for x in (wide_a, wide_b))
        d = torch.cat([(rows @ wide_b.T).to(dtype) for rows in wide_a.split(1000)])
        d = d.mul_(-2).add_(norm_a[:, None]).add_(norm_b).clamp_(min=0)
        if d.isfinite().all():
            break
    return d


def _exact_distances(a, b):
    """(n, m), squared, of float64: right to 1e-9 of themselves, and 0 between equal features."""
    norm_a, norm_b = a.square().sum(1)[:, None], b.square().sum(1)
    d = (a @ b.T).mul_(-2).add_(norm_a).add_(norm_b)
    for near in (d <= 1e-6 * (norm_a + norm_b)).nonzero().split(1000):  # whose digits the sums have lost
        i, j = near.T
        d[i, j] = (a[i] - b[j]).square().sum(1)
    return d


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
    """One side before a network has seen it. images: all there are, or None. numbers: of those that count. statistics: of
    the file, {"pool": (mu, sigma), ...}, or empty."""

    name: str
    images: object
    numbers: list
    statistics: dict
    counted: int | None  # images behind the statistics, if the file says so

    @property
    def shown(self):
        """How many images count."""
        return len(self.numbers)

    @property
    def remarks(self):
        """Lines that say which files of a folder are no images."""
        return getattr(self.images, "remarks", [])


class Side(NamedTuple):
    """One side of a comparison. pool (N, D): features of its images in order, or None. statistics: {"pool": (mean,
    covariance), perhaps "spatial": ...}. counted: images behind them, None if unknown. sizes: the images' (H, W)."""

    name: str
    pool: torch.Tensor | None
    statistics: dict
    counted: int | None
    sizes: set

    @property
    def shown(self):
        return 0 if self.pool is None else len(self.pool)


def open_source(source, network, crop=None, dataset=None, num=None, part=slice(None)):
    """A path or an array uint8 (N, H, W, 3) as a Source, after a look at its headers only.

    crop and dataset are for folders. num takes that many of its images, evenly spread; part a slice of those. Without
    either, statistics in the file count if they are of the network's features, and images serve what needs single ones.
    OSError or ValueError says what is wrong.
    """
    statistics, counted, misfit = {}, None, None
    if not isinstance(source, str | os.PathLike):
        name, images = "images in memory", ArrayImages(source)
    elif Path(source).is_file():
        name = str(source)
        with open_npz(source) as archive:
            held = names(archive)
        images = NpzImages(source) if "arr_0" in held else None
        if "mu" in held:
            statistics, counted, misfit = read_statistics(source, network)
        if not statistics and images is None:
            nothing = misfit or "neither images (arr_0) nor statistics (mu, sigma)"
            raise ValueError(f"{source} holds {nothing}; it has {_list(held)}")
    elif Path(source).exists() or source == "digits":
        name, images = str(source), FolderImages(str(source), crop, dataset)
    else:
        raise FileNotFoundError(f"{source}: no such file or folder")
    if num or part != slice(None):
        statistics, counted = {}, None
        if images is None:
            raise ValueError(f"{name} holds statistics and no images to choose from")
        if num and num > len(images):
            raise ValueError(f"{name} holds {len(images):,} images, fewer than --num {num:,}")
    return Source(name, images, spread(len(images), num)[part] if images else [], statistics, counted)


def read_statistics(path, network):
    """(statistics, images behind them or None, None) of an .npz, or ({}, None, why they are not of the network)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features = str(arrays["features"]) if "features" in arrays else "inception"
            counted = int(arrays["count"]) if "count" in arrays else None
            keys = dict(pool=("mu", "sigma"), spatial=("mu_s", "sigma_s"))
            statistics = {name: tuple(arrays[k] for k in pair) for name, pair in keys.items() if pair[0] in arrays}
    except Exception as error:  # damaged bytes raise nearly anything
        raise OSError(f"cannot read the statistics in {path} ({_reason(error)})") from error
    for name, (mu, sigma) in statistics.items():
        if problem := _no_gaussian(mu, sigma):
            raise ValueError(f"{path}: {name} statistics {problem}; they are a mean (D,) and its covariance (D, D)")
    dim = len(statistics["pool"][0])
    if (features, dim) != (network.name, network.dim):
        return {}, None, f"statistics of {dim} features of {features}, not of {network.dim} of {network.name}"
    return statistics, counted, None


def _reason(error):
    return "it holds Python objects, not numbers" if "allow_pickle" in str(error) else error


def _no_gaussian(mu, sigma):
    """What is wrong with a mean and a covariance, or None."""
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)) or not {mu.dtype.kind, sigma.dtype.kind} <= set("iuf"):
        return f"are {mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}"
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return "are not finite"
    sigma = sigma.astype(np.float64)
    values, apart = np.linalg.eigvalsh(sigma), np.abs(sigma - sigma.T).max()
    if max(apart, -values[0]) > 1e-3 * values[-1]:  # rounding to float32 leaves less
        return f"have no covariance: eigenvalues from {values[0]:.3g} to {values[-1]:.3g}, {apart:.3g} off symmetry"
    return None


@torch.no_grad()
def measure(source, network, processes=ALONE, batch_size=None):
    """A Source, as the network sees it: a Side, whole on rank 0. Every process needs an image. ValueError on all processes
    if a feature is not finite."""
    if source.images is None:
        return Side(source.name, None, source.statistics, source.counted, set())
    numbers = source.numbers
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
            if not source.statistics:
                for name, values in features.items():
                    sums.setdefault(name, Statistics()).add(values)
    wrong = [numbers[row] for row in (~pool.isfinite().all(1)).nonzero().flatten().tolist()]
    if any(processes.any(bool(wrong), not all(np.isfinite(s.mean).all() for s in sums.values()))):
        which = f"image {wrong[0]}" if wrong else "an image"
        raise ValueError(f"{source.name}: features of {which} are not finite in {network.name}")
    if processes.size > 1:
        dist.reduce(pool, 0)  # rows that others filled are zero here
        for statistics in sums.values():
            statistics.sum_over_processes()
        everywhere = [None] * processes.size
        dist.all_gather_object(everywhere, sizes)
        sizes = set().union(*everywhere)
    if source.statistics:
        return Side(source.name, pool, source.statistics, source.counted, sizes)
    statistics = {name: (s.mean, s.covariance) for name, s in sums.items() if s.count > 1}
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


def metrics(network, kid=False, prefix=""):
    """What the network's features define, in ADM's order: {what it is made of: (its name, the images that it takes)}.

    The names FID, sFID, KID, precision and recall are for Inception's 2048 features; those of other features say so.
    Other layers of Inception give the distance alone.
    """
    inception, suffix = network.name == "inception", f"-{network.label}" if network.label else ""
    pool, whole = (prefix + ("FID" if inception else "FD") + suffix, 2), not (inception and suffix)
    found = {"classes": ("Inception Score", 1)} if inception and whole and not prefix else {}
    found |= {"pool": pool} | ({"spatial": (f"{prefix}sFID", 2)} if inception and whole else {})
    if whole:
        found["neighbours"] = f"{prefix}Precision{suffix}, {prefix}Recall{suffix}", NEAREST + 1
        found |= {"kernel": (prefix + ("KID" if inception else "KD") + suffix, 2)} if kid else {}
    return found


def left_out(ref, sample, network, kid=False, prefix=""):
    """{what it is made of: a line} for the metrics that two sides, Sources or Sides, hold too little for. ValueError if that
    are all."""
    wanted, lines = metrics(network, kid, prefix), {}
    for kind, (name, least) in wanted.items():
        needs = f"{least} image{'s' * (least > 1)}" + (f" or {kind} statistics" if kind in ("pool", "spatial") else "")
        for side in (sample,) if kind == "classes" else (ref, sample):
            enough = kind in side.statistics if "statistics" in needs and side.statistics else side.shown >= least
            if not enough:
                lines[kind] = f"{name}: not without {needs} a side, and {side.name} holds {_held(side)}"
    if len(lines) == len(wanted):
        raise ValueError("; ".join(lines.values()))
    return lines


def look_ahead(ref, sample, network, processes, kid=False, prefix=""):
    """Says, before a network runs, which images of two Sources and which metrics are left out. ValueError if that are all, or
    if some process would see no image."""
    for source in (ref, sample):
        if 0 < source.shown < processes.size:
            raise ValueError(f"the {source.shown} images of {source.name} are fewer than the {processes.size} processes")
    say([*ref.remarks, *sample.remarks, *left_out(ref, sample, network, kid, prefix).values()], processes)


def say(lines, processes):
    for line in dict.fromkeys(lines) if processes.rank == 0 else ():
        print(line, file=sys.stderr)


@torch.no_grad()
def compare(ref, sample, network, exact=False, kid=False, prefix="", progress=False):
    """Every metric that two Sides allow: a dict of floats by name, in ADM's order."""
    missing, results = left_out(ref, sample, network, kid, prefix), {}
    with full_precision():
        for kind, (name, _) in metrics(network, kid, prefix).items():
            if kind in missing:
                continue
            if kind == "classes":
                probabilities = [network.probabilities(part).cpu().numpy() for part in sample.pool.split(SPLIT)]
                results[name] = inception_score(np.concatenate(probabilities))
            elif kind == "neighbours":
                pair = precision_recall(ref.pool, sample.pool, exact=exact, progress=progress)
                results |= dict(zip(name.split(", "), pair))
            elif kind == "kernel":
                results[name], results[f"{name} std"] = kernel_distance(ref.pool, sample.pool)
            else:
                results[name] = frechet_distance(*ref.statistics[kind], *sample.statistics[kind])
    return results


def warnings_of(results, ref, sample):
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
    last = sample.shown % SPLIT
    if "Inception Score" in results and sample.shown > SPLIT and 0 < last < SPLIT / 2:
        found.append(
            f"the last split of the Inception Score has {last:,} of {SPLIT:,} images and counts as much as the others, which "
            f"lowers it (as in ADM's evaluator); compare it at multiples of {SPLIT:,}"
        )
    return found


def report(results, ref, sample, network, to=None):
    """Prints results with what they rest on, one line each, and writes them as JSON to the file `to`, or prints that
    alone if it is "-". ValueError, in the end, for those that are not finite, which it leaves out."""
    wrong = [f"{name} is {value}" for name, value in results.items() if not math.isfinite(value)]
    results = {name: value for name, value in results.items() if math.isfinite(value)}
    warnings = warnings_of(results, ref, sample)
    layer = f"{network.dim} features of {network.name}"
    row = {"features": layer, "warnings": warnings}
    for role, side in (("reference", ref), ("samples", sample)):
        row[role] = dict(source=side.name, images=side.shown, size=_sizes(side), images_in_statistics=side.counted)
    text = json.dumps(results | row, indent=1)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if to == "-":
        print(text)
    else:
        print(f"Reference: {_describe(ref)}\nSamples: {_describe(sample)}")
        for name, value in results.items():
            print(f"{name}: {value:<20} ({_basis(name, ref, sample, network)})")
        if to:
            with whole_file(to, "metrics") as file:
                file.write(f"{text}\n".encode())
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: no number to report")


def _describe(side):
    if side.pool is None:
        return f"{side.name}, statistics only"
    size = f" of {_sizes(side)}" if side.sizes else ""
    return f"{side.name}, {_images(side)}{size}" + ("" if side.shown == side.counted else ", and statistics")


def _held(side):
    """Of a Source or a Side, for a message."""
    statistics = f"{' and '.join(side.statistics)} statistics" if side.statistics else ""
    return " and ".join(filter(None, (statistics, _images(side) if side.shown or not statistics else "")))


def _images(side):
    return f"{side.shown:,} image{'s' * (side.shown != 1)}"


def _basis(name, ref, sample, network):
    """The images and features that a number rests on."""
    features = f"{2023 if 'sFID' in name else network.dim} features of {network.name}"
    if name == "Inception Score":
        return f"{sample.shown:,} samples; {features}"
    by_statistics = name.split()[-1].split("-")[0] in ("FID", "sFID", "FD")
    n, m = (side.counted if by_statistics else side.shown for side in (sample, ref))
    return f"{_count(n)} samples and {_count(m)} references; {features}"


def _count(n):
    return "an unknown number of" if n is None else f"{n:,}"


def _sizes(side):
    ordered = sorted(side.sizes)
    return " to ".join(f"{h} x {w}" for h, w in dict.fromkeys(ordered[:1] + ordered[-1:])) or None


def _list(held):
    return ", ".join([*held[:8], "..."] if len(held) > 8 else held) or "nothing"


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
            try:
                pool = arrays[name]
            except Exception as error:  # damaged bytes raise nearly anything
                raise OSError(f"cannot read {name} in {path} ({_reason(error)})") from error
            if pool.ndim != 2 or 0 in pool.shape or pool.dtype.kind != "f" or pool.dtype.itemsize > 8:
                raise ValueError(f"{name} in {path} is {pool.dtype} {pool.shape}; features are floats of up to 64 bits (N, D)")
            if not np.isfinite(pool).all():
                raise ValueError(f"{name} in {path} holds numbers that are not finite")
            pool, sums = torch.from_numpy(pool.astype(pool.dtype.newbyteorder("="))), Statistics()
            for part in pool.split(BLOCK):
                sums.add(part)
            statistics = dict(pool=(sums.mean, sums.covariance)) if len(pool) > 1 else {}
            sides.append(Side(f"{name} of {path}", pool, statistics, len(pool), set()))
    if len(dims := {side.pool.shape[1] for side in sides}) > 1:
        raise ValueError(f"{path}: features of different sizes, {' and '.join(map(str, sorted(dims)))}")
    return FeatureFile(Path(path).name, sides[0].pool.shape[1]), sides


def make_reference(source, path, network, processes, batch_size=None):
    """Writes statistics of a Source's images, and STORED of them at most, evenly spread, into an .npz that evaluation and
    ADM's evaluator take as reference."""
    if source.shown < max(2, processes.size):
        least = f"2, and 1 for each of {processes.size} processes" if processes.size > 1 else "2"
        raise ValueError(f"a reference takes at least {least}; {source.name} holds {_held(source)}")
    side = measure(source._replace(statistics={}), network, processes, batch_size)
    if processes.rank > 0:
        return
    if len(side.sizes) > 1:
        raise ValueError(f"{source.name} has images of {len(side.sizes)} sizes, {_sizes(side)}; --image-size crops to one")
    arrays = dict(zip(("mu", "sigma"), side.statistics["pool"]))
    arrays |= dict(zip(("mu_s", "sigma_s"), side.statistics.get("spatial", ())))
    numbers = [[source.numbers[place]] for place in spread(source.shown, min(STORED, source.shown))]
    images = (batch[0] for batch in source.images.read(numbers))
    progress = tqdm(images, f"Writing {path}", len(numbers), unit="image")
    write_npz(path, progress, len(numbers), **arrays, features=network.name, count=side.counted)
    stored = f"{len(numbers):,} of them" if len(numbers) < side.counted else "the images"
    print(f"Saved statistics of {side.counted:,} images ({network.name}) and {stored}, {_sizes(side)}, to {path}")


def main(args, processes):
    check(args)
    prefix = "Internal " if args.halves else ""
    if args.features.endswith(".npz"):
        network, (ref, sample) = read_features(args.features, (args.ref, args.samples))
        say(left_out(ref, sample, network, args.kid).values(), processes)
    else:
        network = open_network(args.features, args.weights, args.feature_dim)
        if args.make_ref:
            folder, out = args.make_ref
            source = open_source(folder, network, args.image_size, args.dataset, args.num)
            say(source.remarks, processes)
            make_reference(source, out, network, processes, args.batch_size)
            return
        paths = [args.ref, args.ref] if args.halves else [args.ref, args.samples]
        parts = [slice(0, None, 2), slice(1, None, 2)] if args.halves else [slice(None)] * 2
        sources = [open_source(path, network, args.image_size, None, args.num, part) for path, part in zip(paths, parts)]
        look_ahead(*sources, network, processes, args.kid, prefix)
        ref, sample = (measure(source, network, processes, args.batch_size) for source in sources)
    if processes.rank == 0:
        results = compare(ref, sample, network, args.exact_distances, args.kid, prefix, progress=True)
        report(results, ref, sample, network, args.json)


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
    if args.kid and (args.feature_dim or 2048) != 2048:
        raise ValueError(f"--kid is not for --feature-dim {args.feature_dim}, which gives the Frechet distance alone")
    outs = dict(zip(("--json", "--make-ref"), (args.json, args.make_ref and args.make_ref[1])))
    for flag, out in outs.items():
        if out not in (None, "-") and (Path(out).is_dir() or not os.access(Path(out).parent, os.W_OK)):
            raise OSError(f"{flag} {out}: not a file in a folder that can be written")


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
    add("--exact-distances", action="store_true", help="precision and recall from float64 distances, where ADM has float16")
    add("--make-ref", nargs=2, metavar=("FOLDER", "OUT.npz"), help="write a reference: images and statistics")
    add("--json", metavar="FILE", help="write the numbers there as JSON; - prints nothing else")
    add("--batch-size", type=positive, help="images at a time and process; by default 64 on CUDA and 16 on CPUs")
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
