"""Draws pictures of mixers and of runs, one per subcommand:

    python visualize.py kernels                                                the paper's Figure 1
    python visualize.py kernels --ckpt results/000-DiT-S-4/checkpoints/0050000.pt
    python visualize.py maps --ckpt 0050000.pt --image flower.jpg              Figure 6
    python visualize.py reach --ckpt pde.pt attention.pt
    python visualize.py spectrum --ckpt pde.pt attention.pt
    python visualize.py curves results/000-DiT-S-4 results/001-DiT-S-4
    python visualize.py drift --ckpt 0050000.pt
"""

import argparse
import math
from pathlib import Path

import torch

from checkpoints.build import create_network, for_sampler, load_model
from checkpoints.read import load_checkpoint
from diffusion import create_objective
from diffusion.drawing import choose_classes
from download import find_checkpoint
from figures import curves, drift, kernels, maps, reach, spectrum
from figures.layers import observe
from figures.page import FORMATS, save_page
from images.autoencoder import load_trained_space
from images.dataset import cropped
from images.folders import read_image
from machine.files import check_writable, write_json
from machine.flags import class_label, decay, finite, from_zero, image_size, not_negative, positive, share
from machine.precision import allow_tf32
from machine.processes import launch
from models import DiT


def main(args, processes):
    allow_tf32()
    asked = vars(args) | dict(device=processes.device)
    make, out, numbers = (asked.pop(name) for name in ("make", "out", "json"))
    check_writable(out, "--out", *FORMATS)
    if numbers:
        check_writable(numbers, "--json", ".json")
    figure, found = make(**asked)
    save_page(figure, out)
    if numbers:
        write_json(numbers, found, "numbers")
    print(f"The picture is in {out}" + (f", its numbers in {numbers}" if numbers else ""))


def draw_kernels(ckpt, ema, device, grid, count, **chosen):
    """Draws Green's functions, those of a checkpoint if there is one, or of coefficients that were chosen, or Figure 1."""
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if not ckpt and (ema or count):
        raise ValueError("--count and --ema are for the kernels of a checkpoint; give --ckpt, or leave them out")
    if ckpt:
        if chosen or grid:
            raise ValueError("a checkpoint has its own coefficients and grid; leave --ckpt or the others out")
        model, _, title = open_model(ckpt, ema, device)
        rows = kernels.kernels_of_layers(model, count or 8)
        return kernels.draw_layers(rows, title), {title: [[kernels.measure(kernel) for kernel in row] for row in rows.values()]}
    grid = grid or 64
    found = kernels.chosen_kernels((grid, grid) if isinstance(grid, int) else grid, chosen)
    numbers = {title: kernels.measure(kernel) for title, kernel in found.items()}
    if not all(math.isfinite(number) for row in numbers.values() for number in row.values()):
        raise ValueError("these coefficients make a kernel that is zero or not finite; its sum is exp(--reaction)")
    return kernels.draw_chosen(found), numbers


def objective_of(settings):
    """Returns a checkpoint's objective, whose draws of time are not shifted: here they are places on the way."""
    return create_objective(settings["objective"], **for_sampler(settings) | dict(time_shift=1.0))


def draw_maps(ckpt, ema, device, image, progress, class_label, seed):
    """Draws what a checkpoint's layers make of a disc, and of a picture, at some places on the way from noise."""
    model, settings, title = open_model(ckpt, ema, device)
    space, objective = open_space(settings, device), objective_of(settings)
    label, rows, numbers = first_class(model, class_label), [], {}
    for name, pixels in pictures(model, space, image).items():
        x = space.encode(pixels[None].to(device), torch.zeros((), device=device))
        for place in progress:
            shown, layers = observe(model, objective, x, label, place, seed)
            found = [maps.map_of(layer) for layer in layers]
            alike = [maps.likeness(pixels.to(device), one) for one in found]
            seen = (space.decode(shown)[0].permute(1, 2, 0).cpu() / 2 + 0.5).clamp(0, 1)
            rows.append((f"{name}\n{place:.0%} image", seen, list(zip(alike, (one.cpu() for one in found)))))
            numbers[f"{name} at {place:g}"] = [dict(likeness=one, map=m.tolist()) for one, m in zip(alike, found)]
    return maps.draw_maps(rows, title), {title: numbers}


def draw_reach(ckpt, ema, device, image, progress, class_label, seed, channels):
    """Draws how far the layers of checkpoints see, beside how far their heads look where they have attention."""
    systems, numbers = {}, {}
    for title, layers in look_at(ckpt, ema, device, image, progress, class_label, seed):
        found = [(reach.reach_of(layer, channels).cpu(), reach.attention_distance(layer)) for layer in layers]
        systems[title] = layers[0].grid, [(far, heads if heads is None else heads.cpu()) for far, heads in found]
        numbers[title] = [
            dict(median=far.median().item(), channels=far.tolist()) | ({} if heads is None else dict(heads=heads.tolist()))
            for far, heads in found
        ]
    return reach.draw_reach(systems), numbers


def draw_spectrum(ckpt, ema, device, image, progress, class_label, seed):
    """Draws the gain of the layers of checkpoints by spatial frequency."""
    systems = {}
    for title, layers in look_at(ckpt, ema, device, image, progress, class_label, seed):
        systems[title] = [spectrum.by_frequency(spectrum.gain_map(layer, seed)).tolist() for layer in layers]
    return spectrum.draw_spectrum(systems), systems


def draw_curves(runs, device):
    """Draws the losses and probes of runs."""
    found = {Path(run).resolve().name: curves.read_curves(run) for run in runs}
    if len(found) < len(runs):
        found = {run: curves.read_curves(run) for run in runs}
    return curves.draw_curves(found), found


def draw_drift(ckpt, ema, device, initial):
    """Draws the coefficients of a checkpoint's PDEs beside the initial ones: those of its first seed, or of another
    checkpoint."""
    model, settings, title = open_model(ckpt, ema, device)
    stored = load_checkpoint(find_checkpoint(ckpt))[1]
    seed = stored.get("first_seed", stored.get("global_seed"))  # older runs recorded the last one alone
    if initial:
        first = open_model(initial, None, device)[0]
    elif stored.get("init_from") or not isinstance(seed, int):
        begun = f"began from {stored['init_from']}" if stored.get("init_from") else "does not say with which seed it began"
        raise ValueError(f"{ckpt} {begun}; give --initial the weights before training")
    else:
        torch.manual_seed(seed)
        first = create_network(settings, model.input_size)
    before, after = drift.coefficients_of(first), drift.coefficients_of(model)
    shapes = [[{name: len(x) for name, x in layer.items()} for layer in layers] for layers in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{initial} and {ckpt} are of different networks")
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    numbers = [
        {name: dict(initial=b[name].quantile(levels).tolist(), trained=a[name].quantile(levels).tolist()) for name in b}
        for b, a in zip(before, after)
    ]
    return drift.draw_drift(before, after, title), {title: dict(quantiles=levels.tolist(), layers=numbers)}


def open_model(ckpt, ema, device, name=None):
    """Returns a checkpoint's model on that device, its settings, and what to call it in a picture, by its file's name unless
    another is given."""
    model, settings = load_model(find_checkpoint(ckpt), {}, "mse", ema)
    kind = f"{settings['model']}, {settings['mixer']}" if isinstance(model, DiT) else settings["model"]  # others have their own
    return model.to(device), settings, f"{kind} ({name or Path(ckpt).stem})"


def first_class(model, label):
    """Returns the number of the class that is wanted, or else of the first that samples are drawn of."""
    return choose_classes(model, None if label is None else [label])[0]


def open_space(settings, device):
    return load_trained_space(settings["vae"], device, settings.get("vae_digest"))


def pictures(model, space, image=None):
    """Returns what to show a model: a disc, and the picture in a file as training crops it: {name: (3, H, W) in [-1, 1]}."""
    h, w = (side * space.factor for side in model.input_size)
    if h != w:
        raise ValueError(f"the checkpoint is for images of {h} x {w}; pictures are drawn of square ones")
    shown = dict(disc=maps.disc(h))
    if image:
        shown[Path(image).stem] = cropped(read_image(image), h)
    return shown


def look_at(ckpts, ema, device, image, progress, label, seed):
    """Yields (title, Layers) of checkpoints that look at the picture, or else the disc, under four noises."""
    names = [Path(ckpt).stem for ckpt in ckpts]
    for ckpt, name in zip(ckpts, names if len(set(names)) == len(names) else ckpts):
        model, settings, title = open_model(ckpt, ema, device, name)
        space, objective = open_space(settings, device), objective_of(settings)
        *_, pixels = pictures(model, space, image).values()
        x = space.encode(pixels[None].to(device), torch.zeros((), device=device)).repeat(4, 1, 1, 1)
        yield title, observe(model, objective, x, first_class(model, label), progress, seed)[1]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw what mixers do and how runs went.")
    pictures = parser.add_subparsers(required=True, metavar="PICTURE")

    def picture(name, make, what):
        """Adds a subcommand with the flags that all have, and returns its add_argument."""
        command = pictures.add_parser(name, help=what, description=f"Draw {what}.")
        command.set_defaults(make=make, device=None)
        command.add_argument("--out", default=f"{name}.png", help="file ending in .png or .svg")
        command.add_argument("--json", metavar="FILE", help="write the numbers there, too")
        return command.add_argument

    def add_checkpoint(add, **how):
        add("--ckpt", **how, help="checkpoint, as sample.py takes it")
        add("--ema", type=decay, metavar="DECAY", help="which of several averages of weights, by its decay")
        add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")

    def add_image(add, **progress):
        add("--image", metavar="FILE", help="a picture to show to the network; otherwise a disc is drawn")
        add("--class-label", type=class_label, metavar="CLASS", help="number or name; else the first that sample.py draws")
        add("--seed", type=not_negative, default=0, help="of the noise")
        add("--progress", type=share, **progress, help="how far on the way from noise, 0, to image, 1")

    add = picture("kernels", draw_kernels, "Green's functions, chosen ones or a checkpoint's")
    add_checkpoint(add)
    add("--count", type=positive, help="kernels of each layer of a checkpoint; 8 unless given")
    lengths = "of the Gaussian, in sides of the picture"
    add("--widths", type=from_zero, nargs=2, metavar=("FIRST", "SECOND"), help=f"standard deviations {lengths}")
    add("--angle", type=finite, help="of its first axis, in degrees from right to down")
    add("--shift", type=finite, nargs=2, metavar=("X", "Y"), help="to the right and down, in sides of the picture")
    add("--reaction", type=finite, metavar="R", help="multiplies by exp(R)")
    add("--grid", type=image_size, metavar="SIDE or HxW", help="tokens; 64 unless given")
    add = picture("maps", draw_maps, "what each layer's mixer makes of an image")
    add_checkpoint(add, required=True)
    add_image(add, nargs="+", default=[0.3, 0.6, 0.9])
    add = picture("reach", draw_reach, "how far the channels of each layer see, in tokens")
    add_checkpoint(add, required=True, nargs="+")
    add_image(add, default=0.6)
    add("--channels", type=positive, default=32, help="channels measured in each layer, evenly spread")
    add = picture("spectrum", draw_spectrum, "each layer's gain by spatial frequency")
    add_checkpoint(add, required=True, nargs="+")
    add_image(add, default=0.6)
    add = picture("curves", draw_curves, "losses and probes of runs")
    add("runs", nargs="+", metavar="RUN", help="folders of train.py's runs")
    add = picture("drift", draw_drift, "how the PDEs' coefficients moved in training")
    add_checkpoint(add, required=True)
    add("--initial", metavar="CKPT", help="weights before training; by default they are recreated from the run's seed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
