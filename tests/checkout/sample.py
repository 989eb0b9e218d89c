"""Writes what a trained network makes of a fixed input."""

import argparse

import torch

from download import find_model
from models import Tiny_models

parser = argparse.ArgumentParser()
parser.add_argument("mode", choices=["ODE", "SDE"])
parser.add_argument("--ckpt", required=True)
args = parser.parse_args()

model = Tiny_models["DiT-N/4"](input_size=8)
model.load_state_dict(find_model(args.ckpt))
x, t, y = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8), torch.tensor([10.0, 700.0]), torch.tensor([3, 10])
with torch.no_grad():
    torch.save(model.eval()(x, t, y), "sample.pt")
