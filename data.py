"""Training images: a folder by its path, or a set by its name. Each yields (image, class): float (3, size, size) in
[-1, 1] and an int. Nothing here is random, so an image is the same in any worker of any process."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, ImageFolder

CIFAR10_FOLDER = "cifar-10-batches-py"


def center_crop_arr(image, image_size):
    """ADM's centre crop: the largest centred square of a PIL image, scaled to image_size.

    Halves by averaging while the shorter side stays at or above image_size, then resamples once, bicubically.
    """
    width, height = image.size
    while min(width, height) >= 2 * image_size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    scale = image_size / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


class TrainingImages(Dataset):
    """source: a sequence of (PIL image, class). num_classes: 0 if classes are to be ignored. flip: whether a mirrored
    image is as good as the image."""

    def __init__(self, source, image_size, num_classes, flip):
        self.source, self.image_size, self.num_classes, self.flip = source, image_size, num_classes, flip

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image, label = self.source[index]
        pixels = np.array(center_crop_arr(image, self.image_size))        # (size, size, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, label if self.num_classes else 0


def load_dataset(path, image_size, uncond=False, held_out=False):
    """The training images at `path`, cropped to image_size; with held_out, those of a set's own test split.

    path:   None or "digits" for the 1,797 handwritten digits that scikit-learn carries; a folder that holds CIFAR-10
            as torchvision unpacks it; or a folder with one folder of images per class.
    uncond: every image is of class 0; a folder may then hold images at any depth.

    OSError that names the folder or file if there are no images to be had, ValueError for held-out digits.
    """
    if path is None or (path == "digits" and not Path(path).exists()):
        if held_out:
            raise ValueError("the digits have no held-out images")
        source, num_classes, flip = _digits(), 10, False  # a mirrored digit is no digit
    elif (folder := Path(path)).name == CIFAR10_FOLDER or (folder / CIFAR10_FOLDER).is_dir():
        source, num_classes, flip = _cifar10(folder, train=not held_out), 10, True
    elif folder.is_dir():
        if not any(folder.iterdir()):
            raise FileNotFoundError(f"{path} is empty")
        source = (_UnlabelledFolder if uncond else _LabelledFolder)(folder, loader=read_image)
        num_classes, flip = len(source.classes), True
    else:
        raise FileNotFoundError(f"{path}: no such folder")
    return TrainingImages(source, image_size, 0 if uncond else num_classes, flip)


def read_image(path):
    """An image file as RGB. OSError names a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = str(error).replace(repr(str(path)), "it")
        raise OSError(f"cannot read the image {path} ({reason})") from error


class _LabelledFolder(ImageFolder):
    def find_classes(self, directory):
        if any(entry.is_dir() for entry in Path(directory).iterdir()):
            return super().find_classes(directory)
        raise FileNotFoundError(f"{directory} has no class folders; --uncond trains on images without classes")


class _UnlabelledFolder(ImageFolder):
    def find_classes(self, directory):
        return ["."], {".": 0}

    def make_dataset(self, directory, *args, **kwargs):
        try:
            return super().make_dataset(directory, *args, **kwargs)
        except FileNotFoundError:
            raise FileNotFoundError(f"{directory} holds no images") from None


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
