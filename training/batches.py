"""Batches of images and all their randomness: which images, in which order, mirrored or not, with which noise.

Order and noise belong to images and steps, so any number of processes, restarted at any step, sees the same batches.
"""

import logging
from contextlib import nullcontext
from itertools import count, islice
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, DistributedSampler

from diffusion.noise import PerImageNoise, image_seeds
from images.autoencoder import draw_latents
from images.dataset import Replacing, collate, load_dataset
from machine.stops import Stopped, end_readers, ignore_stops, postponed, read_batches, received, time_limit

PATIENCE = 1800  # seconds for which a process waits for its images
logger = logging.getLogger("train")


class BadImages(NamedTuple):
    """The faults of images that could not be read, one line each, and how many of them a run tolerates."""

    known: list
    most: int = 0

    def replaced_in(self, dataset):
        """Returns the data set with another image of its class in place of each that cannot be read, if any are allowed."""
        return Replacing(dataset, self.most) if self.most else dataset

    def note(self, faults, processes):
        """Logs the new faults of all processes, and records them.

        If there are then more than `most`, returns an OSError, so that the caller can raise it on all processes together.
        """
        for fault in dict.fromkeys(fault for part in processes.gather(faults) for fault in part):
            if fault not in self.known:
                if len(self.known) >= self.most:
                    return OSError(f"{fault}, nor could {len(self.known)} before: all that --max-bad-images allows for")
                self.known.append(fault)
                if processes.rank == 0:
                    logger.warning(f"{fault}; another of its class stands in for it, {len(self.known)} of --max-bad-images")
        return None


def open_images(path, held_out_path, image_size, uncond, name, processes):
    """Returns training images and held-out ones (None without a path). The other arguments are those of load_dataset."""
    with processes.main_process_first() if name else nullcontext():        # a named set's files may be joined when it is opened
        dataset = load_dataset(path, image_size, uncond, name=name)
        uncond = not dataset.num_classes                                   # latents may have none
        held_out = load_dataset(held_out_path, image_size, uncond, held_out=True, name=name) if held_out_path else None
    return dataset, held_out


def make_loader(dataset, batch_size, seed, processes, workers=0):
    """Returns a DataLoader of this process's share of every batch of batch_size images. An epoch's order is the same for any
    number of processes."""
    return DataLoader(
        dataset,
        batch_size=batch_size // processes.size,
        sampler=Order(dataset, processes.size, processes.rank, seed=seed, drop_last=True),
        drop_last=True,
        num_workers=workers,
        collate_fn=collate if isinstance(dataset, Replacing) else None,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_stops,
        pin_memory=processes.device.type == "cuda",
    )


class Order(DistributedSampler):
    """Yields an epoch's images in their order, from any place in it: those before `first` are not read."""

    first = 0

    def __iter__(self):
        return islice(super().__iter__(), self.first, None)


def epochs(loader, step):
    """Yields batches without end, in a new order every epoch, beginning after that of the given step."""
    start, position = divmod(step, len(loader))
    for epoch in count(start):
        logger.info(f"Beginning epoch {epoch}...")
        loader.sampler.set_epoch(epoch)
        loader.sampler.first = position * loader.batch_size
        yield from read_batches(loader)
        position = 0


def batches(loader, first, processes, save, bad):
    """Yields (images, labels) on all processes alike, beginning after step `first`. bad: a BadImages.

    When one process cannot read an image or receives a signal, all of them call save() and stop.
    """
    reader = epochs(loader, first)
    while True:
        faults, problem = [], None
        try:
            late = f"no images have come for {PATIENCE:,} seconds: what holds them is stuck"
            with postponed(False), time_limit(PATIENCE, late):
                images, labels, *faults = next(reader)
        except (Exception, Stopped) as error:
            problem = error
        if received:
            problem = Stopped(" and ".join(received))
        stop = isinstance(problem, Stopped)
        failed, stopped, replaced = processes.any(problem is not None and not stop, stop, any(faults))
        if replaced and not (failed or stopped):
            problem = bad.note([fault for some in faults for fault in some], processes)
            failed = problem is not None
        if (failed or stopped) and processes.size > 1:
            end_readers()
            save()
            processes.barrier()  # the first process to exit terminates the others, so all must have saved
        if failed or stopped:
            failure = OSError("stopped, because another process could not read an image")
            raise problem or (Stopped("a signal to another process") if stopped else failure)
        yield images, labels


def images_of_step(step, loader, batch_size, seed):
    """Returns the numbers in the data set of the images that all processes together see at a step."""
    epoch, position = divmod(step - 1, len(loader))
    order = DistributedSampler(loader.dataset, 1, 0, seed=seed)
    order.set_epoch(epoch)
    return list(order)[position * batch_size :][:batch_size]


def draw_batch(
    images, labels, step, part=0, *, seed, batch_size, flip, space, objective, processes, dropout=0.1, chances=0
):  # fmt: skip
    """Returns the arguments of training_losses for a part of a step's images (n, ...) and their labels (n,), with everything
    random drawn from a generator per image.

    The n-th image that a run sees gets the n-th generator, on whichever process. flip: whether images may be mirrored.
    batch_size: images per step over all processes. dropout: the probability of dropping a class. chances: how many further
    random numbers per image the network takes.
    """
    first = (step - 1) * batch_size + part * len(images) * processes.size + processes.rank
    numbers = range(first, first + len(images) * processes.size, processes.size)
    noise = PerImageNoise(image_seeds(seed, numbers, "training"), images.device)
    mirrored, dropped, time = noise.rand(3).unbind(1)
    x = encode(images, (mirrored < 0.5) & flip, noise, space)
    t = objective.draw_times(time)
    batch = dict(x_start=x, t=t, model_kwargs=dict(y=labels, drop=dropped < dropout), noise=noise(x))
    if chances:
        batch["model_kwargs"]["chance"] = noise.rand(chances)
    return batch


def encode(images, mirrored, noise, space):
    """Returns the model's input for images (B, 3, H, W), flipped where mirrored (B,) bool is true, or for their cached moments
    (B, flips, 2, C, h, w): (B, C, h, w). noise: a PerImageNoise of B generators."""
    if images.dim() == 6:
        moments = torch.where(mirrored[:, None, None, None, None], images[:, -1], images[:, 0])
        return draw_latents(moments, noise.randn(*moments.shape[2:]))
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    side = images.shape[2] // space.factor
    return space.encode(images, noise.randn(space.channels, side, side) if space.factor > 1 else None)
