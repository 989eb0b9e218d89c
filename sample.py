"""Draws a grid of samples from a checkpoint:

    python sample.py --ckpt results/000-DiT-N-2/checkpoints/0002000.pt --class-labels 0 1 2 --samples-per-class 8

The model's size, mixer, classes and space come from the checkpoint. Without --ckpt it is the public DiT-XL/2.
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from checkpoints.build import load_model
from diffusion import OBJECTIVES, PATHS, create_objective
from diffusion.samplers import FLOW_SAMPLERS, SAMPLERS, PerImageNoise, image_seeds
from download import find_checkpoint
from images.autoencoder import open_space
from machine.flags import decay, from_zero, image_size, not_negative, positive, share
from machine.processes import launch
from mixers import MIXERS
from mixers.running import add_speed_flags, prepare_to_sample
from models import MODELS

AT_ONCE = 64     # samples in one batch
SHOWN_SIDE = 64  # smaller samples are enlarged in the grid, smoothly, to about this many pixels
IMAGENET_FAVOURITES = [207, 360, 387, 974, 88, 979, 417, 279]


def main(args, processes):
    torch.set_float32_matmul_precision("high")
    model, settings = load_model(find_checkpoint(checkpoint_name(args)), args, "mse", args.ema)
    labels = [label for label in class_labels(args, model) for _ in range(args.samples_per_class)]
    objective, sampler = create_sampler(args, settings)
    guidance = read_guidance(args, model.in_channels)
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise OSError(f"--out {out}: not a file in a folder that can be written")
    prepare_to_sample(model, args, processes.device)
    space = load_space(settings, args, processes.device)

    print(f"Drawing {len(labels)} images: {in_words(model, settings, sampler, args, guidance)}")
    images = draw(model.to(processes.device), space, objective, sampler, labels, args.seed, guidance)
    save_grid(images, out, columns=args.samples_per_class if args.samples_per_class > 1 else 4)
    print(f"{len(labels)} samples are in {out}")


def create_sampler(args, settings):
    """What a checkpoint was trained for, in as many steps as asked for, and the function that samples from it."""
    samplers = SAMPLERS if settings["objective"] == "diffusion" else FLOW_SAMPLERS
    name = args.sampler or next(iter(samplers))
    if name not in samplers:
        raise ValueError(f"--sampler {name}: the checkpoint's objective is {settings['objective']}, for {', '.join(samplers)}")
    most = {"ddpm": 1000, "ddim": 1000, "dpm-solver": 999}.get(name, args.num_sampling_steps)
    if args.num_sampling_steps > most:
        raise ValueError(f"--num-sampling-steps {args.num_sampling_steps}: {name} takes at most {most} of training's 1000")
    known = {name: settings[name] for name in ("path", "time_scale", "learn_sigma") if name in settings}
    return create_objective(settings["objective"], args.num_sampling_steps, **known), samplers[name]


def load_space(settings, args, device):
    """The space of a checkpoint. ValueError if its autoencoder's folder has another encoder now and --vae does not name it."""
    space, before = open_space(settings["vae"]).load(device), settings.get("vae_digest")
    if args.vae is None and settings["vae"] not in ("ema", "mse") and before not in (None, now := space.digest()):
        raise ValueError(
            f"the autoencoder in {settings['vae']} has changed since the checkpoint was trained: the digest of its encoder was "
            f"{before} and is {now}; --vae {settings['vae']} takes it all the same"
        )
    return space


class Guidance(NamedTuple):
    """Classifier-free guidance: its strength, 1 being none; how many channels it guides, None for all; and on which part
    of the way from noise, 0, to image, 1."""

    scale: float
    channels: int | None = 3
    interval: tuple[float, float] = (0.0, 1.0)


def read_guidance(args, channels):
    """Guidance of a model with so many channels: unless --cfg-channels says otherwise, of DiT's three where there are four,
    and of all where there are not."""
    low, high = args.cfg_interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"--cfg-interval {low} {high}: it is from 0, noise, to 1, image")
    guided = args.cfg_channels or ("3" if channels in (3, 4) else "all")
    return Guidance(args.cfg_scale, None if guided == "all" else 3, (low, high))


def guidance_in_words(guidance, model):
    if guidance.scale == 1 or model.num_classes == 0:
        return "without guidance"
    low, high = guidance.interval
    there, part = model.in_channels, "" if (low, high) == (0, 1) else f" from {low:g} to {high:g} of the way"
    if guidance.scale == 0:
        return f"without classes{part}"
    which = f"{guidance.channels} of" if guidance.channels and guidance.channels < there else "all"
    return f"with guidance of strength {guidance.scale:g} on {which} {there} channels{part}"


def in_words(model, settings, sampler, args, guidance):
    """What is drawn and how, for a line of output."""
    coupling = settings["mixer_options"].get("coupling")
    mixer = f"{settings['mixer']} ({coupling} coupling)" if coupling else settings["mixer"]
    steps = "steps of its own" if sampler is FLOW_SAMPLERS["rk45"] else f"{args.num_sampling_steps} steps"
    how = f"{settings['objective']} by {sampler.__name__.replace('_', '-')} in {steps}, {args.precision}"
    return f"{settings['model']} with mixer {mixer}, {how}, {guidance_in_words(guidance, model)}"


def draw(model, space, objective, sampler, labels, seed, guidance, progress=True):
    """One sample per label of a list, each from a seed of its own: uint8 (n, H, W, 3) on the CPU."""
    device, images = next(model.parameters()).device, []
    labels = torch.tensor(labels, device=device)
    for numbers in torch.arange(len(labels)).split(AT_ONCE):
        noise = PerImageNoise(image_seeds(seed, numbers.tolist(), "sampling"), device)
        some = dict(progress=progress, numbers=numbers.tolist())
        images.append(generate(model, space, objective, sampler, labels[numbers], noise, guidance, **some))
    return torch.cat(images)


def generate(model, space, objective, sampler, labels, noise, guidance, progress=True, numbers=None):
    """One sample per label (n,), from `noise` (a PerImageNoise of n seeds): uint8 (n, H, W, 3) on the CPU.

    Without classes there is no guidance. Pixels are kept in range; latents have none. ValueError, which calls the images
    by their numbers (n,), if anything on the way was not finite: clipped to their range, such images would look like others.
    """
    seen = []  # (where, which of the images were finite there (n,) bool), as it happens

    def see(where, x):                                                     # (n, ...), or (2n, ...) of a doubled batch
        seen.append((where, x.isfinite().flatten(1).all(1).unflatten(0, (-1, len(labels))).all(0)))
        return x

    network, unguided = guided(model, objective, guidance), guidance.scale == 1 or model.num_classes == 0
    hook = model.register_forward_hook(lambda model, inputs, out: see("network", out))
    try:
        x = sampler(
            objective,
            model if unguided else lambda x, t, y: see("guidance", network(x, t, y)),
            noise.randn(model.in_channels, *model.input_size),
            model_kwargs=dict(y=labels),
            clip_denoised=space.factor == 1,
            progress=progress,
            randn_like=noise,
        )
    finally:
        hook.remove()
    images = see("decoder", space.decode(see("sampler", x)))
    finite = torch.stack([finite for _, finite in seen])                   # (m, n) bool, looked at once: a GPU need not wait
    if not finite.all():
        raise ValueError(what_is_not_finite(seen, finite.cpu(), numbers))
    pixels = (127.5 * images + 128).clamp(0, 255)                          # (n, 3, H, W)
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8)


REMEDIES = {
    "network": "--precision fp32, a smaller --cfg-scale or another checkpoint may help",
    "guidance": "a smaller --cfg-scale may help",
    "sampler": "a smaller --cfg-scale or more steps may help",
    "decoder": "a smaller --cfg-scale, more steps or another --vae may help",
}


def what_is_not_finite(seen, finite, numbers):
    """One sentence on a batch of images, from what `generate` has seen: which, from where on, and what may help."""
    bad = [numbers[i] if numbers else i for i in (~finite.all(0)).nonzero()[:, 0].tolist()]
    first = int((~finite.all(1)).nonzero()[0])
    where, calls = seen[first][0], sum(where == "network" for where, _ in seen[: first + 1])
    some = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    which = f"{len(bad)} of {finite.shape[1]} images of a batch are not finite (numbers {some})"
    return f"{which}, first the {where}'s output at call {calls} of the network; {REMEDIES[where]}"


def guided(model, objective, guidance):
    """The network (x, t, y) with classifier-free guidance: both halves of a doubled batch, of which one is returned. At a
    strength of 0 it is the network without classes."""
    scale, channels, (low, high) = guidance
    everywhere = (low, high) == (0, 1)

    def network(x, t, y):
        progress = objective.progress(t.double())
        here = (low <= progress) & (progress <= high) | everywhere         # (n,) bool: samplers may have a t for each image
        null = torch.full_like(y, model.num_classes)
        if scale == 0:
            return model(x, t, torch.where(here, null, y))
        if not (everywhere or here.any()):
            return model(x, t, y)
        strength = scale if everywhere else torch.where(here, scale, 1.0).view(-1, 1, 1, 1)
        doubled = x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, null])
        return model.forward_with_cfg(*doubled, strength, channels or model.in_channels)[: len(x)]

    return network


def checkpoint_name(args):
    """--ckpt, or the public weights for --image-size. ValueError where there are none."""
    if args.ckpt:
        return args.ckpt
    wanted = (args.model or "DiT-XL/2", args.mixer or "attention", args.image_size or 256, args.num_classes or 1000)
    if wanted not in {("DiT-XL/2", "attention", size, 1000) for size in (256, 512)}:
        raise ValueError("without --ckpt there is only DiT-XL/2 with attention, 1000 classes, at --image-size 256 or 512")
    return f"DiT-XL-2-{wanted[2]}x{wanted[2]}.pt"


def class_labels(args, model):
    """The labels asked for, or some of those trained. A model without classes has only the null class, num_classes = 0."""
    num_classes, trained = model.num_classes, model.trained_classes
    default = IMAGENET_FAVOURITES if trained == 1000 else list(range(max(min(trained, 16), 1)))
    labels = args.class_labels or default
    if num_classes == 0 and args.class_labels:
        raise ValueError("the checkpoint was trained without classes, so --class-labels means nothing to it")
    if wrong := [label for label in labels if not 0 <= label <= num_classes]:
        raise ValueError(f"class {wrong[0]} is out of range: the checkpoint has 0 to {num_classes - 1}, {num_classes} is none")
    if wrong := [label for label in labels if trained <= label < num_classes]:
        raise ValueError(f"class {wrong[0]} was not trained: there were images of 0 to {trained - 1}; {num_classes} is none")
    return labels


def save_grid(images, path, columns):
    """uint8 (n, H, W, 3) as one PNG, `columns` to a row."""
    scale = max(1, SHOWN_SIDE // images.shape[1])
    shown = interpolate(images.permute(0, 3, 1, 2).float(), scale_factor=scale, mode="bicubic")
    grid = make_grid(shown.round().clamp(0, 255).byte(), nrow=columns, pad_value=255)
    save_png(grid.permute(1, 2, 0).numpy(), path)


def save_png(pixels, path):
    """uint8 (H, W, 3) to a PNG that is whole or not there. OSError names it if it cannot be written."""
    partial = Path(f"{path}.{os.getpid()}.partial")  # another run may be writing the same image
    try:
        Image.fromarray(pixels).save(partial, format="png")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"could not write the image {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def add_model_flags(add, vae):
    """The flags that sample.py and sample_ddp.py share. What a checkpoint decides has no default here."""
    add("--ckpt", help="checkpoint of train.py; without it, the public DiT-XL/2 is fetched")
    add("--ema", type=decay, metavar="DECAY", help="which of several averages of weights, by its decay; the first unless given")
    add("--model", choices=MODELS, metavar="NAME", help="from the checkpoint")
    add("--mixer", choices=MIXERS, help="from the checkpoint")
    add("--image-size", type=image_size, metavar="SIDE or HxW", help="from the checkpoint; any multiple of the patch works")
    add("--num-classes", type=positive, help="from the checkpoint")
    add("--vae", help=f"ema, mse, a local folder, or none for pixels; from the checkpoint, or {vae}")
    add("--objective", choices=OBJECTIVES, help="from the checkpoint; for weights that do not tell")
    add("--path", choices=PATHS, help="of a flow, from the checkpoint; for weights that do not tell, and linear unless given")
    add("--num-sampling-steps", type=positive, default=250)
    add("--sampler", choices=[*SAMPLERS, *FLOW_SAMPLERS], help="by default ddpm, or euler for flow matching")
    add("--cfg-channels", choices=["3", "all"], help="that guidance guides; by default 3 of 4, as in DiT, and all of others")
    interval = dict(type=share, nargs=2, metavar=("FROM", "TO"), default=(0.0, 1.0))
    add("--cfg-interval", **interval, help="where guidance acts on the way from noise, 0, to image, 1")
    add_speed_flags(add)
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw samples from a DiT.")
    add = parser.add_argument
    add_model_flags(add, vae="mse")
    add("--class-labels", type=not_negative, nargs="+", metavar="CLASS", help="classes to draw; num_classes is the null class")
    add("--samples-per-class", type=positive, default=1)
    add("--cfg-scale", type=from_zero, default=4.0, help="strength of classifier-free guidance; 1 is none")
    add("--seed", type=not_negative, default=0)
    add("--out", default="sample.png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
