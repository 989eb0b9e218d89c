"""Cached latents: an autoencoder's latents of a data set, in a folder, so that training needs no autoencoder.

    latents.json        the index: the autoencoder, the images, the number of images per shard
    00000.safetensors   mean, std (n, flips, C, h, w) of n images, and of their mirror images, in the model's scale;
    ...                 label (n,), their classes; crc32 (n,), of each image's mean and std

The index is written first, and a shard is either whole or absent, so that missing shards can be found and made.
"""

import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import Dataset

from images.autoencoder import open_space
from images.folders import digest, hidden
from machine.files import lock, make_folder, rewrite, whole_file

INDEX = "latents.json"
TYPES = dict(
    vae=str, vae_digest=str, source=str, image_size=int, images=int, shard_size=int, num_classes=int, classes=list | None,
    flip=bool, shape=list,
)  # fmt: skip
AGAIN = "run `python -m images.encode` again with the same flags, which makes what is missing"


class CachedLatents(Dataset):
    """Reads the latents of a folder as (moments, class). Moments (flips, 2, C, h, w) are the mean and standard deviation of an
    image's latents, and of its mirror image's. ValueError if the index is damaged, OSError if shards are, or are missing."""

    def __init__(self, folder, uncond=False):
        self.folder, self.uncond = Path(folder), uncond
        self.index = read_index(self.folder)
        without = "The latents have no classes, so that the model learns none, as with --uncond"
        self.remarks = [] if uncond or self.index["num_classes"] else [without]
        self.image_size, self.flip, self.classes = (self.index[name] for name in ("image_size", "flip", "classes"))
        self.num_classes = 0 if uncond else self.index["num_classes"]
        self.shards, faults = [], []
        for number in range(shard_count(self.index)):
            try:
                self.shards.append(open_shard(self.folder, number, self.index))
            except OSError as error:
                faults.append(str(error))
        if faults:
            raise OSError(f"{len(faults)} of {shard_count(self.index)} shards cannot be used ({faults[0]}); {AGAIN}")

    def __reduce__(self):  # a worker opens the shards for itself
        return CachedLatents, (self.folder, self.uncond)

    def __len__(self):
        return self.index["images"]

    def __getitem__(self, index):
        number, place = divmod(index, self.index["shard_size"])
        mean, std, label, crc32 = (self.shards[number].get_slice(name)[place] for name in ("mean", "std", "label", "crc32"))
        if checksum(mean, std, label) != crc32:
            path = shard_path(self.folder, number)
            raise OSError(f"{path} is damaged: the checksum of its image {place} is wrong; delete the file and {AGAIN}")
        return torch.stack([mean, std], dim=1).float(), 0 if self.uncond else int(label)

    def fingerprint(self):
        """Returns a fingerprint of the latents: their count, and digests of the index and of the shards' source files."""
        index = json.dumps({name: value for name, value in self.index.items() if name not in ("vae", "source", "shard_size")})
        made_of = json.dumps([shard.metadata() for shard in self.shards])
        return dict(images=len(self), names=digest(index.encode()), sizes=digest(made_of.encode()))

    def check_vae(self, vae):
        """Checks that `vae`, as --vae names it, has the encoder that made these latents. ValueError if not."""
        on_hub, made_by = ("ema", "mse"), self.index["vae"]
        if vae in on_hub and made_by in on_hub:
            return  # they share an encoder
        if vae == "none" or vae in on_hub or open_space(vae).load("cpu").digest() != self.index["vae_digest"]:
            raise ValueError(f"--vae {vae} is not what encoded the latents in {self.folder}: that was --vae {made_by}")


def holds_latents(folder):
    return Path(folder, INDEX).is_file()


def read_index(folder):
    """Reads the index of latents. ValueError if it is damaged."""
    path = Path(folder, INDEX)
    return parse_index(path.read_text(), path)


def parse_index(text, path):
    """Reads an index from the text of the file at `path`. ValueError if it is damaged."""
    try:
        index = json.loads(text)
        if wrong := [name for name, kind in TYPES.items() if not isinstance(index[name], kind)]:
            raise TypeError(f"{wrong[0]} is {index[wrong[0]]!r}")
        return index
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of cached latents ({error!r})") from error


def claim_folder(folder, index):
    """Writes the index of latents that are to be made, or checks that the folder has the same, and returns it, an open file:
    the folder is this run's as long as it stays open and `read_index` is not called. ValueError if the indexes differ or
    another run is at work there."""
    make_folder(folder, "--out")
    path, there = folder / INDEX, {entry.name for entry in folder.iterdir() if not hidden(entry.name)}
    if there and INDEX not in there:
        raise ValueError(f"{folder} is not empty and holds no cached latents; give another --out")
    claim = open(path, "a+")  # noqa: SIM115
    lock(claim, folder)  # before it is read or written: another run may begin at the same time
    claim.seek(0)
    try:
        before = dict(names=index["names"]) | parse_index(claim.read(), path)  # older indexes have no names
    except ValueError:
        if there - {INDEX}:
            raise
        before = index  # it is new, or a kill or a full disk cut it short before there was any shard
        rewrite(claim, json.dumps(index, indent=1) + "\n", "index")
    differences = [f"{name} {before.get(name)} and now {now}" for name, now in index.items() if before.get(name) != now]
    if differences:
        raise ValueError(f"{folder} holds latents made with {', '.join(differences)}; give another --out")
    for leftover in folder.glob("*.partial"):  # a run that was killed left it
        leftover.unlink()
    return claim


def shard_count(index):
    return -(-index["images"] // index["shard_size"])


def shard_path(folder, number):
    return Path(folder, f"{number:05d}.safetensors")


def shard_images(index, number):
    """Returns the numbers of the images of a shard."""
    start = number * index["shard_size"]
    return range(start, min(start + index["shard_size"], index["images"]))


def open_shard(folder, number, index):
    """Opens a shard and checks the shapes of its tensors, without reading them. OSError if it is missing or damaged."""
    path, n = shard_path(folder, number), len(shard_images(index, number))
    flips = [n, 2 if index["flip"] else 1]
    expected = dict(mean=flips + index["shape"], std=flips + index["shape"], label=[n], crc32=[n])
    try:
        shard = safe_open(path, "pt")
        shapes = {name: shard.get_slice(name).get_shape() for name in expected}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} is damaged: {error}") from error
    if shapes != expected:
        raise OSError(f"{path} is another's: its tensors are {shapes}, not {expected}")
    return shard


def write_shard(path, moments, labels, dtype, made_of):
    """Writes a shard of moments (n, flips, 2, C, h, w) and labels (n,). made_of: what to keep of the images' files, {name:
    text} or None. ValueError if latents are not finite in dtype."""
    mean, std = (part.to(dtype).contiguous() for part in moments.unbind(2))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(f"latents for {path} are not finite in {dtype}")
    crc32 = torch.tensor([checksum(*image) for image in zip(mean, std, labels)])
    with whole_file(path, "shard") as file:
        file.write(save(dict(mean=mean, std=std, label=labels, crc32=crc32), made_of))


def checksum(mean, std, label):
    """Computes the CRC-32 of one image's latents and label."""
    return zlib.crc32(int(label).to_bytes(8, "little", signed=True), zlib.crc32(std.numpy(), zlib.crc32(mean.numpy())))
