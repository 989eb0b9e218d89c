"""Encodes images once, so that training can use their latents; run again after a stop, it continues where it was:

    torchrun --nproc_per_node=8 -m images.encode --data-path imagenet/train --vae ema --out latents
    torchrun --nproc_per_node=8 train.py --data-path latents
"""

import argparse
import shlex
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from images import latents
from images.autoencoder import open_space
from images.dataset import CHECK, check_readable, load_dataset, worker_count
from images.folders import describe_classes
from images.named import DATASETS
from machine.flags import not_negative, positive
from machine.precision import allow_tf32
from machine.processes import launch
from machine.stops import ignore_stops, read_batches


def encode(args, processes):
    """Writes the latents of every image, and of its mirror image, to --out. Every process makes whole shards."""
    allow_tf32()  # as in training
    space = open_space(args.vae)
    if args.vae == "none":
        raise ValueError("--vae none is to work on pixels, which need no encoding")
    if args.image_size % space.factor:
        raise ValueError(f"--image-size {args.image_size} is not divisible by {space.factor}, the factor of the VAE")
    workers = worker_count(args.num_workers, args.data_path)
    with processes.main_process_first():  # the files of a named data set may be joined when it is opened
        images = load_dataset(args.data_path, args.image_size, args.uncond, args.held_out, args.dataset)
    classes = describe_classes(images.classes) if images.num_classes and images.classes else []
    for line in [*images.remarks, *classes] if processes.rank == 0 else []:
        print(line)
    if isinstance(images, latents.CachedLatents):
        raise ValueError(f"--data-path {args.data_path} holds latents already")
    if args.check_data:
        check_readable(images, processes, print, workers)
    space.load(processes.device)
    made_from = dict(vae=args.vae, source=args.data_path, dataset=args.dataset, held_out=args.held_out)
    dtype = torch.float16 if args.half else torch.float32
    folder, index = Path(args.out), index_of(images, space, args.image_size, dtype, args.shard_size, **made_from)
    if processes.rank == 0:
        claim = latents.claim_folder(folder, index)  # noqa: F841  (until this function ends)
    missing, changed = processes.share(shards_to_make(folder, index, images) if processes.rank == 0 else None)
    shards = sorted(missing + changed)
    if processes.rank == 0:
        if changed:
            print(f"Shards of files that have other sizes now, which are made again: {len(changed):,}")
        total = f"{latents.shard_count(index):,} shards of {len(images):,} images"
        print(f"Encoding {len(shards):,} of {total} into {folder}")
    mine = shards[processes.rank :: processes.size]
    for number, moments, classes in encode_shards(mine, images, index, space, processes, args.batch_size, workers):
        path = latents.shard_path(folder, number)
        latents.write_shard(path, moments, classes, dtype, made_of(images, index, number))
    processes.barrier()
    if processes.rank == 0:
        flags = ["--data-path", folder, "--vae", args.vae, "--image-size", args.image_size]
        flags += ["--num-classes", images.num_classes] if images.num_classes else []
        flags = ["--val-path", folder] if args.held_out else flags  # these go with the training images'
        print(f"The latents are whole; for train.py: {shlex.join(map(str, flags))}")


def shards_to_make(folder, index, images):
    """Lists the numbers of shards (missing or damaged, whole but made of files that have changed since)."""
    missing, changed = [], []
    for number in range(latents.shard_count(index)):
        try:
            then = latents.open_shard(folder, number, index).metadata()
        except OSError:
            missing.append(number)
        else:
            changed += [number] if then and then != made_of(images, index, number) else []
    return missing, changed


def made_of(images, index, number):
    """Returns what a shard keeps of the files of its images: {name: text}, None if they are not files."""
    sizes = images.sizes(latents.shard_images(index, number))
    return dict(sizes=sizes) if sizes else None


def index_of(images, space, image_size, dtype, shard_size, vae, source, dataset, held_out):
    """Makes the index of latents that are to be made (images/latents.py). vae, source and dataset: the autoencoder, the path
    of the images (None for the digits) and the data set there, as the flags name them."""
    side = image_size // space.factor
    return dict(
        vae=vae if space.on_hub else str(Path(vae).resolve()),
        vae_digest=space.digest(),
        source=str(Path(source).resolve()) if source else "digits",
        dataset=dataset,
        held_out=held_out,
        image_size=image_size,
        images=len(images),
        names=images.names(),
        num_classes=images.num_classes,
        classes=images.classes if images.num_classes else None,
        flip=images.flip,
        shape=[space.channels, side, side],
        dtype=str(dtype).removeprefix("torch."),
        shard_size=shard_size,
    )


def encode_shards(numbers, images, index, space, processes, batch_size, workers):
    """Yields (number, moments (n, flips, 2, C, h, w), classes (n,)) of each of these shards, on the CPU. batch_size: images
    encoded at once, or as few as the autoencoder takes. workers: processes that read them."""
    n = min(batch_size, space.at_once(index["image_size"], index["image_size"]))
    batches = [torch.tensor(latents.shard_images(index, number)).split(n) for number in numbers]
    in_order = [batch.tolist() for shard in batches for batch in shard]
    loader = DataLoader(images, batch_sampler=in_order, num_workers=workers, worker_init_fn=ignore_stops)
    progress = tqdm(total=sum(len(batch) for batch in in_order), unit="image", disable=processes.rank > 0)
    read_in_order = read_batches(loader)
    for number, shard in zip(numbers, batches):
        moments, classes = [], []
        for pixels, labels in islice(read_in_order, len(shard)):
            pixels = pixels.to(processes.device)
            views = [pixels, pixels.flip(3)] if images.flip else [pixels]
            moments.append(torch.stack([space.moments(view) for view in views], dim=1).cpu())
            classes.append(labels)
            progress.update(len(labels))
        yield number, torch.cat(moments), torch.cat(classes)


def parse_args(argv=None):
    about = "Keep the latents of a data set, for train.py's --data-path."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data-path", help="folder of images, as for train.py; without it, the digits of scikit-learn")
    add("--dataset", choices=DATASETS, help="which of the papers' data sets --data-path holds; checks that it is whole")
    add("--held-out", action="store_true", help="the set's own test images, for train.py's --val-path")
    add("--uncond", action="store_true", help="images without classes")
    add("--check-data", action="store_true", help=CHECK)
    add("--vae", default="ema", help="autoencoder: ema, mse or a local folder")
    add("--image-size", type=positive, default=256, help="side to which images are cropped, in pixels")
    add("--out", required=True, help="folder for the latents, new or of a run that was stopped; one run at a time")
    add("--half", action="store_true", help="keep float16, which takes half the space and rounds by 5e-4")
    add("--shard-size", type=positive, default=1024, help="images in a file")
    add("--batch-size", type=positive, default=64, help="images encoded at once, per process; fewer if large")
    add("--num-workers", type=not_negative, default=4, help="processes that read images, per process; at most one per core")
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(encode, parse_args())
