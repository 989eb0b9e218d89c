"""Writes the weights of a checkpoint, and its settings, as another kind of file:

    python -m checkpoints.export results/000-DiT-S-4/checkpoints/0050000.pt --format safetensors
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save

from checkpoints.build import save_checkpoint
from checkpoints.read import averages_of, load_checkpoint
from machine.files import whole_file
from machine.flags import decay
from machine.processes import launch


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
