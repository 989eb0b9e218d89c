"""The papers' data sets by name. Each is described in one place: its number of images, the source of its files, and the
function that reads them as a sequence of (PIL image, class). `DATASETS` holds them all; to add one, write one more function."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset
from torchvision.datasets import CIFAR10, Flowers102
from tqdm import tqdm

from images.folders import Folder, digest, printable, read_image
from machine.files import whole_file

CIFAR10_FOLDER = "cifar-10-batches-py"
DATASETS = {}


class Named(NamedTuple):
    """Describes a data set of the paper."""

    images: int       # for training
    held_out: int     # held-out images
    num_classes: int  # 0 where the paper trains without classes
    where: str        # where its files come from
    read: Callable    # (folder, held_out, uncond) -> a sequence of (PIL image, class)


def dataset(name, images, held_out, num_classes, where):
    """Decorates a function: enters it into DATASETS as the reader of the data set of that name."""

    def enter(read):
        DATASETS[name] = Named(images, held_out, num_classes, where, read)
        return read

    return enter


def read_named(name, folder, held_out, uncond):
    """Reads a data set of DATASETS from its folder. OSError says what is missing, and where it comes from."""
    named = DATASETS[name]
    if held_out and not named.held_out:
        raise ValueError(f"{name} has no held-out images here: training takes all {named.images:,}")
    if folder is None or not Path(folder).is_dir():
        raise FileNotFoundError(f"{name} is expected in a folder, not {folder}: {named.where}")
    try:
        source, expected = named.read(folder, held_out, uncond), named.held_out if held_out else named.images
        if len(source) != expected:
            raise OSError(f"it has {len(source):,} images, not {expected:,}")
    except (OSError, RuntimeError) as error:
        raise OSError(f"{name} in {folder} is not whole ({error}); it takes {named.where}") from error
    return source


def read_digits():
    """Returns the 1,797 handwritten digits that scikit-learn carries: a list of (RGB image of 8 x 8, class)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)         # (1797, 8, 8), from 0 to 16
    return [(Image.fromarray(image).convert("RGB"), int(label)) for image, label in zip(images, digits.target)]


@dataset(
    "cifar10", 50_000, 10_000, 10,
    "cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked there",
)  # fmt: skip
def read_cifar10(folder, held_out, uncond):
    """Reads CIFAR-10 as torchvision unpacks it, in `folder` or in CIFAR10_FOLDER inside it. OSError if it is not whole."""
    folder = Path(folder)
    root = folder.parent if folder.name == CIFAR10_FOLDER else folder
    try:
        return CIFAR10(root, train=not held_out)
    except (RuntimeError, OSError) as error:
        raise OSError(f"CIFAR-10 in {root / CIFAR10_FOLDER} is incomplete or damaged: {error}") from error


@dataset(
    "imagenet64", 1_281_167, 50_000, 0,
    "the batches of Imagenet64_train_part1.zip and _part2.zip of https://image-net.org/download-images.php, or ImageNet's "
    "training images in folders",
)  # fmt: skip
def _imagenet64(folder, held_out, uncond):
    """Reads a folder of images, or the batches of downsampled images, which are joined once into one array beside them."""
    pattern, name = ("val_data*", "val") if held_out else ("train_data_batch_*", "train")
    batches = sorted(path for path in Path(folder).glob(pattern) if path.suffix in ("", ".npz"))
    array = Path(folder, f"{name}.npy")
    if not batches and not array.exists():
        return Folder(folder, labelled=False)
    if not array.exists():
        _join(batches, array, DATASETS["imagenet64"].held_out if held_out else DATASETS["imagenet64"].images)
    return _Downsampled(array)


class _Downsampled(Dataset):
    """Reads images from a memory-mapped .npy file (N, 3, side, side), uint8, without classes."""

    def __init__(self, path):
        self.path, self.array = path, np.load(path, mmap_mode="r")

    def __reduce__(self):  # a worker maps the file again instead of getting a copy
        return _Downsampled, (self.path,)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        return Image.fromarray(np.ascontiguousarray(self.array[index].transpose(1, 2, 0))), 0


def _join(batches, path, expected):
    """Writes the images of all batches into one .npy file uint8 (N, 3, 64, 64), one batch in memory at a time."""
    count = sum(len(_read_batch(batch)) for batch in tqdm(batches, desc="Counting", unit="file"))
    if count != expected:
        raise OSError(f"the {len(batches)} files of {path.parent} hold {count:,} images, not {expected:,}")
    with whole_file(path, "images") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(count, 3, 64, 64)))
        for batch in tqdm(batches, desc=f"Building {path}", unit="file"):
            file.write(_read_batch(batch).tobytes())


def _read_batch(path):
    """Reads the images of one batch, uint8 (n, 3, 64, 64), from an .npz or a pickle. OSError if that cannot be done."""
    try:
        with open(path, "rb") as file:
            rows = np.load(file)["data"] if path.suffix == ".npz" else _Arrays(file, encoding="latin1").load()["data"]
        return np.asarray(rows, dtype=np.uint8).reshape(len(rows), 3, 64, 64)
    except Exception as error:  # damaged bytes raise nearly anything
        raise OSError(f"cannot read {path} as downsampled ImageNet ({error})") from error


class _Arrays(pickle.Unpickler):
    """Reads dicts and lists of numpy arrays, and nothing that could run."""

    def find_class(self, module, name):
        known = {"_reconstruct", "_frombuffer", "ndarray", "dtype"} if module.partition(".")[0] == "numpy" else set()
        if name in known or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


@dataset(
    "imagenet256", 1_281_167, 50_000, 1000,
    "ImageNet's training images (held out: validation) of https://image-net.org/challenges/LSVRC/2012, a folder per class",
)  # fmt: skip
def _imagenet256(folder, held_out, uncond):
    return Folder(folder, labelled=not uncond)


@dataset(
    "celeba-hq", 30_000, 0, 0,
    "the images that https://github.com/tkarras/progressive_growing_of_gans makes, as files at any depth",
)  # fmt: skip
@dataset(
    "celeba", 162_770, 0, 0,
    "the training images (partition 0) of img_align_celeba of https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, at any depth",
)  # fmt: skip
def _faces(folder, held_out, uncond):
    return Folder(folder, labelled=False)


@dataset(
    "lsun-church", 126_227, 300, 0,
    "church_outdoor_train_lmdb of https://github.com/fyu/lsun, unpacked, or its images as files",
)  # fmt: skip
def _lsun_church(folder, held_out, uncond):
    database = Path(folder, f"church_outdoor_{'val' if held_out else 'train'}_lmdb")
    return _Database(database) if database.is_dir() else Folder(folder, labelled=False)


opened = {}  # LMDB's environments by path, with the process that opened each


class _Database(Dataset):
    """Reads the images of one of LSUN's LMDB databases, in the order of their keys. Each process opens it for itself, and once:
    LMDB refuses a second time. (The reader of torchvision writes a pickle into the working directory.)"""

    def __init__(self, path):
        self.path = os.path.realpath(path)
        with self._open().begin() as transaction:
            self.keys = list(transaction.cursor().iternext(values=False))

    def _open(self):
        try:
            import lmdb
        except ImportError as error:
            raise OSError(f"{self.path} is an LMDB database: pip install lmdb") from error
        if opened.get(self.path, (None,))[0] != os.getpid():
            opened.pop(self.path, None)  # that of the process from which this one was forked
            try:
                opened[self.path] = os.getpid(), lmdb.open(self.path, readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise OSError(f"cannot read the database {self.path} ({error})") from error
        return opened[self.path][1]

    def __len__(self):
        return len(self.keys)

    def names(self):
        return digest(b"\0".join(self.keys))

    def __getitem__(self, index):
        with self._open().begin() as transaction:
            key = self.keys[index]
            return read_image(io.BytesIO(transaction.get(key)), f"{printable(key)} of {self.path}"), 0

    def __reduce__(self):
        return _Database, (self.path,)


@dataset(
    "flowers102", 8_189, 0, 0,
    "102flowers.tgz, unpacked to flowers-102/jpg, and imagelabels.mat and setid.mat beside it in flowers-102, of "
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102, or its 8,189 images as files at any depth",
)  # fmt: skip
def _flowers102(folder, held_out, uncond):
    if not Path(folder, "flowers-102").is_dir():
        return Folder(folder, labelled=False)
    splits = [Flowers102(folder, split, loader=read_image) for split in ("train", "val", "test")]
    if missing := [file for split in splits for file in split._image_files if not file.is_file()]:
        raise OSError(f"{len(missing):,} images are missing, such as {missing[0]}")
    return _Unlabelled(splits)


class _Unlabelled(ConcatDataset):
    """Reads the images of other sources, one after the other, as if they had no classes."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0], 0
