"""Training images: a folder by its path, or a set by its name. Each yields (image, class): float (3, size, size) in
[-1, 1] and an int. Nothing here is random, so an image is the same in any worker of any process.

As a command it encodes images, once, to train on their latents; run again after a stop, it goes on where it was:

    torchrun --nproc_per_node=8 data.py encode --data-path imagenet/train --vae ema --out latents
    torchrun --nproc_per_node=8 train.py --data-path latents
"""

import argparse
import io
import os
import pickle
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate
from torchvision.datasets import CIFAR10, Flowers102
from tqdm import tqdm

import latents
from flags import not_negative, positive
from folders import Folder, describe_classes, digest, printable, read_image
from parallel import launch
from stops import read, shelter
from vae import open_space

CHECK = "first read every image once, name those that cannot be read, and end if there are any"
CIFAR10_FOLDER = "cifar-10-batches-py"
SIZES = 10_000  # files whose sizes a run compares, evenly spread: to look up those of a million takes minutes on some disks
LONG = 16  # sides of an image: above it, one a pixel wide could become gigabytes before it is cropped


def center_crop_arr(image, image_size):
    """ADM's centre crop: the largest centred square of a PIL image, scaled to image_size.

    Halves by averaging while the shorter side stays at or above image_size, then resamples once, bicubically: the whole
    image, or, where it is longer than LONG times its width, the square alone, as the whole could take gigabytes.
    """
    width, height = image.size
    while min(width, height) >= 2 * image_size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    scale = image_size / min(width, height)
    scaled = round(width * scale), round(height * scale)
    left, top = (scaled[0] - image_size) // 2, (scaled[1] - image_size) // 2
    square = (left, top, left + image_size, top + image_size)
    box = None
    if max(scaled) > LONG * image_size:
        box = [place * side / scaled_side for place, side, scaled_side in zip(square, 2 * (width, height), 2 * scaled)]
        scaled, square = (image_size, image_size), (0, 0, image_size, image_size)
    return image.resize(scaled, resample=Image.Resampling.BICUBIC, box=box).crop(square)


class TrainingImages(Dataset):
    """source: a sequence of (PIL image, class). num_classes: 0 if classes are to be ignored. flip: whether a mirrored
    image is as good as the image."""

    def __init__(self, source, image_size, num_classes, flip):
        self.source, self.image_size, self.num_classes, self.flip = source, image_size, num_classes, flip
        self.classes = getattr(source, "classes", None) or [str(label) for label in range(num_classes)]
        self.remarks = getattr(source, "remarks", [])

    def __len__(self):
        return len(self.source)

    def names(self):
        """A digest of the images' names, None if they have none."""
        return self.source.names() if hasattr(self.source, "names") else None

    def sizes(self, numbers):
        """A digest of the sizes of these images' files, None if they are not files."""
        return self.source.sizes(numbers) if hasattr(self.source, "sizes") else None

    def fingerprint(self):
        """What tells these images from others: how many they are, all their names, and the sizes of SIZES of their files."""
        count = min(len(self), SIZES)
        return dict(images=len(self), names=self.names(), sizes=self.sizes(i * len(self) // count for i in range(count)))

    def __getitem__(self, index):
        image, label = self.source[index]
        pixels = np.array(center_crop_arr(image, self.image_size))        # (size, size, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, label if self.num_classes else 0


class Replacing(Dataset):
    """TrainingImages, as (image, class, faults): for one that cannot be read the next of its class that can, whoever reads it,
    and a list of what is wrong with those that cannot. OSError if these are more than `most`, or the whole class."""

    def __init__(self, images, most):
        self.images, self.most = images, most

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        faults, labels = [], getattr(self.images.source, "labels", None)
        for other in chain(range(index, len(self)), range(index)):
            if labels is None or labels[other] == labels[index]:
                try:
                    return *self.images[other], faults
                except OSError as error:
                    faults.append(str(error))
                    if len(faults) > self.most:
                        break
        tried = f"{len(faults):,} of its class were tried, and --max-bad-images is {self.most:,}"
        raise OSError(f"{faults[0]}; none stands in for it: {tried}")


def collate(items):
    """A batch of Replacing: images (B, ...), classes (B,), faults."""
    images, labels, faults = zip(*items)
    return *default_collate(list(zip(images, labels))), [fault for some in faults for fault in some]


class _Faults(Dataset):
    """What is wrong with each of these images, "" if nothing is."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            self.images[index]
            return ""
        except OSError as error:
            return str(error)


def check_images(images, args, processes, say):
    """Reads every image once, on all processes and their workers, and tells `say` of each that cannot be read, in order.
    ValueError if there are more than --max-bad-images, where there is such a flag."""
    mine = range(processes.rank, len(images), processes.size)
    loader = DataLoader(_Faults(images), 16, sampler=mine, collate_fn=list, num_workers=readers(args), worker_init_fn=shelter)
    progress = tqdm(total=len(mine), desc="Checking", unit="image", disable=processes.rank > 0)
    found = []
    for faults in read(loader):
        found += [(mine[progress.n + place], fault) for place, fault in enumerate(faults) if fault]
        progress.update(len(faults))
    progress.close()
    found = sorted(fault for part in processes.gather(found) for fault in part)
    if processes.rank == 0:
        for _, fault in found:
            say(fault)
    if len(found) > getattr(args, "max_bad_images", 0):
        way_out = f", or give --max-bad-images {len(found)}" if hasattr(args, "max_bad_images") else ""
        raise ValueError(f"{len(found):,} of {len(images):,} images cannot be read: replace or delete them{way_out}")


def readers(args):
    """How many processes read images for this one."""
    return min(args.num_workers, os.cpu_count() or 1) if args.data_path else 0


def load_dataset(path, image_size, uncond=False, held_out=False, name=None):
    """The training images at `path`, cropped to image_size; with held_out, those of a set's own test split.

    A folder that `encode` made gives a latents.CachedLatents; ValueError if it was made for other arguments than these.

    name:   one of DATASETS, whose files are expected at `path`, all of them; without it, the folder is taken as it is.
    path:   None or "digits" for the 1,797 handwritten digits that scikit-learn carries; a folder that holds CIFAR-10
            as torchvision unpacks it; or a folder with one folder of images per class.
    uncond: every image is of class 0; a folder may then hold images at any depth.

    OSError that names the folder or file if there are no images to be had, or not as many as the named set has;
    ValueError for held-out images of a set that has none.
    """
    if path is not None and latents.holds_latents(path):
        return _cached(path, image_size, uncond, held_out, name)
    if name is not None:
        source, num_classes, flip = _read_named(name, path, held_out, uncond), DATASETS[name].num_classes, True
    elif path is None or (path == "digits" and not Path(path).exists()):
        if held_out:
            raise ValueError("the digits have no held-out images")
        source, num_classes, flip = _digits(), 10, False  # a mirrored digit is no digit
    elif (folder := Path(path)).name == CIFAR10_FOLDER or (folder / CIFAR10_FOLDER).is_dir():
        source, num_classes, flip = _cifar10(folder, train=not held_out), 10, True
    elif folder.is_dir():
        if not any(folder.iterdir()):
            raise FileNotFoundError(f"{path} is empty")
        source, flip = Folder(folder, labelled=not uncond), True
        num_classes = len(source.classes)
    else:
        raise FileNotFoundError(f"{path}: {'not a folder' if folder.exists() else 'no such folder'}")
    return TrainingImages(source, image_size, 0 if uncond else num_classes, flip)


def _cached(folder, image_size, uncond, held_out, name):
    cached = latents.CachedLatents(folder, uncond)
    if cached.image_size != image_size:
        raise ValueError(f"the latents in {folder} are for --image-size {cached.image_size}, not {image_size}")
    made_of = (cached.index.get("dataset"), cached.index.get("held_out"))
    if name is not None and made_of != (name, held_out):
        raise ValueError(f"the latents in {folder} are of {made_of}, not of (dataset, held out) {(name, held_out)}")
    return cached


def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)         # (1797, 8, 8), from 0 to 16
    return [(Image.fromarray(image).convert("RGB"), int(label)) for image, label in zip(images, digits.target)]


def _cifar10(folder, train):
    root = folder.parent if folder.name == CIFAR10_FOLDER else folder
    try:
        return CIFAR10(root, train)
    except (RuntimeError, OSError) as error:
        raise OSError(f"CIFAR-10 in {root / CIFAR10_FOLDER} is incomplete or damaged: {error}") from error


class _Unlabelled(Dataset):
    """The images of other sources, one after the other, as if they had no classes."""

    def __init__(self, *sources):
        self.images = ConcatDataset(sources)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index][0], 0


class _Downsampled(Dataset):
    """Images in a memory-mapped .npy file (N, 3, side, side), uint8, without classes."""

    def __init__(self, path):
        self.path, self.array = path, np.load(path, mmap_mode="r")

    def __reduce__(self):  # a worker maps the file again instead of getting a copy
        return _Downsampled, (self.path,)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        return Image.fromarray(np.ascontiguousarray(self.array[index].transpose(1, 2, 0))), 0


class _Arrays(pickle.Unpickler):
    """Reads dicts and lists of numpy arrays, and nothing that could run."""

    def find_class(self, module, name):
        known = {"_reconstruct", "_frombuffer", "ndarray", "dtype"} if module.partition(".")[0] == "numpy" else set()
        if name in known or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _imagenet64(folder, held_out, uncond):
    """A folder of images, or the batches of downsampled images, of which an array beside them is made once."""
    pattern, name = ("val_data*", "val") if held_out else ("train_data_batch_*", "train")
    parts = sorted(path for path in Path(folder).glob(pattern) if path.suffix in ("", ".npz"))
    array = Path(folder, f"{name}.npy")
    if not parts and not array.exists():
        return Folder(folder, labelled=False)
    if not array.exists():
        _join(parts, array, DATASETS["imagenet64"].held_out if held_out else DATASETS["imagenet64"].images)
    return _Downsampled(array)


def _join(parts, path, expected):
    """Writes the "data" of all parts, rows of 3 x 64 x 64, into one .npy file, one part in memory at a time."""
    count = sum(len(_read_part(part)) for part in tqdm(parts, desc="Counting", unit="file"))
    if count != expected:
        raise OSError(f"the {len(parts)} files of {path.parent} hold {count:,} images, not {expected:,}")
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(count, 3, 64, 64)))
            for part in tqdm(parts, desc=f"Building {path}", unit="file"):
                file.write(_read_part(part).tobytes())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_part(path):
    try:
        with open(path, "rb") as file:
            rows = np.load(file)["data"] if path.suffix == ".npz" else _Arrays(file, encoding="latin1").load()["data"]
        return np.asarray(rows, dtype=np.uint8).reshape(len(rows), 3, 64, 64)
    except Exception as error:  # damaged bytes raise nearly anything
        raise OSError(f"cannot read {path} as downsampled ImageNet ({error})") from error


def _imagenet256(folder, held_out, uncond):
    return Folder(folder, labelled=not uncond)


def _celeba_hq(folder, held_out, uncond):
    if held_out:
        raise ValueError("celeba-hq has no held-out images of its own")
    return Folder(folder, labelled=False)


def _lsun_church(folder, held_out, uncond):
    database = Path(folder, f"church_outdoor_{'val' if held_out else 'train'}_lmdb")
    return _Database(database) if database.is_dir() else Folder(folder, labelled=False)


class _Database(Dataset):
    """The images of one of LSUN's LMDB databases, in the order of their keys. Each process opens it for itself."""

    def __init__(self, path):
        self.path, self.opened_by = str(path), None
        with self._open() as environment, environment.begin() as transaction:
            self.keys = list(transaction.cursor().iternext(values=False))

    def _open(self):
        try:
            import lmdb
        except ImportError as error:
            raise OSError(f"{self.path} is an LMDB database: pip install lmdb") from error
        try:
            return lmdb.open(self.path, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise OSError(f"cannot read the database {self.path} ({error})") from error

    def __len__(self):
        return len(self.keys)

    def names(self):
        return digest(b"\0".join(self.keys))

    def __getitem__(self, index):
        if self.opened_by != os.getpid():
            self.environment, self.opened_by = self._open(), os.getpid()
        with self.environment.begin() as transaction:
            key = self.keys[index]
            return read_image(io.BytesIO(transaction.get(key)), f"{printable(key)} of {self.path}"), 0

    def __reduce__(self):
        return _Database, (self.path,)


def _flowers102(folder, held_out, uncond):
    if held_out:
        raise ValueError("flowers102 has no held-out images here: training takes all of its three splits, as the paper does")
    splits = [Flowers102(folder, split) for split in ("train", "val", "test")]
    if missing := [file for split in splits for file in split._image_files if not file.is_file()]:
        raise OSError(f"{len(missing):,} images are missing, such as {missing[0]}")
    return _Unlabelled(*splits)


class Named(NamedTuple):
    """A data set of the paper: how many images it has for training and held out, its classes (0 where it is trained
    without), where its files come from, and read(folder, held_out, uncond), which returns a sequence of (PIL image, class)."""

    images: int
    held_out: int
    num_classes: int
    where: str
    read: Callable


DATASETS = {
    "cifar10": Named(
        50_000, 10_000, 10,
        "cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked there",
        lambda folder, held_out, uncond: _cifar10(Path(folder), train=not held_out),
    ),
    "imagenet64": Named(
        1_281_167, 50_000, 0,
        "the batches of Imagenet64_train_part1.zip and _part2.zip of https://image-net.org/download-images.php, or ImageNet's "
        "training images in folders",
        _imagenet64,
    ),
    "imagenet256": Named(
        1_281_167, 50_000, 1000,
        "ImageNet's training images (held out: validation) of https://image-net.org/challenges/LSVRC/2012, a folder per class",
        _imagenet256,
    ),
    "celeba-hq": Named(
        30_000, 0, 0,
        "the images that https://github.com/tkarras/progressive_growing_of_gans makes, as files at any depth",
        _celeba_hq,
    ),
    "lsun-church": Named(
        126_227, 300, 0,
        "church_outdoor_train_lmdb of https://github.com/fyu/lsun, unpacked, or its images as files",
        _lsun_church,
    ),
    "flowers102": Named(
        8_189, 0, 0,
        "102flowers.tgz, unpacked to flowers-102/jpg, and imagelabels.mat and setid.mat beside it in flowers-102, of "
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        _flowers102,
    ),
}  # fmt: skip


def _read_named(name, folder, held_out, uncond):
    """OSError says what is missing, and where it comes from."""
    named = DATASETS[name]
    if folder is None or not Path(folder).is_dir():
        raise FileNotFoundError(f"{name} is expected in a folder, not {folder}: {named.where}")
    try:
        source, expected = named.read(folder, held_out, uncond), named.held_out if held_out else named.images
        if len(source) != expected:
            raise OSError(f"it has {len(source):,} images, not {expected:,}")
    except (OSError, RuntimeError) as error:
        raise OSError(f"{name} in {folder} is not whole ({error}); it takes {named.where}") from error
    return source


def encode(args, processes):
    """Writes the latents of every image, and of its mirror image, to --out: a process makes whole shards, of its own."""
    torch.set_float32_matmul_precision("high")  # as in training
    space = open_space(args.vae)
    if args.vae == "none":
        raise ValueError("--vae none is to work on pixels, which need no encoding")
    if args.image_size % space.factor:
        raise ValueError(f"--image-size {args.image_size} is not divisible by {space.factor}, the factor of the VAE")
    if processes.rank > 0:
        processes.barrier()  # rank 0 looks first: what it makes of a set's files, the others find
    images = load_dataset(args.data_path, args.image_size, args.uncond, args.held_out, args.dataset)
    classes = describe_classes(images.classes) if images.num_classes and images.classes else []
    for line in [*images.remarks, *classes] if processes.rank == 0 else []:
        print(line)
    if isinstance(images, latents.CachedLatents):
        raise ValueError(f"--data-path {args.data_path} holds latents already")
    if args.check_data:
        check_images(images, args, processes, print)
    space.load(processes.device)
    folder, index = Path(args.out), describe(images, space, args)
    if processes.rank == 0:
        latents.claim(folder, index)
        processes.barrier()
    missing, changed = processes.share(shards_to_make(folder, index, images) if processes.rank == 0 else None)
    shards = sorted(missing + changed)
    if processes.rank == 0:
        if changed:
            print(f"Shards of files that have other sizes now, which are made again: {len(changed):,}")
        total = f"{latents.shard_count(index):,} shards of {len(images):,} images"
        print(f"Encoding {len(shards):,} of {total} into {folder}")
    mine = shards[processes.rank :: processes.size]
    dtype = torch.float16 if args.half else torch.float32
    for number, moments, classes in encode_shards(mine, images, index, space, args, processes):
        path = latents.shard_path(folder, number)
        latents.write_shard(path, moments, classes, dtype, made_of(images, index, number))
    processes.barrier()
    if processes.rank == 0:
        flags = f"--data-path {folder} --vae {args.vae} --image-size {args.image_size}"
        print(f"The latents are whole: train.py {flags}")


def shards_to_make(folder, index, images):
    """(those that are missing or damaged, those that are whole but of files that have changed since)."""
    missing = latents.unfinished_shards(folder, index)
    whole = sorted({*range(latents.shard_count(index))} - {*missing})
    then = {number: latents.open_shard(folder, number, index).metadata() for number in whole}
    return missing, [number for number in whole if then[number] and then[number] != made_of(images, index, number)]


def made_of(images, index, number):
    """What a shard keeps of the files of its images: {name: text}, None if they are not files."""
    sizes = images.sizes(latents.shard_images(index, number))
    return dict(sizes=sizes) if sizes else None


def describe(images, space, args):
    """The index of the latents to be made."""
    side = args.image_size // space.factor
    return dict(
        vae=str(Path(args.vae).resolve()) if not space.on_hub else args.vae,
        vae_digest=space.digest(),
        source=str(Path(args.data_path).resolve()) if args.data_path else "digits",
        dataset=args.dataset,
        held_out=args.held_out,
        image_size=args.image_size,
        images=len(images),
        names=images.names(),
        num_classes=images.num_classes,
        classes=images.classes if images.num_classes else None,
        flip=images.flip,
        shape=[space.channels, side, side],
        dtype="float16" if args.half else "float32",
        shard_size=args.shard_size,
    )


def encode_shards(numbers, images, index, space, args, processes):
    """Yields (number, moments (n, flips, 2, C, h, w), classes (n,)) of each of these shards, on the CPU."""
    n = min(args.batch_size, space.at_once(args.image_size, args.image_size))
    batches = [torch.tensor(latents.shard_images(index, number)).split(n) for number in numbers]
    in_order = [batch.tolist() for shard in batches for batch in shard]
    loader = DataLoader(images, batch_sampler=in_order, num_workers=readers(args), worker_init_fn=shelter)
    progress = tqdm(total=sum(len(batch) for batch in in_order), unit="image", disable=processes.rank > 0)
    read_in_order = read(loader)
    for number, shard in zip(numbers, batches):
        moments, classes = [], []
        for pixels, labels in islice(read_in_order, len(shard)):
            pixels = pixels.to(processes.device)
            views = [pixels, pixels.flip(3)] if images.flip else [pixels]
            moments.append(torch.stack([space.moments(view) for view in views], dim=1).cpu())
            classes.append(labels)
            progress.update(len(labels))
        yield number, torch.cat(moments), torch.cat(classes)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepare training images.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "keep the latents of a data set, for train.py's --data-path"
    add = commands.add_parser(
        "encode", help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    ).add_argument
    add("--data-path", help="what train.py would be given: a folder of images; without it, the digits of scikit-learn")
    add("--dataset", choices=DATASETS, help="which of the paper's data sets --data-path holds; checks that it is whole")
    add("--held-out", action="store_true", help="the set's own test images, for train.py's --val-path")
    add("--uncond", action="store_true", help="images without classes")
    add("--check-data", action="store_true", help=CHECK)
    add("--vae", default="ema", help="autoencoder: ema, mse or a local folder")
    add("--image-size", type=positive, default=256, help="side to which images are cropped, in pixels")
    add("--out", required=True, help="folder for the latents, new or of a run that was stopped; one run at a time")
    add("--half", action="store_true", help="keep float16, which takes half the space and rounds by 5e-4")
    add("--shard-size", type=positive, default=1024, help="images in a file")
    add("--batch-size", type=positive, default=64, help="images encoded at once, per process; fewer if large")
    add("--num-workers", type=not_negative, default=4, help="processes that read images, per process; at most one per core")
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(encode, parse_args())
