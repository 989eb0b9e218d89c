"""Runs train.py and sample_ddp.py of an untouched checkout of DiT through overlay.py, a few steps on a few images:

    python -m benchmarks.checkout ../DiT

It needs no network: the images are noise, and an autoencoder of mean colours stands in for Stable Diffusion's. DiT's scripts
want a GPU; tests/checkout, whose flags are others, stands in for them on CPUs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import ROOT

MIXERS = ("attention", "pdessm", "pdessm-g")
# The commands of tests/checkout.
STAND_INS = [("train.py", "--model", "DiT-N/4", "--images", "images.pt"), ("sample.py", "ODE", "--ckpt", "results/last.pt")]
DIFFUSERS = '''
from types import SimpleNamespace

import torch
from torch.nn.functional import avg_pool2d, interpolate


class AutoencoderKL(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, *names, **options):
        return cls()

    def encode(self, images):
        means = avg_pool2d(images, 8)
        latents = torch.cat([means, means.mean(1, keepdim=True)], 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: latents))

    def decode(self, latents):
        return SimpleNamespace(sample=interpolate(latents[:, :3], scale_factor=8))
'''


def main(checkout, mixers):
    checkout = checkout.resolve()
    before = status(checkout)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_inputs(folder)
        for mixer in mixers:
            for name, *arguments in dits(mixer) if (checkout / "sample_ddp.py").exists() else STAND_INS:
                run(folder, mixer, checkout / name, arguments)
        images = list(folder.glob("samples-*/*.npz"))
        print(f"{len(images)} files of samples")
    if status(checkout) != before:
        raise SystemExit(f"the checkout {checkout} has changed")


def dits(mixer):
    """Returns the commands of facebookresearch/DiT, by its flags."""
    model = ["--model", "DiT-S/8", "--image-size", "256", "--num-classes", "1000"]
    learning = ["--epochs", "1", "--global-batch-size", "8", "--num-workers", "2", "--log-every", "2", "--ckpt-every", "4"]
    drawing = ["--num-fid-samples", "8", "--per-proc-batch-size", "4", "--num-sampling-steps", "4", "--cfg-scale", "1.5"]
    results = f"results-{mixer}"
    checkpoint = f"{results}/000-DiT-S-8/checkpoints/0000004.pt"
    return [
        ("train.py", *model, *learning, "--data-path", "images", "--results-dir", results),
        ("sample_ddp.py", *model, *drawing, "--ckpt", checkpoint, "--sample-dir", f"samples-{mixer}"),
    ]


def write_inputs(folder):
    (folder / "stand-in" / "diffusers").mkdir(parents=True)
    (folder / "stand-in" / "diffusers" / "__init__.py").touch()
    (folder / "stand-in" / "diffusers" / "models.py").write_text(DIFFUSERS)
    random = np.random.default_rng(0)
    for number in range(48):
        path = folder / "images" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(path)
    torch.save(torch.randn(4, 3, 8, 8), folder / "images.pt")


def run(folder, mixer, script, arguments):
    """Runs a script through the overlay, as one process under torchrun. SystemExit if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", str(ROOT / "overlay.py")]
    # A checkpoint says itself which mixer it is of.
    command += [str(script), *([] if "--ckpt" in arguments else ["--mixer", mixer]), *arguments]
    paths = os.pathsep.join([str(folder / "stand-in"), os.environ.get("PYTHONPATH", "")])
    print(" ".join(["overlay.py", *command[6:]]), flush=True)
    if subprocess.run(command, cwd=folder, env=os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS="1")).returncode:
        raise SystemExit(f"{script.name} failed with {mixer}")


def status(checkout):
    """Returns the files of a checkout, each with its size and the time of its last change."""
    files = [path for path in checkout.rglob("*") if path.is_file()]
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--mixers", nargs="+", default=MIXERS)
    args = parser.parse_args()
    main(args.checkout, args.mixers)
