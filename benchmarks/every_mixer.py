"""Times a training step of DiT-N on images of 32 x 32 with every mixer and some options of ours:

    python -m benchmarks.every_mixer

64 tokens at batch 64, and 256 tokens at batch 16.
"""

from functools import partial

from benchmarks.flags import parse_args
from benchmarks.report import Report, lines_of, milliseconds
from benchmarks.sides import training_step
from benchmarks.timing import time_in_turns
from mixers import MIXERS
from models import MODELS

SIDES = {name: dict(mixer=name) for name in MIXERS} | {
    "gate": dict(mixer="pdessm", gate=True),
    "gate-conditioned": dict(mixer="pdessm", gate=True, conditioned=True),
    "conditioned": dict(mixer="pdessm", conditioned=True),
    "pairwise": dict(mixer="pdessm", coupling="pairwise"),
    "coupled": dict(mixer="pdessm", coupling="coupled"),
}
MODELS_AND_BATCHES = {"DiT-N/4": 64, "DiT-N/2": 16}
COLUMNS = {
    "model": lambda row: row["model"],
    "tokens": lambda row: row["tokens"],
    "batch": lambda row: row["batch"],
    **{f"{name}, ms": milliseconds(name) for name in SIDES},
}


def main(args):
    report = Report("every_mixer", args, COLUMNS, input_size=32, in_channels=3, num_classes=10)
    for name, batch in MODELS_AND_BATCHES.items():
        options = MODELS[name].keywords | dict(input_size=32, in_channels=3, num_classes=10)
        step = partial(training_step, args.device, batch, compile=args.compile, **options)
        times = time_in_turns({side: partial(step, **how) for side, how in SIDES.items()}, args.device, args.seconds)
        report.add(model=name, tokens=(32 // options["patch_size"]) ** 2, batch=batch, sides=times)
    report.finish({"training step, DiT-N": lines_of(report.contents["rows"], SIDES)})


if __name__ == "__main__":
    main(parse_args(__doc__))
