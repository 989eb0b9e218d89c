"""Writes the weights of a checkpoint, and its settings, in another form:

    python -m checkpoints.export results/000-DiT-S-4/checkpoints/0050000.pt --format safetensors
    python -m checkpoints.export results/000-DiT-S-4/checkpoints/0050000.pt --format hub --push OWNER/NAME
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from backbones.pretrained import public, to_safetensors
from checkpoints.build import class_names, load_model, save_checkpoint
from checkpoints.hub import locate
from checkpoints.hub import push as upload
from checkpoints.pipelines import write_pipeline
from checkpoints.read import averages_of, load_checkpoint, read_checkpoint
from diffusion import OBJECTIVES, PATHS, PREDICTIONS
from machine.files import read_rows, whole_file
from machine.flags import decay
from machine.processes import launch
from mixers import MIXERS, add_mixer_flags, kind_of, mixer_options

FILES, FOLDERS = ("safetensors", "pt"), ("hub", "diffusers")


def export(ckpt, format, out=None, ema=None, push=None, names=None, metrics=None, half=False, **given):
    """Writes a checkpoint's weights (its EMA's, if it has one) and its settings in the requested format. given: objective,
    path, predict, vae, mixer and its options for weights that do not state them; they are added to the settings."""
    if format in FILES and (push or metrics):
        raise ValueError(f"--push and --metrics go with --format {' or '.join(FOLDERS)}")
    if half and format in FOLDERS:
        raise ValueError(f"--half goes with --format {' or '.join(FILES)}")
    path = locate(ckpt)
    target = Path(out or Path(ckpt).with_suffix(f".{format}"))
    if target.exists() and (out or not push):
        raise ValueError(f"{target} is there already; give another --out")
    rename, stated = renaming(names) if names else dict, {}
    if names or any(given.values()):
        model, known = load_model(path, given, "ema", ema)  # refuses what contradicts the checkpoint
        named = class_names(rename(model.settings), model.num_classes, names or path) or []
        if names and not model.class_names and len(named) != model.num_classes:
            raise ValueError(f"--class-names {names} has {len(named)} names, and the weights {model.num_classes} classes")
        stated = {name: value for name, value in given.items() if value}
        if mixer_options(known["mixer"], stated):  # which go with the mixer and its other options
            flag = kind_of(known["mixer"]).flag_of
            options = {flag(name)[2:].replace("-", "_"): value for name, value in known["mixer_options"].items()}
            stated |= dict(mixer=known["mixer"]) | options
        stated |= dict(time_scale=known["time_scale"]) if known["time_scale"] != 1000 else {}

    def change(settings):
        return of_average(rename(settings), ema) | stated

    if format in FILES:
        write_file(path, ema, format, target, change, half)
        return
    facts = dict(name=push or target.name) | measures(path, metrics)
    with TemporaryDirectory() as alone:  # what is only uploaded leaves nothing here
        folder = alone if push and not out else target
        model, settings = load_model(path, given, "ema", ema)
        model.settings = change(model.settings)
        model.class_names = class_names(model.settings, model.num_classes, names or path)
        if format == "diffusers":
            read = write_pipeline(model, settings, folder)
            model.generate_model_card(**facts).save(Path(folder, "README.md"))
        else:
            model.save_pretrained(folder, model_card_kwargs=facts)
            read = f"{type(model).__name__}.from_pretrained({str(folder)!r})"
        if folder is target:
            print(f"The model is in {target}: {read}")
        if push:
            upload(folder, push)


def renaming(file):
    """Returns a function of settings that returns them with the names of classes in a JSON file: a list, in the order of the
    classes, or a dict of new names by those that they have. ValueError for anything else."""
    try:
        names = json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(f"--class-names {file} is no JSON: {error}") from error
    values = names.values() if isinstance(names, dict) else names
    if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"--class-names {file} should hold a list of names, or a dict of new names by old ones")

    def rename(settings):
        known = settings.get("class_names") or []
        if isinstance(names, list):
            if known and len(names) != len(known):
                raise ValueError(f"--class-names {file} has {len(names)} names, and the checkpoint {len(known)} classes")
            return settings | dict(class_names=names)
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"--class-names {file} renames {missing[0]!r}, and the checkpoint has no such class")
        return settings | dict(class_names=[names.get(name, name) for name in known])

    return rename


def of_average(settings, decay):
    """Returns settings with only one average, that of this decay, or else the first."""
    if not (averages := averages_of(settings)):
        return settings
    return settings | dict(ema_decay=[next(iter(averages)) if decay is None else decay], ema_lengths=None)


def write_file(path, average, form, out, change, half):
    """Writes the weights in a checkpoint, those of an average of that decay, in half precision if asked for, and its settings,
    changed and without paths of this machine, to a file."""
    weights, settings = load_checkpoint(path, average)
    settings = public(change(settings))
    if half:
        weights = {name: rounded_to_half(name, w) for name, w in weights.items()}
    if (out.suffix == ".safetensors") != (form == "safetensors"):
        raise ValueError(f"--out {out} should end in .{form}")
    if form == "pt":
        save_checkpoint(out, ema=weights, args=settings)
    else:
        with whole_file(out, "checkpoint") as file:
            file.write(to_safetensors(weights, settings))
    print(f"{len(weights)} tensors are in {out}")


def rounded_to_half(name, weights):
    """Returns floating-point weights as float16. ValueError for what is too large for it."""
    if not weights.is_floating_point():
        return weights
    if (largest := weights.abs().max().item()) > torch.finfo(torch.float16).max:
        raise ValueError(f"{name} has a weight of {largest:.4g}, which is too large for --half")
    return weights.half()


def measures(path, metrics):
    """Returns the facts for a checkpoint's card besides its settings: steps, as in the checkpoint, and metrics, the last that
    its run had logged by then and those in evaluate.py's JSON file."""
    contents = read_checkpoint(path)
    step, log, found = contents.get("step"), Path(path).parent.parent / "log.jsonl", {}
    for row in read_rows(log) if step else []:
        if row["step"] <= step:
            named = {f"{key} (train.py, step {row['step']:,})": value for key, value in row.items() if _is_measure(key, value)}
            found = {key: value for key, value in found.items() if key.split()[0] not in row} | named
    if metrics:
        try:
            told = json.loads(Path(metrics).read_text())
            if not isinstance(told, dict):
                raise ValueError("it holds no names of numbers")
        except ValueError as error:
            raise ValueError(f"--metrics {metrics} is not the JSON of evaluate.py: {error}") from error
        found |= {f"{key} (evaluate.py)": value for key, value in told.items() if isinstance(value, (int, float))}
    return dict(steps=step, metrics=found)


def _is_measure(name, value):
    return (name in ("loss", "held_out_loss") or name.startswith("fd")) and isinstance(value, float)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Write the weights of a checkpoint in another format.")
    add = parser.add_argument
    add("ckpt", help="checkpoint of train.py or of this command, or what --ckpt takes elsewhere, without public weights")
    forms = "pt is what DiT's own code loads; hub, diffusers: a folder for from_pretrained, here or there"
    add("--format", choices=[*FILES, *FOLDERS], required=True, help=forms)
    add("--ema", type=decay, metavar="DECAY", help="which of several averages, by its decay; the first unless given")
    add("--out", help="by default the checkpoint's name with the format's ending")
    add("--push", metavar="OWNER/NAME", help="upload the folder to Hugging Face's hub")
    add("--class-names", dest="names", metavar="FILE", help="JSON of names for the classes: a list, or new names by old")
    add("--half", action="store_true", help="float16, half the size: pt and safetensors; networks compute in float32 again")
    add("--metrics", metavar="FILE", help="JSON of evaluate.py, for the card")
    add("--objective", choices=OBJECTIVES, help="objective to record, for weights that do not state theirs")
    add("--path", choices=PATHS, help="of a flow: path to record, for weights that do not state it")
    add("--predict", choices=PREDICTIONS, help="of a flow: prediction to record, for weights that do not state it")
    add("--mixer", choices=MIXERS, help="mixer to record, for weights that do not tell the order of their scans")
    add_mixer_flags(add, told=False)
    add("--vae", help="autoencoder to record, for weights that do not state theirs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(lambda args, _: export(**vars(args)), parse_args())
