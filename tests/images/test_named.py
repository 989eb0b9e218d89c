"""Data sets by name: where their images come from, and what is said when they are not whole."""

import io
import pickle
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import ConcatDataset, DataLoader

from images import dataset, named
from images.dataset import load_dataset


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
    ("name", "num_classes"), [("imagenet64", 0), ("imagenet256", 1000), ("celeba-hq", 0), ("celeba", 0), ("lsun-church", 0)]
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
    (base / "jpg" / "image_00003.jpg").write_bytes((base / "jpg" / "image_00003.jpg").read_bytes()[:-150])
    with pytest.raises(OSError, match=r"image_00003\.jpg"):
        images[4]
    (base / "jpg" / "image_00004.jpg").unlink()
    with pytest.raises(OSError, match=r"3 images are missing, such as .*image_00004\.jpg\); it takes .*https://"):
        load_dataset(str(tmp_path), 8, name="flowers102")


def test_flowers_may_be_files_alone(tmp_path, monkeypatch):
    for number in range(5):
        folder = tmp_path / ("test" if number == 4 else "train") / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(folder / f"{number}.png")
    expect(monkeypatch, "flowers102", 5)
    images = load_dataset(str(tmp_path), 8, name="flowers102")
    assert (len(images), images.num_classes, images[0][1]) == (5, 0, 0)
    (tmp_path / "test" / "0" / "4.png").unlink()
    with pytest.raises(OSError, match=r"not whole \(it has 4 images, not 5\); it takes .*, or its 8,189 images as files"):
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
    (tmp_path / "damaged" / "church_outdoor_val_lmdb").mkdir(parents=True)
    (tmp_path / "damaged" / "church_outdoor_val_lmdb" / "data.mdb").write_bytes(b"")
    with pytest.raises(OSError, match=r"cannot read the database .*church_outdoor_val_lmdb.*; it takes .*https://"):
        load_dataset(str(tmp_path / "damaged"), 8, held_out=True, name="lsun-church")


def test_lsun_is_read_twice_and_after_a_fork(tmp_path, monkeypatch):
    write_database(tmp_path / "church_outdoor_train_lmdb", [Image.new("RGB", (9, 8), (i, 0, 0)) for i in range(6)])
    expect(monkeypatch, "lsun-church", 6)
    first, second = (load_dataset(str(tmp_path), 8, name="lsun-church") for _ in range(2))
    assert torch.equal(first[5][0], second[5][0])
    read = [image for image, _ in DataLoader(first, batch_size=None, num_workers=2, multiprocessing_context="fork")]
    assert torch.equal(read[5], first[5][0])


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


@pytest.mark.parametrize("name", ["flowers102", "celeba-hq", "celeba"])
def test_sets_without_held_out_images_say_so(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} has no held-out images"):
        load_dataset(str(tmp_path), 32, held_out=True, name=name)


def test_workers_that_are_not_forked_read_everything(tmp_path, photos, monkeypatch):
    Path(photos, "1", "10.png").write_bytes(b"")  # another stands in for it
    expect(monkeypatch, "lsun-church", 2)
    write_database(tmp_path / "church_outdoor_train_lmdb", [Image.new("RGB", (9, 8), (i, 0, 0)) for i in range(2)])
    sources = dataset.Replacing(load_dataset(photos, 8), 3), load_dataset(str(tmp_path), 8, name="lsun-church")
    together = ConcatDataset(sources)
    numbers = [0, 15, 40, 41]
    loader = DataLoader(together, batch_size=None, sampler=numbers, num_workers=1, multiprocessing_context="spawn")
    for number, (image, *_) in zip(numbers, loader, strict=True):
        assert torch.equal(image, together[number][0])
