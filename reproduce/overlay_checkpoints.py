"""Writes what overlay.sh gives to the scripts of DiT, SiT and fast-DiT: checkpoints and an autoencoder of random weights.

    python -m reproduce.overlay_checkpoints FOLDER
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from diffusers.models import AutoencoderKL

from benchmarks.sides import fill_zeros
from models import DiT_models


def main(folder):
    """Writes <child>-<mixer>.pt, and under hub/ an autoencoder in Stable Diffusion's place."""
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = AutoencoderKL(**blocks, block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4)
    cached = folder / "hub" / "hub" / "models--stabilityai--sd-vae-ft-mse"
    vae.save_pretrained(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    for mixer in ("attention", "pdessm", "pdessm-g"):
        for child, learn_sigma in (("DiT", True), ("SiT", False)):
            model = fill_zeros(DiT_models["DiT-S/8"](mixer=mixer, learn_sigma=learn_sigma))
            args = Namespace(model=f"{child}-S/8", image_size=256, num_classes=1000, vae="ema")
            torch.save(dict(ema=model.state_dict(), args=args), folder / f"{child}-{mixer}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
