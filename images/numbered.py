"""A folder of samples that are named by number, 000000.png and so on, and the .npz beside it, <folder>.npz.

A folder belongs to one set of settings and to one run at a time. A run that was stopped goes on with the images that are
missing; an image belongs to the same batch in every run.
"""

import glob
import json
import os
import struct
from pathlib import Path

import numpy as np
from tqdm import tqdm

from images.folders import read_image
from images.samples import NpzImages, write_npz
from machine.files import lock, make_folder, rewrite

# Settings of images in folders that were begun before these settings were recorded.
UNRECORDED = dict(precision="fp32", predict="velocity", time_shift=1.0, balanced_labels=False, guide=None, guide_scale=1)


def image_path(folder, number):
    return Path(folder, f"{number:06d}.png")


def claim_folder(folder, settings, count):
    """Makes the folder, or checks that the images in it were made with these settings, a dict for JSON.

    Returns an open file, settings.json in the folder: the folder is this run's as long as it stays open. Settings that an older
    folder did not record are not compared. ValueError if settings differ, if the folder's origin is unknown or another run is
    drawing into it, or if an .npz of more than `count` images would be replaced.
    """
    make_folder(folder, "--sample-dir")
    path, npz = folder / "settings.json", Path(f"{folder}.npz")
    drawn = npz.exists() or any(folder.glob("*.png"))
    strange = f"{folder} or {npz.name} holds images of unknown origin; give another --sample-dir"
    if drawn and not path.exists():
        raise ValueError(strange)
    record = open(path, "a+")  # noqa: SIM115
    lock(record, folder)
    before = settings
    if drawn:
        record.seek(0)
        try:
            before = UNRECORDED | json.loads(record.read())
        except (ValueError, TypeError) as error:  # it was cut short
            raise ValueError(strange) from error
    else:
        rewrite(record, json.dumps(settings), "settings")
    changed = {name: value for name, value in settings.items() if before.get(name, value) != value}
    if differences := [f"{name} {before[name]} and now {value}" for name, value in changed.items()]:
        raise ValueError(f"{folder} holds images made with {', '.join(differences)}; give another --sample-dir")
    if npz.exists() and (there := len(NpzImages(npz))) > count:
        raise ValueError(f"{npz} holds {there:,} images, more than --num-fid-samples {count:,}; move it away")
    return record


def check_folder(folder, size, count):
    """Checks the names and first bytes of the images that are there, and removes files that a killed run left half written.

    size: (height, width) of this run's images. Prints how many are beyond `count`. OSError names a file that is none of this
    run's images.
    """
    for partial in [*folder.glob("*.partial"), *folder.parent.glob(f"{glob.escape(folder.name)}.npz.*.partial")]:
        partial.unlink()
    more = 0
    for entry in os.scandir(folder):
        stem, ending = os.path.splitext(entry.name)
        if ending == ".png":
            if not stem.isdecimal() or stem != f"{int(stem):06d}":
                raise OSError(f"{entry.path} is none of this run's images, which are named by number; move it away")
            check_png(entry.path, size)
            more += int(stem) >= count
    if more:
        print(f"{more:,} images beyond --num-fid-samples {count:,} stay in {folder} and do not go into the .npz")


def check_png(path, size):
    """Checks that a file begins as an 8-bit RGB PNG of that size (height, width). OSError if not."""
    height, width = size
    beginning = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBB", 13, b"IHDR", width, height, 8, 2)
    with open(path, "rb") as file:
        if file.read(len(beginning)) != beginning:
            raise OSError(f"{path} is not an 8-bit RGB PNG of {height} x {width} as this run's are; delete it and run again")


def unfinished_batches(folder, batch_size, count):
    """Lists the batches of `count` images, each a range of numbers, of which an image is missing."""
    there = {entry.name for entry in os.scandir(folder)}
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return [batch for batch in batches if any(image_path(folder, number).name not in there for number in batch)]


def gather_npz(folder, count, size):
    """Gathers images 0 to count - 1 into <folder>.npz as arr_0, uint8 (count, *size, 3), one image in memory at a time, and
    returns its path. OSError names an image that cannot be read."""

    def read(number):
        path = image_path(folder, number)
        check_png(path, size)
        try:
            return np.asarray(read_image(path))
        except OSError as error:
            raise OSError(f"{error}; delete it and run again") from error

    write_npz(f"{folder}.npz", map(read, tqdm(range(count), desc="Building .npz file from samples")), count)
    return f"{folder}.npz"
