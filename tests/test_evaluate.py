import numpy as np
import pytest
from scipy.linalg import sqrtm

from evaluate import Statistics, frechet_distance, inception_score, precision_recall


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def statistics(features, batch=97):
    result = Statistics()
    for start in range(0, len(features), batch):
        result.add(features[start : start + batch])
    return result.mean, result.covariance


@pytest.mark.parametrize(("features", "metric"), [("pool", "fid"), ("spatial", "sfid")])
def test_frechet_distance_is_adms(golden, features, metric):
    numbers = golden("adm_metrics.npz")
    sides = [statistics(numbers[f"{side}_{features}"].numpy()) for side in ("ref", "sample")]
    assert frechet_distance(*sides[0], *sides[1]) == pytest.approx(float(numbers[metric]), rel=1e-4)


def test_inception_score_is_adms(golden):
    numbers = golden("adm_metrics.npz")
    assert inception_score(numbers["sample_probs"].numpy()) == pytest.approx(float(numbers["inception_score"]), rel=1e-4)


@pytest.mark.parametrize("block", [10_000, 113])
def test_precision_and_recall_are_adms(golden, block):
    numbers = golden("adm_metrics.npz")
    precision, recall = precision_recall(numbers["ref_pool"], numbers["sample_pool"], block=block)
    assert precision == pytest.approx(float(numbers["precision"]), abs=0.005)
    assert recall == pytest.approx(float(numbers["recall"]), abs=0.005)


def test_batches_add_up_to_the_whole(rng):
    features = 1e3 + rng.normal(size=(500, 6))
    mean, covariance = statistics(features, batch=33)
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9)


def test_frechet_distance_of_gaussians(rng):
    a, b = rng.normal(size=(2, 5, 5))
    s1, s2 = a @ a.T, b @ b.T
    mu1, mu2 = rng.normal(size=(2, 5))
    with_root = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(with_root, rel=1e-9)
    assert frechet_distance(mu1, s1, mu1, s1) == pytest.approx(0, abs=1e-9)
    flat = np.diag([1.0, 0, 0, 0, 0])  # singular
    assert frechet_distance(mu1, flat, mu1, 4 * flat) == pytest.approx(1)


def test_inception_score_of_known_distributions():
    assert inception_score(np.full((10, 4), 0.25)) == pytest.approx(1)
    sure = np.full((8, 4), 1e-12)
    sure[range(8), [0, 1, 2, 3] * 2] = 1
    assert inception_score(sure) == pytest.approx(4)
    assert inception_score(sure, split_size=2) == pytest.approx(2)  # each split sees two classes


def test_precision_and_recall_of_known_sets(rng):
    points = rng.normal(size=(50, 3))
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 100) == (0, 0)
    few = points[:10]  # all inside the whole, which is not inside them
    precision, recall = precision_recall(points, few)
    assert precision == 1
    assert recall > 0


def test_mistakes_are_named(rng):
    with pytest.raises(ValueError, match="more than 3 images a side; there are 50 and 2"):
        precision_recall(rng.normal(size=(50, 3)), rng.normal(size=(2, 3)))
    with pytest.raises(ValueError, match="different sizes"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    single = Statistics()
    single.add(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="at least 2 images; there are 1"):
        _ = single.covariance
