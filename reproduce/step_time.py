"""Milliseconds of a training step (forward, backward, AdamW) with every mixer, in turns in one process:

    python reproduce/step_time.py DiT-N/4 --batch 64        (64 tokens)
    python reproduce/step_time.py DiT-N/2 --batch 16        (256 tokens)
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from models import MODELS

MIXERS = {
    "attention": dict(mixer="attention"),
    "pdessm": dict(mixer="pdessm"),
    "gate": dict(mixer="pdessm", gate=True),
    "conditioned": dict(mixer="pdessm", conditioned=True),
    "gate-conditioned": dict(mixer="pdessm", gate=True, conditioned=True),
    "pairwise": dict(mixer="pdessm", coupling="pairwise"),
    "coupled": dict(mixer="pdessm", coupling="coupled"),
    "pdessm-g": dict(mixer="pdessm-g"),
}


def main(args):
    torch.set_num_threads(args.threads)
    models = {n: MODELS[args.model](input_size=32, in_channels=3, num_classes=10, **o) for n, o in MIXERS.items()}
    optimisers = {n: torch.optim.AdamW(model.parameters(), lr=1e-4) for n, model in models.items()}
    x, t, y = torch.randn(args.batch, 3, 32, 32), torch.randint(1000, (args.batch,)), torch.randint(10, (args.batch,))
    times = {n: [] for n in models}
    for _ in range(args.repeats + 1):
        for n, model in models.items():
            start = perf_counter()
            loss = model(x, t, y).square().mean()
            optimisers[n].zero_grad()
            loss.backward()
            optimisers[n].step()
            times[n].append(1e3 * (perf_counter() - start))
    for n, (_, *rest) in times.items():  # the first warms up
        count = sum(p.numel() for p in models[n].parameters())
        print(f"{n:17}{count:>10,} parameters  {median(rest):6.1f} ms  ({min(rest):.1f} to {max(rest):.1f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time a training step with every mixer.")
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    main(parser.parse_args())
