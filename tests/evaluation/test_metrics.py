"""ADM's metrics: the numbers of its own evaluator, and what is known of them otherwise."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from evaluation.metrics import Statistics, frechet_distance, inception_score, kernel_distance, precision_recall


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
    flat = np.diag([1.0, 0, 0, 0, 0])  # singular
    assert frechet_distance(mu1, flat, mu1, 4 * flat) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(("images", "tolerance"), [(51, 1e-6), (128, 1e-6), (400, 1e-9)])
def test_frechet_distance_of_any_number_of_images(rng, images, tolerance):
    """With fewer images than the 128 features covariances are singular."""
    sides = [rng.normal(size=(images, 128)) * rng.uniform(0.5, 1, size=128) for _ in range(2)]
    (mu1, s1), (mu2, s2) = sides = [(x.mean(0), np.cov(x, rowvar=False)) for x in sides]
    with_root = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert frechet_distance(*sides[0], *sides[1]) == pytest.approx(with_root, rel=tolerance)


def test_frechet_distance_is_never_negative(rng):
    for n, dim in [(2, 9), (20, 50), (90, 30)]:
        side = statistics(100 + rng.normal(size=(n, dim)))
        assert 0 <= frechet_distance(*side, *side) < 1e-9


def test_inception_score_of_known_distributions():
    assert inception_score(np.full((10, 4), 0.25)) == pytest.approx(1)
    sure = np.full((8, 4), 1e-12)
    sure[range(8), [0, 1, 2, 3] * 2] = 1
    assert inception_score(sure) == pytest.approx(4)
    assert inception_score(sure, split_size=2) == pytest.approx(2)  # each split sees two classes
    assert inception_score(torch.eye(4).repeat(2, 1)) == pytest.approx(4)  # where log 0 has no weight
    assert inception_score(np.eye(2).repeat(5000, 0)) == pytest.approx(1)  # splits are of 5,000 images, as ADM's


def test_precision_and_recall_of_known_sets(rng):
    points = rng.normal(size=(50, 3))
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 100) == (0, 0)
    few = points[:10]  # all inside the whole, which is not inside them
    precision, recall = precision_recall(points, few)
    assert precision == 1
    assert recall > 0


def squared_distances(a, b):
    return np.square(a[:, None] - b[None]).sum(2)


def brute_force(ref, sample, distances=squared_distances, k=3):
    def inside(points, features):
        reach = np.sort(distances(features, features), 1)[:, k]
        return (distances(points, features) <= reach).any(1).mean()

    return inside(sample, ref), inside(ref, sample)


@pytest.mark.parametrize("scale", [1, 300])  # at 300 most distances are beyond float16
@pytest.mark.parametrize("exact", [False, True])
def test_precision_and_recall_by_brute_force_in_any_blocks(rng, scale, exact):
    ref, sample = scale * rng.normal(size=(90, 4)), scale * rng.normal(0.8, 0.7, size=(70, 4))
    expected = brute_force(ref, sample)
    assert 0.1 < min(expected) < max(expected) < 0.95
    blocks = [10_000, 7, 80] if scale == 1 or exact else [10_000]
    results = {block: precision_recall(ref, sample, block=block, exact=exact) for block in blocks}
    assert len(set(results.values())) == 1
    assert results[10_000] == pytest.approx(expected, abs=1e-6 if exact else 0.03)


def test_beyond_float16_precision_and_recall_are_adms(rng):
    """ADM's evaluator printed these numbers (TensorFlow 2.21, CPU), for all of it in one block and in blocks of 13."""
    ref, sample = ((100 * rng.normal(size=(n, 8))).astype(np.float32) for n in (100, 90))
    for block in (10_000, 13):
        assert precision_recall(ref, sample, block=block) == (81 / 90, 87 / 100)


@pytest.mark.parametrize("block", [10_000, 50, 20])
def test_one_distance_beyond_float16_takes_its_block_to_float32(rng, block):
    """Near 20 float16 is coarse, and the last points are far away, so blocks without them differ from those with them."""
    ref, sample = (20 + rng.normal(size=(n, 8)).astype(np.float32) for n in (120, 100))
    ref[-3:], sample[-3:] = 40 * ref[-3:], 30 * sample[-3:]

    def in_blocks(rows, columns):
        def distances(a, b, dtype):
            a, b = (x.astype(dtype).astype(np.float64) for x in (a, b))
            with np.errstate(over="ignore", invalid="ignore"):
                norms = [np.square(x).sum(1).astype(dtype) for x in (a, b)]
                return np.maximum(norms[0][:, None] - 2 * (a @ b.T).astype(dtype) + norms[1], 0)

        def block_of(a, b):
            half = distances(a, b, np.float16)
            return half.astype(np.float32) if np.isfinite(half).all() else distances(a, b, np.float32)

        starts = [range(0, len(x), block) for x in (rows, columns)]
        return np.block([[block_of(rows[i : i + block], columns[j : j + block]) for j in starts[1]] for i in starts[0]])

    found = precision_recall(ref, sample, block=block)
    assert found == brute_force(ref, sample, in_blocks)
    others = [precision_recall(ref, sample, block=n) for n in {10_000, 50, 20} - {block}]
    assert found not in others


@pytest.mark.parametrize("offset", [0, 3e3, 1e9])
def test_exact_distances_are_exact(rng, offset):
    ref, sample = offset + rng.normal(size=(90, 8)), offset + rng.normal(0.3, 0.9, size=(70, 8))
    ref[40:50], sample[:5] = ref[:10], ref[:5]
    for points in (ref, sample):
        points[::9] += 1e-4 * offset  # apart from the others, next to each other
    assert precision_recall(ref, sample, exact=True) == brute_force(ref, sample)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scale", [1, 1000])
def test_equal_features_are_within_reach_of_each_other(rng, scale, exact):
    for n, dim in [(4, 1), (12, 1020), (17, 1525), (20, 1279), (23, 1142)]:
        points = np.repeat(scale * rng.normal(size=(1, dim)), n, 0)
        assert precision_recall(points, points, exact=exact) == (1, 1)


def test_distances_that_no_format_holds_are_an_error(rng):
    for exact, scale in ((False, 1e25), (True, 1e200)):
        with pytest.raises(ValueError, match="too large for their squared distances to be finite"):
            precision_recall(scale * rng.normal(size=(9, 3)), rng.normal(size=(9, 3)), exact=exact)


def test_the_kernel_distance_takes_subsets_of_at_most_a_thousand_images(monkeypatch):
    kid, sizes = pytest.importorskip("torch_fidelity.metric_kid"), []

    def compute(ref, sample, kid_subset_size, verbose):
        sizes.append(kid_subset_size)
        return {kid.KEY_METRIC_KID_MEAN: 0.5, kid.KEY_METRIC_KID_STD: 0.25}

    monkeypatch.setattr(kid, "kid_features_to_metric", compute)
    for n, m in ((1500, 1200), (1500, 20)):
        assert kernel_distance(np.zeros((n, 2)), np.zeros((m, 2))) == (0.5, 0.25)
    assert sizes == [1000, 20]


def test_the_order_of_spatial_features_matters(rng):
    """Statistics of one order (height, width, channel, as ADM's files have it) are far from those of the other."""
    scales = rng.uniform(size=(3, 3, 7))
    ref, sample = rng.normal(size=(2, 500, 3, 3, 7)) * scales
    one, other = (statistics(array.reshape(500, -1)) for array in (sample, sample.transpose(0, 3, 1, 2)))
    near, far = (frechet_distance(*statistics(ref.reshape(500, -1)), *side) for side in (one, other))
    assert far > 10 * near


def test_mistakes_are_named(rng):
    with pytest.raises(ValueError, match="more than 3 images a side; there are 50 and 2"):
        precision_recall(rng.normal(size=(50, 3)), rng.normal(size=(2, 3)))
    with pytest.raises(ValueError, match="different sizes"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    for place, value in ((0, np.nan), (1, np.inf)):
        side = [np.zeros(2), np.eye(2)]
        side[place] = side[place] + value
        with pytest.raises(ValueError, match="a mean or a covariance is not finite"):
            frechet_distance(*side, np.zeros(2), np.eye(2))
    single = Statistics()
    single.add(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="at least 2 images; there are 1"):
        _ = single.covariance
