"""Times one layer of Algorithm 1 (`coupling="pairwise"`) against attention, by tokens and images, beside what its products of
matrices would take at the rate of the largest, and one of systems of channels (`coupling="coupled"`):

    python -m benchmarks.pairwise --threads 1 --quick      up to 1,024 tokens
    python -m benchmarks.pairwise --threads 1

384 channels, 6 heads; forward and backward, and the forward pass for evaluation, which has seen more images than channels
before, so that a layer has folded its matrices where they find room.
"""

from functools import partial

import torch

from benchmarks.flags import parse_args
from benchmarks.report import Report, lines_of, milliseconds, plain, ratio
from benchmarks.sides import layer_pass
from benchmarks.timing import time_in_turns

DIM, HEADS = 384, 6
BATCHES = (4, 16)
SIZES = (8, 16, 32, 64)
ROWS = 1024                 # of the product that gives the rate
# Operations of a forward pass in units of N D^2, a multiplication and an addition being two: half a spectrum in real products.
# A backward pass has twice as many.
STEPS, FOLDED = 2 + 4 + 4, 4  # R, embedding and symbol; one product
FOLDS = 32                  # the longest side whose products find room in what evaluation may keep
SIDES = ("attention", "pairwise", "coupled")


def product(device):
    """Returns a function that multiplies matrices as large as those of R on ROWS tokens."""
    tokens, weight = torch.randn(ROWS, DIM, device=device), torch.randn(DIM, DIM, device=device)
    return lambda: tokens @ weight


def floor(row):
    """Computes the milliseconds that the layer's operations would take at the rate of `product`."""
    if (one := milliseconds("product")(row)) is not None:
        return one * row["operations"] * row["batch"] * row["tokens"] / (2 * ROWS)


def attention_over_floor(row):
    times = milliseconds("attention")(row), floor(row)
    return f"{times[0] / times[1]:.2f}x" if all(times) else None


COLUMNS = {
    **plain("batch", "tokens", "pass"),
    **{f"{name}, ms": milliseconds(name) for name in SIDES},
    "floor, ms": floor,
    "attention/pairwise": ratio("attention", "pairwise"),
    "attention/coupled": ratio("attention", "coupled"),
    "attention/floor": attention_over_floor,
}


def evaluated(build, batch):
    """Builds a pass for evaluation and runs it until its layer has seen more images than it has channels."""
    run = build()
    for _ in range(DIM // batch + 1):
        run()
    return run


def main(args):
    report = Report("pairwise", args, COLUMNS, channels=DIM)
    for training in (True, False):
        for batch in BATCHES:
            for side in [side for side in SIZES if side <= 32 or not args.quick]:
                how = dict(batch=batch, dim=DIM, heads=HEADS, grid=(side, side), training=training, compile=args.compile)
                layer = partial(layer_pass, args.device, **how)
                folds = not training and side <= FOLDS
                ours = partial(layer, mixer="pdessm", coupling="pairwise")
                sides = dict(
                    attention=partial(layer, mixer="attention"),
                    pairwise=partial(evaluated, ours, batch) if folds else ours,
                    coupled=partial(layer, mixer="pdessm", coupling="coupled"),
                    product=partial(product, args.device),
                )
                times = time_in_turns(sides, args.device, args.seconds)
                operations = 3 * STEPS if training else FOLDED if folds else STEPS
                name = "both" if training else "evaluation"
                report.add(batch=batch, tokens=side**2, **{"pass": name}, operations=operations, sides=times)
    rows = report.contents["rows"]
    report.finish({
        f"{name}, batch {batch}": lines_of([row for row in rows if row["pass"] == name and row["batch"] == batch], SIDES)
        for name in ("both", "evaluation") for batch in BATCHES
    })  # fmt: skip


if __name__ == "__main__":
    main(parse_args(__doc__))
