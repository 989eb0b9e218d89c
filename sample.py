"""Draws a grid of samples from a checkpoint:

    python sample.py --ckpt results/000-DiT-N-2/checkpoints/0002000.pt --class-labels 0 1 2 --samples-per-class 8

The model's size, mixer, classes and space come from the checkpoint. Without --ckpt it is the public DiT-XL/2.
"""

import argparse

from checkpoints.build import for_sampler, load_guide, load_model
from diffusion import OBJECTIVES, PATHS, PREDICTIONS, create_sampler
from diffusion.drawing import choose_classes, draw, name_classes
from diffusion.guidance import create_guidance, guidance_in_words
from diffusion.samplers import FLOW_SAMPLERS, SAMPLERS
from download import find_checkpoint, public_checkpoint
from images.autoencoder import load_trained_space
from images.samples import save_grid
from machine.files import check_writable
from machine.flags import USE, above_zero, class_label, decay, ema_length, from_zero, image_size, not_negative, positive, share
from machine.precision import allow_tf32
from machine.processes import launch
from mixers import MIXERS, add_mixer_flags
from mixers.running import add_speed_flags, prepare_to_sample
from models import DiT, model_name


def main(args, processes):
    allow_tf32()
    name = args.ckpt or public_checkpoint(args.model, args.mixer, args.image_size, args.num_classes)
    model, settings = load_model(find_checkpoint(name), vars(args), "mse", args.ema)
    labels = [label for label in choose_classes(model, args.class_labels) for _ in range(args.samples_per_class)]
    steps = args.num_sampling_steps
    objective, sampler = create_sampler(settings["objective"], args.sampler, steps, **for_sampler(settings))
    guidance = create_guidance(args.cfg_scale, model.in_channels, args.cfg_channels, args.cfg_interval)
    check_writable(args.out, "--out", ".png")
    running = processes.device, args.precision, args.compile, args.backend, args.deterministic
    guidance = with_guide(guidance, args.guide_ckpt, args.guide_scale, model, settings, running)
    prepare_to_sample(model, *running)
    space = load_trained_space(settings["vae"], processes.device, None if args.vae else settings.get("vae_digest"))

    drawn = in_words(model, settings, sampler, steps, args.precision, guidance)
    print(f"Drawing {len(labels)} images: {drawn}")
    images = draw(model, space, objective, sampler, labels, args.seed, guidance)
    columns = args.samples_per_class if args.samples_per_class > 1 else 4
    captions = None if guidance.drops_classes else name_classes(model, labels)
    save_grid(images, args.out, columns, captions)
    print(f"{len(labels)} samples are in {args.out}")


def with_guide(guidance, path, scale, model, settings, running):
    """Returns the Guidance with the model of the checkpoint at `path`, if any, as guide. running: further arguments of
    `prepare_to_sample`. ValueError if it cannot guide a model of these settings."""
    if not path:
        if scale is not None:
            raise ValueError(f"--guide-scale {scale:g} means nothing without --guide-ckpt")
        return guidance
    guide = load_guide(find_checkpoint(path), model, settings)
    prepare_to_sample(guide, *running)
    return guidance._replace(guide=guide, guide_scale=2.0 if scale is None else scale)


def in_words(model, settings, sampler, steps, precision, guidance):
    """Returns, in words, what is drawn and how, for a line of output. settings: a checkpoint's, as from `load_model`."""
    coupling = settings["mixer_options"].get("coupling")
    mixer = f"{settings['mixer']} ({coupling} coupling)" if coupling else settings["mixer"]
    mixer = f" with mixer {mixer}" if isinstance(model, DiT) else ""  # others bring their own
    steps = "steps of its own" if sampler is FLOW_SAMPLERS["rk45"] else f"{steps} steps"
    how = f"{settings['objective']} by {sampler.__name__.replace('_', '-')} in {steps}, {precision}"
    return f"{settings['model']}{mixer}, {how}, {guidance_in_words(guidance, model)}"


def add_model_flags(add, vae):
    """Adds the flags that sample.py and sample_ddp.py share. What a checkpoint decides has no default here."""
    add("--ckpt", help="checkpoint of train.py; without it, the public DiT-XL/2 is fetched")
    add("--ema", type=decay, metavar="DECAY", help="which of several averages of weights, by its decay; the first unless given")
    length = "use an average that looks back over this share of the run, made from those of train.py's --ema-lengths"
    add("--ema-length", type=ema_length, metavar="L", help=length)
    add("--model", type=model_name, metavar="NAME", help="from the checkpoint")
    add("--mixer", choices=MIXERS, help="from the checkpoint; for weights that do not tell the order of their scans")
    add_mixer_flags(add, told=False)
    add("--image-size", type=image_size, metavar="SIDE or HxW", help="from the checkpoint; any multiple of the patch works")
    add("--num-classes", type=positive, help="from the checkpoint")
    add("--vae", help=f"ema, mse, a local folder, or none for pixels; from the checkpoint, or {vae}")
    add("--objective", choices=OBJECTIVES, help="from the checkpoint; for weights that do not tell")
    add("--path", choices=PATHS, help="of a flow, for weights that do not state it; from the checkpoint, or linear")
    add("--predict", choices=PREDICTIONS, help="of a flow, for weights that do not state it; from the checkpoint, or velocity")
    add("--time-shift", type=above_zero, metavar="S", help="of a flow: its steps nearer the noise; from the checkpoint, or 1")
    add("--num-sampling-steps", type=positive, default=250)
    add("--sampler", choices=[*SAMPLERS, *FLOW_SAMPLERS], help="by default ddpm, or euler for flow matching")
    add("--cfg-channels", choices=["3", "all"], help="guided channels; by default 3 of 4, as in DiT, and all of others")
    interval = dict(type=share, nargs=2, metavar=("FROM", "TO"), default=(0.0, 1.0))
    add("--cfg-interval", **interval, help="where guidance acts on the way from noise, 0, to image, 1")
    add("--guide-ckpt", metavar="FILE", help="checkpoint of a weaker model to steer away from (autoguidance)")
    add("--guide-scale", type=from_zero, metavar="W", help="strength of autoguidance; 1 is none, and 2 the default")
    add_speed_flags(add)
    add("--device", help="cpu, cuda or cuda:N; by default cuda if there is any")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw samples from a DiT.", usage=USE)
    add = parser.add_argument
    add_model_flags(add, vae="mse")
    add("--class-labels", type=class_label, nargs="+", metavar="CLASS", help="numbers or names; num_classes is the null class")
    add("--samples-per-class", type=positive, default=1)
    add("--cfg-scale", type=from_zero, default=4.0, help="strength of classifier-free guidance; 1 is none")
    add("--seed", type=not_negative, default=0)
    add("--out", default="sample.png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(main, parse_args())
