"""Trains a small ViT of timm's to classify CIFAR-10, with attention and with `replace_attention`, at equal steps, and says how
often each is right on the test images, at 32 x 32 and, with the same weights, on the same images enlarged to 48 x 48:

    python -m reproduce.classify CIFAR10 [--mixers attention pdessm pdessm-g] [--seeds 0 1 2] [--steps 1500]

CIFAR10 holds train/ and test/, or what torchvision unpacks. Every finished run goes to reproduce/results/classify.json at once,
those that are there are left out, and the table of all is printed. 10 to 17 minutes a run on one core.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import timm
import torch
from torch.nn.functional import cross_entropy, interpolate, pad
from tqdm import tqdm

from benchmarks.timing import time_in_turns
from images.dataset import load_dataset
from machine.files import alone_in, write_json
from machine.flags import not_negative, positive
from machine.processes import launch
from pde_ssm import PRESETS, replace_attention

RESULTS = Path(__file__).parent / "results" / "classify.json"
BATCH, LR, WARMUP, WEIGHT_DECAY = 128, 2e-3, 0.1, 0.05
SIZES = (32, 48)


def build(mixer, seed):
    """Returns the ViT, 6 blocks of 96 channels on patches of 4 x 4, whose mean token is classified."""
    torch.manual_seed(seed)
    model = timm.models.VisionTransformer(
        32, 4, num_classes=10, embed_dim=96, depth=6, num_heads=3, class_token=False, global_pool="avg", dynamic_img_size=True
    )
    return model if mixer == "attention" else replace_attention(model, mixer)


def set_size(model, size):
    """Tells mixers in place of attention the grid of images of that side; timm interpolates the positions by itself."""
    for block in model.blocks:
        if hasattr(block.attn, "grid_size"):
            block.attn.grid_size = (size // 4, size // 4)


def read(path, held_out):
    """Returns all images (N, 3, 32, 32) in [0, 255] as uint8, and their classes (N,)."""
    folder = Path(path, "test" if held_out else "train")
    images = load_dataset(folder, 32) if folder.is_dir() else load_dataset(path, 32, held_out=held_out)
    count = range(len(images))
    pixels = np.stack([np.asarray(images.source[i][0].convert("RGB")) for i in tqdm(count, "Reading", unit="image")])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([images.source[i][1] for i in count])


def augment(images, random):
    """Mirrors half of the images (B, 3, H, W) and moves all by up to 4 pixels, within a border of zeros."""
    mirrored = torch.rand(len(images), generator=random) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    places = torch.randint(9, (len(images), 2), generator=random).tolist()
    padded, side = pad(images, (4, 4, 4, 4)), images.shape[-1]
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, places)])


def scaled(images):
    return images.float() / 127.5 - 1


def train(model, images, classes, steps, seed):
    """Trains by AdamW; its learning rate rises over the first tenth of the steps and falls to zero as a cosine."""
    random, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW([dict(params=matrices), dict(params=others, weight_decay=0)], LR, weight_decay=WEIGHT_DECAY)

    def factor(step):
        done = (step + 1) / steps
        return done / WARMUP if done < WARMUP else (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    progress = tqdm(range(steps), "Training", unit="step")
    for step in progress:
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=random)
        batch, order = order[:BATCH], order[BATCH:]
        loss = cross_entropy(model(scaled(augment(images[batch], random))), classes[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def accuracy(model, images, classes, size):
    """Returns the model's accuracy on the images, enlarged to that side."""
    set_size(model.eval(), size)
    right = 0
    for some, wanted in zip(images.split(250), classes.split(250)):
        enlarged = interpolate(scaled(some), (size, size), mode="bicubic", antialias=True) if size != 32 else scaled(some)
        right += (model(enlarged).argmax(1) == wanted).sum().item()
    return right / len(images)


def training_step(mixer):
    model, images = build(mixer, 0), torch.randn(BATCH, 3, 32, 32)

    def run():
        cross_entropy(model(images), torch.zeros(BATCH, dtype=torch.long)).backward()

    return run


def main(data, mixers, seeds, steps, results):
    done = {(row["mixer"], row["seed"], row["steps"]) for row in rows_in(results)}
    missing = [(m, s) for s in seeds for m in mixers if (m, s, steps) not in done]
    if missing:
        images, held_out = read(data, held_out=False), read(data, held_out=True)
        times = time_in_turns({m: partial(training_step, m) for m in mixers}, torch.device("cpu"), seconds=20)
    for mixer, seed in missing:
        model = build(mixer, seed)
        train(model, *images, steps, seed)
        row = dict(mixer=mixer, seed=seed, steps=steps, parameters=sum(p.numel() for p in model.parameters()))
        row |= dict(accuracy={str(size): accuracy(model, *held_out, size) for size in SIZES})
        row |= dict(step_ms=times[mixer]["median_ms"], threads=torch.get_num_threads(), torch=torch.__version__)
        with alone_in(results.parent):  # rows are read again, since another command may have added some
            write_json(results, dict(rows=[*rows_in(results), row]), "results")
    print(table(rows_in(results)))


def rows_in(results):
    return json.loads(results.read_text())["rows"] if results.exists() else []


def table(rows):
    """Returns the table of all runs, as Markdown: the mean over the seeds of a mixer and number of steps, and their range."""
    lines = ["| mixer | parameters | steps | seeds | right at 32 x 32 | right at 48 x 48 | a step, ms |", "|---|" + "---:|" * 6]
    for mixer, steps in dict.fromkeys((row["mixer"], row["steps"]) for row in rows):
        runs = [row for row in rows if (row["mixer"], row["steps"]) == (mixer, steps)]
        parts = [[100 * row["accuracy"][str(size)] for row in runs] for size in SIZES]
        cells = [f"{mean(part):.1f}% ({min(part):.1f} to {max(part):.1f})" for part in parts]
        numbers = f"{runs[0]['parameters']:,}", f"{steps:,}", f"{len(runs)}"
        lines.append(" | ".join([f"| {mixer}", *numbers, *cells, f"{mean(row['step_ms'] for row in runs):.0f} |"]))
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="CIFAR10")
    parser.add_argument("--mixers", nargs="+", choices=["attention", *PRESETS], default=["attention", "pdessm", "pdessm-g"])
    parser.add_argument("--seeds", nargs="+", type=not_negative, default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, default=1500)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    launch(lambda args, _: main(**vars(args)), parse_args())
