"""evaluate.py from its flags to its numbers, with a stand-in for the network."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from commands import ROOT, Colours, draw_many
from evaluation import metrics, report, sides
from evaluation.metrics import frechet_distance, inception_score, precision_recall
from machine.processes import ALONE, launch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags): the JSON of the command with a stand-in for the network, which launch() ends as for a user."""

    def command(*flags, network=None):
        monkeypatch.setattr(evaluate, "open_network", lambda *_: network or Colours())
        numbers = [] if "--make-ref" in flags else ["--json", str(tmp_path / "out.json")]
        launch(evaluate.main, evaluate.parse_args([*numbers, "--device", "cpu", *map(str, flags)]))
        return json.loads((tmp_path / "out.json").read_text()) if numbers else None

    return command


FIVE = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


def test_the_command_prints_adms_five_metrics_in_its_order(tmp_path, random_images, run, capsys):
    ref, sample = random_images(40), random_images(30, 0.8)
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
    assert row["samples"] == dict(source=str(tmp_path / "sample.npz"), images=30, size="6 x 6", images_in_statistics=30)
    evaluate.main(evaluate.parse_args([str(tmp_path / "ref.npz"), str(tmp_path / "sample.npz"), "--json", "-"]), ALONE)
    assert json.loads(capsys.readouterr().out) == row


def test_a_reference_of_one_s_own(tmp_path, random_images, run, capsys):
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(random_images(30)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number}.png")
    np.savez(tmp_path / "sample.npz", arr_0=random_images(25, 0.8))
    plain = run(tmp_path / "photos", tmp_path / "sample.npz")
    evaluate.main(evaluate.parse_args(["--make-ref", str(tmp_path / "photos"), str(tmp_path / "ref.npz")]), ALONE)
    with np.load(tmp_path / "ref.npz") as arrays:
        kept = dict(arrays)
    assert kept.keys() == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "pool", "features", "count"}
    assert (kept["arr_0"].shape, kept["arr_0"].dtype, int(kept["count"])) == ((30, 6, 6, 3), np.uint8, 30)
    again = run(tmp_path / "ref.npz", tmp_path / "sample.npz")
    assert [again[name] for name in FIVE] == [plain[name] for name in FIVE]

    np.savez(tmp_path / "statistics.npz", **{name: kept[name] for name in ("mu", "sigma")})
    row = run(tmp_path / "statistics.npz", tmp_path / "sample.npz")  # no images: no precision, no recall, no sFID here
    assert row["FID"] == plain["FID"]
    assert not {"sFID", "Precision"} & row.keys()
    assert row["reference"] == dict(source=str(tmp_path / "statistics.npz"), images=0, size=None, images_in_statistics=None)
    printed = capsys.readouterr().out
    assert f"Reference: {tmp_path / 'statistics.npz'}, statistics only\n" in printed
    assert "(25 samples and an unknown number of references; 6 features of inception)\n" in printed

    moved = kept | dict(mu=kept["mu"] + 1)  # as in ADM's files, whose statistics are of more images than they hold
    np.savez(tmp_path / "moved.npz", **moved)
    row = run(tmp_path / "moved.npz", tmp_path / "sample.npz")
    assert row["FID"] > plain["FID"] + 1
    assert row["Precision"] == plain["Precision"]
    assert run(tmp_path / "moved.npz", tmp_path / "sample.npz", "--num", 25)["FID"] < 1  # of the chosen images themselves


def test_a_reference_stores_some_of_its_images_and_statistics_of_all(tmp_path, random_images, run, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    shown = random_images(30)
    for number, image in enumerate(shown):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number:02}.png")
    np.savez(tmp_path / "sample.npz", arr_0=random_images(25, 0.8))
    monkeypatch.setattr(sides, "STORED", 10)
    of_all = run(tmp_path / "photos", tmp_path / "sample.npz")
    evaluate.main(evaluate.parse_args(["--make-ref", str(tmp_path / "photos"), str(tmp_path / "ref.npz")]), ALONE)
    with np.load(tmp_path / "ref.npz") as arrays:
        assert int(arrays["count"]) == 30
        np.testing.assert_array_equal(arrays["arr_0"], shown[::3])
    capsys.readouterr()
    some = run(tmp_path / "ref.npz", tmp_path / "sample.npz")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Reference: {tmp_path / 'ref.npz'}, 10 images of 6 x 6, and statistics"
    counts = {line.partition(":")[0]: line.partition(" and ")[2].partition(";")[0] for line in lines[2:]}
    assert (counts["FID"], counts["Precision"]) == ("30 references", "10 references")
    assert (some["FID"], some["sFID"]) == (of_all["FID"], of_all["sFID"])
    assert (some["reference"]["images"], some["reference"]["images_in_statistics"]) == (10, 30)


class OtherColours(Colours):
    name = label = "other"

    def forward(self, images):
        return dict(pool=super().forward(images)["pool"])


class OneLayer(OtherColours):
    name, label = "inception", "6"


def test_statistics_of_another_network_do_not_count(tmp_path, random_images, run):
    np.savez(tmp_path / "sample.npz", arr_0=random_images(25, 0.8))
    statistics = dict(mu=np.zeros(6), sigma=np.eye(6))
    np.savez(tmp_path / "both.npz", arr_0=random_images(30), **statistics)
    np.savez(tmp_path / "statistics.npz", **statistics)
    row = run(tmp_path / "both.npz", tmp_path / "sample.npz", network=OtherColours())
    assert row["FD-other"] < 0.5  # of the images
    assert not set(FIVE) & row.keys()  # nor is anything else called as if it were Inception's
    with pytest.raises(SystemExit, match="holds statistics of 6 features of inception, not of 6 of other; it has mu, sigma"):
        run(tmp_path / "statistics.npz", tmp_path / "sample.npz", network=OtherColours())


def test_a_layer_of_inception_gives_the_distance_alone(tmp_path, random_images, run):
    np.savez(tmp_path / "a.npz", arr_0=random_images(30))
    row = run(tmp_path / "a.npz", tmp_path / "a.npz", "--kid", "--num", 20, network=OneLayer())
    assert [name for name, value in row.items() if isinstance(value, float)] == ["FID-6"]
    assert not set(FIVE) & row.keys()
    assert row["samples"]["images"] == 20


def test_halves_of_one_set(tmp_path, random_images, run):
    bright, dark = random_images(20), random_images(20, 0.5)
    np.savez(tmp_path / "a.npz", arr_0=np.concatenate([bright, dark]))
    np.savez(tmp_path / "b.npz", arr_0=np.stack([bright, dark], 1).reshape(40, 6, 6, 3))
    row = run(tmp_path / "a.npz", "--halves")
    assert [name for name in row if name.startswith("Internal")] == [f"Internal {name}" for name in FIVE[1:]]
    assert not set(FIVE) & row.keys()
    assert row["samples"]["images"] == row["reference"]["images"] == 20
    assert run(tmp_path / "b.npz", "--halves")["Internal FID"] > 3 * row["Internal FID"]  # even are bright, odd are dark


def test_the_kernel_distance(tmp_path, random_images, run):
    pytest.importorskip("torch_fidelity")
    for name, brightness in (("a", 1), ("b", 1), ("c", 0.4)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random_images(60, brightness))
    near, far = (run(tmp_path / "a.npz", tmp_path / f"{name}.npz", "--kid")["KID"] for name in "bc")
    assert abs(near) < 0.05 * far


def test_exact_distances_are_those_of_float64(tmp_path, rng, run):
    """Of features that lie so far out that float16 tells none of them from its neighbours."""
    ref, sample = 3e3 + rng.normal(size=(60, 4)), 3e3 + rng.normal(0.5, 0.8, size=(50, 4))
    np.savez(tmp_path / "features.npz", ref=ref, sample=sample)
    flags = ["ref", "sample", "--features", tmp_path / "features.npz"]
    adms, exact = ([row["Precision-file"], row["Recall-file"]] for row in (run(*flags), run(*flags, "--exact-distances")))
    assert exact == pytest.approx(precision_recall(ref, sample, exact=True))
    assert adms != exact


def save_folder(folder, array):
    folder.mkdir()
    for number, image in enumerate(array):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


@pytest.mark.parametrize(("count", "found"), [(1, FIVE[:1]), (2, FIVE[:3]), (3, FIVE[:3]), (4, FIVE)])
def test_few_images_give_what_they_allow(tmp_path, random_images, run, capsys, count, found):
    """The rest is said in a line each before the network runs."""
    ref, sample = (save_folder(tmp_path / name, random_images(count)) for name in ("ref", "sample"))
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


def test_where_nothing_can_be_computed_no_network_runs(tmp_path, random_images, run):
    np.savez(tmp_path / "one.npz", arr_0=random_images(1))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6), features="other")
    with pytest.raises(SystemExit, match=r"FD-other: not without 2 images .* holds 1 image; Precision-other,"):
        run(tmp_path / "statistics.npz", tmp_path / "one.npz", network=Unwanted())


def test_sets_of_no_variety(tmp_path, random_images, run):
    black, noise = np.zeros((20, 6, 6, 3), np.uint8), random_images(20)
    equal = np.repeat(random_images(1), 20, 0)
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


def without_package(*_):
    raise OSError("KID needs the package torch-fidelity")


@pytest.mark.parametrize("distance", [lambda *_: (np.nan, 0.0), without_package], ids=["NaN", "no package"])
def test_a_number_that_is_not_finite_is_no_result(tmp_path, random_images, run, monkeypatch, capsys, distance):
    """The others are printed and written."""
    np.savez(tmp_path / "a.npz", arr_0=random_images(20))
    monkeypatch.setattr(metrics, "kernel_distance", distance)
    with pytest.raises(SystemExit, match=r"error: KID is nan.*: no number to report"):
        run(tmp_path / "a.npz", tmp_path / "a.npz", "--kid")
    written = json.loads((tmp_path / "out.json").read_text())
    assert "KID" not in written
    assert written["FID"] < 1e-9
    assert "KID:" not in capsys.readouterr().out


def test_a_last_split_of_few_images_is_said(tmp_path, random_images, run, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=random_images(21))
    monkeypatch.setattr(report, "SPLIT", 10)
    warning = "the last split of the Inception Score has 1 of 10 images and counts as much as the others"
    for number, said in ((21, True), (20, False), (9, False), (16, False)):
        row = run(tmp_path / "a.npz", tmp_path / "a.npz", "--num", number)
        assert any(line.startswith(warning) for line in row["warnings"]) == said


def test_what_a_reader_must_know_is_said(tmp_path, random_images, run, capsys):
    np.savez(tmp_path / "few.npz", arr_0=random_images(5))
    (tmp_path / "mixed").mkdir()
    for number, image in enumerate(random_images(20)):
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


def test_features_computed_elsewhere(golden, tmp_path, run):
    path = ROOT / "tests" / "golden" / "adm_metrics.npz"
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
        (["a.npz", "a.npz", "--json", "a.npz"], r"--json a.npz should end in \.json"),
        (["--make-ref", "a.npz", "photo.png"], r"--make-ref photo.png should end in \.npz"),
        (["one.npz", "--halves"], "a part of one.npz holds"),
        (["a.npz", "a.npz", "--halves"], "leave SAMPLES out"),
        (["a.npz", "--make-ref", "a.npz", "b.npz"], "--make-ref FOLDER OUT.npz stands alone"),
        (["--make-ref", "empty", "b.npz", "--kid"], "--json, --kid and --exact-distances are for comparisons"),
        (["--make-ref", "a.npz", "b.npz", "--dataset", "cifar10"], "--dataset says what the FOLDER of --make-ref holds"),
        (["a.npz", "a.npz", "--image-size", "8"], "--image-size crops the images of folders, and there is none"),
        (["x", "y", "--features", "f.npz", "--image-size", "8"], "--image-size crops the images of folders, and there is none"),
        (["x", "y", "--features", "f.npz", "--num", "3"], "not for features in a file"),
        (["x", "y", "--features", "none.npz"], "none.npz"),
        (["x", "y", "--features", "text.npz"], "text.npz is not an .npz"),
        (["arr_0", "y", "--features", "a.npz"], r"arr_0 in a.npz is uint8 \(5, 6, 6, 3\); features are floats"),
    ],
)
def test_a_user_s_mistakes_end_in_one_line_before_the_work(tmp_path, monkeypatch, random_images, run, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.npz").write_text("text")
    Image.fromarray(random_images(1)[0]).save("photo.png")
    np.save("array.npy", random_images(5))
    np.savez("a.npz", arr_0=random_images(5))
    np.savez("one.npz", arr_0=random_images(1))
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
def test_unusual_statistics_are_read_rightly(tmp_path, random_images, run, statistics):
    np.savez(tmp_path / "samples.npz", arr_0=random_images(5))
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
        (dict(mu_s=np.zeros(4)), r"spatial statistics have a mean alone; they are a mean \(D,\) and its covariance \(D, D\)$"),
        (dict(count=np.arange(3)), "cannot read the statistics in"),
    ],
)
def test_statistics_that_are_none_end_in_one_line(tmp_path, random_images, run, statistics, message):
    np.savez(tmp_path / "samples.npz", arr_0=random_images(5))
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
        (lambda x: 1e200 * x, "b in .* holds features that are too large: their covariance is not finite"),
        (lambda x: x[:1], "FD-file: not without 2 images .* holds 1 image; Precision-file, Recall-file: not without 4 images"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")
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


def test_a_metric_that_cannot_be_computed_leaves_the_others(tmp_path, capsys, rng):
    a, b = rng.normal(size=(2, 9, 4)).astype(np.float32)
    np.savez(tmp_path / "f.npz", a=a, b=1e25 * b)
    flags = ["a", "b", "--features", str(tmp_path / "f.npz"), "--json", str(tmp_path / "m.json")]
    with pytest.raises(ValueError, match="Precision-file is nan, Recall-file is nan: no number to report"):
        evaluate.main(evaluate.parse_args(flags), ALONE)
    assert json.loads((tmp_path / "m.json").read_text())["FD-file"] > 1e40
    assert "features are too large for their squared distances" in capsys.readouterr().err


def test_damaged_features_end_in_one_line(tmp_path, run, rng):
    np.savez(tmp_path / "f.npz", a=rng.normal(size=(9, 4)))
    whole = (tmp_path / "f.npz").read_bytes()
    (tmp_path / "f.npz").write_bytes(whole[:300] + bytes(9) + whole[309:])
    with pytest.raises(SystemExit, match=r"cannot read a in .*CRC"):
        run("a", "a", "--features", tmp_path / "f.npz")


def test_the_same_samples_in_any_form_give_the_same_numbers(tmp_path, checkpoint, random_images, run):
    drawn = draw_many(checkpoint(), tmp_path / "s", "--num-fid-samples", 21, "--per-proc-batch-size", 8)
    (folder,) = (path for path in (tmp_path / "s").iterdir() if path.is_dir())
    np.savez_compressed(tmp_path / "other.npz", arr_0=drawn, arr_1=np.arange(21))
    np.savez(tmp_path / "ref.npz", arr_0=random_images(30))
    rows = [run(tmp_path / "ref.npz", samples) for samples in (f"{folder}.npz", folder, tmp_path / "other.npz")]
    numbers = [{name: row[name] for name in FIVE} for row in rows]
    assert numbers[1:] == numbers[:1] * 2
    size = "references of 6 x 6 and samples of 8 x 8; all are resized for the network"
    assert all(size in row["warnings"] for row in rows)


def test_what_is_interrupted_leaves_no_half_file(tmp_path, random_images, run, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=random_images(20))
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
