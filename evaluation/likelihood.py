"""Measures how likely images that were held out are under trained networks on pixels, in bits per dimension:

    python -m evaluation.likelihood --ckpt pde.pt attention.pt --data-path photos/test

Lower is better, and no feature network has a say in it. Every network sees the same images and noise, so that differences
between them are known better than the numbers. See docs/evaluation.md for what the numbers mean.
"""

import argparse
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoints.build import for_sampler, load_model
from diffusion import create_diffusion, create_objective
from diffusion.likelihood import diffusion_bits, flow_bits
from diffusion.noise import PerImageNoise, image_seeds
from download import find_checkpoint
from images.dataset import load_dataset
from images.folders import listed
from images.latents import CachedLatents
from images.named import DATASETS
from machine.files import check_writable, write_json
from machine.flags import decay, positive
from machine.processes import launch


def main(args, processes):
    if args.json:
        check_writable(args.json, "--json", ".json")
    networks = {path: load_model(find_checkpoint(path), {}, "mse", args.ema) for path in args.ckpt}
    for path, (_, settings) in networks.items():
        check(path, settings)
    sizes = {path: settings["image_size"] for path, (_, settings) in networks.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"--ckpt: networks of one image size can be compared, and these are of {sizes}")
    bits = {}
    for path, (model, settings) in networks.items():
        with processes.main_process_first():  # the files of a named data set may be joined when it is opened
            images = load_dataset(args.data_path, sizes[path], not model.num_classes, held_out=True, name=args.dataset)
        if isinstance(images, CachedLatents):
            raise ValueError(f"--data-path {args.data_path} holds cached latents; a likelihood is that of images")
        known = model.class_names or images.classes[: model.num_classes]
        if images.num_classes and list(known) != list(images.classes):
            raise ValueError(f"{path} has the classes {listed(known)}, and {args.data_path} has {listed(images.classes)}")
        model.to(processes.device)
        measured = partial(bits_of, model, settings, args.steps)
        bits[path] = measure(measured, images, args.num_images, args.batch_size, processes, path)
        model.to("cpu")
    if processes.rank == 0:
        rows = compare(bits, {path: settings["objective"] for path, (_, settings) in networks.items()})
        count = len(bits[args.ckpt[0]])
        print(f"Bits per dimension of {count:,} images of {args.data_path}; lower is better")
        for path, row in rows.items():
            print("  " + in_words(path, row))
        if args.json:
            write_json(args.json, dict(images=count, data=args.data_path, steps=args.steps, networks=rows), "numbers")


def check(path, settings):
    """Raises a ValueError for a network that has no likelihood of pixels."""
    if settings["vae"] != "none":
        raise ValueError(f"{path} works in the latent space of an autoencoder, which has no likelihood of pixels")
    if settings["objective"] == "flow" and settings["predict"] != "velocity":
        raise ValueError(f"{path} predicts clean images, and a flow has a likelihood only if its network predicts velocities")


def bits_of(model, settings, steps, x, noise, model_kwargs):
    """Computes the bits per dimension of images (B, C, H, W) by a network of these settings, with four calls of it per step:
    (B,), float64."""
    if settings["objective"] == "flow":
        flow = create_objective("flow", steps, **for_sampler(settings) | dict(time_shift=1.0))
        return flow_bits(flow, model, x, noise, model_kwargs)
    diffusion = create_diffusion("", use_kl=True, learn_sigma=settings["learn_sigma"])
    return diffusion_bits(diffusion, model, x, noise, 4 * steps, model_kwargs)


def measure(bits_of, images, most, batch_size, processes, title):
    """Returns the bits per dimension of at most that many images, evenly spread: (n,), float64, on the CPU. Every process takes
    a part, and gets them all. ValueError for a single image, or if bits are not finite."""
    n = min(len(images), most)
    if n < 2:
        raise ValueError(f"{n} image: a mean and its error take at least 2")
    bits, mine = torch.zeros(n, dtype=torch.float64, device=processes.device), range(processes.rank, n, processes.size)
    for start in tqdm(range(0, len(mine), batch_size), desc=title, disable=processes.rank > 0):
        numbers = mine[start : start + batch_size]
        x, y = zip(*(images[number * len(images) // n] for number in numbers))
        noise = PerImageNoise(image_seeds(0, numbers, "likelihood"), processes.device, drawn_on="cpu")
        classes = torch.tensor(y, device=processes.device)
        bits[list(numbers)] = bits_of(torch.stack(x).to(processes.device), noise, dict(y=classes))
    if processes.size > 1:
        dist.all_reduce(bits)
    if wrong := n - bits.isfinite().sum().item():
        raise ValueError(f"{title}: the bits of {wrong:,} of {n:,} images are not finite: more --steps, or other weights")
    return bits.cpu()


def compare(bits, objectives):
    """Returns the numbers of every network: the mean of its bits (n,) and its standard error, and by how much they are more
    than the first network's, with the standard error of the difference."""
    first, rows = next(iter(bits.values())), {}
    for path, of_network in bits.items():
        rows[path] = dict(objective=objectives[path], bits_per_dimension=mean_and_error(of_network))
        if of_network is not first:
            rows[path]["more_than_first"] = mean_and_error(of_network - first)
    return rows


def mean_and_error(values):
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def in_words(path, row):
    line = "{:.4f} +- {:.4f}".format(*row["bits_per_dimension"])
    if "more_than_first" in row:
        line += ", {:+.4f} +- {:.4f} against the first".format(*row["more_than_first"])
    return f"{line}: {path} ({row['objective']})"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Bits per dimension of held-out images.")
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="FILE", help="checkpoints of networks on pixels, of one image size")
    add("--ema", type=decay, metavar="DECAY", help="which of several averages of weights, by its decay; the first unless given")
    add("--data-path", required=True, help="images that no network was trained on, in the folders of train.py's --data-path")
    add("--dataset", choices=DATASETS, help="which of the paper's data sets --data-path holds; its own test images are taken")
    add("--num-images", type=positive, default=1000, help="at most that many, evenly spread")
    add("--steps", type=positive, default=20, help="four calls of the network each: a step of the ODE, or four timesteps")
    add("--batch-size", type=positive, default=64, help="images at a time and process")
    add("--json", metavar="FILE", help="write the numbers there, too")
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
