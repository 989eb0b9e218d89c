"""ADM's metrics as functions of features: Frechet distance (FID, sFID), Inception Score, precision and recall.

Features are arrays (N, D), one row an image. Which network they come from is the caller's business."""

import numpy as np
import torch


class Statistics:
    """Mean (D,) and covariance (D, D) of features that arrive in batches, in float64."""

    def __init__(self):
        self.count, self.total, self.products = 0, 0.0, 0.0

    def add(self, features):
        """features (n, D), n >= 1."""
        features = np.asarray(features, dtype=np.float64)
        if self.count == 0:
            self.origin = features.mean(axis=0)  # sums of squares around a far-off mean would lose digits
        centred = features - self.origin
        self.count += len(centred)
        self.total = self.total + centred.sum(axis=0)
        self.products = self.products + centred.T @ centred

    @property
    def mean(self):
        return self.origin + self.total / self.count

    @property
    def covariance(self):
        """With N - 1 in the denominator, as np.cov."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images; there are {self.count}")
        return (self.products - np.outer(self.total, self.total) / self.count) / (self.count - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): of two Gaussians, mu (D,) and sigma (D, D).

    The trace of the root is the sum of the roots of the eigenvalues of sigma1^(1/2) sigma2 sigma1^(1/2), which are real
    and not negative, and so need no general matrix root. ValueError if shapes differ.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError(f"features of different sizes: {mu1.shape} and {mu2.shape}")
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)


def inception_score(probabilities, split_size=5000):
    """exp of the mean divergence of p(class | image) (N, classes) from its average, averaged over splits in order."""
    scores = []
    for start in range(0, len(probabilities), split_size):
        p = np.asarray(probabilities[start : start + split_size])
        divergence = (p * (np.log(p) - np.log(p.mean(axis=0, keepdims=True)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_recall(ref, sample, k=3, block=10_000):
    """(precision, recall) of Kynkaanniemi et al. (2019), features (N, D) and (M, D).

    Precision is the share of samples within the distance that some reference has to its k-th nearest other reference;
    recall is the same with the roles exchanged. Takes memory for `block` rows of distances at a time.
    """
    ref, sample = (torch.as_tensor(np.asarray(a, dtype=np.float32)) for a in (ref, sample))
    if min(len(ref), len(sample)) <= k:
        raise ValueError(f"precision and recall need more than {k} images a side; there are {len(ref)} and {len(sample)}")

    def radii(features):  # the nearest of all is the point itself
        return torch.cat([_squared_distances(part, features).kthvalue(k + 1, dim=1).values for part in features.split(block)])

    def share_inside(points, features):
        reach = radii(features)
        inside = [(_squared_distances(part, features) <= reach).any(1) for part in points.split(block)]
        return torch.cat(inside).float().mean().item()

    return share_inside(sample, ref), share_inside(ref, sample)


def _squared_distances(a, b):
    """As ADM has them: in float16, which decides close calls, or in float32 if those are not finite."""
    half_a, half_b = a.half(), b.half()
    norm_a, norm_b = (x.float().square().sum(1).half() for x in (half_a, half_b))
    products = (half_a.float() @ half_b.float().T).half()
    distances = (norm_a[:, None] - 2 * products + norm_b).clamp(min=0)
    return distances.float() if distances.isfinite().all() else torch.cdist(a, b).square()
