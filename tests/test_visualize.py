"""visualize.py: pictures of a small run."""

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from checkpoints.build import load_model
from checkpoints.export import export
from commands import change_weights, error_of, fit
from figures.layers import time_at
from figures.page import FORMATS
from machine.processes import ALONE
from models import MODELS
from pde_ssm import receptive_field
from small_runs import log_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps, and its checkpoint."""
    flags = ["--mixer", "pdessm", "--max-steps", 2, "--log-every", 1, "--global-batch-size", 8, "--num-workers", 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "DiT-N/4", partial(MODELS["DiT-N/4"], depth=2))
        folder = fit(tmp_path_factory.mktemp("runs"), *flags, "--lr", 1e-8)
        yield folder, str(folder / "checkpoints" / "0000002.pt")


def numbers_of(tmp_path, *flags, picture="a.png"):
    """What a subcommand writes as JSON, and the picture's bytes."""
    given = [*map(str, flags), "--out", str(tmp_path / picture), "--json", str(tmp_path / "a.json")]
    visualize.main(visualize.parse_args(given), ALONE)
    return json.loads((tmp_path / "a.json").read_text()), (tmp_path / picture).read_bytes()


def test_kernels_of_a_checkpoint_run_from_narrow_to_wide(tmp_path, run):
    numbers, _ = numbers_of(tmp_path, "kernels", "--ckpt", run[1], "--count", 3)
    (rows,) = numbers.values()
    model = load_model(run[1], {}, "ema")[0]
    for row, block in zip(rows, model.blocks):
        expected = receptive_field(block.attn.pde.kernel(2, 2)).sort().values[[0, 48, 95]]
        assert [kernel["reach"] for kernel in row] == pytest.approx(expected.tolist(), rel=1e-4)


def test_chosen_kernels(tmp_path):
    numbers, _ = numbers_of(tmp_path, "kernels", "--widths", 0.1, 0.05, "--shift", -0.2, 0.1, "--grid", "48x64")
    assert numbers["chosen"]["std_x"] == pytest.approx(0.1, abs=1e-4)
    assert numbers["chosen"]["shift_x"] == pytest.approx(-0.2, abs=1e-4)
    assert len(numbers_of(tmp_path, "kernels")[0]) == 4


def test_every_picture_is_drawn_with_its_numbers(tmp_path, run):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    shown = ["--image", tmp_path / "photo.png", "--class-label", 3]
    commands = {
        "maps": ["--ckpt", run[1], *shown, "--progress", 0.5, 1],
        "reach": ["--ckpt", run[1], *shown, "--channels", 4],
        "spectrum": ["--ckpt", run[1], run[1], *shown],
        "curves": [run[0]],
        "drift": ["--ckpt", run[1]],
    }
    for command, flags in commands.items():
        numbers, png = numbers_of(tmp_path, command, *flags)
        assert png[:4] == b"\x89PNG"
        if command == "maps":
            (places,) = numbers.values()
            assert list(places) == ["disc at 0.5", "disc at 1", "photo at 0.5", "photo at 1"]
            assert np.shape(places["disc at 1"][0]["map"]) == (2, 2)
        if command == "curves":
            again, svg = numbers_of(tmp_path, command, *flags, picture="a.svg")
            assert b"<svg" in svg
            assert again == numbers
            assert numbers[run[0].name]["loss"] == [[row["step"], row["loss"]] for row in log_rows(run[0].parent)]
        if command == "drift":  # so small a learning rate moves nothing, and the initial weights are found again
            ((_, found),) = numbers.items()
            for layer in found["layers"]:
                assert [x["trained"] for x in layer.values()] == [pytest.approx(x["initial"], abs=1e-6) for x in layer.values()]


def test_what_moved_is_seen(tmp_path, run):
    path = tmp_path / "moved.pt"
    torch.save(torch.load(run[1], weights_only=True), path)
    change_weights(path, lambda weights: weights["blocks.1.attn.pde.equation.log_tau"].add_(1))
    ((_, found),) = numbers_of(tmp_path, "drift", "--ckpt", path, "--initial", run[1])[0].items()
    assert found["layers"][0]["tau"]["trained"] == found["layers"][0]["tau"]["initial"]
    before, after = (found["layers"][1]["tau"][when] for when in ("initial", "trained"))
    assert after == pytest.approx([np.e * tau for tau in before], rel=1e-5)


def test_initial_weights_are_those_of_the_first_seed(tmp_path, run):
    folder = Path(shutil.copytree(run[0], tmp_path / "r" / run[0].name))
    flags = ["--mixer", "pdessm", "--global-batch-size", 8, "--num-workers", 0, "--lr", 1e-8, "--allow-changes"]
    for seed in (1, 2):
        fit(folder.parent, *flags, "--resume", folder, "--max-steps", 2 + seed, "--global-seed", seed)
    ((_, found),) = numbers_of(tmp_path, "drift", "--ckpt", folder / "checkpoints" / "0000004.pt")[0].items()
    for layer in found["layers"]:
        assert [x["trained"] for x in layer.values()] == [pytest.approx(x["initial"], abs=1e-6) for x in layer.values()]


def test_weights_of_a_run_that_began_with_others_are_not_compared_with_its_seeds(tmp_path, run):
    contents, path = torch.load(run[1], weights_only=True), tmp_path / "a.pt"
    torch.save(contents | dict(args=contents["args"] | dict(init_from="/home/me/b.pt")), path)
    export(path, "safetensors")
    for ending, begun in ((".pt", "/home/me/b.pt"), (".safetensors", "b.pt")):
        flags = ["--ckpt", path.with_suffix(ending), "--out", tmp_path / "a.png"]
        assert f" began from {begun}; give --initial the weights before training" in error_of(visualize, "drift", *flags)


@pytest.mark.parametrize("command", ["reach", "spectrum"])
def test_checkpoints_of_one_name_are_two(tmp_path, run, command):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0000001.pt").hardlink_to(run[1])
    paths = [tmp_path / name / "0000001.pt" for name in "ab"]
    titles = list(numbers_of(tmp_path, command, "--ckpt", *paths)[0])
    assert [path in title for path, title in zip(map(str, paths), titles, strict=True)] == [True, True]


@pytest.mark.parametrize(("label", "number"), [(None, 207), (0, 0), (1, 1)])
def test_class_0_is_a_class(label, number):
    model = SimpleNamespace(num_classes=1000, trained_classes=1000, class_names=None)
    assert visualize.first_class(model, label) == number


def test_places_are_those_on_the_way_whatever_training_shifted():
    settings = dict(objective="flow", path="linear", time_scale=1, predict="velocity", time_shift=3.0, learn_sigma=False)
    objective = visualize.objective_of(settings)
    for place in (0.3, 0.6, 0.9):
        assert objective.progress(time_at(objective, place, torch.zeros(1))).item() == pytest.approx(place)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["kernels", "--reaction", "1000"], "make a kernel that is zero or not finite"),
        (["kernels", "--out", "a.pdf"], f"--out a.pdf should end in {' or '.join(FORMATS)}"),
        (["kernels", "--out", "/no/folder/a.png"], "--out /no/folder/a.png: not a file in a folder that can be written"),
        (["kernels", "--ckpt", "PDE", "--angle", "3"], "a checkpoint has its own coefficients"),
        (["kernels", "--count", "3"], "--count and --ema are for the kernels of a checkpoint"),
        (["kernels", "--ckpt", "ATTENTION"], "no Green's functions; reach and spectrum measure every mixer"),
        (["drift", "--ckpt", "ATTENTION", "--initial", "PDE"], "has no PDEs"),
        (["drift", "--ckpt", "ATTENTION"], "does not say with which seed it began; give --initial"),
        (["maps", "--ckpt", "PDE", "--image", __file__], r"cannot read the image .*\(it is of no known format\)"),
        (["maps", "--ckpt", __file__], "is not a whole checkpoint"),
        (["reach", "--ckpt", "PDE", "--class-label", "rose"], "does not name its classes|has no class 'rose'"),
        (["curves", "PDE"], "is no folder of a run"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, checkpoint, run, flags, message):
    monkeypatch.chdir(tmp_path)
    flags = [checkpoint("attention") if flag == "ATTENTION" else run[1] if flag == "PDE" else flag for flag in flags]
    assert re.search(message, error_of(visualize, *flags))
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in error_of(visualize, "kernels")
