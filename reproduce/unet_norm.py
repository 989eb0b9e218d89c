"""Says what the last normalisation of the U-Net does to clean-image prediction: trains UNet-N with it and without it, which is
an identity in its place, as Table 1 at small scale does, and prints the errors of the velocity by time (reproduce.denoising):

    python -m reproduce.unet_norm DATA WORK [--steps 300] [--num 256] [--json FILE]

DATA holds train/ and test/; WORK is a new folder for both runs.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

from torch import nn

import train
from backbones.unet import UNet
from machine.files import write_json
from machine.flags import positive
from machine.processes import launch
from reproduce.denoising import TIMES, measure

FLAGS = "--model UNet-N --vae none --uncond --image-size 32 --num-workers 0 --epochs 100000 --global-batch-size 32 --lr 1e-3 "
FLAGS += "--predict x --objective flow"
BUILD = UNet.__init__


def build_without_last_norm(self, *args, **options):
    BUILD(self, *args, **options)
    self.net.conv_norm_out = nn.Identity()


def main(data, work, steps, num, json, processes):
    if work.exists():
        raise ValueError(f"{work} exists already: give a new folder for the runs")
    if not (data / "test").is_dir():  # before the training, which takes minutes
        raise ValueError(f"{data / 'test'}: no such folder")
    rows = {}
    for name, build in (("with", BUILD), ("without", build_without_last_norm)):
        with patch.object(UNet, "__init__", build):
            flags = [*FLAGS.split(), "--data-path", f"{data}/train", "--max-steps", str(steps)]
            train.main(train.parse_args([*flags, "--results-dir", f"{work}/{name}"]), processes)
            (checkpoint,) = work.glob(f"{name}/*/checkpoints/{steps:07}.pt")
            rows[name] = measure(data / "test", name, checkpoint, num)
    if json:
        write_json(json, dict(steps=steps, most_images=num, times=TIMES, rows=rows), "errors")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, metavar="DATA")
    add("work", type=Path, metavar="WORK")
    add("--steps", type=positive, default=300)
    add("--num", type=positive, default=256, help="held-out images (default: 256)")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(lambda args, processes: main(**vars(args), processes=processes), parse_args())
