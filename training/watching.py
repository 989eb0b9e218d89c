"""Monitors a run's averaged weights during training: held-out loss, samples, and the samples' distance to images."""

import logging
from math import isfinite
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from diffusion import create_objective, create_sampler
from diffusion.drawing import choose_classes, draw, name_classes
from diffusion.guidance import create_guidance, guidance_in_words
from diffusion.noise import PerImageNoise, image_seeds
from images.autoencoder import LatentSpace, PixelSpace
from images.latents import CachedLatents
from images.samples import save_grid
from training.batches import BadImages, encode
from training.learner import moved_to
from training.probe import Probe, distance
from training.runs import best_effort

HELD_OUT = 2560  # images that a held-out loss takes
SAMPLING_STEPS = 50
STRENGTH = 4.0  # of the guidance of samples, as sample.py has it
logger = logging.getLogger("train")


class Watch(NamedTuple):
    """What a run shows, and how often, in steps. held_out: images whose loss is logged with every checkpoint. objective, how:
    its name and its settings. bad: the BadImages of the run."""

    space: PixelSpace | LatentSpace
    objective: str
    how: dict
    bad: BadImages
    held_out: Dataset | None = None
    sample_every: int | None = None
    probe: Probe | None = None
    probe_every: int | None = None

    def due(self, step, saved):
        """Returns the names of the outputs that are due after a step; saved: whether the step has a checkpoint."""
        names = {"held_out_loss"} if self.held_out and saved else set()
        names |= {"samples"} if self.sample_every and step % self.sample_every == 0 else set()
        return names | ({self.probe.name} if self.probe and step % self.probe_every == 0 else set())

    def show(self, step, model, saved, processes, journal, seen=frozenset()):
        """Logs what is due after a step of that model, an average of weights, except the outputs of the names `seen`, which a
        run that was stopped had logged before. saved: as for `due`. All processes take part."""
        names = self.due(step, saved) - seen
        if not names:
            return
        # Held-out losses of runs are comparable without min_snr, times and time_shift, which weight the loss of training.
        flow = {name: value for name, value in self.how.items() if name in ("path", "predict")}
        drawn = {name: value for name, value in self.how.items() if name in ("path", "predict", "time_shift")}
        quick_sampler = create_sampler(self.objective, steps=SAMPLING_STEPS, **drawn)  # a pair: objective, sampler
        with moved_to(processes.device, model):
            if "held_out_loss" in names:
                objective = create_objective(self.objective, **flow)
                losses = held_out_loss(model, self.held_out, objective, self.space, processes, self.bad)
                log_held_out(step, losses, journal.write_row)
            if "samples" in names:
                draw_samples(step, model, self.space, quick_sampler, journal)
            if self.probe and self.probe.name in names:
                try:
                    found = distance(self.probe, model, self.space, *quick_sampler, processes)
                except ValueError as error:  # these weights draw nothing; later ones may
                    found = error
                log_probe(step, self.probe.name, found, journal.write_row)


@torch.no_grad()
def held_out_loss(model, dataset, objective, space, processes, bad=None, most=HELD_OUT):
    """Returns the mean of every term of the loss over at most that many images, evenly spread over the data set: a dict of
    floats. bad: a BadImages for those that cannot be read. All processes take part.

    Noise and timesteps are the same in every call of every run, and the timesteps evenly spread, so that losses of two models
    or of two steps differ for no other reason.
    """
    model.eval()  # drops cached symbols: a sharded model may have computed them from older weights
    n = min(len(dataset), most)
    sums, faults = {}, []
    if bad and not isinstance(dataset, CachedLatents):
        dataset = bad.replaced_in(dataset)
    mine = range(processes.rank, n, processes.size)
    parts = -(-n // (64 * processes.size))  # for every process the same number, as a sharded model needs
    for numbers in (mine[part::parts] for part in range(parts)):
        images, labels, *new = zip(*(dataset[number * len(dataset) // n] for number in numbers))
        faults += [fault for some in new for part in some for fault in part]
        noise = PerImageNoise(image_seeds(0, numbers, "validation"), processes.device, drawn_on="cpu")
        images, labels = torch.stack(images).to(processes.device), torch.tensor(labels, device=processes.device)
        x = encode(images, torch.zeros(len(images), dtype=torch.bool, device=images.device), noise, space)
        # Multiplying by a prime that divides no n permutes: timesteps have nothing to do with an image's place in the set.
        shuffled = torch.tensor([number * 1_000_003 % n for number in numbers], device=processes.device)
        t = objective.draw_times((shuffled + noise.rand()) / n)
        losses = objective.training_losses(model, x, t, dict(y=labels), noise(x))
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.sum(dtype=torch.float64)
    if bad and bad.most and (problem := bad.note(faults, processes)):
        raise problem
    total = torch.stack(list(sums.values())).float()
    if processes.size > 1:
        dist.all_reduce(total)
    return dict(zip(sums, (total / n).tolist()))


def draw_samples(step, model, space, quick_sampler, journal):
    """Draws a grid of samples, the same noise at every step: what sample.py draws of a checkpoint. All processes draw, as they
    would have to wait anyway.

    It leaves the random numbers of training as they are.
    """
    model.eval()  # drops symbols that were kept: sharded parameters change without telling
    classes, guidance = choose_classes(model), create_guidance(STRENGTH, model.in_channels)
    labels = [label for label in classes for _ in range(max(16 // len(classes), 1))]
    try:
        images = draw(model, space, *quick_sampler, labels, 0, guidance, progress=False)
    except ValueError as error:  # these weights draw nothing; later ones may
        logger.info(f"(step={step:07d}) No samples: {error}")
        return
    if not journal.writes:
        return
    path = journal.folder / "samples" / f"{step:07d}.png"
    with best_effort("Writing a grid of samples"):
        path.parent.mkdir(exist_ok=True)
        save_grid(images, path, 4, name_classes(model, labels))
        drawn = f"drawn {guidance_in_words(guidance, model)}"
        logger.info(f"(step={step:07d}) {len(labels)} samples are in {path}, {drawn}")
    if journal.track and path.exists():
        with best_effort("Tracking"):
            journal.track(step, {}, path)


def log_held_out(step, losses, write_row):
    """Logs the terms of a held-out loss; those that are not finite are None in log.jsonl."""
    logger.info(f"(step={step:07d}) Held-out Loss: {losses['loss']:.4f}")
    write_row(dict(step=step) | {f"held_out_{name}": loss if isfinite(loss) else None for name, loss in losses.items()})


def log_probe(step, name, found, write_row):
    """Logs a distance, or the ValueError that says why there is none."""
    failed = isinstance(found, ValueError)
    logger.info(f"(step={step:07d}) Frechet Distance: {f'none, {found}' if failed else f'{found:.4g}'} ({name})")
    write_row({"step": step, name: None if failed else found})
