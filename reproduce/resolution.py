"""Prints the held-out error of a checkpoint on images enlarged to other sizes, with positions between those of training, as
sample.py --image-size has them, and with positions that continue them:

    python -m reproduce.resolution CKPT CIFAR10/test 32 48 64
"""

import argparse

from backbones.parts import grid_embedding
from checkpoints.build import for_sampler, load_model
from diffusion import create_objective
from images.autoencoder import PixelSpace
from images.dataset import load_dataset
from machine.flags import positive
from machine.processes import ALONE, launch
from models import DiT_models
from training.watching import held_out_loss

IMAGES = 640


def main(checkpoint, images, sides):
    for side in sides:
        model, settings = load_model(checkpoint, dict(image_size=side), "ema")
        if settings["model"] not in DiT_models or model.rotary or settings["vae"] != "none":
            raise ValueError(f"{checkpoint} is none of a DiT with sine positions on pixels, whose positions can continue")
        objective = create_objective(settings["objective"], **for_sampler(settings) | dict(time_shift=1.0))
        dataset = load_dataset(images, side, uncond=not model.num_classes, held_out=True)
        between = held_out_loss(model, dataset, objective, PixelSpace(), ALONE, most=IMAGES)["mse"]
        model.pos_embed.copy_(grid_embedding(*model.grid_size, model.pos_embed.shape[2]))
        continued = held_out_loss(model, dataset, objective, PixelSpace(), ALONE, most=IMAGES)["mse"]
        print(f"{side} x {side}: between {between:.4f}, continued {continued:.4f}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("images", metavar="IMAGES")
    parser.add_argument("sides", nargs="+", type=positive, metavar="SIDE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(lambda args, _: main(**vars(args)), parse_args())
