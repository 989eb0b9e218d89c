"""Finished images, uint8 from 0 to 255: PNG files, grids, folders, and ADM's .npz, read and written as streams."""

import math
import os
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid

from images.dataset import center_crop_arr, load_dataset
from images.latents import holds_latents
from machine.files import whole_file
from machine.precision import count_cores
from machine.stops import ignore_stops, read_batches

SHOWN_SIDE = 64  # a grid enlarges smaller images, smoothly, to about this many pixels
CAPTION = 16  # pixels of the strip above an image that says what it is


def save_png(pixels, path):
    """Writes uint8 (H, W, 3) to a PNG that is whole or not there. OSError names it if it cannot be written."""
    with whole_file(path, "image") as file:
        Image.fromarray(pixels).save(file, format="png")


def save_grid(images, path, columns, captions=None):
    """Writes what `make_sheet` makes of images as one PNG."""
    save_png(make_sheet(images, columns, captions), path)


def make_sheet(images, columns, captions=None):
    """Returns a tensor of images uint8 (n, H, W, 3) as one picture, a NumPy array uint8 (H, W, 3), `columns` images per row.
    captions: a text per image; a caption that neighbours share is written over the first of them only."""
    scale = max(1, SHOWN_SIDE // images.shape[1])
    shown = interpolate(images.permute(0, 3, 1, 2).float(), scale_factor=scale, mode="bicubic")
    shown = shown.round().clamp(0, 255).byte()
    if captions:
        shown = pad(shown, (0, 0, CAPTION, 0), value=255)
    sheet = make_grid(shown, nrow=columns, pad_value=255).permute(1, 2, 0).numpy()
    return write_captions(sheet, captions, min(columns, len(captions)), *shown.shape[2:]) if captions else sheet


def write_captions(grid, captions, columns, height, width):
    """Writes captions into the strips above the images of a grid, (H, W, 3) of NumPy, shortened to where the next begins."""
    picture, places = Image.fromarray(grid), [(i // columns, i % columns) for i in range(len(captions))]
    pen, captions = ImageDraw.Draw(picture), [" ".join(text.splitlines()) for text in captions]
    for (row, column), text in zip(places, captions):
        same = [there == text for (at, _), there in zip(places, captions) if at == row]
        if column and same[column - 1]:
            continue
        font, room = caption_font(text), (same[column:] + [False]).index(False) * (width + 2) - 4
        while text and pen.textlength(text, font) > room:
            text = f"{text.removesuffix('…')[:-1].rstrip()}…" if len(text) > 1 else ""
        pen.text((2 + column * (width + 2), 2 + row * (height + 2)), text, fill="black", font=font)
    return np.asarray(picture)


def caption_font(text):
    """Returns Pillow's own font, or, for letters beyond ASCII, which that shows as boxes, matplotlib's if it is installed."""
    if not text.isascii():
        with suppress(ImportError, OSError):
            from matplotlib import get_data_path

            return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), CAPTION - 4)
    return ImageFont.load_default(CAPTION - 4)


class NpzImages:
    """Reads arr_0 of an .npz, uint8 (N, H, W, 3), one batch at a time. ValueError or OSError says what is wrong with it."""

    def __init__(self, path):
        self.path = path
        with open_npz(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"{path} holds no images: it has no arr_0, only {', '.join(names(archive)) or 'nothing'}")
            size = archive.getinfo("arr_0.npy").file_size
        with self._open() as file:
            self.shape, fortran, self.dtype = read_header(file)
            size -= file.tell()
            first = file.read(2**16) if self.dtype.kind == "f" else b""
        if self.dtype != np.uint8:
            raise ValueError(f"arr_0 of {path} is {self.dtype}{_span(first, self.dtype)}; images are uint8 from 0 to 255")
        if len(self.shape) != 4 or self.shape[3] != 3 or 0 in self.shape:
            raise ValueError(f"arr_0 of {path} has the shape {self.shape}; images are (N, height, width, 3)")
        if fortran:
            raise ValueError(f"arr_0 of {path} is in Fortran order, in which images lie scattered: save a C-ordered copy")
        if size != (pixels := math.prod(self.shape)):
            raise OSError(f"arr_0 of {path} is damaged: it has {size:,} bytes of pixels, not {pixels:,}")

    def __len__(self):
        return self.shape[0]

    def read(self, batches):
        """Yields a uint8 (n, H, W, 3) for each of `batches`, increasing sequences of increasing numbers."""
        size, at = self.shape[1] * self.shape[2] * 3, 0
        with self._open() as file:
            read_header(file)
            for numbers in batches:
                batch = np.empty((len(numbers), *self.shape[1:]), np.uint8)
                for image, number in zip(batch, numbers):
                    file.seek((number - at) * size, os.SEEK_CUR)
                    image[:] = np.frombuffer(file.read(size), np.uint8).reshape(image.shape)
                    at = number + 1
                yield batch

    @contextmanager
    def _open(self):
        with open_npz(self.path) as archive:
            try:
                with archive.open("arr_0.npy") as file:
                    yield file
            except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:  # the last: encrypted
                raise OSError(f"arr_0 of {self.path} is damaged ({error})") from error


class FolderImages(Dataset):
    """Reads the images of a folder, of any sizes, as training does. dataset: which of DATASETS it is. remarks: lines that say
    what of the folder was left out."""

    def __init__(self, path, crop=None, dataset=None, held_out=False):
        if path and holds_latents(path):
            raise ValueError(f"{path} holds latents, not images; give the folder that they were made of")
        images = load_dataset(path, crop, uncond=True, held_out=held_out, name=dataset)
        self.crop, self.source, self.remarks = crop, images.source, images.remarks

    def __len__(self):
        return len(self.source)

    def __getitem__(self, number):
        image, _ = self.source[number]
        return np.asarray(image if self.crop is None else center_crop_arr(image, self.crop))

    def read(self, batches):
        """Yields a list of uint8 (H, W, 3) for each of `batches`, sequences of numbers."""
        workers = min(4, count_cores()) if torch.cuda.is_available() else 0
        how = dict(collate_fn=list, num_workers=workers, worker_init_fn=ignore_stops)
        yield from read_batches(DataLoader(self, batch_sampler=batches, **how))


class ArrayImages:
    """Reads an array or tensor uint8 (N, H, W, 3) that is in memory already."""

    def __init__(self, array):
        self.array = np.asarray(array)
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            raise ValueError(f"images are uint8 (N, height, width, 3), not {self.array.dtype} {self.array.shape}")

    def __len__(self):
        return len(self.array)

    def read(self, batches):
        for numbers in batches:
            yield self.array[numbers]


def write_npz(path, images, n, **arrays):
    """Writes n images, an iterable of uint8 (H, W, 3) of one size, as arr_0 (n, H, W, 3) in C order, one in memory at a
    time, and other arrays beside it: the .npz that ADM's evaluator reads. ValueError if sizes differ."""
    with whole_file(path, "images") as npz, zipfile.ZipFile(npz, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for number, pixels in enumerate(images):
                if number == 0:
                    first = pixels
                    header = dict(descr="|u1", fortran_order=False, shape=(n, *first.shape))
                    np.lib.format.write_array_header_1_0(file, header)
                if pixels.shape != first.shape:
                    raise ValueError(f"image {number} is {_size(pixels)}, image 0 {_size(first)}; an .npz holds one size")
                file.write(pixels.tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(array), version=(1, 0), allow_pickle=False)


def open_npz(path):
    """Opens an .npz as a zip archive. OSError if it is none."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise OSError(f"{path} is not an .npz, or only a part of one ({error}); np.savez writes an .npz") from error


def names(archive):
    return [name.removesuffix(".npy") for name in archive.namelist()]


def read_header(file):
    """Reads (shape, Fortran order, dtype) of an array in the .npy format. Versions 2 and 3 differ in names of fields alone."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _span(first, dtype):
    """Returns the range of the first values of a float array, in words, for a message."""
    values = np.frombuffer(first[: len(first) // dtype.itemsize * dtype.itemsize], dtype) if first else np.zeros(0)
    return f" from {values.min():.3g} to {values.max():.3g}" if len(values) else ""


def _size(pixels):
    return f"{pixels.shape[0]} x {pixels.shape[1]}"
