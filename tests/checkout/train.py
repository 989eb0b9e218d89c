"""A few steps of training, for one process or several; knows its own arguments alone."""

import argparse
import os
import sys
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist

from diffusion import noisy
from models import Tiny_models


def main(args):
    several = "RANK" in os.environ
    if several:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Tiny_models[args.model](input_size=8)
    numbers = torch.rand(5)
    ema = deepcopy(model)
    replica = torch.nn.parallel.DistributedDataParallel(model) if several else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.load(args.images)
    for _ in range(args.steps):
        t = torch.rand(len(images)) * 1000
        loss = replica(noisy(images, t), t, torch.arange(len(images))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print("loss", loss.item())
    for mean, new in zip(ema.state_dict().values(), model.state_dict().values()):
        mean.copy_(new)
    if not several or dist.get_rank() == 0:
        contents = {"model": model.state_dict(), "ema": ema.state_dict(), "args": args, "numbers": numbers}
        Path("results").mkdir(exist_ok=True)
        torch.save(contents, "results/last.pt")
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    assert not [argument for argument in sys.argv if "mixer" in argument or "pde" in argument]
    assert Path(sys.argv[0]).samefile(__file__)
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=Tiny_models, required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=8)
    parser.add_argument("--vae", default="none")
    main(parser.parse_args())
