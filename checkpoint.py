"""Checkpoints: a dict of model, ema, opt and args, as DiT's train.py writes them, except that args is a plain dict,
so that torch.load reads it without trusting the file. Files with an argparse.Namespace, or bare weights, load too, and
so do safetensors, with the weights and, as JSON in their metadata, the args. As a command it makes one of the other:

    python checkpoint.py results/000-DiT-S-4/checkpoints/0050000.pt --format safetensors
"""

import argparse
import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from diffusion import PATHS
from flags import decay
from mixers import MIXERS
from models import MODELS, DiT_models, UNets
from parallel import launch
from pde_ssm import options_from_weights
from sharded import read_settings, read_whole
from vae import open_space

# What settings_from_weights reads of a DiT and of a U-Net.
READ_FROM = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed", "final_layer.linear.bias")
READ_FROM_UNET = ("net.conv_in.weight", "net.conv_out.weight", "net.class_embedding.weight")
CLASS_TABLES = ("y_embedder.embedding_table.weight", "net.class_embedding.weight")


@contextmanager
def whole_file(path, what):
    """A file to write to under a temporary name, which becomes `path` in the end: it is whole or not there."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # Where the disk is full, PyTorch's writer speaks of positions, after the OSError that says so.
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"could not write the {what} {path}: {reason}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def save_checkpoint(path, **contents):
    with whole_file(path, "checkpoint") as file:
        torch.save(contents, file)


def average_names(decays):
    """The first average of weights is a checkpoint's `ema`, as DiT has it, the others are `ema_<decay>`."""
    return {decay: f"ema_{decay}" if i else "ema" for i, decay in enumerate(decays)}


def averages_of(args):
    """The same, from a checkpoint's settings, which may be of another code base."""
    decays = args.get("ema_decay") if isinstance(args, dict) else None
    return average_names(decays) if isinstance(decays, list) else {}


def choose_average(args, decay, path):
    """The name of the average of that decay, or of the first for None. ValueError names those that there are."""
    names = {None: "ema"} | averages_of(args)
    if decay not in names:
        raise ValueError(f"--ema {decay}: {path} has averages of decay {', '.join(map(str, averages_of(args))) or 'unknown'}")
    return names[decay]


def read_checkpoint(path, decay=None):
    """The dict in a file, an empty one for a file of something else; of a folder that FSDP wrote, as ema one of its averages,
    and args.

    Unpickles nothing but tensors, plain containers and argparse.Namespace. ValueError for anything else.
    """
    if os.path.isdir(path):
        args = read_settings(path)["args"]
        return dict(ema=read_whole(path, choose_average(args, decay, path)), args=args)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if Path(path).suffix == ".safetensors":
            return _read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        raise ValueError(f"{path} is not a whole checkpoint of tensors: it is damaged, cut short or something else") from error
    return contents if isinstance(contents, dict) else {}


def _read_safetensors(path):
    with safe_open(path, "pt") as file:
        args = (file.metadata() or {}).get("args", "{}")
        return dict(ema={name: file.get_tensor(name) for name in file.keys()}, args=json.loads(args))  # noqa: SIM118


def load_checkpoint(path, decay=None):
    """(weights, args) of a checkpoint: its EMA's state dict if it has one, that of `decay` if it has several, and its
    settings as a dict. ValueError for anything else."""
    contents = read_checkpoint(path, decay)
    name = "ema" if os.path.isdir(path) else choose_average(contents.get("args"), decay, path)
    weights = contents.get(name, contents.get("model", contents))
    weights = weights if isinstance(weights, dict) else {}
    needed = READ_FROM_UNET if READ_FROM_UNET[0] in weights else READ_FROM
    if missing := [name for name in needed if not isinstance(weights.get(name), torch.Tensor)]:
        raise ValueError(f"{path} holds no {'U-Net' if needed is READ_FROM_UNET else 'DiT'}: {missing[0]} is missing")
    args = contents.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return weights, args if isinstance(args, dict) else {}


def settings_from_weights(weights):
    """What train.py was told, read off the weights: model, mixer and its options, num_classes, image_size, vae,
    objective (a flow's network has no variance among its outputs) and path (of a flow, which is guessed)."""
    read = _settings_of_unet if READ_FROM_UNET[0] in weights else _settings_of_dit
    return read(weights) | {"path": "linear"}


def _settings_of_dit(weights):
    hidden, channels, *_, patch = weights["x_embedder.proj.weight"].shape
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    names = [
        name
        for name, build in DiT_models.items()
        if (build.keywords["hidden_size"], build.keywords["depth"], build.keywords["patch_size"]) == (hidden, depth, patch)
    ]
    if not names:
        raise ValueError(f"no model is known with hidden size {hidden}, depth {depth} and patch size {patch}")
    vae = "ema" if channels == 4 else "none"
    grid = round(weights["pos_embed"].shape[1] ** 0.5)
    first = {name.removeprefix("blocks.0.attn."): w for name, w in weights.items() if name.startswith("blocks.0.attn.")}
    attention = "qkv.weight" in first
    if not attention and "pde.equation.g0" not in first:
        raise ValueError("the weights' blocks mix tokens neither by attention nor by a PDE of this version")
    return {
        "model": names[0],
        "mixer": "attention" if attention else "pdessm",
        "mixer_options": {} if attention else options_from_weights(first),
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "image_size": grid * patch * open_space(vae).factor,
        "vae": vae,
        "objective": "flow" if len(weights["final_layer.linear.bias"]) == channels * patch**2 else "diffusion",
    }


def _settings_of_unet(weights):
    """A U-Net's weights know no image_size: None."""
    width, channels = weights["net.conv_in.weight"].shape[:2]
    names = [name for name, build in UNets.items() if build.keywords["channels"][0] == width]
    if not names:
        raise ValueError(f"no U-Net is known that begins with {width} channels")
    return {
        "model": names[0],
        "mixer": "attention",
        "mixer_options": {},
        "num_classes": len(weights["net.class_embedding.weight"]) - 1,
        "image_size": None,
        "vae": "ema" if channels == 4 else "none",
        "objective": "flow" if len(weights["net.conv_out.weight"]) == channels else "diffusion",
    }


def _trustworthy(stored, settings):
    """Of what a file says of itself, that which does not contradict its weights, or that they cannot know."""
    kept = {name: stored[name] for name in ("model", "vae") if isinstance(stored.get(name), str)}
    if stored.get("mixer") in MIXERS and (stored["mixer"] == "attention") == (settings["mixer"] == "attention"):
        kept["mixer"] = stored["mixer"]  # the name of a preset
    if isinstance(stored.get("image_size"), int):
        kept["image_size"] = stored["image_size"]
    if stored.get("objective") == settings["objective"] and stored.get("path") in PATHS:
        kept["path"] = stored["path"]
    return kept


def load_model(path, args, default_vae, decay=None):
    """The model of a checkpoint, in eval mode: (model, settings).

    The settings, those of `settings_from_weights`, are the checkpoint's; those that `args` gives too, not None, must
    agree. Two are free: which decoder to use in latent space, and image_size, a side or (height, width), to which the
    model is resized. decay: of which average the weights are, if there are several. ValueError names both values, or what
    does not fit.
    """
    weights, stored = load_checkpoint(path, decay)
    settings = settings_from_weights(weights)
    if stored.get("model") in MODELS:  # a file of another code base may have names of its own
        settings |= _trustworthy(stored, settings)
    for name in ("model", "mixer", "num_classes"):
        given = getattr(args, name)
        if given not in (None, settings[name]):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {given} contradicts {path}, which has {flag} {settings[name]}; leave the flag out")
    if args.vae is not None and (args.vae == "none") != (settings["vae"] == "none"):
        raise ValueError(f"--vae {args.vae} contradicts {path}, which was trained with --vae {settings['vae']}")
    if settings["vae"] in ("ema", "mse"):  # they share an encoder, so either decodes
        settings["vae"] = default_vae
    settings["vae"] = args.vae or settings["vae"]

    if settings["image_size"] is None:
        if args.image_size is None:
            raise ValueError(f"{path} does not say for images of which size it is; give --image-size")
        settings["image_size"] = args.image_size if isinstance(args.image_size, int) else args.image_size[0]
    space = open_space(settings["vae"])
    model = MODELS[settings["model"]](
        input_size=settings["image_size"] // space.factor,
        in_channels=space.channels,
        num_classes=settings["num_classes"],
        learn_sigma=settings["objective"] == "diffusion",
        mixer=settings["mixer"],
        **settings["mixer_options"],
    )
    load_weights(model, weights, path)
    if args.image_size not in (None, settings["image_size"]):
        settings["image_size"] = args.image_size
        resize(model, args.image_size, space.factor)
    return model.eval().requires_grad_(False), settings


def resize(model, image_size, factor):
    """Makes the model one for images of another size, a side or (height, width), in a space smaller by `factor`."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    least = model.stride * factor
    if height % least or width % least:
        parts = f"{model.stride} of the model times {factor} of its space"
        raise ValueError(f"--image-size {height}x{width}: both must be divisible by {least} ({parts})")
    model.resize((height // factor, width // factor))


def load_weights(model, weights, path):
    """load_state_dict, strictly, with a ValueError of one line that says what differs."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        expected = model.state_dict()
        differences = [f"{key} is missing" for key in expected if key not in weights]
        differences += [f"{key} is not the model's" for key in weights if key not in expected]
        differences += [
            f"{key} is {tuple(weights[key].shape)}, not {tuple(value.shape)}"
            for key, value in expected.items()
            if key in weights and weights[key].shape != value.shape
        ]
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(differences[:3])}{more}") from error


def initialize(model, path):
    """Gives the model what fits it of a checkpoint's weights, by name and shape; returns lines that say what does not.

    Mixers of another kind keep their initial values, since they share no name, and so does the table of another number of
    classes, but for the null class. ValueError if no matrix fits.
    """
    given = {name: w for name, w in load_checkpoint(path)[0].items() if isinstance(w, torch.Tensor)}
    own = model.state_dict()
    known = {name: w for name, w in given.items() if name in own}
    fitting = {name: w for name, w in known.items() if w.shape == own[name].shape}
    if not any(w.dim() > 1 for w in fitting.values()):
        raise ValueError(f"{path} is of another network or size: none of its matrices fits the model")
    model.load_state_dict(fitting, strict=False)
    report = [f"Initial weights from {path}: {len(fitting)} of the model's {len(own)} tensors"]
    for name in (name for name in known if name not in fitting):
        report.append(f"... not {name}, which is {tuple(known[name].shape)} there and {tuple(own[name].shape)} here")
        if name in CLASS_TABLES and own[name].shape[1:] == known[name].shape[1:]:
            own[name][-1].copy_(known[name][-1])
            report[-1] += "; the null class is kept"
    if missing := [name for name in own if name not in known]:
        report.append(f"... not there, and initial: {_by_kind(missing)}")
    if unknown := [name for name in given if name not in known]:
        report.append(f"... there, and not taken: {_by_kind(unknown)}")
    return report


def _by_kind(names):
    """Names that differ in a number alone, such as a block's, once, with how many there are."""
    kinds = [re.sub(r"\b\d+\b", "*", name) for name in names]
    return ", ".join(f"{kind} ({kinds.count(kind)})" for kind in dict.fromkeys(kinds))


def export(args, processes):
    """Writes a checkpoint's weights, its EMA's if it has one, and its settings, in the format asked for."""
    weights, settings = load_checkpoint(args.ckpt, args.ema)
    if averages := averages_of(settings):
        settings = settings | dict(ema_decay=[args.ema or next(iter(averages))])
    out = Path(args.out or Path(args.ckpt).with_suffix(f".{args.format}"))
    if out.exists():
        raise ValueError(f"{out} is there already; give another --out")
    if (out.suffix == ".safetensors") != (args.format == "safetensors"):
        raise ValueError(f"--out {out} should end in .{args.format}")
    if args.format == "pt":
        save_checkpoint(out, ema=weights, args=settings)
    else:
        whole = {name: w.clone(memory_format=torch.contiguous_format) for name, w in weights.items()}
        metadata = dict(format="pt", args=json.dumps(settings, default=str, skipkeys=True))
        with whole_file(out, "checkpoint") as file:
            file.write(save(whole, metadata))
    print(f"{len(weights)} tensors are in {out}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Write the weights of a checkpoint in another format.")
    parser.set_defaults(device="cpu")
    add = parser.add_argument
    add("ckpt", help="checkpoint of train.py or of this command")
    add("--format", choices=["safetensors", "pt"], required=True, help="pt is what DiT's own code loads")
    add("--ema", type=decay, metavar="DECAY", help="which of several averages, by its decay; the first unless given")
    add("--out", help="by default the checkpoint's name with the format's ending")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(export, parse_args())
