"""Draws many samples, on one process or many, as PNG files and as the .npz that ADM's evaluator reads:

    torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/000-DiT-XL-2/checkpoints/0400000.pt --num-fid-samples 50000

Every image has a seed of its own and batches are the same for any number of processes, so the images are too. Run again
after a stop, it goes on where it was. With --evaluate REF it then prints what evaluate.py would.
"""

import argparse
import glob
import json
import os
import struct
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoints.build import load_model
from diffusion.samplers import PerImageNoise, image_seeds
from download import find_checkpoint
from evaluation.features import add_feature_flags, open_network
from evaluation.report import compare, look_ahead, report
from evaluation.sides import Source, measure, open_source
from images.autoencoder import DECODER, digest
from images.folders import read_image
from images.samples import npz_shape, write_npz
from machine.files import lock
from machine.flags import from_zero, not_negative, positive
from machine.processes import launch
from mixers.running import prepare_to_sample
from sample import add_model_flags, checkpoint_name, create_sampler, generate, in_words, load_space, read_guidance, save_png


def main(args, processes):
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    if args.num_fid_samples > 2**32:
        raise ValueError(f"--num-fid-samples {args.num_fid_samples:,}: seeds tell 4,294,967,296 images apart, not more")
    if processes.rank == 0:
        find_checkpoint(checkpoint_name(args))  # if it must be fetched, then once
    processes.barrier()
    model, settings = load_model(find_checkpoint(checkpoint_name(args)), args, "ema", args.ema)
    objective, sampler = create_sampler(args, settings)
    if args.evaluate:  # what is missing for it shows before the work
        network = open_network(args.features, args.weights)
        reference = open_source(args.evaluate, network)
        look_ahead(reference, Source("the samples", None, range(args.num_fid_samples), {}, None), network, processes)
    guidance = read_guidance(args, model.in_channels)
    prepare_to_sample(model, args, processes.device)
    space = load_space(settings, args, processes.device)
    folder = Path(args.sample_dir) / folder_name(args, settings)
    size = [side * space.factor for side in model.input_size]
    if processes.rank == 0:
        record = claim_folder(folder, model, settings, space, sampler.__name__, guidance, args)  # noqa: F841  it locks
        check_images(folder, size, args.num_fid_samples)
    processes.barrier()
    batches = unfinished_batches(folder, args)
    mine = batches[processes.rank :: processes.size]
    processes.barrier()  # every process has looked before any writes
    if processes.rank == 0:
        some = f"{sum(map(len, batches)):,} of {args.num_fid_samples:,} images"
        print(f"Sampling {some} into {folder}: {in_words(model, settings, sampler, args, guidance)}")

    model.to(processes.device)
    for numbers in tqdm(mine, unit="batch", disable=processes.rank > 0):
        noise = PerImageNoise(image_seeds(args.global_seed, numbers, "sampling"), processes.device)
        labels = (noise.rand() * model.trained_classes).long()
        some = dict(progress=False, numbers=numbers)
        images = generate(model, space, objective, sampler, labels, noise, guidance, **some)
        for number, image in zip(numbers, images):
            save_png(image.numpy(), folder / f"{number:06d}.png")
    processes.barrier()
    if processes.rank == 0:
        print(f"Saved .npz file to {gather_npz(folder, args.num_fid_samples, size)}")
    processes.barrier()
    if args.evaluate:
        samples = open_source(f"{folder}.npz", network)
        sides = [measure(source, network, processes) for source in (reference, samples)]
        if processes.rank == 0:
            report(compare(*sides, network, progress=True), *sides, network, f"{folder}.json")


def folder_name(args, settings):
    """As DiT names it, which is where scripts look."""
    model = settings["model"].replace("/", "-")
    checkpoint = Path(args.ckpt).stem if args.ckpt else "pretrained"
    vae = Path(settings["vae"]).name
    size = settings["image_size"] if isinstance(settings["image_size"], int) else "{}x{}".format(*settings["image_size"])
    return f"{model}-{checkpoint}-size-{size}-vae-{vae}-cfg-{args.cfg_scale}-seed-{args.global_seed}"


def claim_folder(folder, model, trained, space, sampler, guidance, args):
    """Makes the folder, or makes sure that what lies there came from the same weights and settings.

    The name does not tell apart two runs' checkpoints of one step, two samplers, or autoencoders that have one name or one
    folder. ValueError names what differs, and refuses to replace an .npz by a smaller one, or a folder in which another run
    is drawing: it is this run's as long as the file that is returned stays open.
    """
    settings = dict(weights=digest(model.state_dict()), sampler=sampler, num_sampling_steps=args.num_sampling_steps)
    settings |= dict(cfg_channels=str(guidance.channels or "all"), cfg_interval=list(args.cfg_interval))
    vae = trained["vae"]
    settings["vae"] = str(Path(vae).resolve()) if Path(vae).is_dir() else vae
    settings |= dict(path=trained["path"], time_scale=trained["time_scale"])
    settings |= dict(decoder=space.digest(DECODER), precision=args.precision)
    folder.mkdir(parents=True, exist_ok=True)
    path, drawn = folder / "settings.json", any(folder.glob("*.png"))
    strange = f"{folder} holds images of unknown origin; give another --sample-dir"
    if drawn and not path.exists():
        raise ValueError(strange)
    record = open(path, "a+")  # noqa: SIM115
    lock(record, folder)
    record.seek(0)
    try:
        before = dict(precision="fp32") | json.loads(record.read())  # which older folders do not mention
    except (ValueError, TypeError) as error:  # new, or cut short
        if drawn:
            raise ValueError(strange) from error
        before = settings
        record.truncate(0)
        record.write(json.dumps(settings))
        record.flush()
    settings = {k: v for k, v in settings.items() if before.get(k, v) != v}  # older folders know fewer settings
    if differences := [f"{k} {before[k]} and now {v}" for k, v in settings.items()]:
        raise ValueError(f"{folder} holds images made with {', '.join(differences)}; give another --sample-dir")
    npz = Path(f"{folder}.npz")
    if npz.exists() and (count := npz_shape(npz)[0]) > args.num_fid_samples:
        raise ValueError(f"{npz} holds {count:,} images, more than --num-fid-samples {args.num_fid_samples:,}; move it away")
    return record


def check_images(folder, size, count):
    """Looks at names and first bytes of the images that are there. OSError names one that is none of this run's."""
    for partial in [*folder.glob("*.partial"), *folder.parent.glob(f"{glob.escape(folder.name)}.npz.*.partial")]:
        partial.unlink()  # a run that was killed left it
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
    """OSError unless a file begins as an 8-bit RGB PNG of that size (height, width)."""
    height, width = size
    beginning = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBB", 13, b"IHDR", width, height, 8, 2)
    with open(path, "rb") as file:
        if file.read(len(beginning)) != beginning:
            raise OSError(f"{path} is not an 8-bit RGB PNG of {height} x {width} as this run's are; delete it and run again")


def unfinished_batches(folder, args):
    """The numbers of the images of every batch that is not whole. An image belongs to the same batch in every run."""
    there = {entry.name for entry in os.scandir(folder)}
    n, total = args.per_proc_batch_size, args.num_fid_samples
    batches = [range(start, min(start + n, total)) for start in range(0, total, n)]
    return [batch for batch in batches if any(f"{number:06d}.png" not in there for number in batch)]


def gather_npz(folder, count, size):
    """Gathers images 0 to count - 1 into <folder>.npz as arr_0, uint8 (count, *size, 3), one image in memory at a time."""

    def read(number):
        path = folder / f"{number:06d}.png"
        check_png(path, size)
        try:
            return np.asarray(read_image(path))
        except OSError as error:
            raise OSError(f"{error}; delete it and run again") from error

    write_npz(f"{folder}.npz", map(read, tqdm(range(count), desc="Building .npz file from samples")), count)
    return f"{folder}.npz"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw samples from a DiT for evaluation.")
    add = parser.add_argument
    add_model_flags(add, vae="ema")
    add("--sample-dir", default="samples", help="where the folder of images and the .npz beside it go")
    add("--per-proc-batch-size", type=positive, default=32)
    add("--num-fid-samples", type=positive, default=50_000)
    add("--cfg-scale", type=from_zero, default=1.5, help="strength of classifier-free guidance; 1 is none")
    add("--global-seed", type=not_negative, default=0)
    add("--evaluate", metavar="REF", help="compare with this .npz or folder when done, as evaluate.py does; also as .json")
    add_feature_flags(add)
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="faster matrix products, with rounding of 1e-3")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
