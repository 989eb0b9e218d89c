"""Images for training: crops, folders, classes, and what is refused when a run goes on with others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from commands import ALONE, fit
from images import dataset
from images.dataset import center_crop_arr, load_dataset, worker_count


@pytest.fixture
def folder(tmp_path):
    """Two classes of two images each, of odd sizes and modes."""
    generator = np.random.default_rng(0)
    for label, mode in [("cat", "RGB"), ("dog", "L")]:
        (tmp_path / "images" / label).mkdir(parents=True)
        for i, size in enumerate([(40, 31), (70, 100)]):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("i", range(4))
def test_centre_crop_is_adms_to_the_pixel(golden, i):
    numbers = golden("center_crop.npz")
    cropped = train.center_crop_arr(Image.fromarray(numbers[f"in{i}"].numpy()), int(numbers[f"size{i}"]))
    assert np.array_equal(cropped, numbers[f"out{i}"])


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (7, 150), (200, 9), (70, 1200), (1, 1), (3, 2)])
def test_extreme_images_are_cropped_without_enlarging_all_of_them(size, monkeypatch):
    x, y = np.meshgrid(*(np.linspace(0, 255, side) for side in size))
    image = Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: sizes.append(resize(self, *a, **k)) or sizes[-1])
    cropped = np.asarray(center_crop_arr(image, 32)).astype(int)
    assert cropped.shape == (32, 32, 3)
    assert max(image.width * image.height for image in sizes) <= max(image.width * image.height, 16 * 32**2)
    if max(size) < 2000:
        monkeypatch.setattr(dataset, "LONG", 10**6)
        assert np.abs(cropped - np.asarray(center_crop_arr(image, 32))).max() <= 2


def test_what_is_twice_as_large_is_halved_by_averaging(rng):
    """Also at exactly twice, where ADM's loop has its last turn."""
    image = Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8))
    halved = image.resize((10, 8), Image.Resampling.BOX).crop((1, 0, 9, 8))
    assert np.array_equal(center_crop_arr(image, 8), halved)


def test_digits_are_there_without_a_path():
    digits = load_dataset(None, 16)
    assert (len(digits), digits.num_classes, digits.flip) == (1797, 10, False)
    image, label = digits[0]
    assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.float32, 0)
    assert image.min() >= -1
    assert image.max() <= 1
    assert image.std() > 0.3


def test_folder_of_classes(folder):
    images = load_dataset(str(folder), 32)
    assert (len(images), images.num_classes, images.flip) == (4, 2, True)
    assert [label for _, label in images] == [0, 0, 1, 1]
    with Image.open(folder / "cat" / "0.png") as image:
        pixels = np.asarray(center_crop_arr(image, 32))
    assert torch.equal(images[0][0], torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1)


def test_folder_by_a_relative_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert len(load_dataset("images", 32)) == 4
    folder.rename(folder.parent / "digits")
    assert len(load_dataset("digits", 32)) == 4  # a folder of that name comes before the data set


def test_no_more_processes_read_images_than_this_one_may_have_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {5, 6}, raising=False)
    assert [worker_count(wanted, path) for wanted, path in ((4, "photos"), (1, "photos"), (4, None))] == [2, 1, 0]


def test_folder_without_classes(folder):
    Image.new("RGB", (8, 8)).save(folder / "loose.png")
    images = load_dataset(str(folder), 8, uncond=True)
    assert (len(images), images.num_classes) == (5, 0)
    assert {label for _, label in images} == {0}


def test_classes_can_be_ignored():
    digits = load_dataset(None, 8, uncond=True)
    assert digits.num_classes == 0
    assert {digits[i][1] for i in range(20)} == {0}


def damaged(folder):
    path = folder / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    return load_dataset(str(folder), 32)[3]


def empty_class(folder):
    (folder / "bird").mkdir()
    return load_dataset(str(folder), 32)


def no_classes(folder):
    return load_dataset(str(folder / "cat"), 32)


def nothing(folder):
    (folder / "empty").mkdir()
    return load_dataset(str(folder / "empty"), 32)


def nothing_unlabelled(folder):
    (folder / "empty").mkdir()
    return load_dataset(str(folder / "empty"), 32, uncond=True)


def missing(folder):
    return load_dataset(str(folder / "nowhere"), 32)


def half_a_cifar(folder):
    (folder / "cifar-10-batches-py").mkdir()
    return load_dataset(str(folder), 32)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (damaged, r"cannot read the image .*dog/1\.png"),
        (empty_class, "bird"),
        (no_classes, "cat has no class folders; --uncond"),
        (nothing, "empty is empty"),
        (nothing_unlabelled, "empty is empty"),
        (missing, "nowhere: no such folder"),
        (half_a_cifar, "cifar-10-batches-py is incomplete"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_mistakes_name_the_place(folder, mistake, message):
    with pytest.raises(OSError, match=message):
        mistake(folder)


def test_images_that_changed_are_named_when_a_run_goes_on(tmp_path, photos, caplog, shallow):
    """Nothing but the images is different; a checkpoint of an older version does not know them."""
    flags = ["--model", "DiT-N/8", "--data-path", photos, "--num-workers", 0, "--global-batch-size", 8, "--max-steps", 2]
    path = fit(tmp_path / "r", *flags) / "checkpoints" / "0000002.pt"
    again = [*flags, "--resume", path.parent.parent, "--max-steps"]
    known = torch.load(path)
    assert known["args"]["class_names"] == ["0", "1", "2"]
    assert known["args"]["data"]["images"] == 40
    photos = Path(photos)

    def refused(message):
        with pytest.raises(ValueError, match=rf"0000002\.pt is of other settings: {message}; .*--allow-changes"):
            fit(tmp_path / "r", *again, 3)

    photos.rename(photos.parent / "moved")
    caplog.clear()
    fit(tmp_path / "r", *again, 2, "--data-path", photos.parent / "moved")
    assert "Done! All 2 steps were done before" in caplog.text
    (photos.parent / "moved").rename(photos)
    another = photos / "1" / "another.png"
    another.write_bytes((photos / "0" / "0.png").read_bytes())
    refused("the images were 40 and are 41")
    another.unlink()
    (photos / "1").rename(photos / "cat")
    refused(r"the classes have changed \(gone: 1; new: cat\); the images have other names than they had")
    (photos / "cat").rename(photos / "1")
    whole = (photos / "2" / "2.png").read_bytes()
    Image.new("RGB", (50, 50)).save(photos / "2" / "2.png")
    refused("the images have other sizes than they had")
    fit(tmp_path / "r", *again, 3, "--allow-changes")
    assert "the images have other sizes than they had" in caplog.text
    (photos / "2" / "2.png").write_bytes(whole)
    del known["args"]["data"], known["args"]["class_names"]
    torch.save(known, path)
    (path.parent / "0000003.pt").unlink()
    another.write_bytes(whole)
    fit(tmp_path / "r", *again, 3)
    assert (path.parent / "0000003.pt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the images have 3 classes: --num-classes 3"),
        (["--num-classes", "2"], "the images are of 3 classes, more than --num-classes 2"),
    ],
)
def test_another_number_of_classes_is_an_error(tmp_path, photos, flags, message):
    flags = ["--model", "DiT-N/4", "--vae", "none", "--image-size", "8", "--data-path", photos, *flags]
    with pytest.raises(ValueError, match=f"^{message}$"):
        train.main(train.parse_args([*flags, "--global-batch-size", "8", "--results-dir", str(tmp_path)]), ALONE)


def test_more_classes_than_the_images_have_are_warned_of(tmp_path, photos, caplog, shallow):
    flags = ["--model", "DiT-N/8", "--data-path", photos, "--num-workers", 0, "--global-batch-size", 8, "--max-steps", 1]
    fit(tmp_path / "r", *flags, "--num-classes", 4)
    assert "have 3 classes, fewer than --num-classes 4: those from number 3 on will stay untrained" in caplog.text
    log = (next((tmp_path / "r").iterdir()) / "log.txt").read_text()
    assert "Classes: 0, 1, 2" in log
