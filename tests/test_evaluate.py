import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from scipy.linalg import sqrtm

import evaluate
from commands import Colours, draw_many, forked
from evaluation import metrics, report, sides
from evaluation.metrics import Statistics, frechet_distance, inception_score, precision_recall
from evaluation.report import compare
from evaluation.sides import measure, open_source
from machine.processes import ALONE, Processes, launch

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.fixture
def images(rng):
    """images(n, brightness): random uint8 (n, 6, 6, 3)."""

    def draw(n, brightness=1.0):
        tints = rng.uniform(0.3, brightness, size=(n, 1, 1, 3))
        return (255 * tints * rng.uniform(0.5, 1, size=(n, 6, 6, 3))).astype(np.uint8)

    return draw


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags): the JSON of the command with a stand-in for the network, which launch() ends as for a user."""

    def command(*flags, network=None):
        monkeypatch.setattr(evaluate, "open_network", lambda *_: network or Colours())
        args = evaluate.parse_args(["--json", str(tmp_path / "out.json"), "--device", "cpu", *map(str, flags)])
        launch(evaluate.main, args)
        return json.loads((tmp_path / "out.json").read_text())

    return command


FIVE = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


def test_the_command_prints_adms_five_metrics_in_its_order(tmp_path, images, run, capsys):
    ref, sample = images(40), images(30, 0.8)
    np.savez(tmp_path / "ref.npz", arr_0=ref)
    np.savez_compressed(tmp_path / "sample.npz", arr_0=sample)
    row = run(tmp_path / "ref.npz", tmp_path / "sample.npz")
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()] == ["Reference", "Samples", *FIVE]
    assert "(30 samples and 40 references; 2023 features of inception)" in printed
    pools, spatials = zip(*(Colours()(torch.from_numpy(x).permute(0, 3, 1, 2)).values() for x in (ref, sample)))
    expected = [inception_score(Colours().probabilities(pools[1]))]
    for features in (pools, spatials):
        expected.append(frechet_distance(*(part for f in features for part in (f.double().mean(0), np.cov(f, rowvar=False)))))
    expected += precision_recall(*pools)
    assert [row[name] for name in FIVE] == pytest.approx(expected, rel=1e-4)
    assert row["samples"] == dict(
        source=str(tmp_path / "sample.npz"), images=30, size="6 x 6", images_in_statistics=30
    )  # fmt: skip
    evaluate.main(evaluate.parse_args([str(tmp_path / "ref.npz"), str(tmp_path / "sample.npz"), "--json", "-"]), ALONE)
    assert json.loads(capsys.readouterr().out) == row


def in_processes(size, run, folder):
    """Calls run(processes) in so many of them."""

    def join(rank):
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        run(Processes(rank, size, torch.device("cpu")))
        if size > 1:
            dist.destroy_process_group()

    children = [forked(join, rank) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * size


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_and_processes_change_nothing(tmp_path, images, batch, size):
    arrays = images(150), images(130, 0.8)
    network = Colours()

    def run(processes):
        sides = [measure(open_source(array, network), network, processes, batch) for array in arrays]
        if processes.rank == 0:
            torch.save((sides[0].pool, compare(*sides, network)), tmp_path / "results.pt")

    in_processes(size, run, tmp_path)
    pool, results = torch.load(tmp_path / "results.pt")
    whole = [measure(open_source(array, network), network, batch_size=len(array)) for array in arrays]
    torch.testing.assert_close(pool, whole[0].pool)
    assert list(results) == FIVE
    assert results == pytest.approx(compare(*whole, network), rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("features", ["pool", "spatial"])
def test_features_that_are_not_finite_end_every_process(tmp_path, images, features, size):
    array = images(9)
    array[6] = 0

    class Overflowing(Colours):
        def forward(self, images):
            found = super().forward(images)
            found[features][(images == 0).flatten(1).all(1)] = torch.inf
            return found

    def run(processes):
        with pytest.raises(ValueError, match=r"memory: features of (image 6|an image) are not finite in inception"):
            measure(open_source(array, Overflowing()), Overflowing(), processes, 2)

    in_processes(size, run, tmp_path)


def test_some_of_the_images_are_evenly_spread(images):
    assert sides.evenly_spread(10, 4) == [0, 2, 5, 7]
    assert sides.evenly_spread(4) == [0, 1, 2, 3]
    array = images(10)
    side = measure(open_source(array, Colours(), num=4, part=slice(1, None, 2)), Colours())
    whole = measure(open_source(array, Colours()), Colours())
    torch.testing.assert_close(side.pool, whole.pool[[2, 7]])


def test_fewer_images_than_processes(tmp_path, images):
    few, many = (open_source(images(n), Colours()) for n in (2, 9))
    three = Processes(1, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="the 2 images of images in memory are fewer than the 3 processes"):
        report.look_ahead(many, few, Colours(), three)
    with pytest.raises(ValueError, match="takes at least 2, and 1 for each of 3 processes; images in memory holds 2 images"):
        sides.make_reference(few, tmp_path / "ref.npz", Colours(), three)


def test_a_reference_of_one_s_own(tmp_path, images, run):
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(images(30)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number}.png")
    np.savez(tmp_path / "sample.npz", arr_0=images(25, 0.8))
    plain = run(tmp_path / "photos", tmp_path / "sample.npz")
    evaluate.main(evaluate.parse_args(["--make-ref", str(tmp_path / "photos"), str(tmp_path / "ref.npz")]), ALONE)
    with np.load(tmp_path / "ref.npz") as arrays:
        kept = dict(arrays)
    assert kept.keys() == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "features", "count"}
    assert (kept["arr_0"].shape, kept["arr_0"].dtype, int(kept["count"])) == ((30, 6, 6, 3), np.uint8, 30)
    again = run(tmp_path / "ref.npz", tmp_path / "sample.npz")
    assert [again[name] for name in FIVE] == [plain[name] for name in FIVE]

    np.savez(tmp_path / "statistics.npz", **{name: kept[name] for name in ("mu", "sigma")})
    row = run(tmp_path / "statistics.npz", tmp_path / "sample.npz")  # no images: no precision, no recall, no sFID here
    assert row["FID"] == plain["FID"]
    assert not {"sFID", "Precision"} & row.keys()
    assert row["reference"] == dict(
        source=str(tmp_path / "statistics.npz"), images=0, size=None, images_in_statistics=None
    )  # fmt: skip

    moved = kept | dict(mu=kept["mu"] + 1)  # as in ADM's files, whose statistics are of more images than they hold
    np.savez(tmp_path / "moved.npz", **moved)
    row = run(tmp_path / "moved.npz", tmp_path / "sample.npz")
    assert row["FID"] > plain["FID"] + 1
    assert row["Precision"] == plain["Precision"]
    assert run(tmp_path / "moved.npz", tmp_path / "sample.npz", "--num", 25)["FID"] < 1  # of the chosen images themselves


def test_a_reference_stores_some_of_its_images_and_statistics_of_all(tmp_path, images, run, monkeypatch):
    (tmp_path / "photos").mkdir()
    shown = images(30)
    for number, image in enumerate(shown):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number:02}.png")
    np.savez(tmp_path / "sample.npz", arr_0=images(25, 0.8))
    monkeypatch.setattr(sides, "STORED", 10)
    of_all = run(tmp_path / "photos", tmp_path / "sample.npz")
    evaluate.main(evaluate.parse_args(["--make-ref", str(tmp_path / "photos"), str(tmp_path / "ref.npz")]), ALONE)
    with np.load(tmp_path / "ref.npz") as arrays:
        assert int(arrays["count"]) == 30
        np.testing.assert_array_equal(arrays["arr_0"], shown[::3])
    some = run(tmp_path / "ref.npz", tmp_path / "sample.npz")
    assert (some["FID"], some["sFID"]) == (of_all["FID"], of_all["sFID"])
    assert (some["reference"]["images"], some["reference"]["images_in_statistics"]) == (10, 30)


class OtherColours(Colours):
    name = label = "other"

    def forward(self, images):
        return dict(pool=super().forward(images)["pool"])


class OneLayer(OtherColours):
    name, label = "inception", "6"


def test_statistics_of_another_network_do_not_count(tmp_path, images, run):
    np.savez(tmp_path / "sample.npz", arr_0=images(25, 0.8))
    statistics = dict(mu=np.zeros(6), sigma=np.eye(6))
    np.savez(tmp_path / "both.npz", arr_0=images(30), **statistics)
    np.savez(tmp_path / "statistics.npz", **statistics)
    row = run(tmp_path / "both.npz", tmp_path / "sample.npz", network=OtherColours())
    assert row["FD-other"] < 0.5  # of the images
    assert not set(FIVE) & row.keys()  # nor is anything else called as if it were Inception's
    with pytest.raises(SystemExit, match="holds statistics of 6 features of inception, not of 6 of other; it has mu, sigma"):
        run(tmp_path / "statistics.npz", tmp_path / "sample.npz", network=OtherColours())


def test_a_layer_of_inception_gives_the_distance_alone(tmp_path, images, run):
    np.savez(tmp_path / "a.npz", arr_0=images(30))
    row = run(tmp_path / "a.npz", tmp_path / "a.npz", "--kid", "--num", 20, network=OneLayer())
    assert [name for name, value in row.items() if isinstance(value, float)] == ["FID-6"]
    assert not set(FIVE) & row.keys()
    assert row["samples"]["images"] == 20


def test_halves_of_one_set(tmp_path, images, run):
    bright, dark = images(20), images(20, 0.5)
    np.savez(tmp_path / "a.npz", arr_0=np.concatenate([bright, dark]))
    np.savez(tmp_path / "b.npz", arr_0=np.stack([bright, dark], 1).reshape(40, 6, 6, 3))
    row = run(tmp_path / "a.npz", "--halves")
    assert [name for name in row if name.startswith("Internal")] == [f"Internal {name}" for name in FIVE[1:]]
    assert not set(FIVE) & row.keys()
    assert row["samples"]["images"] == row["reference"]["images"] == 20
    assert run(tmp_path / "b.npz", "--halves")["Internal FID"] > 3 * row["Internal FID"]  # even are bright, odd are dark


def test_the_kernel_distance(tmp_path, images, run):
    pytest.importorskip("torch_fidelity")
    for name, brightness in (("a", 1), ("b", 1), ("c", 0.4)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images(60, brightness))
    near, far = (run(tmp_path / "a.npz", tmp_path / f"{name}.npz", "--kid")["KID"] for name in "bc")
    assert abs(near) < 0.05 * far


def save_folder(folder, array):
    folder.mkdir()
    for number, image in enumerate(array):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


@pytest.mark.parametrize(("count", "found"), [(1, FIVE[:1]), (2, FIVE[:3]), (3, FIVE[:3]), (4, FIVE)])
def test_few_images_give_what_they_allow(tmp_path, images, run, capsys, count, found):
    """The rest is said in a line each before the network runs."""
    ref, sample = (save_folder(tmp_path / name, images(count)) for name in ("ref", "sample"))
    said = []

    class Listening(Colours):
        def forward(self, images):
            said.append(capsys.readouterr().err)
            return super().forward(images)

    row = run(ref, sample, "--kid", network=Listening())
    assert [name for name in row if isinstance(row[name], float)] == found + ["KID", "KID std"] * (count > 1)
    lines = [line for line in said[0].splitlines() if ": not without " in line]
    expected = [f"{name}: not without 2 images or {kind} statistics" for name, kind in (("FID", "pool"), ("sFID", "spatial"))]
    expected = expected * (count < 2) + ["Precision, Recall: not without 4 images"] * (count < 4)
    expected += ["KID: not without 2 images"] * (count < 2)
    held = f" a side, and {sample} holds {count} image{'s' * (count > 1)}"
    assert lines == [line + held for line in expected]


class Unwanted(OtherColours):
    def forward(self, images):
        raise AssertionError("the network runs")


def test_where_nothing_can_be_computed_no_network_runs(tmp_path, images, run):
    np.savez(tmp_path / "one.npz", arr_0=images(1))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6), features="other")
    with pytest.raises(SystemExit, match=r"FD-other: not without 2 images .* holds 1 image; Precision-other,"):
        run(tmp_path / "statistics.npz", tmp_path / "one.npz", network=Unwanted())


def test_sets_of_no_variety(tmp_path, images, run):
    black, noise = np.zeros((20, 6, 6, 3), np.uint8), images(20)
    equal = np.repeat(images(1), 20, 0)
    for name, array in dict(black=black, noise=noise, equal=equal).items():
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    for name in ("black", "noise", "equal"):
        row = run(tmp_path / f"{name}.npz", tmp_path / f"{name}.npz")
        assert (row["Precision"], row["Recall"]) == (1, 1)
        assert 0 <= row["FID"] < 1e-9
        assert 0 <= row["sFID"] < 1e-9
    row = run(tmp_path / "black.npz", tmp_path / "noise.npz", "--kid")
    assert row["FID"] > 0.1
    assert (row["Inception Score"] > 1, row["Precision"], row["Recall"]) == (True, 0, 0)


def test_a_number_that_is_not_finite_is_no_result(tmp_path, images, run, monkeypatch, capsys):
    """The others are printed and written."""
    np.savez(tmp_path / "a.npz", arr_0=images(20))
    monkeypatch.setattr(metrics, "kernel_distance", lambda *_: (np.nan, 0.0))
    with pytest.raises(SystemExit, match="error: KID is nan: no number to report"):
        run(tmp_path / "a.npz", tmp_path / "a.npz", "--kid")
    written = json.loads((tmp_path / "out.json").read_text())
    assert "KID" not in written
    assert written["FID"] < 1e-9
    assert "KID:" not in capsys.readouterr().out


def test_a_last_split_of_few_images_is_said(tmp_path, images, run, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=images(21))
    monkeypatch.setattr(report, "SPLIT", 10)
    warning = "the last split of the Inception Score has 1 of 10 images and counts as much as the others"
    for number, said in ((21, True), (20, False), (9, False), (16, False)):
        row = run(tmp_path / "a.npz", tmp_path / "a.npz", "--num", number)
        assert any(line.startswith(warning) for line in row["warnings"]) == said


def test_what_a_reader_must_know_is_said(tmp_path, images, run, capsys):
    np.savez(tmp_path / "few.npz", arr_0=images(5))
    (tmp_path / "mixed").mkdir()
    for number, image in enumerate(images(20)):
        Image.fromarray(image).resize((6, 6 + number % 2)).save(tmp_path / "mixed" / f"{number}.png")
    (tmp_path / "mixed" / "notes.txt").write_text("no image")
    row = run(tmp_path / "few.npz", tmp_path / "mixed")
    biased, mixed, differ = (warning for warning in row["warnings"] if "spatial" not in warning)
    assert "5 images of" in biased
    assert "not more than the 6 pool features" in biased
    assert "mixed has images of 2 sizes, 6 x 6 to 7 x 6" in mixed
    assert "references of 6 x 6 and samples of 6 x 6 to 7 x 6" in differ
    said = capsys.readouterr().err
    assert said.count("warning: ") == len(row["warnings"])
    assert f"Left out of {tmp_path / 'mixed'}: 1 with other endings (1 .txt)\n" in said


def test_images_of_several_sizes_keep_their_order(tmp_path, images):
    array = images(7)
    for number, image in enumerate(array):
        size = (6, 6) if number % 3 else (12, 12)
        Image.fromarray(image).resize(size, Image.Resampling.NEAREST).save(tmp_path / f"{number}.png")
    side = measure(open_source(tmp_path, Colours()), Colours(), batch_size=4)
    same = measure(open_source(array, Colours()), Colours())
    torch.testing.assert_close(side.pool[:, :3], same.pool[:, :3])  # enlarging keeps the mean colour


def test_features_computed_elsewhere(golden, tmp_path, run):
    path = Path(__file__).parent / "golden" / "adm_metrics.npz"
    numbers = golden("adm_metrics.npz")
    row = run("ref_pool", "sample_pool", "--features", path)
    assert row["FD-file"] == pytest.approx(float(numbers["fid"]), rel=1e-4)
    assert row["Precision-file"] == pytest.approx(float(numbers["precision"]), abs=0.005)
    assert row["Recall-file"] == pytest.approx(float(numbers["recall"]), abs=0.005)
    with pytest.raises(SystemExit, match=r"has no array 'nothing' of features; it has .*ref_pool"):
        run("nothing", "sample_pool", "--features", path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "REF and SAMPLES are needed"),
        (["a.npz"], "REF and SAMPLES are needed"),
        (["a.npz", "none.npz"], "none.npz: no such file or folder"),
        (["a.npz", "empty"], "empty is empty"),
        (["a.npz", "text.npz"], "text.npz is not an .npz"),
        (["a.npz", "photo.png"], "photo.png is not an .npz"),
        (["array.npy", "a.npz"], r"array.npy is not an .npz, .*; np.savez writes an .npz"),
        (["a.npz", "other.npz"], "holds neither images .* nor statistics .*; it has x"),
        (["a.npz", "broken.npz"], r"pool statistics are float64 \(3,\) and float64 \(2, 2\); they are a mean \(D,\) and"),
        (["a.npz", "a.npz", "--num", "6"], "holds 5 images, fewer than --num 6"),
        (["statistics.npz", "a.npz", "--num", "5"], "statistics and no images to choose from"),
        (["--make-ref", "one.npz", "b.npz"], "a reference takes at least 2; one.npz holds 1 image"),
        (["--make-ref", "statistics.npz", "b.npz"], "a reference takes at least 2; statistics.npz holds pool statistics"),
        (["a.npz", "a.npz", "--feature-dim", "64", "--kid"], "--kid is not for --feature-dim 64"),
        (["--make-ref", "a.npz", "none/b.npz"], "--make-ref none/b.npz: not a file in a folder that can be written"),
        (["a.npz", "a.npz", "--json", "empty"], "--json empty: not a file in a folder that can be written"),
        (["a.npz", "a.npz", "--halves"], "leave SAMPLES out"),
        (["a.npz", "--make-ref", "a.npz", "b.npz"], "--make-ref FOLDER OUT.npz stands alone"),
        (["x", "y", "--features", "f.npz", "--num", "3"], "not for features in a file"),
        (["x", "y", "--features", "none.npz"], "none.npz"),
        (["x", "y", "--features", "text.npz"], "text.npz is not an .npz"),
        (["arr_0", "y", "--features", "a.npz"], r"arr_0 in a.npz is uint8 \(5, 6, 6, 3\); features are floats"),
    ],
)
def test_a_user_s_mistakes_end_in_one_line_before_the_work(tmp_path, monkeypatch, images, run, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.npz").write_text("text")
    Image.fromarray(images(1)[0]).save("photo.png")
    np.save("array.npy", images(5))
    np.savez("a.npz", arr_0=images(5))
    np.savez("one.npz", arr_0=images(1))
    np.savez("other.npz", x=np.zeros(3))
    np.savez("broken.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez("statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(SystemExit, match=message) as end:
        run(*flags)
    assert "\n" not in str(end.value)


GAUSSIAN = dict(mu=np.zeros(6), sigma=np.eye(6))
PLAIN = dict(mu=np.arange(6.0), sigma=np.diag(np.arange(6.0)))


@pytest.mark.parametrize(
    "statistics",
    [
        dict(sigma=PLAIN["sigma"].astype(np.float32)),
        dict(mu=PLAIN["mu"].astype(">f8"), sigma=PLAIN["sigma"].astype(">f4")),
        dict(mu=np.arange(6), sigma=np.asfortranarray(PLAIN["sigma"])),
        dict(arr_1=np.zeros(3), features="inception"),
    ],
    ids=["float32", "big-endian", "integers", "others beside"],
)
def test_unusual_statistics_are_read_rightly(tmp_path, images, run, statistics):
    np.savez(tmp_path / "samples.npz", arr_0=images(5))
    np.savez(tmp_path / "plain.npz", **PLAIN)
    np.savez(tmp_path / "unusual.npz", **PLAIN | statistics)
    plain, unusual = (run(tmp_path / f"{name}.npz", tmp_path / "samples.npz") for name in ("plain", "unusual"))
    assert unusual["FID"] == pytest.approx(plain["FID"], rel=1e-6)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (dict(mu=np.zeros((1, 6))), r"\(1, 6\) and float64 \(6, 6\); they are a mean \(D,\) and its covariance \(D, D\)"),
        (dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), r"are float64 \(0,\)"),
        (dict(mu=np.array("text")), r"are <U4 \(\)"),
        (dict(mu=np.array([None] * 6)), r"cannot read the statistics in .* \(it holds Python objects, not numbers\)"),
        (dict(mu=np.full(6, np.nan)), "pool statistics are not finite"),
        (dict(sigma=np.full((6, 6), np.inf)), "pool statistics are not finite"),
        (dict(sigma=1j * np.eye(6)), r"and complex128 \(6, 6\)"),
        (dict(sigma=-np.eye(6)), "have no covariance: eigenvalues from -1 to -1"),
        (dict(sigma=np.triu(np.ones((6, 6)))), "have no covariance: .* 1 off symmetry"),
        (dict(mu_s=np.zeros(4), sigma_s=np.eye(3)), r"spatial statistics are float64 \(4,\) and float64 \(3, 3\)"),
        (dict(mu_s=np.zeros(4)), "cannot read the statistics in .*sigma_s"),
        (dict(count=np.arange(3)), "cannot read the statistics in"),
    ],
)
def test_statistics_that_are_none_end_in_one_line(tmp_path, images, run, statistics, message):
    np.savez(tmp_path / "samples.npz", arr_0=images(5))
    np.savez(tmp_path / "statistics.npz", **GAUSSIAN | statistics)
    with pytest.raises(SystemExit, match=message) as end:
        run(tmp_path / "statistics.npz", tmp_path / "samples.npz", network=Unwanted())
    assert "\n" not in str(end.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.astype(">f8"), None),
        (lambda x: x.astype(np.float32), None),
        (np.asfortranarray, None),
        (lambda x: x.astype(object), r"cannot read b in .* \(it holds Python objects, not numbers\)"),
        (lambda x: x.astype(np.int64), r"b in .* is int64 \(9, 4\); features are floats of up to 64 bits \(N, D\)"),
        (lambda x: x.astype(np.longdouble), "features are floats of up to 64 bits"),
        (lambda x: x.astype(complex), r"is complex128 \(9, 4\)"),
        (lambda x: x[0], r"is float64 \(4,\)"),
        (lambda x: x[:0], r"is float64 \(0, 4\)"),
        (lambda x: x / 0, "holds numbers that are not finite"),
        (lambda x: x[:, :3], "features of different sizes, 3 and 4"),
        (lambda x: x[:1], "FD-file: not without 2 images .* holds 1 image; Precision-file, Recall-file: not without 4 images"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_unusual_features_are_read_rightly_or_end_in_one_line(tmp_path, run, rng, change, message):
    features = rng.normal(size=(9, 4))
    np.savez(tmp_path / "f.npz", a=features, b=change(features))
    if message:
        with pytest.raises(SystemExit, match=message) as end:
            run("a", "b", "--features", tmp_path / "f.npz")
        assert "\n" not in str(end.value)
    else:
        row = run("a", "b", "--features", tmp_path / "f.npz")
        assert row["FD-file"] == pytest.approx(0, abs=1e-9)
        assert (row["Precision-file"], row["Recall-file"]) == (1, 1)


def test_damaged_features_end_in_one_line(tmp_path, run, rng):
    np.savez(tmp_path / "f.npz", a=rng.normal(size=(9, 4)))
    whole = (tmp_path / "f.npz").read_bytes()
    (tmp_path / "f.npz").write_bytes(whole[:300] + bytes(9) + whole[309:])
    with pytest.raises(SystemExit, match=r"cannot read a in .*CRC"):
        run("a", "a", "--features", tmp_path / "f.npz")


def test_the_same_samples_in_any_form_give_the_same_numbers(tmp_path, checkpoint, images, run):
    drawn = draw_many(checkpoint(), tmp_path / "s", "--num-fid-samples", 21, "--per-proc-batch-size", 8)
    (folder,) = (path for path in (tmp_path / "s").iterdir() if path.is_dir())
    np.savez_compressed(tmp_path / "other.npz", arr_0=drawn, arr_1=np.arange(21))
    np.savez(tmp_path / "ref.npz", arr_0=images(30))
    rows = [run(tmp_path / "ref.npz", samples) for samples in (f"{folder}.npz", folder, tmp_path / "other.npz")]
    numbers = [{name: row[name] for name in FIVE} for row in rows]
    assert numbers[1:] == numbers[:1] * 2
    size = "references of 6 x 6 and samples of 8 x 8; all are resized for the network"
    assert all(size in row["warnings"] for row in rows)


def test_what_is_interrupted_leaves_no_half_file(tmp_path, images, run, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=images(20))
    (tmp_path / "ref.npz").write_text("older")
    (tmp_path / "out.json").write_text("older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for flags in ([tmp_path / "a.npz", tmp_path / "a.npz"], ["--make-ref", tmp_path / "a.npz", tmp_path / "ref.npz"]):
        with pytest.raises(SystemExit, match=r"could not write the (metrics .*out.json|images .*ref.npz): .*No space"):
            run(*flags)
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "ref.npz", "out.json"}
    assert {(tmp_path / name).read_text() for name in ("ref.npz", "out.json")} == {"older"}


def test_a_reference_of_an_npz_with_statistics_is_of_its_images(tmp_path, images):
    np.savez(tmp_path / "a.npz", arr_0=images(20), **GAUSSIAN)
    source = open_source(tmp_path / "a.npz", Colours())
    sides.make_reference(source, tmp_path / "ref.npz", Colours(), ALONE)
    with np.load(tmp_path / "ref.npz") as arrays:
        assert int(arrays["count"]) == 20
        assert arrays["mu"].min() > 0


def test_memory_grows_with_features_only(tmp_path):
    """A thousand images of 64 x 64 (12 MB) pass through in far less."""
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((1000, 64, 64, 3), np.uint8))
    tracemalloc.start()
    measure(open_source(tmp_path / "a.npz", Colours()), Colours(), batch_size=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
