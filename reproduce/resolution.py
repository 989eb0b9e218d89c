"""Held-out error of a checkpoint on images enlarged to other sizes, with positions between those of training, as
sample.py --image-size has them, and with positions that continue them:

    python reproduce/resolution.py CKPT CIFAR10/test 32 48 64
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from checkpoints.build import load_model
from images.autoencoder import PixelSpace
from images.dataset import load_dataset
from machine.processes import Processes
from models import grid_embedding

path, images, *sides = sys.argv[1:]
train.HELD_OUT = 640
for side in map(int, sides):
    model, settings = load_model(path, SimpleNamespace(image_size=side), "ema")
    args = SimpleNamespace(objective=settings["objective"], path=settings["path"], image_size=side)
    dataset = load_dataset(images, side, held_out=True)

    def error(model=model, dataset=dataset, args=args):
        one = Processes(0, 1, torch.device("cpu"))
        return train.held_out_loss(model, dataset, args, one, PixelSpace())["mse"]

    between = error()
    model.pos_embed.copy_(grid_embedding(*model.grid_size, model.pos_embed.shape[2]))
    print(f"{side} x {side}: between {between:.4f}, continued {error():.4f}")
