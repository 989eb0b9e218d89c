"""The two sides of a comparison: reads their images, statistics or features, and computes features by a network."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from evaluation.metrics import BLOCK, Statistics
from images.samples import ArrayImages, FolderImages, NpzImages, names, open_npz, write_npz
from machine.processes import ALONE

STORED = 10_000  # images that a reference keeps, as many as ADM's do; its statistics are of all images


class Source(NamedTuple):
    """Describes one side of a comparison before a network has seen it."""

    name: str
    images: object       # all images there are (images/samples.py), or None
    numbers: list        # the numbers of those that are compared
    statistics: dict     # those of the file, {"pool": (mu, sigma), ...}, or empty
    counted: int | None  # how many images the statistics are of, None if the file does not say so
    pool: np.ndarray | None = None  # features (N, D) of all images, from a reference that keeps them

    @property
    def shown(self):
        """How many images are compared."""
        return len(self.numbers)

    @property
    def remarks(self):
        """Lines that say which files of a folder were left out."""
        return getattr(self.images, "remarks", [])


class Side(NamedTuple):
    """Holds one side of a comparison, as a network has seen it."""

    name: str
    pool: torch.Tensor | None  # features (N, D) of its images in order
    statistics: dict           # {"pool": (mean (D,), covariance (D, D)), and perhaps "spatial": ...}
    counted: int | None        # how many images the statistics are of, None if unknown
    sizes: set                 # the (height, width) that occur among the images

    @property
    def shown(self):
        """How many images are compared."""
        return 0 if self.pool is None else len(self.pool)


def images_in_words(side):
    """Returns, in words, how many images of a Source or a Side are counted."""
    return f"{side.shown:,} image{'s' * (side.shown != 1)}"


def held_in_words(side):
    """Says what a Source or a Side holds: statistics, images or both."""
    statistics = f"{' and '.join(side.statistics)} statistics" if side.statistics else ""
    return " and ".join(filter(None, (statistics, images_in_words(side) if side.shown or not statistics else "")))


def sizes_in_words(side):
    """Returns the range of sizes of a Side's images, in words, or None if it has none."""
    ordered = sorted(side.sizes)
    return " to ".join(f"{h} x {w}" for h, w in dict.fromkeys(ordered[:1] + ordered[-1:])) or None


def open_source(source, network, crop=None, dataset=None, num=None, part=slice(None)):
    """Makes a Source of a path, or of an array uint8 (N, H, W, 3), and reads no images: headers, statistics, and the
    features that a reference keeps.

    crop, dataset: for folders, as in `load_dataset`.
    num, part:     take that many of the images, evenly spread, and a slice of those. Without either, statistics in the file
                   are used if they are of the network's features, and images for metrics that need single images.

    OSError or ValueError says what is wrong.
    """
    statistics, counted, misfit, pool = {}, None, None, None
    if not isinstance(source, str | os.PathLike):
        name, images = "images in memory", ArrayImages(source)
    elif Path(source).is_file():
        name = str(source)
        with open_npz(source) as archive:
            held = names(archive)
        images = NpzImages(source) if "arr_0" in held else None
        if "mu" in held:
            statistics, counted, misfit = read_statistics(source, network)
        if statistics and images is not None and "pool" in held:
            pool = read_pool(source, (len(images), network.dim))
        if not statistics and images is None:
            nothing = misfit or "neither images (arr_0) nor statistics (mu, sigma)"
            raise ValueError(f"{source} holds {nothing}; it has {_some(held)}")
    elif Path(source).exists() or source == "digits":
        name, images = str(source), FolderImages(str(source), crop, dataset)
    else:
        raise FileNotFoundError(f"{source}: no such file or folder")
    if num or part != slice(None):
        statistics, counted, pool = {}, None, None
        if images is None:
            raise ValueError(f"{name} holds statistics and no images to choose from")
        if num and num > len(images):
            raise ValueError(f"{name} holds {len(images):,} images, fewer than --num {num:,}")
    if part != slice(None):
        name = f"a part of {name}"
    return Source(name, images, evenly_spread(len(images), num)[part] if images else [], statistics, counted, pool)


def read_statistics(path, network):
    """Reads (statistics, how many images they are of or None, None) from an .npz, or returns ({}, None, why they are not of
    the network's features). OSError or ValueError if they are damaged or not of a Gaussian."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features = str(arrays["features"]) if "features" in arrays else "inception"
            counted = int(arrays["count"]) if "count" in arrays else None
            keys = dict(pool=("mu", "sigma"), spatial=("mu_s", "sigma_s"))
            statistics = {name: (arrays[mu], arrays.get(sigma)) for name, (mu, sigma) in keys.items() if mu in arrays}
    except Exception as error:  # damaged bytes raise nearly anything
        raise OSError(f"cannot read the statistics in {path} ({_reason(error)})") from error
    for name, (mu, sigma) in statistics.items():
        if problem := _no_gaussian(mu, sigma):
            raise ValueError(f"{path}: {name} statistics {problem}; they are a mean (D,) and its covariance (D, D)")
    dim = len(statistics["pool"][0])
    if (features, dim) != (network.name, network.dim):
        return {}, None, f"statistics of {dim} features of {features}, not of {network.dim} of {network.name}"
    return statistics, counted, None


def read_pool(path, shape):
    """Reads the features that `make_reference` put beside the images of an .npz. OSError or ValueError if they are damaged or
    not of this shape."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pool = arrays["pool"]
    except Exception as error:  # damaged bytes raise nearly anything
        raise OSError(f"cannot read the features (pool) in {path} ({_reason(error)})") from error
    if pool.shape != shape or pool.dtype != np.float32:
        raise ValueError(f"pool of {path} is {pool.dtype} {pool.shape}; features of its images are float32 {shape}")
    if not np.isfinite(pool).all():
        raise ValueError(f"pool of {path} holds numbers that are not finite")
    return pool


def _reason(error):
    return "it holds Python objects, not numbers" if "allow_pickle" in str(error) else error


def _no_gaussian(mu, sigma):
    """Says what is wrong with a mean and a covariance, or returns None. sigma is None where a file has none."""
    if sigma is None:
        return "have a mean alone"
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
    """Runs the network on a Source's images and returns the Side, which is whole on rank 0. Every process needs an image.
    ValueError on all processes if a feature is not finite."""
    if source.images is None:
        return Side(source.name, None, source.statistics, source.counted, set())
    network.to(processes.device, memory_format=torch.channels_last)  # for the Inception Score even stored features need it
    if source.pool is not None:
        pool = torch.from_numpy(source.pool).to(processes.device)
        return Side(source.name, pool, source.statistics, source.counted, {source.images.shape[1:3]})
    numbers = source.numbers
    batch_size = batch_size or (64 if processes.device.type == "cuda" else 16)
    batch_size = min(batch_size, len(numbers) // processes.size)
    starts = range(0, len(numbers), batch_size)[processes.rank :: processes.size]
    batches = [numbers[start : start + batch_size] for start in starts]

    pool = torch.zeros(len(numbers), network.dim, device=processes.device)
    sums, sizes = {}, set()
    progress = tqdm(source.images.read(batches), source.name, len(batches), unit="batch", disable=processes.rank > 0)
    with without_tf32():
        for batch, start in zip(progress, starts):
            sizes |= {image.shape[:2] for image in batch}
            features = features_of(network, batch, processes.device)
            pool[start : start + len(batch)] = features["pool"]
            if not source.statistics:
                for name, values in features.items():
                    sums.setdefault(name, Statistics()).add(values)
    wrong = [numbers[row] for row in (~pool.isfinite().all(1)).nonzero().flatten().tolist()]
    if any(processes.any(bool(wrong), not all(np.isfinite(s.mean).all() for s in sums.values()))):
        which = f"image {wrong[0]}" if wrong else "an image"
        raise ValueError(f"{source.name}: features of {which} are not finite in {network.name}")
    if processes.size > 1:
        dist.reduce(pool, 0)  # adds the rows of others, which are zero here
        for statistics in sums.values():
            statistics.sum_over_processes()
        sizes = set().union(*processes.gather(sizes))
    if source.statistics:
        return Side(source.name, pool, source.statistics, source.counted, sizes)
    statistics = {name: (s.mean, s.covariance) for name, s in sums.items() if s.count > 1}
    return Side(source.name, pool, statistics, len(numbers), sizes)


def evenly_spread(count, num=None):
    """Numbers all of `count` images, or `num` of them, evenly spread."""
    return [i * count // num for i in range(num)] if num else list(range(count))


def features_of(network, batch, device):
    """Computes the features of a batch of uint8 (H, W, 3), in order: {name: (n, D)}. Images of one size go together."""
    shapes, features = [image.shape for image in batch], {}
    for shape in dict.fromkeys(shapes):
        rows = [row for row, other in enumerate(shapes) if other == shape]
        images = torch.from_numpy(np.stack([batch[row] for row in rows])).permute(0, 3, 1, 2).to(device)
        for name, values in network(images).items():
            features.setdefault(name, values.new_empty(len(batch), values.shape[1]))[rows] = values
    return features


@contextmanager
def without_tf32():
    """Turns TF32 off in its body, since TF32 would change features by 1e-3."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def _some(held):
    """Lists the first names of many, for a message."""
    return ", ".join([*held[:8], "..."] if len(held) > 8 else held) or "nothing"


class FeatureFile(NamedTuple):
    """Stands for the network where features were computed elsewhere: it has the name of a file."""

    name: str
    dim: int
    label: str = "file"


def read_features(path, wanted):
    """Reads arrays (N, D) of features by their names from an .npz: (FeatureFile, a Side for each name). ValueError or OSError
    says what is wrong with them."""
    sides = []
    with open_npz(path), np.load(path, allow_pickle=False) as arrays:
        for name in wanted:
            if name not in arrays:
                raise ValueError(f"{path} has no array {name!r} of features; it has {_some(arrays.files)}")
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
            if statistics and not np.isfinite(sums.covariance).all():
                raise ValueError(f"{name} in {path} holds features that are too large: their covariance is not finite")
            sides.append(Side(f"{name} of {path}", pool, statistics, len(pool), set()))
    if len(dims := {side.pool.shape[1] for side in sides}) > 1:
        raise ValueError(f"{path}: features of different sizes, {' and '.join(map(str, sorted(dims)))}")
    return FeatureFile(Path(path).name, sides[0].pool.shape[1]), sides


def make_reference(source, path, network, processes, batch_size=None):
    """Writes statistics of a Source's images, and STORED of them at most, evenly spread, with their features, into an .npz that
    evaluation and ADM's evaluator take as reference."""
    if source.shown < max(2, processes.size):
        least = f"2, and 1 for each of {processes.size} processes" if processes.size > 1 else "2"
        raise ValueError(f"a reference takes at least {least}; {source.name} holds {held_in_words(source)}")
    side = measure(source._replace(statistics={}, pool=None), network, processes, batch_size)
    if processes.rank > 0:
        return
    if len(side.sizes) > 1:
        sizes = f"{len(side.sizes)} sizes, {sizes_in_words(side)}"
        raise ValueError(f"{source.name} has images of {sizes}; --image-size crops to one")
    arrays = dict(zip(("mu", "sigma"), side.statistics["pool"]))
    arrays |= dict(zip(("mu_s", "sigma_s"), side.statistics.get("spatial", ())))
    places = evenly_spread(source.shown, min(STORED, source.shown))
    arrays |= dict(pool=side.pool[places].cpu().numpy())  # which takes longer to compute than all that is computed from it
    numbers = [[source.numbers[place]] for place in places]
    images = (batch[0] for batch in source.images.read(numbers))
    progress = tqdm(images, f"Writing {path}", len(numbers), unit="image")
    write_npz(path, progress, len(numbers), **arrays, features=network.name, count=side.counted)
    stored = f"{len(numbers):,} of them" if len(numbers) < side.counted else "the images"
    print(f"Saved statistics of {side.counted:,} images ({network.name}) and {stored}, {sizes_in_words(side)}, to {path}")
