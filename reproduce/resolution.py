"""Prints the held-out error of a checkpoint on images enlarged to other sizes, with positions between those of training, as
sample.py --image-size has them, and with positions that continue them:

    python -m reproduce.resolution CKPT CIFAR10/test 32 48 64
"""

import sys
from types import SimpleNamespace

import torch

import train
from checkpoints.build import load_model
from images.autoencoder import PixelSpace
from images.dataset import load_dataset
from machine.processes import Processes
from models import grid_embedding

IMAGES = 640


def main(path, images, sides):
    train.HELD_OUT = IMAGES
    one = Processes(0, 1, torch.device("cpu"))
    for side in sides:
        model, settings = load_model(path, SimpleNamespace(image_size=side), "ema")
        how = SimpleNamespace(objective=settings["objective"], path=settings["path"], image_size=side)
        dataset = load_dataset(images, side, held_out=True)
        between = train.held_out_loss(model, dataset, how, one, PixelSpace())["mse"]
        model.pos_embed.copy_(grid_embedding(*model.grid_size, model.pos_embed.shape[2]))
        continued = train.held_out_loss(model, dataset, how, one, PixelSpace())["mse"]
        print(f"{side} x {side}: between {between:.4f}, continued {continued:.4f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(side) for side in sys.argv[3:]])
