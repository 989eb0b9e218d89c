"""Pages 2 and 3: samples on their way, and what may be opened."""

import os
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from checkpoints.sharded import SETTINGS
from machine.processes import ALONE
from pages import samples, two_models
from pages.checkpoints import checkpoints_in, open_checkpoint
from pages.samples import How, appear, read_how
from pages.two_models import check_alike, difference


@pytest.fixture
def opened(checkpoint, tmp_path):
    return open_checkpoint(checkpoint(), [str(tmp_path)], torch.device("cpu"))


@pytest.fixture
def opened_flow(checkpoint, tmp_path):
    return open_checkpoint(checkpoint(objective="flow", name="flow.pt"), [str(tmp_path)], torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("opened", How((3, 1), each=3, steps=12, sampler="ddim", scale=2.5, interval=(0.2, 0.7), seed=5)),
        ("opened", How(steps=12, scale=1)),
        ("opened_flow", How((2,), steps=6, sampler="heun")),
    ],
)
def test_the_command_draws_what_the_page_shows(request, tmp_path, monkeypatch, kind, how):
    monkeypatch.setattr(samples, "LOOK", 0.001)
    opened = request.getfixturevalue(kind)
    *way, (images, calls) = appear(opened, how)
    assert calls == 12
    assert way
    assert all(0 < seen <= 12 and shown.shape == images.shape for shown, seen in way)
    assert (way[0][0].int() - images.int()).abs().float().mean() > 10  # it is noise at first
    sample.main(sample.parse_args(shlex.split(how.command(opened.path, str(tmp_path / "a.png")))[2:]), ALONE)
    with Image.open(tmp_path / "a.png") as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), how.sheet(images, opened.model))


def test_a_sampler_ends_when_nobody_looks(opened, monkeypatch):
    monkeypatch.setattr(samples, "LOOK", 0.001)
    asked = []
    opened.model.register_forward_hook(lambda *call: asked.append(call))
    way = appear(opened, How(steps=250, sampler="ddpm", scale=1))
    next(way)
    way.close()
    assert 0 < len(asked) < 250


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (How(("rosa",)), "does not name its classes"),
        (How((11,)), "class 11 is out of range"),
        (How((1,) * 9, each=8), "72 images are more than the 64 of one page"),
        (How(sampler="euler"), "objective is diffusion, for ddpm"),
        (How(interval=(0.6, 0.5)), "from 0, noise, to 1, image"),
    ],
)
def test_what_cannot_be_drawn(opened, how, message):
    with pytest.raises(ValueError, match=message):
        next(appear(opened, how))


@pytest.mark.parametrize("seed", [None, -1, 2**70])
def test_seeds_that_are_none(seed):
    with pytest.raises(ValueError, match="the seed is a whole number from 0"):
        read_how(["1"], 1, seed, 4, "ddpm", 4, 0, 1)


def test_names_and_numbers_of_classes_are_told_apart():
    assert read_how([" rose", "17", "007"], 1, 3.0, 4, None, 4, 0, 1).classes == ("rose", 17, "007")


@pytest.mark.parametrize("names", [None, ["1", "10", "2", "007", "rose", "lily", "rose", "3 ", "Lily", "9"]])
def test_a_class_that_is_chosen_is_the_one_that_is_drawn(opened, names):
    opened.model.class_names = names
    shown, texts = zip(*opened.classes())
    assert list(shown) == (names or [str(number) for number in range(10)])
    assert read_how(texts, 1, 0, 4, None, 4, 0, 1).labels(opened.model) == list(range(10))


def test_nothing_outside_the_folders_is_opened(checkpoint, tmp_path):
    outside = checkpoint(name="outside.pt")
    inside = tmp_path / "inside"
    (inside / "run" / "checkpoints").mkdir(parents=True)
    os.link(outside, inside / "run" / "checkpoints" / "0000001.pt")
    (inside / "link.pt").symlink_to(outside)
    (inside / "notes.txt").write_text("none")
    (inside / "sharded.dcp").mkdir()
    (inside / "sharded.dcp" / SETTINGS).touch()
    folders = [str(inside)]
    assert checkpoints_in(folders) == [f"{inside}/run/checkpoints/0000001.pt", f"{inside}/sharded.dcp"]
    for path in (outside, f"{inside}/link.pt", f"{inside}/../outside.pt", "/etc/passwd"):
        with pytest.raises(ValueError, match=r"is not within .*--folders names others"):
            open_checkpoint(path, folders, "cpu")
    with pytest.raises(ValueError, match="choose a checkpoint first"):
        open_checkpoint(None, folders, "cpu")


def test_a_checkpoint_of_another_family_is_told(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.ones(2, 2)}}, tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match=r"holds no DiT: .* is missing"):
        open_checkpoint(str(tmp_path / "resnet.pt"), [str(tmp_path)], "cpu")


def test_two_models_must_draw_from_the_same_noise(checkpoint, tmp_path, opened):
    other = open_checkpoint(checkpoint("attention", name="b.pt"), [str(tmp_path)], torch.device("cpu"))
    check_alike(opened, other, How())
    other.model.trained_classes = 3
    check_alike(opened, other, How((1, 2)))
    with pytest.raises(ValueError, match="choose classes that both have"):
        check_alike(opened, other, How())
    other.model.resize((16, 16))
    with pytest.raises(ValueError, match=r"noise of 3 x 8 x 8, .* from 3 x 16 x 16"):
        check_alike(opened, other, How())


def test_without_classes_there_are_no_captions(opened):
    opened.model.class_names = [f"flower {number}" for number in range(10)]
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    heights = [len(How((3, 1), scale=scale).sheet(images, opened.model)) for scale in (0.0, 1.5)]
    assert heights[0] < heights[1]


def test_pages_that_draw_with_the_same_networks_take_turns(tmp_path):
    gradio = pytest.importorskip("gradio", reason="gradio is what the app is made of")
    with gradio.Blocks() as blocks:
        for page in (samples, two_models):
            page.build([str(tmp_path)], torch.device("cpu"))
    drawing = [event for event in blocks.fns.values() if event.name in ("draw_it", "draw_both")]
    assert len(drawing) == 2
    assert len({event.concurrency_id for event in drawing}) == 1


def test_the_difference_of_images():
    images, others = (torch.full((1, 2, 2, 3), value, dtype=torch.uint8) for value in (250, 250))
    others[0, 0, 0] = torch.tensor([255, 0, 250])
    apart, mean = difference(images, others)
    assert apart[0, 0, 0].tolist() == [5, 250, 0]
    assert mean == pytest.approx(255 / 12 / 255)
