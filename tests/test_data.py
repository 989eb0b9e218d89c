import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import center_crop_arr, load_dataset


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


def test_folder_without_classes(folder):
    Image.new("RGB", (8, 8)).save(folder / "loose.png")
    images = load_dataset(str(folder), 8, uncond=True)
    assert (len(images), images.num_classes) == (5, 0)
    assert {label for _, label in images} == {0}


def test_classes_can_be_ignored():
    digits = load_dataset(None, 8, uncond=True)
    assert digits.num_classes == 0
    assert {digits[i][1] for i in range(20)} == {0}


@pytest.mark.parametrize("inside", [False, True])
def test_cifar10_as_torchvision_unpacks_it(tmp_path, monkeypatch, inside):
    monkeypatch.setattr("data.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("data.CIFAR10._load_meta", lambda self: None)
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    for i in range(1, 6):
        batch = {"data": np.full((2, 3072), i, dtype=np.uint8), "labels": [i, 0]}
        (root / f"data_batch_{i}").write_bytes(pickle.dumps(batch))
    test = {"data": np.full((3, 3072), 9, dtype=np.uint8), "labels": [9, 8, 7]}
    (root / "test_batch").write_bytes(pickle.dumps(test))
    images = load_dataset(str(root if inside else tmp_path), 32)
    assert (len(images), images.num_classes, images.flip) == (10, 10, True)
    assert images[2][1] == 2
    torch.testing.assert_close(images[2][0], torch.full((3, 32, 32), 2 / 127.5 - 1))
    held_out = load_dataset(str(tmp_path), 32, held_out=True)
    assert [held_out[i][1] for i in range(len(held_out))] == [9, 8, 7]


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
