import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from scipy.linalg import sqrtm

import evaluate
from commands import Colours, forked
from evaluate import Statistics, frechet_distance, inception_score, measure, open_source, precision_recall
from parallel import ALONE, Processes, launch

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
    assert frechet_distance(mu1, s1, mu1, s1) == pytest.approx(0, abs=1e-9)
    flat = np.diag([1.0, 0, 0, 0, 0])  # singular
    assert frechet_distance(mu1, flat, mu1, 4 * flat) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_frechet_distance_of_fewer_images_than_features(rng):
    sides = [statistics(rng.normal(size=(20, 50)) * rng.uniform(size=50)) for _ in range(2)]
    (mu1, s1), (mu2, s2) = sides
    with_root = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert frechet_distance(*sides[0], *sides[1]) == pytest.approx(with_root, rel=1e-4)
    assert frechet_distance(*sides[0], *sides[0]) == pytest.approx(0, abs=1e-10)


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


def brute_force(ref, sample, k=3):
    def distances(a, b):
        return np.square(a[:, None] - b[None]).sum(2)

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
    results = {block: precision_recall(ref, sample, block=block, exact=exact) for block in (None, 1, 13, 80)}
    assert len(set(results.values())) == 1
    assert results[13] == pytest.approx(expected, abs=1e-6 if exact else 0.03)


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
        args = evaluate.parse_args([*map(str, flags), "--json", str(tmp_path / "out.json"), "--device", "cpu"])
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


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batches_change_nothing(images, batch):
    source = open_source(images(20), Colours())
    side, whole = (measure(source, Colours(), batch_size=n) for n in (batch, 20))
    torch.testing.assert_close(side.pool, whole.pool)
    for name, (mean, covariance) in whole.statistics.items():
        np.testing.assert_allclose(side.statistics[name][0], mean, rtol=1e-6)
        np.testing.assert_allclose(side.statistics[name][1], covariance, rtol=1e-4, atol=1e-9)


def _measure_as_one_of(rank, size, array, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    network = Colours()
    side = measure(open_source(array, network), network, Processes(rank, size, torch.device("cpu")), batch_size=4)
    if rank == 0:
        torch.save((side.pool, side.statistics), f"{folder}/side.pt")
    dist.destroy_process_group()


def test_two_processes_see_what_one_sees(tmp_path, images):
    array = images(23)
    both = [forked(_measure_as_one_of, rank, 2, array, str(tmp_path)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    pool, statistics = torch.load(tmp_path / "side.pt", weights_only=False)
    alone = measure(open_source(array, Colours()), Colours())
    torch.testing.assert_close(pool, alone.pool)
    for name, (mean, covariance) in alone.statistics.items():
        np.testing.assert_allclose(statistics[name][0], mean, rtol=1e-6)
        np.testing.assert_allclose(statistics[name][1], covariance, rtol=1e-4, atol=1e-9)


def test_some_of_the_images_are_evenly_spread(images):
    assert evaluate.spread(10, 4) == [0, 2, 5, 7]
    assert evaluate.spread(4) == [0, 1, 2, 3]
    array = images(10)
    side = measure(open_source(array, Colours()), Colours(), num=4, part=slice(1, None, 2))
    whole = measure(open_source(array, Colours()), Colours())
    torch.testing.assert_close(side.pool, whole.pool[[2, 7]])


def test_fewer_images_than_processes(images):
    with pytest.raises(ValueError, match="the 2 images of images in memory are fewer than the 3 processes"):
        measure(open_source(images(2), Colours()), Colours(), Processes(1, 3, torch.device("cpu")))


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
    monkeypatch.setattr(evaluate, "STORED", 10)
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
        (["a.npz", "text.png"], "text.png is not an .npz"),
        (["a.npz", "other.npz"], "holds neither images .* nor statistics .*; it has x"),
        (["a.npz", "broken.npz"], r"pool statistics of shapes \(3,\) and \(2, 2\)"),
        (["a.npz", "a.npz", "--num", "6"], "holds 5 images, fewer than --num 6"),
        (["statistics.npz", "a.npz", "--num", "5"], "statistics and no images to choose from"),
        (["a.npz", "one.npz"], "a covariance needs at least 2 images; there are 1"),
        (["a.npz", "a.npz", "--halves"], "leave SAMPLES out"),
        (["a.npz", "--make-ref", "a.npz", "b.npz"], "--make-ref FOLDER OUT.npz stands alone"),
        (["x", "y", "--features", "f.npz", "--num", "3"], "not for features in a file"),
        (["x", "y", "--features", "none.npz"], "none.npz"),
        (["x", "y", "--features", "text.npz"], "text.npz is not an .npz"),
        (["arr_0", "y", "--features", "a.npz"], r"arr_0 in a.npz is uint8 \(5, 6, 6, 3\); features are finite floats"),
    ],
)
def test_a_user_s_mistakes_end_in_one_line(tmp_path, monkeypatch, images, run, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.npz").write_text("text")
    Path("text.png").write_text("text")
    np.savez("a.npz", arr_0=images(5))
    np.savez("one.npz", arr_0=images(1))
    np.savez("other.npz", x=np.zeros(3))
    np.savez("broken.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez("statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(SystemExit, match=message) as end:
        run(*flags)
    assert "\n" not in str(end.value)


def test_memory_grows_with_features_only(tmp_path):
    """A thousand images of 64 x 64 (12 MB) pass through in far less."""
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((1000, 64, 64, 3), np.uint8))
    tracemalloc.start()
    measure(open_source(tmp_path / "a.npz", Colours()), Colours(), batch_size=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
