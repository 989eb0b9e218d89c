"""The distance to the data that a run measures as it goes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import evaluate
import train
from commands import ALONE, QUICK, Colours, draw_many, fit, fork
from diffusion import drawing
from evaluation.metrics import Statistics, frechet_distance
from images.dataset import load_dataset
from machine.processes import launch
from training import probe, watching

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ["--global-batch-size", 8, "--max-steps", 4, "--lr", 1e-2, "--ckpt-every", 2]
NAME = "fd6_inception_12"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A stand-in for the network with six features, few samples, in batches of five, and few steps."""
    for target, value in (("open_network", lambda *_: Colours()), ("PROBED", 12), ("AT_ONCE", 5)):
        monkeypatch.setattr(probe, target, value)
    monkeypatch.setattr(watching, "SAMPLING_STEPS", 4)


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def probed(folder):
    return {row["step"]: row[NAME] for row in rows(folder) if NAME in row}


def gaussian(images):
    """Of uint8 images (n, H, W, 3), as NumPy has it."""
    features = Colours()(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))["pool"].double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def test_a_folder_of_the_name_of_the_digits_is_not_the_digits(tmp_path, photos, monkeypatch):
    shutil.copytree(photos, tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    folder = fit(tmp_path / "r", *SHORT, "--probe-every", 4)
    assert "compares 12 samples with 12 images" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("flags", [[], ["--objective", "flow"], ["--uncond"]], ids=["classes", "flow", "uncond"])
def test_the_distance_is_that_of_the_checkpoint_s_samples_to_images(tmp_path, flags):
    """The samples are the first of sample_ddp.py's without guidance."""
    folder = fit(tmp_path / "r", *SHORT, "--probe-every", 2, *flags)
    digits = load_dataset(None, 8).source
    images = gaussian([np.asarray(digits[number * len(digits) // 12][0]) for number in range(12)])
    for step, found in probed(folder).items():
        path = folder / "checkpoints" / f"{step:07d}.pt"
        samples = draw_many(path, tmp_path / f"{step}", "--cfg-scale", 1, "--num-fid-samples", 12)
        assert found == pytest.approx(frechet_distance(*images, *gaussian(samples)), rel=1e-4)
    assert list(probed(folder)) == [2, 4]
    assert f"(step=0000004) Frechet Distance: {found:.4g} ({NAME})" in (folder / "log.txt").read_text()


def test_it_is_what_evaluate_prints_of_the_same_samples(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(evaluate, "open_network", lambda *_: Colours())
    folder = fit(tmp_path / "r", *SHORT, "--data-path", photos, "--num-workers", 0, "--num-classes", 3, "--probe-every", 4)
    samples, out = tmp_path / "samples", tmp_path / "out.json"
    draw_many(folder / "checkpoints" / "0000004.pt", samples, "--cfg-scale", 1, "--num-fid-samples", 12)
    flags = [photos, str(next(samples.glob("*.npz"))), "--num", "12", "--image-size", "8", "--json", str(out)]
    evaluate.main(evaluate.parse_args(flags), ALONE)
    assert json.loads(out.read_text())["FID"] == pytest.approx(probed(folder)[4], rel=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("fault", ["samples", "features"])
def test_a_probe_that_fails_ends_no_run(tmp_path, monkeypatch, photos, fault, processes):
    """On one of the processes; the next probe is made again."""
    draws = []

    def fail(rank):
        generate = drawing.generate

        def failing(*args, **kwargs):
            draws.append(rank)
            if rank == processes - 1 and len(draws) <= 2 and fault == "samples":
                raise RuntimeError("out of memory\nand a long story")
            return generate(*args, **kwargs)

        def overflowing(network, batch, device):
            values = features(network, batch, device)
            return {"pool": torch.inf * values["pool"]} if rank == processes - 1 and len(draws) in (1, 2) else values

        features = probe.features_of
        monkeypatch.setattr(drawing, "generate", failing)
        if fault == "features":
            monkeypatch.setattr(probe, "features_of", overflowing)

    flags = [*SHORT, "--data-path", photos, "--num-workers", 0, "--num-classes", 3, "--probe-every", 2]
    monkeypatch.setattr(probe, "PROBED", 12 * processes)
    name = f"fd6_inception_{12 * processes}"
    monkeypatch.setattr(probe, "AT_ONCE", 6)
    assert fork(*flags, "--results-dir", tmp_path / "r", processes=processes, spoil=fail) == [0] * processes
    (folder,) = (tmp_path / "r").iterdir()
    found = {row["step"]: row[name] for row in rows(folder) if name in row}
    assert list(found) == [2, 4]
    assert (found[2], found[4] is None) == (None, False)
    reason = dict(samples="out of memory|another process has no samples", features="features are not finite")[fault]
    assert re.search(rf"\(step=0000002\) Frechet Distance: none, ({reason}) \({name}\)\n", (folder / "log.txt").read_text())


@pytest.mark.parametrize("images", [1, 5])
def test_too_few_images_are_said_before_training(tmp_path, photos, images):
    for path in sorted((tmp_path / "photos").glob("*/*.png"))[images:]:
        path.unlink()
    flags = ["--data-path", photos, "--val-path", photos, "--uncond", "--global-batch-size", images, "--max-steps", 1]
    args = train.parse_args([*QUICK, *map(str, flags), "--results-dir", str(tmp_path / "r"), "--probe-every", "1"])
    if images == 1:
        with pytest.raises(SystemExit, match=r"--probe-every compares with 2 images or more, one a process; .*photos holds 1"):
            launch(train.main, args)
        assert not (tmp_path / "r").exists()
    else:
        launch(train.main, args)
        line = "compares 12 samples with 5 images; those are not more than 6 features, which biases it upwards"
        assert line in next(tmp_path.glob("r/*/log.txt")).read_text().partition("Training for")[0]


def test_a_probe_does_not_change_the_run(tmp_path):
    plain, watched = fit(tmp_path / "a", *SHORT), fit(tmp_path / "b", *SHORT, "--probe-every", 1)
    weights = [torch.load(folder / "checkpoints" / "0000004.pt")["model"] for folder in (plain, watched)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert [row["loss"] for row in rows(plain) if "loss" in row] == [row["loss"] for row in rows(watched) if "loss" in row]


@pytest.mark.parametrize("flags", [[], ["--parallel", "fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_draw_what_one_does(tmp_path, photos, flags):
    flags = [*SHORT, "--data-path", photos, "--num-workers", 0, "--probe-every", 2, "--mixer", "pdessm", "--lr", 0.1, *flags]
    assert fork(*flags, "--results-dir", tmp_path / "two", processes=2) == [0, 0]
    one = fit(tmp_path / "one", *flags[: -2 if "fsdp" in flags else None])
    assert probed(one) == pytest.approx(probed(next((tmp_path / "two").iterdir())), rel=2e-3)


def test_it_takes_the_first_features_alone(monkeypatch, random_images):
    monkeypatch.setattr(probe, "FEATURES", 4)
    sums, images = Statistics(), random_images(9)
    probe.add(sums, images, Colours(), ALONE)
    np.testing.assert_allclose(sums.mean, gaussian(images)[0][:4], rtol=1e-6)


def test_held_out_images_are_what_it_compares_with_if_there_are(tmp_path, photos):
    flags = [*SHORT, "--data-path", photos, "--num-workers", 0, "--probe-every", 4]
    others = tmp_path / "others"
    for path in sorted((tmp_path / "photos").glob("*/*.png"))[:30]:
        (others / path.parent.name).mkdir(parents=True, exist_ok=True)
        (others / path.parent.name / path.name).write_bytes(path.read_bytes())
    plain, held_out = fit(tmp_path / "a", *flags), fit(tmp_path / "b", *flags, "--val-path", others)
    assert probed(plain) != probed(held_out)
    assert {"held_out_loss", NAME} <= {name for row in rows(held_out) for name in row}


def test_a_tracker_shows_it(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setitem(train.TRACKERS, "tensorboard", lambda *_: lambda step, numbers, *_: shown.append((step, numbers)))
    folder = fit(tmp_path, *SHORT, "--probe-every", 4, "--tracker", "tensorboard")
    assert (4, {NAME: probed(folder)[4]}) in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Inception's weights are not in .*; put pt_inception-2015-12-05-6726825d.pth .*--features efficientnet-lite0"),
        (["--weights", "none.pth"], "none.pth is no file"),
        (["--features", "efficientnet-lite0", "--weights", "a"], "--weights is for --features inception"),
    ],
)
def test_what_is_missing_shows_before_anything_is_done(tmp_path, monkeypatch, flags, message):
    from evaluation.features import open_network

    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(probe, "open_network", open_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    args = train.parse_args([*QUICK, "--results-dir", str(tmp_path / "r"), "--probe-every", "2", *flags])
    with pytest.raises(SystemExit, match=message) as end:
        launch(train.main, args)
    assert "\n" not in str(end.value)
    assert not (tmp_path / "r").exists()


def test_latents_are_no_images(tmp_path):
    (tmp_path / "latents.json").write_text("{}")
    with pytest.raises(ValueError, match=f"--probe-every compares with images, and {tmp_path} holds latents; name images with"):
        probe.open_probe(str(tmp_path), None, 8, None, "inception", None, ALONE)
