import io
import json
import logging
import os
import pickle
import re
import shutil
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import ConcatDataset, DataLoader

import train
from commands import ALONE, fit, fork, lasting
from images import dataset, named
from images.dataset import center_crop_arr, load_dataset


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
    monkeypatch.setattr("images.named.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("images.named.CIFAR10._load_meta", lambda self: None)
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
    assert "have 3 classes, fewer than --num-classes 4: the others will stay untrained, 3 to 3" in caplog.text
    log = (next((tmp_path / "r").iterdir()) / "log.txt").read_text()
    assert "Classes: 0, 1, 2" in log


SMALL = ["--model", "DiT-N/8", "--global-batch-size", 8, "--lr", 1e-3, "--num-workers", 0, "--max-steps", 5]  # an epoch
BAD = {"1/7.png": "1/1.png", "2/5.png": "2/11.png", "2/8.png": "2/11.png"}  # and the next of its class, which goes around


@pytest.fixture
def spoilt(photos, tmp_path):
    """Photos of which three cannot be read, and the same with copies of the next ones in their place."""
    mended = shutil.copytree(photos, tmp_path / "mended")
    for name, other in BAD.items():
        shutil.copy(mended / other, mended / name)
        Path(photos, name).write_bytes(Path(photos, name).read_bytes()[:100])
    return photos, str(mended)


def learnt(results):
    return torch.load(max(Path(results).glob("000-DiT-N-8/checkpoints/*")))


def rows(results):
    return [lasting(json.loads(line)) for line in Path(results, "000-DiT-N-8", "log.jsonl").read_text().splitlines()]


def test_another_of_its_class_stands_in_for_a_bad_image(tmp_path, spoilt, shallow, caplog, one_thread):
    """In training and held out, on one process and on two."""
    for name, photos in zip(("a", "b"), spoilt):
        flags = [*SMALL, "--data-path", photos, "--val-path", photos, "--max-bad-images", 3, "--ckpt-every", 4]
        fit(tmp_path / name, *flags)
        assert fork(*flags, "--results-dir", tmp_path / f"{name}2", "--num-workers", 1, processes=2) == [0, 0]
    for processes in ("", "2"):
        with_bad, mended = (learnt(tmp_path / f"{name}{processes}") for name in "ab")
        assert all(torch.equal(with_bad["model"][name], w) for name, w in mended["model"].items())
        assert rows(tmp_path / f"a{processes}") == rows(tmp_path / f"b{processes}")
        assert mended["args"]["bad_images"] == []
        named = [re.search(r"cannot read the image .*/(\d/\d\.png) \(", fault)[1] for fault in with_bad["args"]["bad_images"]]
        assert sorted(named) == sorted(BAD)
    assert sum("another of its class stands in for it" in line for line in caplog.messages) == 3


def test_one_bad_image_too_many_ends_the_run_and_more_may_be_allowed_for(tmp_path, spoilt, shallow):
    flags = [*SMALL, "--data-path", spoilt[0]]
    for more in ([], ["--resume", "auto"]):
        with pytest.raises(OSError, match=r"nor could 1 before: all that --max-bad-images allows for|none stands in for it: 2"):
            fit(tmp_path / "r", *flags, "--max-bad-images", 1, *more)
    stopped = learnt(tmp_path / "r")
    assert 0 < stopped["step"] < 5
    assert len(stopped["args"]["bad_images"]) <= 1
    fit(tmp_path / "r", *flags, "--max-bad-images", 3, "--resume", "auto")
    fit(tmp_path / "whole", *flags, "--max-bad-images", 3)
    assert all(torch.equal(learnt(tmp_path / "r")["model"][name], w) for name, w in learnt(tmp_path / "whole")["model"].items())
    assert learnt(tmp_path / "r")["args"]["bad_images"] == learnt(tmp_path / "whole")["args"]["bad_images"]


def test_a_class_without_a_good_image_has_none_to_stand_in(photos):
    for path in Path(photos, "1").iterdir():
        path.write_bytes(b"")
    images = dataset.Replacing(load_dataset(photos, 8), 100)
    with pytest.raises(OSError, match=r"/1/10\.png .*; none stands in for it: 13 of its class were tried, .* is 100"):
        images[15]
    assert images[0][1:] == (0, [])


@pytest.mark.parametrize("workers", [0, 1])
def test_all_images_are_read_before_training(tmp_path, spoilt, shallow, caplog, workers):
    flags = [*SMALL, "--data-path", spoilt[1], "--val-path", spoilt[0], "--check-data", "--num-workers", workers]
    with pytest.raises(ValueError, match="3 of 40 images cannot be read: replace or delete them, or give --max-bad-images 3"):
        fit(tmp_path / "r", *flags)
    assert not (tmp_path / "r").exists()
    named = [re.search(r"^cannot read the image .*/(\d/\d\.png) \(.+\)$", line)[1] for line in caplog.messages]
    assert named == sorted(BAD)
    if not workers:
        fit(tmp_path / "r", *flags, "--max-bad-images", 3)
        fit(tmp_path / "s", *flags, "--val-path", spoilt[1])
        assert learnt(tmp_path / "s")["step"] == learnt(tmp_path / "r")["step"] == 5


def test_names_that_no_locale_can_spell_are_logged(tmp_path, photos, shallow, capfd, monkeypatch):
    """In the folder's path and in a class."""
    monkeypatch.setattr(logging.getLogger("train"), "propagate", False)  # to pytest, whose workers cannot send such names
    folder = bytes(tmp_path) + b"/gr\xfcn"
    os.rename(photos, folder)
    os.rename(folder + b"/1", folder + b"/wei\xdf")
    bad = folder + b"/wei\xdf/7.png"
    os.truncate(bad, 50)
    train.log_to(logging.StreamHandler())
    fit(tmp_path / "r", *SMALL, "--data-path", os.fsdecode(folder), "--max-bad-images", 1)
    log, errors = (tmp_path / "r" / "000-DiT-N-8" / "log.txt").read_text(), capfd.readouterr().err
    assert not re.search("Logging error|Writing to .* failed", errors)
    assert r"gr\udcfcn)" in log
    assert r"Classes: 0, 2, wei\xdf" in log
    assert r"gr\xfcn/wei\xdf/7.png" in log


def test_workers_that_are_not_forked_read_everything(tmp_path, spoilt, monkeypatch):
    expect(monkeypatch, "lsun-church", 2)
    write_database(tmp_path / "church_outdoor_train_lmdb", [Image.new("RGB", (9, 8), (i, 0, 0)) for i in range(2)])
    sources = dataset.Replacing(load_dataset(spoilt[0], 8), 3), load_dataset(str(tmp_path), 8, name="lsun-church")
    together = ConcatDataset(sources)
    numbers = [0, 15, 40, 41]
    loader = DataLoader(together, batch_size=None, sampler=numbers, num_workers=1, multiprocessing_context="spawn")
    for number, (image, *_) in zip(numbers, loader, strict=True):
        assert torch.equal(image, together[number][0])


def write_images(folder, count, classes=1):
    for i in range(count):
        path = folder / f"class{i % classes}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 64), (i, 0, 0)).save(path)


def write_batches(folder, suffix, prefix="train_data_batch_"):
    """Two batches of two images of one colour each, as ImageNet's site gives them."""
    for number in (1, 2):
        rows = np.stack([np.full((3, 64, 64), 10 * number + i, dtype=np.uint8).reshape(-1) for i in range(2)])
        batch = dict(data=rows, labels=[1, 2], mean=rows.mean(0))
        if suffix == ".npz":
            np.savez(folder / f"{prefix}{number}.npz", **batch)
        else:
            (folder / f"{prefix}{number}").write_bytes(pickle.dumps(batch, protocol=2))


def expect(monkeypatch, name, images, held_out=0):
    monkeypatch.setitem(named.DATASETS, name, named.DATASETS[name]._replace(images=images, held_out=held_out))


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_downsampled_imagenet_from_its_batches(tmp_path, monkeypatch, suffix):
    expect(monkeypatch, "imagenet64", 4, held_out=4)
    write_batches(tmp_path, suffix)
    for _ in range(2):  # the second time from the array that the first one left
        images = load_dataset(str(tmp_path), 64, name="imagenet64")
        assert (len(images), images.num_classes, images.flip) == (4, 0, True)
        colours = [((image[0, 0, 0] + 1) * 127.5).item() for image, _ in (images[i] for i in range(4))]
        assert colours == pytest.approx([10, 11, 20, 21], abs=1e-3)
    assert (tmp_path / "train.npy").exists()
    assert not list(tmp_path.glob("*.partial"))
    write_batches(tmp_path, suffix, "val_data_")
    assert len(load_dataset(str(tmp_path), 64, held_out=True, name="imagenet64")) == 4


def test_a_hostile_batch_does_not_run(tmp_path):
    (tmp_path / "train_data_batch_1").write_bytes(pickle.dumps(dict(data=print)))
    with pytest.raises(OSError, match=r"cannot read .*train_data_batch_1 as downsampled ImageNet \(it holds .*print\)"):
        load_dataset(str(tmp_path), 64, name="imagenet64")
    assert [path.name for path in tmp_path.iterdir()] == ["train_data_batch_1"]


def test_batches_can_come_one_after_the_other(tmp_path, monkeypatch):
    expect(monkeypatch, "imagenet64", 4)
    write_batches(tmp_path, "")
    second = (tmp_path / "train_data_batch_2").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"the 1 files of .* hold 2 images, not 4"):
        load_dataset(str(tmp_path), 64, name="imagenet64")
    second.rename(tmp_path / "train_data_batch_2")
    images = load_dataset(str(tmp_path), 64, name="imagenet64")
    assert len(pickle.dumps(images)) < 2000  # a worker maps the file
    assert torch.equal(pickle.loads(pickle.dumps(images))[3][0], images[3][0])


def test_batches_of_another_size_are_refused(tmp_path, monkeypatch):
    expect(monkeypatch, "imagenet64", 1)
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros((4, 3 * 32 * 32), dtype=np.uint8))
    with pytest.raises(OSError, match=r"cannot read .*train_data_batch_1\.npz as downsampled ImageNet"):
        load_dataset(str(tmp_path), 64, name="imagenet64")


@pytest.mark.parametrize(
    ("name", "num_classes"), [("imagenet64", 0), ("imagenet256", 1000), ("celeba-hq", 0), ("lsun-church", 0)]
)
def test_named_sets_from_folders_of_images(tmp_path, monkeypatch, name, num_classes):
    expect(monkeypatch, name, 6)
    write_images(tmp_path, 6, classes=3)
    images = load_dataset(str(tmp_path), 32, name=name)
    assert (len(images), images.num_classes) == (6, num_classes)
    assert images[5][0].shape == (3, 32, 32)
    assert images[5][1] == (2 if num_classes else 0)
    expect(monkeypatch, name, 1000)
    with pytest.raises(OSError, match=rf"{name} in .* is not whole \(it has 6 images, not 1,000\); it takes .*https://"):
        load_dataset(str(tmp_path), 32, name=name)


def test_flowers_are_all_three_splits(tmp_path, monkeypatch):
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    colours = ["red", "lime", "blue", "white"]
    for number, colour in enumerate(colours, start=1):
        Image.new("RGB", (8, 8), colour).save(base / "jpg" / f"image_{number:05d}.jpg", quality=95)
    savemat(base / "setid.mat", dict(trnid=[[1]], valid=[[2]], tstid=[[3, 4]]))
    savemat(base / "imagelabels.mat", dict(labels=[[5, 6, 7, 8]]))
    monkeypatch.setattr(named.Flowers102, "_check_integrity", lambda self: True)
    # torchvision reads one image's number as a number, not as a list
    monkeypatch.setattr(named.Flowers102, "_splits_map", dict(train="tstid", val="tstid", test="tstid"))
    expect(monkeypatch, "flowers102", 6)
    images = load_dataset(str(tmp_path), 8, name="flowers102")
    assert images.num_classes == 0
    assert [images[i][1] for i in range(6)] == [0] * 6
    torch.testing.assert_close(images[5][0], torch.ones(3, 8, 8), rtol=0, atol=0.05)
    (base / "jpg" / "image_00004.jpg").unlink()
    with pytest.raises(OSError, match=r"3 images are missing, such as .*image_00004\.jpg\); it takes .*https://"):
        load_dataset(str(tmp_path), 8, name="flowers102")


def write_database(path, images):
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for i, image in enumerate(images):
            file = io.BytesIO()
            image.save(file, "webp", lossless=True)
            transaction.put(f"key{i}".encode(), file.getvalue())


def test_lsun_is_read_from_its_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_database(tmp_path / "church_outdoor_train_lmdb", [Image.new("RGB", (9, 8), (i, 0, 0)) for i in range(6)])
    write_database(tmp_path / "church_outdoor_val_lmdb", [Image.new("RGB", (9, 8), "blue")])
    before = sorted(path.name for path in tmp_path.iterdir())
    expect(monkeypatch, "lsun-church", 6, held_out=1)
    images = load_dataset(str(tmp_path), 8, name="lsun-church")
    read = [image[0, 0, 0].item() for image, _ in DataLoader(images, batch_size=None, num_workers=2)]
    assert read == pytest.approx([i / 127.5 - 1 for i in range(6)])
    assert torch.equal(pickle.loads(pickle.dumps(images))[5][0], images[5][0])
    assert load_dataset(str(tmp_path), 8, held_out=True, name="lsun-church")[0][0][2].min() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing is written
    (tmp_path / "church_outdoor_val_lmdb" / "data.mdb").write_bytes(b"")
    with pytest.raises(OSError, match=r"cannot read the database .*church_outdoor_val_lmdb.*; it takes .*https://"):
        load_dataset(str(tmp_path), 8, held_out=True, name="lsun-church")


def test_flat_imagenet_without_classes(tmp_path, monkeypatch):
    expect(monkeypatch, "imagenet256", 2)
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    assert load_dataset(str(tmp_path), 8, uncond=True, name="imagenet256").num_classes == 0
    with pytest.raises(OSError, match=r"has no class folders.*it takes .*https://"):
        load_dataset(str(tmp_path), 8, name="imagenet256")


@pytest.mark.parametrize("name", named.DATASETS)
def test_a_missing_set_says_where_to_get_it(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=rf"{name} in .*empty is not whole .* it takes .*https://"):
        load_dataset(str(tmp_path / "empty"), 32, name=name)
    for folder in (None, str(tmp_path / "nowhere")):
        with pytest.raises(OSError, match=rf"{name} is expected in a folder, not .*: .*https://"):
            load_dataset(folder, 32, name=name)


@pytest.mark.parametrize("name", ["flowers102", "celeba-hq"])
def test_sets_without_held_out_images_say_so(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} has no held-out images"):
        load_dataset(str(tmp_path), 32, held_out=True, name=name)
