"""Trains a DiT, with attention or another mixer, on one process or, under torchrun, on many:

    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /imagenet/train
    python train.py --model DiT-N/2 --mixer pdessm --vae none --image-size 8 --num-classes 10      (digits, no data needed)

All randomness belongs to images and steps, not to processes: the number of processes changes only rounding.
"""

import argparse
import json
import logging
import re
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from math import isfinite
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import sample
from checkpoints.build import initialize
from checkpoints.resume import (
    best_effort,
    find_run,
    forget_what_came_after,
    open_log,
    record_rounding,
    rescue,
    restore,
    save_run,
    seen_at,
)
from diffusion import OBJECTIVES, PATHS, TIMES, create_objective
from diffusion.samplers import PerImageNoise, image_seeds
from download import find_checkpoint
from evaluation.features import NETWORKS
from images.autoencoder import draw_latents, open_space
from images.dataset import CHECK, Replacing, check_images, collate, load_dataset, readers
from images.dataset import center_crop_arr as center_crop_arr
from images.folders import describe_classes
from images.latents import CachedLatents
from images.named import DATASETS
from machine.cost import peak_flops, peak_memory, training_flops
from machine.flags import Default, above_zero, decay, not_negative, positive
from machine.precision import be_deterministic, check_compiler, in_precision
from machine.processes import launch
from machine.stops import Stopped, came, end_readers, postponed, read, shelter, within
from mixers import MIXERS, add_pde_flags, mixer_options
from mixers.running import add_speed_flags, choose_backend
from models import MODELS, stride
from training.learner import create_learner, exchange_gradients, lent, only_the_scale_falls, replicate, update
from training.probe import distance, open_probe
from training.trackers import TRACKERS, numbers_of

HELD_OUT = 2560  # images of --val-path that a validation loss takes
SAMPLING_STEPS = 50  # of the samples that training shows
PATIENCE = 1800  # seconds that a process waits for its images
ANOTHER = "stopped, because another process could not read an image"
logger = logging.getLogger("train")


def main(args, processes):
    if processes.rank == 0:
        logger.setLevel(logging.INFO)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    if args.deterministic:
        be_deterministic()
    device = processes.device
    space = open_space(args.vae)
    if args.dataset and processes.rank > 0:
        processes.barrier()  # rank 0 looks first: what it makes of a set's files, the others find
    dataset, held_out = load_dataset(args.data_path, args.image_size, args.uncond, name=args.dataset), None
    if args.val_path:
        held_out = load_dataset(args.val_path, args.image_size, args.uncond, held_out=True, name=args.dataset)
    if args.dataset and processes.rank == 0:
        processes.barrier()
    if args.dataset or not dataset.num_classes:
        args.num_classes = dataset.num_classes
    check(args, processes, dataset, held_out, space)
    args.num_classes, args.class_names = int(args.num_classes), dataset.classes if dataset.num_classes else None
    args.data = dataset.fingerprint()
    if processes.any(args.data != processes.share(args.data))[0]:
        raise ValueError("the processes do not see the same images: --data-path differs from one machine to another")
    if args.check_data:
        for images in filter(None, (dataset, held_out)):
            check_images(images, args, processes, logger.warning)
    probe = open_probe(args, processes) if args.probe_every else None
    if args.sample_every or probe or not all(isinstance(images, CachedLatents) for images in (dataset, held_out) if images):
        space.load(device)
    args.vae_digest = dataset.index["vae_digest"] if isinstance(dataset, CachedLatents) else space.digest()

    torch.manual_seed(args.global_seed)  # the same initial weights on every process
    model = MODELS[args.model](
        input_size=args.image_size // space.factor,
        in_channels=space.channels,
        num_classes=args.num_classes,
        learn_sigma=args.objective == "diffusion",
        mixer=args.mixer,
        **mixer_options(args),
    )
    model.trained_classes = dataset.num_classes
    cost = training_flops(model, args.global_batch_size), peak_flops(device, args.precision, args.tf32)
    choose_backend(args.backend, model, device)  # after the count, for which nothing is computed
    loader = make_loader(dataset, args, processes)
    total = min(args.epochs * len(loader), args.max_steps or args.epochs * len(loader))
    run = find_run(args, processes)
    args.bad_images = run["args"].get("bad_images", []) if run else []
    first = run["step"] if run else 0
    saved, seen = {first}, processes.share(seen_at(run) if run and processes.rank == 0 else set())

    def due(step):
        """What there is to see after a step: held-out loss, samples and their distance to images."""
        names = {"held_out_loss"} if held_out and step in saved else set()
        names |= {"samples"} if args.sample_every and step % args.sample_every == 0 else set()
        names |= {probe.name} if probe and step % args.probe_every == 0 else set()
        return names

    if run and first >= total and not due(first) - seen:
        logger.info(f"Done! All {total:,} steps were done before: {run['path']}")
        return
    begun_from = start_from(args.init_from, model, processes) if args.init_from and not run else []
    folder = track = None
    if processes.rank == 0:
        folder = run["path"].parent.parent if run else create_experiment(args)
        log = open_log(folder)
        log_to(log)
        logger.info(f"Experiment directory {'reopened' if run else 'created'} at {folder}")
    folder = processes.share(folder)
    logger.info(f"DiT Parameters: {sum(p.numel() for p in model.parameters()):,}")
    for line in begun_from:
        logger.info(line)
    classes = f" of {dataset.num_classes} classes" if dataset.num_classes else ""
    logger.info(f"Dataset contains {len(dataset):,} images{classes} ({args.data_path or 'digits'})")
    for line in dict.fromkeys(line for images in (dataset, held_out) if images for line in images.remarks):
        logger.info(line)
    for line in describe_classes(args.class_names) if args.class_names else []:
        logger.info(line)
    if probe:
        logger.info(probe.describe())
    if dataset.num_classes < args.num_classes:
        logger.info(
            f"The images have {dataset.num_classes} classes, fewer than --num-classes {args.num_classes}: the others will stay "
            f"untrained, {dataset.num_classes} to {args.num_classes - 1}"
        )

    conditions, otherwise = record_rounding(run, processes)
    learner = create_learner(model, args, processes)
    ema = next(iter(learner.averages.values()))
    if run:
        restore(learner, run)
        if processes.rank == 0:
            forget_what_came_after(run)
        logger.info("; ".join([f"Going on after step {first:,}, from {run['path']}", *run["changes"]]))
        if otherwise:
            logger.info(otherwise)
        run = None  # it holds as much as the learner
    if args.tracker and processes.rank == 0:
        track = TRACKERS[args.tracker](folder, vars(args), first)
    write_row = partial(append_row, folder, track)
    replica = replicate(model, args, processes)
    network = in_precision(replica, args.precision, device)
    objective = create_objective(args.objective, path=args.path or "linear", times=args.times or "uniform")

    def save(alone=False):
        if learner.step not in saved:  # a signal may come right after a checkpoint
            saved.add(learner.step)  # nor is it tried again
            with postponed():
                logger.info(f"Saved checkpoint to {save_run(folder, learner, args, processes, conditions, alone)}")

    def watch(step, names):
        """Makes what is due after a step."""
        with lent(ema, device) if names else nullcontext():
            if "held_out_loss" in names:
                log_held_out(step, held_out_loss(ema, held_out, args, processes, space), processes, write_row)
            if "samples" in names:
                draw_samples(step, ema, args, processes, space, folder, track)
            if probe and probe.name in names:
                try:
                    found = distance(probe, ema, space, *quick_sampler(args), processes)
                except ValueError as error:  # of these weights, which training goes on to change
                    found = error
                log_probe(step, probe, found, processes, write_row)

    if first:  # what a kill may have come before
        watch(first, due(first) - seen)
    logger.info(f"Training for {total:,} steps ({total / len(loader):.1f} epochs) on {processes.size} x {device.type}...")
    parts = f" in {args.grad_accum} parts" if args.grad_accum > 1 else ""
    logger.info(f"A step has {args.global_batch_size:,} images, {loader.batch_size:,} on each process{parts}")
    losses, skipped, start = [], 0, perf_counter()
    with rescue(learner, save), postponed(processes.size > 1):  # alone, nobody waits for the end of a step
        reader = islice(batches(loader, first, args, processes, save), max(total - first, 0))
        progress = tqdm(reader, total=total, initial=first, unit="step", mininterval=0.5, disable=processes.rank > 0)
        for step, (images, labels) in enumerate(progress, start=first + 1):
            loss = torch.zeros((), device=device)
            for part in range(args.grad_accum):
                x, y = images.chunk(args.grad_accum)[part].to(device), labels.chunk(args.grad_accum)[part].to(device)
                batch = draw_batch(x, y, step, args, processes, dataset.flip, space, objective, part)
                with exchange_gradients(replica, part == args.grad_accum - 1):
                    terms = objective.training_losses(network, **batch)
                    part_loss = terms["loss"].mean() / args.grad_accum
                    learner.scaler.scale(part_loss).backward()
                loss += part_loss.detach()
            loss = processes.mean(loss)
            if update(learner, loss, step, args.max_grad_norm, args.ema_warmup):
                losses.append(loss)
                skipped = 0
            elif only_the_scale_falls(learner, loss):
                log_scale(step, learner.scaler.get_scale(), processes, write_row)
            else:
                skipped += 1
                log_skipped(step, skipped, batch_indices(step, loader, args), args, processes, write_row, save)
            if step % 10 == 0:
                progress.set_postfix(loss=f"{loss.item():.4f}")
            if step % args.log_every == 0 or step == total:
                log_interval(step, losses, perf_counter() - start, cost, processes, write_row)
                losses, start = [], perf_counter()
            paused = perf_counter()
            if step % args.ckpt_every == 0 or step == total:
                save()
            watch(step, due(step))
            start += perf_counter() - paused
    logger.info("Done!")


def check(args, processes, dataset, held_out, space):
    """ValueError for settings that cannot work together."""
    least = stride(args.model) * space.factor
    if args.image_size % least:
        parts = f"{stride(args.model)} of {args.model}" + (f" x {space.factor} of the VAE" if space.factor > 1 else "")
        raise ValueError(f"--image-size {args.image_size} is not divisible by {least} ({parts})")
    if args.global_batch_size % (processes.size * args.grad_accum):
        parts = f"{processes.size} processes" + (f" x {args.grad_accum} of --grad-accum" if args.grad_accum > 1 else "")
        raise ValueError(f"--global-batch-size {args.global_batch_size} is not divisible by {parts}")
    if args.parallel == "fsdp" and processes.size == 1:
        raise ValueError("--parallel fsdp has nothing to shard on one process; start several with torchrun, or leave it out")
    if args.parallel == "fsdp" and args.ema_device:
        raise ValueError("--ema-device is not for --parallel fsdp, which leaves every process its part of the averages")
    if args.parallel == "fsdp" and processes.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(f"--parallel fsdp on CPUs needs a newer PyTorch than {torch.__version__}")
    if len(dataset) < args.global_batch_size:
        raise ValueError(f"the {len(dataset)} images do not fill one batch of --global-batch-size {args.global_batch_size}")
    if isinstance(args.num_classes, Default) and dataset.num_classes != args.num_classes:
        raise ValueError(f"the images have {dataset.num_classes} classes: --num-classes {dataset.num_classes}")
    if dataset.num_classes > args.num_classes:
        raise ValueError(f"the images are of {dataset.num_classes} classes, more than --num-classes {args.num_classes}")
    for latents in (images for images in (dataset, held_out) if isinstance(images, CachedLatents)):
        latents.check_vae(args.vae)
    if args.max_bad_images and isinstance(dataset, CachedLatents):
        raise ValueError("--max-bad-images is for images; `python -m images.encode` makes damaged latents again")
    if args.compile:
        check_compiler(processes.device)
    if args.objective != "flow" and (args.path or args.times):
        raise ValueError("--path and --times mean nothing without --objective flow")
    if held_out:
        names = [images.classes for images in (held_out, dataset)]
        if dataset.num_classes and names[0] != names[1]:
            raise ValueError(f"--val-path has other classes ({names[0]}) than --data-path ({names[1]})")
        if len(held_out) < processes.size:
            raise ValueError(f"the {len(held_out)} images of --val-path are fewer than the {processes.size} processes")


def start_from(checkpoint, model, processes):
    """Initial weights for fine-tuning; returns what to say about it."""
    if processes.rank == 0:
        find_checkpoint(checkpoint)  # if it must be fetched, then once
    processes.barrier()
    return initialize(model, find_checkpoint(checkpoint))


def make_loader(dataset, args, processes):
    """This process's share of every global batch; an epoch's order is the same for any number of processes."""
    sampler = Order(dataset, processes.size, processes.rank, seed=args.global_seed, drop_last=True)
    workers = readers(args)
    return DataLoader(
        Replacing(dataset, args.max_bad_images) if args.max_bad_images else dataset,
        batch_size=args.global_batch_size // processes.size,
        sampler=sampler,
        drop_last=True,
        num_workers=workers,
        collate_fn=collate if args.max_bad_images else None,
        persistent_workers=workers > 0,
        worker_init_fn=shelter,
        pin_memory=processes.device.type == "cuda",
    )


class Order(DistributedSampler):
    """The order of an epoch, from any place in it: images before `first` are not read."""

    first = 0

    def __iter__(self):
        return islice(super().__iter__(), self.first, None)


def epochs(loader, step):
    """Batches without end, in a new order every epoch, beginning after that of the given step."""
    start, position = divmod(step, len(loader))
    for epoch in count(start):
        logger.info(f"Beginning epoch {epoch}...")
        loader.sampler.set_epoch(epoch)
        loader.sampler.first = position * loader.batch_size
        yield from read(loader)
        position = 0


def batches(loader, first, args, processes, save):
    """Batches for all processes alike, beginning after that of step `first`.

    When one process cannot read an image or is sent a signal, all of them stop, with what was learnt until then saved.
    """
    reader = epochs(loader, first)
    while True:
        faults, problem = [], None
        try:
            with postponed(False), within(PATIENCE, f"no images have come for {PATIENCE:,} seconds: what holds them is stuck"):
                images, labels, *faults = next(reader)
        except (Exception, Stopped) as error:
            problem = error
        if came:
            problem = Stopped(" and ".join(came))
        stop = isinstance(problem, Stopped)
        failed, stopped, replaced = processes.any(problem is not None and not stop, stop, any(faults))
        if replaced and not (failed or stopped):
            problem = note_bad_images([fault for some in faults for fault in some], args, processes)
            failed = problem is not None
        if (failed or stopped) and processes.size > 1:
            end_readers()
            save()
            processes.barrier()  # the first process to end takes the others with it
        if failed or stopped:
            others = Stopped("a signal to another process") if stopped else OSError(ANOTHER)
            raise problem or others
        yield images, labels


def note_bad_images(faults, args, processes):
    """Says what is wrong with images that others stood in for, in all processes, and that is new; the checkpoints know of them.
    Returns an OSError where --max-bad-images does not allow for more of them."""
    for fault in dict.fromkeys(fault for part in processes.gather(faults) for fault in part):
        if fault not in args.bad_images:
            if len(args.bad_images) >= args.max_bad_images:
                return OSError(f"{fault}, nor could {len(args.bad_images)} before: all that --max-bad-images allows for")
            args.bad_images.append(fault)
            if processes.rank == 0:
                logger.warning(f"{fault}; another of its class stands in for it, {len(args.bad_images)} of --max-bad-images")


def batch_indices(step, loader, args):
    """Which images of the data set all processes together see at a step."""
    epoch, position = divmod(step - 1, len(loader))
    order = DistributedSampler(loader.dataset, 1, 0, seed=args.global_seed)
    order.set_epoch(epoch)
    return list(order)[position * args.global_batch_size :][: args.global_batch_size]


def draw_batch(images, labels, step, args, processes, flip, space, objective, part=0):
    """The arguments of training_losses for a part of a step's images, with everything random drawn from a generator per image.

    The n-th image that a run sees gets the n-th generator, whichever process it lands on.
    """
    first = (step - 1) * args.global_batch_size + part * len(images) * processes.size + processes.rank
    numbers = range(first, first + len(images) * processes.size, processes.size)
    noise = PerImageNoise(image_seeds(args.global_seed, numbers, "training"), images.device)
    mirrored, dropped, time = noise.rand(3).unbind(1)
    x = to_space(images, (mirrored < 0.5) & flip, noise, space)
    t = objective.draw_times(time)
    model_kwargs = dict(y=labels, drop=dropped < 0.1)
    return dict(x_start=x, t=t, model_kwargs=model_kwargs, noise=noise(x))


def to_space(images, mirrored, noise, space):
    """What the model sees of images (B, 3, H, W), those of mirrored (B,) bool turned around, or of their cached moments
    (B, flips, 2, C, h, w)."""
    if images.dim() == 6:
        moments = torch.where(mirrored[:, None, None, None, None], images[:, -1], images[:, 0])
        return draw_latents(moments, noise.randn(*moments.shape[2:]))
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    side = images.shape[2] // space.factor
    return space.encode(images, noise.randn(space.channels, side, side) if space.factor > 1 else None)


@torch.no_grad()
def held_out_loss(model, dataset, args, processes, space):
    """The mean of every term of the loss over up to HELD_OUT images, spread over the data set: a dict of floats.

    Noise and timesteps are the same in every call of every run, the timesteps evenly spread, so that two models or
    two steps of one differ by nothing else.
    """
    objective = create_objective(args.objective, path=args.path or "linear")
    model.eval()  # lest layers of a sharded model, whose weights come and go, keep what they made of older ones
    n = min(len(dataset), HELD_OUT)
    sums, bad = {}, []
    if args.max_bad_images and not isinstance(dataset, CachedLatents):
        dataset = Replacing(dataset, args.max_bad_images)
    mine = range(processes.rank, n, processes.size)
    parts = -(-n // (64 * processes.size))  # for every process the same number, as a sharded model needs
    for numbers in (mine[part::parts] for part in range(parts)):
        images, labels, *faults = zip(*(dataset[number * len(dataset) // n] for number in numbers))
        bad += [fault for some in faults for part in some for fault in part]
        noise = PerImageNoise(image_seeds(0, numbers, "validation"), processes.device)
        images, labels = torch.stack(images).to(processes.device), torch.tensor(labels, device=processes.device)
        x = to_space(images, torch.zeros(len(images), dtype=torch.bool, device=images.device), noise, space)
        # A prime that divides no n: a permutation, so that timesteps have nothing to do with an image's place in the set.
        shuffled = torch.tensor([number * 1_000_003 % n for number in numbers], device=processes.device)
        t = objective.draw_times((shuffled + noise.rand()) / n)
        losses = objective.training_losses(model, x, t, dict(y=labels), noise(x))
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.sum(dtype=torch.float64)
    if args.max_bad_images and (problem := note_bad_images(bad, args, processes)):
        raise problem
    total = torch.stack(list(sums.values())).float()
    if processes.size > 1:
        dist.all_reduce(total)
    return dict(zip(sums, (total / n).tolist()))


def create_experiment(args):
    """A new folder results/<index>-<model>, with the index after the highest that is there."""
    root = Path(args.results_dir)
    root.mkdir(parents=True, exist_ok=True)
    indexed = [re.match(r"(\d{3,5})-", entry.name, re.ASCII) for entry in root.iterdir()]  # a date has more digits
    for index in count(max((int(found[1]) for found in indexed if found), default=-1) + 1):
        folder = root / f"{index:03d}-{args.model.replace('/', '-')}"
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue  # another run took it just now
    (folder / "checkpoints").mkdir()
    return folder


def log_to(handler):
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)


def log_interval(step, losses, seconds, cost, processes, write_row):
    """The mean loss since the last line, the speed, by steps and by operations per process, and this process's memory at its
    peak, as text and as a line of JSON. cost: flops of a step, and per second those that the device is made for, or None."""
    if processes.rank == 0 and losses:
        row = dict(step=step, loss=torch.stack(losses).mean().item(), steps_per_sec=len(losses) / seconds)
        flops, peak = row["steps_per_sec"] * cost[0] / processes.size, cost[1]
        row |= dict(gflops_per_sec=flops / 1e9, peak_memory_gb=peak_memory(processes.device) / 1e9)
        row |= dict(utilisation=flops / peak) if peak else {}
        logger.info(
            f"(step={step:07d}) Train Loss: {row['loss']:.4f}, Train Steps/Sec: {row['steps_per_sec']:.2f}, "
            f"GFLOP/s: {row['gflops_per_sec']:,.2f}{f' ({flops / peak:.1%} of the peak)' if peak else ''}, "
            f"Peak Memory: {row['peak_memory_gb']:.2f} GB"
        )
        write_row(row)


def log_scale(step, scale, processes, write_row):
    """Says of a step that it was skipped for float16's scale, to which it is now."""
    if processes.rank == 0:
        logger.info(f"(step={step:07d}) Skipped: float16 cannot hold the scaled gradients, whose scale is now {scale:g}")
        write_row(dict(step=step, scale=scale))


def log_skipped(step, in_a_row, indices, args, processes, write_row, save):
    """Says of which images a step made nothing finite. After too many such steps it saves, and raises ValueError."""
    if processes.rank == 0:
        logger.info(f"(step={step:07d}) Skipped, {in_a_row} in a row: the loss or a gradient is not finite")
        write_row(dict(step=step, skipped=in_a_row, images=indices))
    if in_a_row == args.max_skipped:
        save()
        some = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        raise ValueError(
            f"steps {step - in_a_row + 1} to {step} had no finite loss and gradient, the last one with images {some} of the "
            "data set; log.jsonl has all of them; a lower --lr, --max-grad-norm or --precision fp32 may help"
        )


def log_held_out(step, losses, processes, write_row):
    if processes.rank == 0:
        logger.info(f"(step={step:07d}) Held-out Loss: {losses['loss']:.4f}")
        write_row(dict(step=step) | {f"held_out_{name}": loss if isfinite(loss) else None for name, loss in losses.items()})


def log_probe(step, probe, found, processes, write_row):
    """found: the distance, or why there is none."""
    failed = isinstance(found, ValueError)
    if processes.rank == 0:
        logger.info(f"(step={step:07d}) Frechet Distance: {f'none, {found}' if failed else f'{found:.4g}'} ({probe.name})")
        write_row({"step": step, probe.name: None if failed else found})


def append_row(folder, track, row):
    with best_effort("Writing to log.jsonl"), open(folder / "log.jsonl", "a") as file:
        print(json.dumps(row), file=file)
    if track:
        with best_effort("Tracking"):
            track(row["step"], numbers_of(row))


def quick_sampler(args):
    """The objective in few steps, and the sampler that sample.py takes for it."""
    settings = sample.parse_args(["--num-sampling-steps", str(SAMPLING_STEPS)])
    return sample.create_sampler(settings, dict(objective=args.objective, path=args.path or "linear"))


def draw_samples(step, ema, args, processes, space, folder, track):
    """A grid of samples from the averaged weights, the same noise at every step: what sample.py draws of a checkpoint.

    It leaves the random numbers of training as they are. All processes draw, as they would have to wait anyway.
    """
    ema.eval()  # which drops kept symbols: sharded parameters change without telling
    settings, (objective, sampler) = sample.parse_args([]), quick_sampler(args)
    classes, guidance = sample.class_labels(settings, ema), sample.read_guidance(settings, ema.in_channels)
    labels = [label for label in classes for _ in range(max(16 // len(classes), 1))]
    try:
        images = sample.draw(ema, space, objective, sampler, labels, settings.seed, guidance, progress=False)
    except ValueError as error:  # of these weights, which training goes on to change
        logger.info(f"(step={step:07d}) No samples: {error}")
        return
    if processes.rank == 0:
        path = folder / "samples" / f"{step:07d}.png"
        with best_effort("Writing a grid of samples"):
            path.parent.mkdir(exist_ok=True)
            sample.save_grid(images, path, columns=4)
            drawn = f"drawn {sample.guidance_in_words(guidance, ema)}"
            logger.info(f"(step={step:07d}) {len(labels)} samples are in {path}, {drawn}")
        if track and path.exists():
            with best_effort("Tracking"):
                track(step, {}, path)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train a DiT.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data-path", help="folder of images, one folder per class, or of CIFAR-10; without it, the digits of scikit-learn")
    add("--dataset", choices=DATASETS, help="which of the paper's data sets --data-path holds; checks that it is whole")
    add("--check-data", action="store_true", help=CHECK)
    more = "so many that cannot be read are named, and the next of their class stands in; one more ends the run, saved"
    add("--max-bad-images", type=not_negative, default=0, metavar="N", help=more)
    add("--val-path", help="held-out images of the same classes (or CIFAR-10), whose loss is logged with every checkpoint")
    add("--results-dir", default="results", help="where the experiment's folder goes")
    add("--model", choices=MODELS, metavar="NAME", default="DiT-XL/2", help=f"one of {', '.join(MODELS)}")
    add("--mixer", choices=MIXERS, default="attention", help="what mixes the tokens; pdessm: see --pde-coupling")
    add_pde_flags(add)
    add("--pde-conditioned", action="store_true", help="let timestep and class scale the PDE's time (not in the paper)")
    add("--init-from", metavar="CKPT", help="begin with what fits of a checkpoint, with other classes, mixer or size")
    add("--objective", choices=OBJECTIVES, default="diffusion", help="diffusion as in DiT, or flow matching")
    add("--path", choices=PATHS, help="of flow matching, from noise to image; linear unless given")
    add("--times", choices=TIMES, help="how flow matching draws its times; uniform unless given")
    add("--vae", default="ema", help="autoencoder: ema, mse, a local folder, or none to work on pixels")
    add("--image-size", type=positive, default=256, help="side to which images are cropped, in pixels")
    add("--num-classes", type=positive, default=Default(1000), help="of the images; a --dataset brings its own")
    add("--uncond", action="store_true", help="train without classes; the folder then needs no class folders")
    add("--epochs", type=positive, default=1400)
    add("--max-steps", type=positive, help="stop after so many steps, if that comes before the last epoch's end")
    add("--global-batch-size", type=positive, default=256, help="over all processes")
    add("--lr", type=above_zero, default=1e-4, help="learning rate of AdamW, constant")
    add("--global-seed", type=not_negative, default=0)
    add("--num-workers", type=not_negative, default=4, help="processes that read images, per process; at most one per core")
    add("--log-every", type=positive, default=100, help="steps")
    add("--ckpt-every", type=positive, default=50_000, help="steps; the last step is always saved")
    add("--keep-last", type=positive, metavar="K", help="keep the newest K checkpoints only; all unless given")
    add("--keep-every", type=positive, metavar="STEPS", help="and those of every such step, for good")
    add(
        "--resume", metavar="auto|PATH", help="go on with a stopped run: an experiment's folder or a checkpoint in it; auto is "
        "the last experiment of this model in --results-dir, or a new one if there is none",
    )  # fmt: skip
    add("--allow-changes", action="store_true", help="let --resume go on with other settings")
    add("--ema-decay", type=decay, nargs="+", default=[0.9999], help="of averages of weights; samples: the first, or --ema")
    warmup = "let averages start fast, so that short runs can be sampled; without it their decay is constant, as upstream's"
    add("--ema-warmup", action=argparse.BooleanOptionalAction, default=True, help=warmup)
    add("--ema-device", choices=["cpu"], help="keep the averages in CPU memory; by default they are where the model is")
    add_speed_flags(add)
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="every process holds the model, or a part (FSDP2)")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="faster float32 products, with rounding of 1e-3")
    add("--grad-checkpointing", action="store_true", help="compute blocks twice instead of keeping their values: less memory")
    add("--grad-accum", type=positive, default=1, metavar="PARTS", help="of a process's batch, one at a time: less memory")
    add("--max-grad-norm", type=above_zero, help="scale larger gradients down to this norm")
    add("--max-skipped", type=positive, default=20, metavar="STEPS", help="stop after so many in a row that are not finite")
    add("--sample-every", type=positive, metavar="STEPS", help="draw a grid of samples; none unless given")
    add("--probe-every", type=positive, metavar="STEPS", help="Frechet distance of a few samples; none unless given")
    add("--features", choices=NETWORKS, default=NETWORKS[0], help="network of --probe-every")
    add("--weights", metavar="FILE", help="of Inception for --probe-every; by default the file in PyTorch's hub cache")
    add("--tracker", choices=TRACKERS, help="show numbers and samples there too; wandb is offline unless logged in")
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")
    return parser.parse_args(argv)


if __name__ == "__main__":
    log_to(logging.StreamHandler())
    with logging_redirect_tqdm([logger]):  # above the progress bar, not across it
        launch(main, parse_args())
