"""The command that measures bits per dimension of networks."""

import json
import math
import os
import re

import pytest
import torch

from autoencoders import save_autoencoder
from checkpoints.build import save_checkpoint
from commands import as_torchrun_has_it, change_weights, error_of, fit, in_forks
from evaluation import likelihood
from images import encode
from images.dataset import load_dataset
from machine.processes import ALONE, launch


def measured(out, *flags):
    args = likelihood.parse_args([*map(str, flags), "--device", "cpu", "--steps", "3", "--json", str(out)])
    launch(likelihood.main, args)
    return json.loads(out.read_text())


def silence(weights):
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name].zero_()


@pytest.mark.parametrize("num_classes", [3, 0])
def test_a_flow_that_stands_still_has_the_bits_of_noise(tmp_path, checkpoint, photos, num_classes):
    path = change_weights(checkpoint(objective="flow", num_classes=num_classes), silence)
    images = load_dataset(photos, 8, uncond=not num_classes)
    x = torch.stack([images[i][0] for i in range(40)]).double()
    expected = (x.square().mean() + math.log(2 * math.pi)).item() / 2 / math.log(2) + math.log2(127.5)
    found = measured(tmp_path / "a.json", "--ckpt", path, "--data-path", photos)
    mean, error = found["networks"][path]["bits_per_dimension"]
    assert found["images"] == 40
    assert mean == pytest.approx(expected, abs=1e-3)
    assert 0 < error < 0.1


@pytest.mark.parametrize("mixer", ["attention", "pdessm-g", "vim"])
@pytest.mark.parametrize("objective", ["flow", "diffusion"])
def test_bits_depend_on_no_batch(tmp_path, checkpoint, photos, mixer, objective):
    """Up to rounding: and every mixer passes gradients to the image."""
    path = checkpoint(mixer, num_classes=3, objective=objective)
    flags = ["--ckpt", path, "--data-path", photos, "--num-images", 5]
    found = [measured(tmp_path / "a.json", *flags, "--batch-size", size)["networks"][path] for size in (1, 5)]
    assert found[0]["bits_per_dimension"] == pytest.approx(found[1]["bits_per_dimension"], rel=1e-4)
    assert found[0]["objective"] == objective


@pytest.mark.usefixtures("one_thread")
def test_two_processes_measure_what_one_does(tmp_path, checkpoint, photos):
    flags = ["--ckpt", checkpoint(num_classes=3), checkpoint("mean", 3, "b.pt"), "--data-path", photos, "--num-images", 7]
    environment = as_torchrun_has_it(2)

    def run(rank):
        os.environ |= environment | dict(RANK=str(rank))
        measured(tmp_path / "two.json", *flags)

    one = measured(tmp_path / "one.json", *flags)
    assert in_forks(2, run) == [0, 0]
    two = json.loads((tmp_path / "two.json").read_text())
    first, second = (row["bits_per_dimension"][0] for row in one["networks"].values())
    for path, row in one["networks"].items():
        assert two["networks"][path]["bits_per_dimension"] == pytest.approx(row["bits_per_dimension"], rel=1e-5)
    assert row["more_than_first"][0] == pytest.approx(second - first, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(predict="x"), r"a\.pt predicts clean images, and a flow has a likelihood only if its network predicts vel"),
        (dict(class_names=["cat", "dog", "emu"]), r"a\.pt has the classes cat, dog, emu, and .*photos has 0, 1, 2"),
        (dict(num_images=1), "1 image: a mean and its error take at least 2"),
    ],
)
def test_what_cannot_be_measured_is_told(checkpoint, photos, settings, message):
    path = checkpoint(objective="flow", num_classes=3)
    contents = torch.load(path, weights_only=True)
    save_checkpoint(path, **contents | dict(args=contents["args"] | settings))
    flags = ["--ckpt", checkpoint(num_classes=3, name="b.pt"), path, "--data-path", photos]
    assert re.search(message, error_of(likelihood, *flags, "--num-images", settings.get("num_images", 2), "--steps", 1))


def test_images_of_more_classes_than_the_network_has(checkpoint, photos):
    said = error_of(likelihood, "--ckpt", checkpoint(num_classes=2), "--data-path", photos)
    assert "has the classes 0, 1, and" in said


def test_what_overflows_is_no_measurement(checkpoint, photos):
    path = checkpoint(num_classes=3, objective="flow")
    change_weights(path, lambda weights: weights["final_layer.linear.bias"].fill_(3e38))
    said = error_of(likelihood, "--ckpt", path, "--data-path", photos, "--steps", 1)
    assert "a.pt: the bits of 40 of 40 images are not finite" in said


def test_cached_latents_are_no_images(tmp_path, checkpoint, photos):
    vae, out = save_autoencoder(tmp_path / "vae", levels=3, channels=4), tmp_path / "latents"
    flags = ["--data-path", photos, "--vae", vae, "--image-size", "8", "--out", str(out), "--num-workers", "0"]
    encode.encode(encode.parse_args([*flags, "--device", "cpu"]), ALONE)
    assert "latents holds cached latents" in error_of(likelihood, "--ckpt", checkpoint(num_classes=3), "--data-path", out)


def test_latents_have_no_likelihood_of_pixels():
    with pytest.raises(ValueError, match=r"a\.pt works in the latent space of an autoencoder"):
        likelihood.check("a.pt", dict(vae="ema", objective="diffusion"))


def test_networks_of_two_sizes_are_not_compared(tmp_path, checkpoint, photos):
    flags = ["--objective", "flow", "--data-path", photos, "--image-size", 16, "--num-classes", 3, "--num-workers", 0]
    folder = fit(tmp_path / "r", *flags, "--global-batch-size", 4, "--max-steps", 1)
    larger = folder / "checkpoints" / "0000001.pt"
    said = error_of(likelihood, "--ckpt", checkpoint(num_classes=3), larger, "--data-path", photos)
    assert "of one image size" in said
    assert "16" in said
