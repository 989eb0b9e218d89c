"""Draws one image of 512 or 1,024 pixels by sample.py on this machine's CPU, in one piece, and says how much memory that takes:

    python -m benchmarks.large_images [attention]

DiT-S/8 on pixels and, where diffusers is installed, DiT-S/2 on latents, with weights that are random, as Stable Diffusion's
autoencoder here; two steps with guidance, which is two images at once to the network.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import torch

from benchmarks import ROOT
from benchmarks.sides import fill_zeros
from checkpoints.build import save_checkpoint
from mixers import MIXERS
from models import MODELS

SIDES = (512, 1024)
MODEL_OF = {"none": "DiT-S/8", "vae": "DiT-S/2"}  # by --vae
# Stable Diffusion's, but for its weights.
AUTOENCODER = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=256,
)  # fmt: skip


def main(mixer="pdessm"):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if find_spec("diffusers"):
            from diffusers.models import AutoencoderKL

            AutoencoderKL(**AUTOENCODER).save_pretrained("vae")
        for vae, name in MODEL_OF.items():
            for side in SIDES if vae == "none" or Path("vae").is_dir() else ():
                write_checkpoint("a.pt", name, mixer, vae, side)
                seconds, most = draw("a.pt")
                n = side // (8 if vae == "none" else 16)
                what = f"{side} x {side} pixels, {name}, {mixer}, {n} x {n} tokens"
                print(f"{what}: {most / 1e9:.2f} GB, {seconds:.0f} s", flush=True)


def write_checkpoint(path, name, mixer, vae, side):
    """Writes an untrained model whose images are of that side, on pixels or on latents an eighth as wide."""
    torch.manual_seed(0)
    inputs, channels = (side, 3) if vae == "none" else (side // 8, 4)
    model = fill_zeros(MODELS[name](inputs, in_channels=channels, num_classes=10, mixer=mixer))
    args = dict(model=name, mixer=mixer, vae=vae, num_classes=10, image_size=side, objective="diffusion")
    save_checkpoint(path, model={}, ema=model.state_dict(), opt={}, args=args)


def draw(path):
    """Draws an image in a process of its own; returns its seconds and the most bytes that it took. SystemExit if it fails."""
    flags = ["--ckpt", path, "--class-labels", "3", "--num-sampling-steps", "2", "--device", "cpu", "--out", "a.png"]
    start = perf_counter()
    child = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *flags], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit("sample.py failed")
    return perf_counter() - start, 1024 * usage.ru_maxrss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mixer", nargs="?", choices=MIXERS, default="pdessm")
    main(parser.parse_args().mixer)
