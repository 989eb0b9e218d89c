"""Training images: a folder by its path, or a data set by its name. Each yields (image, class): float (3, size, size) in
[-1, 1] and an int. Nothing here is random, so an image is the same in any worker of any process."""

import errno
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from images import latents
from images.folders import Folder
from images.named import CIFAR10_FOLDER, DATASETS, read_cifar10, read_digits, read_named
from machine.precision import count_cores
from machine.stops import ignore_stops, read_batches

CHECK = "first read every image once, list those that cannot be read, and stop if there are any"
SIZES = 10_000  # files whose sizes a run compares, evenly spread: looking up a million takes minutes on some disks
# Errors that may pass: too many open files, no memory, failing disks and networks. The same image may be readable later.
PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
LONG = 16  # a longer image, by this ratio of its sides, is cropped first: scaled as a whole, it could take gigabytes


def center_crop_arr(image, image_size):
    """Crops a PIL image as ADM does: to its largest centred square, scaled to image_size.

    Halves by averaging while the shorter side stays at or above image_size, then resamples once, bicubically: the whole
    image, or the square alone if the image is longer than LONG times its width, as the whole could take gigabytes.
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
    """Crops the images of a source and scales their pixels to [-1, 1].

    source: a sequence of (PIL image, class). num_classes: 0 if classes are to be ignored. flip: whether training may mirror
    images.
    """

    def __init__(self, source, image_size, num_classes, flip):
        self.source, self.image_size, self.num_classes, self.flip = source, image_size, num_classes, flip
        self.classes = getattr(source, "classes", None) or [str(label) for label in range(num_classes)]
        self.remarks = getattr(source, "remarks", [])

    def __len__(self):
        return len(self.source)

    def names(self):
        """Returns a digest of the images' names, None if they have none."""
        return self.source.names() if hasattr(self.source, "names") else None

    def sizes(self, numbers):
        """Returns a digest of the sizes of these images' files, None if they are not files."""
        return self.source.sizes(numbers) if hasattr(self.source, "sizes") else None

    def fingerprint(self):
        """Returns a fingerprint of the images: their count, a digest of all names, and one of the sizes of SIZES files."""
        count = min(len(self), SIZES)
        return dict(images=len(self), names=self.names(), sizes=self.sizes(i * len(self) // count for i in range(count)))

    def __getitem__(self, index):
        image, label = self.source[index]
        return cropped(image, self.image_size), label if self.num_classes else 0


def cropped(image, image_size):
    """Returns a PIL image as networks see it: (3, image_size, image_size) from -1 to 1, cropped by `center_crop_arr`."""
    pixels = np.array(center_crop_arr(image, image_size))                  # (size, size, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


class Replacing(Dataset):
    """Yields TrainingImages as (image, class, faults): an image that cannot be read is replaced by the next readable one of its
    class, the same on every process, and faults lists what is wrong with the unreadable ones. OSError if more than `most`
    images, or a whole class, cannot be read."""

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
                    if of_machine(error):
                        raise
                    faults.append(str(error))
                    if len(faults) > self.most:
                        break
        tried = f"{len(faults):,} of its class were tried, and --max-bad-images is {self.most:,}"
        raise OSError(f"{faults[0]}; none stands in for it: {tried}")


def of_machine(error):
    """Returns whether an error in reading an image is the machine's, such as a lack of memory, so that a retry may succeed."""
    cause = error.__cause__
    return isinstance(cause, MemoryError) or getattr(cause, "errno", None) in PASSING


def collate(items):
    """Makes a batch of the items of Replacing: images (B, ...), classes (B,), faults."""
    images, labels, faults = zip(*items)
    return *default_collate(list(zip(images, labels))), [fault for some in faults for fault in some]


class _Faults(Dataset):
    """Yields (number, fault) of each of these images, the fault "" if it has none."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            self.images[index]
            return index, ""
        except OSError as error:
            if of_machine(error):
                raise
            return index, str(error)


def check_readable(images, processes, say, workers=0, most=None):
    """Reads every image once, on all processes and their workers, and calls `say` with what is wrong with each that cannot be
    read, in order. ValueError if there are more than `most`, or any at all for None, where none may be replaced."""
    mine = range(processes.rank, len(images), processes.size)
    loader = DataLoader(_Faults(images), 16, sampler=mine, collate_fn=list, num_workers=workers, worker_init_fn=ignore_stops)
    progress = tqdm(total=len(mine), desc="Checking", unit="image", disable=processes.rank > 0)
    found = []
    for faults in read_batches(loader):
        found += [(number, fault) for number, fault in faults if fault]
        progress.update(len(faults))
    progress.close()
    faults = dict.fromkeys(fault for _, fault in sorted(fault for part in processes.gather(found) for fault in part))
    if processes.rank == 0:
        for fault in faults:
            say(fault)
    if (bad := len(faults)) > (most or 0):
        way_out = f", or give --max-bad-images {bad}" if most is not None else ""
        raise ValueError(f"{bad:,} of {len(images):,} images cannot be read: replace or delete them{way_out}")


def worker_count(wanted, path):
    """Returns how many processes read images from `path` for this one: at most one a core, and none for the digits."""
    return min(wanted, count_cores()) if path else 0


def load_dataset(path, image_size, uncond=False, held_out=False, name=None):
    """Opens the training images at `path`, cropped to image_size; with held_out, those of a data set's own test split.

    A folder that `images.encode` made gives a latents.CachedLatents; ValueError if it was made for other arguments than these.

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
        source, num_classes, flip = read_named(name, path, held_out, uncond), DATASETS[name].num_classes, True
    elif path is None or (path == "digits" and not Path(path).exists()):
        if held_out:
            raise ValueError("the digits have no held-out images")
        source, num_classes, flip = read_digits(), 10, False  # a mirrored digit is no digit
    elif (folder := Path(path)).name == CIFAR10_FOLDER or (folder / CIFAR10_FOLDER).is_dir():
        source, num_classes, flip = read_cifar10(folder, held_out, uncond), 10, True
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
