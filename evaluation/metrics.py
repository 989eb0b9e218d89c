"""Metrics of generated images, as plain mathematics of features: the Frechet distance of FID and sFID, the Inception Score,
precision and recall, and the kernel distance KID. `metrics_of` lists them; docs/evaluation.md says how each is defined."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from scipy.special import rel_entr
from tqdm import tqdm

NEAREST = 3     # precision and recall take the distance to this nearest neighbour as a radius
BLOCK = 10_000  # rows and columns of distances at a time, as in ADM's evaluator
SPLIT = 5000    # images in a split of the Inception Score


class Statistics:
    """Accumulates the mean (D,) and covariance (D, D) of features that arrive in batches, in float64."""

    def __init__(self):
        self.count, self._mean, self._products = 0, 0, 0

    def add(self, features):
        """Adds features (n, D), n >= 1, an array or a tensor on any device."""
        features = torch.as_tensor(features).detach().double()
        n, mean = len(features), features.mean(0)
        centred, apart = features - mean, mean - self._mean
        if self.count == 0:
            self._products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
        self._products.addmm_(centred.T, centred).addr_(apart, apart, alpha=self.count * n / (self.count + n))
        self.count += n
        self._mean = self._mean + apart * (n / self.count)

    def sum_over_processes(self):
        """Combines the statistics of all processes, each of which must have added features."""
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
        """Returns the covariance with N - 1 in the denominator, as np.cov. ValueError for fewer than 2 images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images; there are {self.count}")
        return (self._products / (self.count - 1)).cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Computes |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians, mu (D,) and sigma (D, D).

    The trace of the root is the sum of the singular values of sigma1^(1/2) sigma2^(1/2). Symmetric roots come from
    eigenvalues and exist for singular covariances too, so nothing is added to their diagonals here (ADM adds 1e-6 if its
    general root of the product is not finite). A result that rounding makes negative is returned as 0. ValueError if shapes
    differ or values are not finite.
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
    """Computes exp of the mean divergence of p(class | image) (N, classes) from its average, averaged over splits in order
    (Salimans et al., 2016)."""
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size])
        divergence = rel_entr(p, p.mean(axis=0, keepdims=True)).sum(axis=1)  # p log p is 0 at 0
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


@torch.no_grad()
def precision_recall(ref, sample, k=NEAREST, block=BLOCK, exact=False, progress=False):
    """Computes (precision, recall) of Kynkaanniemi et al. (2019) from features (N, D) and (M, D), arrays or tensors on one
    device. ValueError if a side has k images or fewer, or a squared distance is not finite.

    Precision is the share of samples within the distance that some reference has to its k-th nearest other reference;
    recall is the same with the roles exchanged. Distances are ADM's, in float16 or, in blocks where one of them is not
    finite there, in float32; with `exact` they have float64's precision. They take the memory of block x block of them.
    """
    ref, sample = map(torch.as_tensor, (ref, sample))
    if min(len(ref), len(sample)) <= k:
        raise ValueError(f"precision and recall need more than {k} images a side; there are {len(ref)} and {len(sample)}")
    if exact:  # subtracting the mean keeps the digits that a common offset would cost
        middle, block = ref.double().mean(0), min(block, 2000)
        ref, sample = ref - middle, sample - middle
    refs, samples = ref.split(block), sample.split(block)
    blocks = len(refs) ** 2 + len(samples) ** 2 + len(refs) * len(samples)
    bar = tqdm(total=blocks, desc="Distances", unit="block", disable=not progress)

    def distances(rows, columns):
        bar.update()
        d = (_exact_distances if exact else _distances)(rows, columns)
        if not d.isfinite().all():
            raise ValueError("features are too large for their squared distances to be finite")
        return d

    def radii(parts):  # k + 1, since the nearest of all is the point itself
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
    """Computes squared distances (n, m) of a (n, D) and b (m, D) as ADM's evaluator rounds them: to float16, which decides
    close calls, or the whole block to float32 if one entry is beyond float16. Products are summed in float64 here, so that
    equal features have equal distances."""
    for dtype in (torch.float16, torch.float32):
        wide_a, wide_b = (x.to(dtype).double() for x in (a, b))
        norm_a, norm_b = (x.square().sum(1).to(dtype) for x in (wide_a, wide_b))
        d = torch.cat([(rows @ wide_b.T).to(dtype) for rows in wide_a.split(1000)])
        d = d.mul_(-2).add_(norm_a[:, None]).add_(norm_b).clamp_(min=0)
        if d.isfinite().all():
            break
    return d


def _exact_distances(a, b):
    """Computes squared distances (n, m) in float64, right to 1e-9 of themselves and 0 between equal features."""
    norm_a, norm_b = a.square().sum(1)[:, None], b.square().sum(1)
    d = (a @ b.T).mul_(-2).add_(norm_a).add_(norm_b)
    for near in (d <= 1e-6 * (norm_a + norm_b)).nonzero().split(1000):  # differences of near points have lost their digits
        i, j = near.T
        d[i, j] = (a[i] - b[j]).square().sum(1)
    return d


def kernel_distance(ref, sample):
    """Computes KID (Binkowski et al., 2018) by torch-fidelity: (mean, standard deviation) over 100 pairs of subsets of at
    most 1,000 images. OSError if torch-fidelity is not installed."""
    try:
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    except ImportError as error:
        raise OSError(f"KID needs the package torch-fidelity: pip install torch-fidelity ({error})") from error
    size = min(1000, len(ref), len(sample))
    features = (torch.as_tensor(a).float().cpu() for a in (ref, sample))
    result = kid_features_to_metric(*features, kid_subset_size=size, verbose=False)
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


class Metric(NamedTuple):
    """A metric that compares two sides (evaluation/sides.py)."""

    name: str                      # what messages call it
    numbers: tuple[str, ...]       # the names of its results, in order
    compute: Callable              # (reference, samples) -> those results
    images: int                    # how many images each side must hold
    features: str = "pool"         # which of the network's features it takes, "pool" or "spatial"
    from_statistics: bool = False  # whether a mean and covariance of those features will do without images
    of_samples: bool = False       # whether it looks at the samples alone


def metrics_of(network, kid=False, prefix="", exact=False, progress=False):
    """Lists the metrics that a network's features define, in ADM's order. A new metric is one more entry here.

    The names FID, sFID, KID, precision and recall are for Inception's 2,048 features; names for other features say so.
    Inception's other layers give the Frechet distance alone. prefix: stands before every name. kid: whether the kernel
    distance is wanted too. exact and progress: as in `precision_recall`.
    """
    inception, suffix = network.name == "inception", f"-{network.label}" if network.label else ""
    last_layer, other_layer = inception and not suffix, inception and suffix
    frechet, kernel = (f"{prefix}{name}{suffix}" for name in (("FID", "KID") if inception else ("FD", "KD")))
    sfid, precision, recall = f"{prefix}sFID", f"{prefix}Precision{suffix}", f"{prefix}Recall{suffix}"

    def score(ref, sample):
        probabilities = [network.probabilities(part).cpu().numpy() for part in sample.pool.split(SPLIT)]
        return [inception_score(np.concatenate(probabilities))]

    def distance(features):
        return lambda ref, sample: [frechet_distance(*ref.statistics[features], *sample.statistics[features])]

    def neighbours(ref, sample):
        return precision_recall(ref.pool, sample.pool, exact=exact, progress=progress)

    def kernels(ref, sample):
        return kernel_distance(ref.pool, sample.pool)

    listed = [  # whether there is such a metric, and the metric
        (last_layer and not prefix, Metric("Inception Score", ("Inception Score",), score, 1, of_samples=True)),
        (True, Metric(frechet, (frechet,), distance("pool"), 2, from_statistics=True)),
        (last_layer, Metric(sfid, (sfid,), distance("spatial"), 2, "spatial", from_statistics=True)),
        (not other_layer, Metric(f"{precision}, {recall}", (precision, recall), neighbours, NEAREST + 1)),
        (kid and not other_layer, Metric(kernel, (kernel, f"{kernel} std"), kernels, 2)),
    ]
    return [metric for exists, metric in listed if exists]
