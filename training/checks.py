"""Checks that a run's settings work together and with its images."""

from evaluation.features import NETWORKS
from images.folders import listed
from images.latents import CachedLatents
from machine.flags import Default
from machine.precision import check_compiler
from mixers import pde
from models import MODELS, stride
from training.trackers import check_installed


def check(args, processes, dataset, held_out, space):
    """Raises a ValueError for settings that cannot work together, or an OSError for what is not installed."""
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
    if len(dataset) < args.global_batch_size:
        raise ValueError(f"--global-batch-size {args.global_batch_size} is more than there are images: at most {len(dataset)}")
    brings_classes = args.dataset or not dataset.num_classes
    if not brings_classes and isinstance(args.num_classes, Default) and dataset.num_classes != args.num_classes:
        raise ValueError(f"the images have {dataset.num_classes} classes: --num-classes {dataset.num_classes}")
    if not brings_classes and dataset.num_classes > args.num_classes:
        raise ValueError(f"the images are of {dataset.num_classes} classes, more than --num-classes {args.num_classes}")
    if not (dataset.num_classes or args.uncond or args.dataset or isinstance(args.num_classes, Default)):
        raise ValueError(f"--num-classes {args.num_classes}, and the images have no classes: give --uncond, or others")
    for name, values in (("--ema-decay", args.ema_decay), ("--ema-lengths", args.ema_lengths or [])):
        if len({*values}) < len(values):
            raise ValueError(f"{name} {' '.join(map(str, values))}: give each once")
    if args.lr_coefficients != 1 and args.mixer not in pde.MIXER.named:
        raise ValueError(f"--lr-coefficients {args.lr_coefficients:g} is for the coefficients of PDEs, and the model has none")
    if (every := args.pde_attention_every) and every > (depth := MODELS[args.model].keywords.get("depth", every)):
        raise ValueError(f"--pde-attention-every {every}: {args.model} has {depth} blocks, of which none would have attention")
    if args.class_dropout and not dataset.num_classes:
        without = "to --uncond, which trains without classes" if args.uncond else "here: the images have no classes"
        raise ValueError(f"--class-dropout means nothing {without}")
    for latents in (images for images in (dataset, held_out) if isinstance(images, CachedLatents)):
        latents.check_vae(args.vae)
    if args.max_bad_images and isinstance(dataset, CachedLatents):
        raise ValueError("--max-bad-images is for images; `python -m images.encode` makes damaged latents again")
    if not args.probe_every and (args.weights or args.features != NETWORKS[0]):
        raise ValueError("--features and --weights mean nothing without --probe-every")
    if args.keep_every and not args.keep_last:
        raise ValueError("--keep-every means nothing without --keep-last: all checkpoints are kept")
    if args.tracker:
        check_installed(args.tracker)
    if args.compile:
        check_compiler(processes.device)
    if held_out:
        theirs, ours = held_out.classes, dataset.classes
        if dataset.num_classes and theirs != ours:
            raise ValueError(f"--val-path has other classes ({listed(theirs)}) than --data-path ({listed(ours)})")
        if len(held_out) < processes.size:
            raise ValueError(f"the {len(held_out)} images of --val-path are fewer than the {processes.size} processes")
