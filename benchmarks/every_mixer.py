"""Times a training step of every mixer in a DiT-N/4, and of the other systems, and measures its memory:

    python -m benchmarks.every_mixer

On images of 32, 64 and 128 pixels, which are 64, 256 and 1,024 tokens of a DiT-N/4, at batches of 64, 16 and 4. Systems without
patches get the same images. Parameters, and multiply-adds of a forward pass of one image, are counted. Peak memory is what
benchmarks.memory measures. --quick leaves out the largest images.
"""

from functools import partial
from math import isqrt

import torch

from benchmarks.flags import parse_args
from benchmarks.memory import megabytes, peak
from benchmarks.report import Report, lines_of, milliseconds, plain
from benchmarks.sides import training_step
from benchmarks.timing import rounded, time_in_turns
from machine.cost import training_flops
from mixers import MIXERS
from models import MODELS, DiT_models

DIT = "DiT-N/4"
SYSTEMS = [name for name in MODELS if name.endswith(("-N", "-N/4")) and name not in DiT_models]
SIDES = {
    **{name: dict(model=DIT, mixer=name) for name in MIXERS},
    **{name.removesuffix("/4"): dict(model=name) for name in SYSTEMS},
    "gate": dict(model=DIT, mixer="pdessm", gate=True),
    "gate-conditioned": dict(model=DIT, mixer="pdessm", gate=True, conditioned=True),
    "conditioned": dict(model=DIT, mixer="pdessm", conditioned=True),
    "pairwise": dict(model=DIT, mixer="pdessm", coupling="pairwise"),
    "coupled": dict(model=DIT, mixer="pdessm", coupling="coupled"),
    "global-filter-projection": dict(model=DIT, mixer="global-filter", projection=True),
}
PICTURED = "attention", "pdessm", "pdessm-g", "pdessm-gla", "mamba", "ss2d", "window", "U-ViT-N"  # more would be illegible
PATCH = 4
BATCHES = {64: 64, 256: 16, 1024: 4}  # by tokens
QUICK_TOKENS = 256
IMAGES = dict(in_channels=3, num_classes=10)
COLUMNS = {
    **plain("tokens", "image", "batch"),
    "attention, ms": milliseconds("attention"),
    "pdessm, ms": milliseconds("pdessm"),
}


def main(args):
    report = Report("every_mixer", args, COLUMNS, **IMAGES)
    for tokens, batch in BATCHES.items():
        if args.quick and tokens > QUICK_TOKENS:
            print(f"{tokens:>9,}  left out by --quick")
            continue
        n = isqrt(tokens)
        sides = {name: count(n, **side) for name, side in SIDES.items()}
        steps = {
            name: partial(step, args.device, batch, args.compile, **SIDES[name])
            for name, side in sides.items()
            if isinstance(side, dict)
        }
        times = time_in_turns({name: partial(build, n) for name, build in steps.items()}, args.device, args.seconds)
        for name, time in times.items():
            memory = peak(steps[name], n, args.device, args.threads, args.backend)
            failed = next((words for words in (time, memory) if isinstance(words, str)), None)
            sides[name] = failed or sides[name] | time | memory
        report.add(tokens=tokens, image=PATCH * n, batch=batch, sides=sides)
        for name, side in sides.items():
            if isinstance(side, dict):
                cost = f"{side['parameters']:>9,} parameters, {side['multiply_adds'] / 1e6:7.4g} million multiply-adds"
                print(f"{'':9}  {name:24} {side['median_ms']:7.4g} ms, {side['peak_mb']:6.4g} MB, {cost}", flush=True)
    rows = report.contents["rows"]
    panels = {"training step, ms": lines_of(rows, PICTURED), "its peak memory, MB": lines_of(rows, PICTURED, megabytes)}
    report.finish(panels, unit="")


def count(n, model, **options):
    """Returns the costs of a side on images of 4n x 4n pixels, or a sentence if it cannot be built for them."""
    try:
        with torch.device("meta"):
            network = MODELS[model](PATCH * n, **IMAGES, **options)
    except ValueError as error:
        return f"is not built: {error}"
    return costs(network)


def costs(network):
    """Counts the parameters of a network and the multiply-adds of its forward pass of one image: a dict."""
    multiply_adds = training_flops(network, 1) / 6  # a step is three forward passes, and each multiply-add two operations
    return dict(parameters=sum(p.numel() for p in network.parameters()), multiply_adds=rounded(multiply_adds))


def step(device, batch, compile, n, model, **options):
    """Returns a function that takes a training step of a side on images of 4n x 4n pixels."""
    return training_step(device, batch, build=MODELS[model], input_size=PATCH * n, compile=compile, **IMAGES, **options)


if __name__ == "__main__":
    main(parse_args(__doc__))
