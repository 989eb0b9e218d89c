"""Times a training step of a whole DiT-S/2 by tokens, also against the same model built from timm's and PyTorch's own parts:

    python -m benchmarks.step --quick      on 2 CPU cores within 5 minutes
    python -m benchmarks.step --tokens-per-step 65536 --size XL
"""

from functools import partial

from benchmarks.flags import parse_args
from benchmarks.report import Report, lines_of, milliseconds, plain, ratio
from benchmarks.sides import Floor, of_size, training_step
from benchmarks.timing import time_in_turns
from machine.flags import positive
from models import SIZES

INPUTS = (8, 16, 32, 64, 128)
SIDES = {
    "attention": dict(mixer="attention"),
    "timm": dict(mixer="attention", timms_blocks=True),
    "pdessm": dict(mixer="pdessm"),
    "floor": dict(mixer=Floor),
}
COLUMNS = {
    **plain("input", "tokens", "batch"),
    **{f"{name}, ms": milliseconds(name) for name in SIDES},
    "attention/pdessm": ratio("attention", "pdessm"),
    "timm/attention": ratio("timm", "attention"),
    "pdessm/floor": ratio("pdessm", "floor"),
}


def main(args):
    name = "step" if args.size == "S" else f"step-{args.size.lower()}"
    report = Report(name, args, COLUMNS, model=f"DiT-{args.size}/2", tokens_per_step=args.tokens_per_step)
    for side in INPUTS:
        tokens = (side // 2) ** 2
        batch = max(1, args.tokens_per_step // tokens)
        names = [name for name in SIDES if not (args.quick and name == "timm" and tokens > 1024)]
        step = partial(training_step, args.device, batch, compile=args.compile, **of_size(args.size, side))
        times = time_in_turns({name: partial(step, **SIDES[name]) for name in names}, args.device, args.seconds)
        report.add(input=side, tokens=tokens, batch=batch, sides=times)
    lines = lines_of(report.contents["rows"], SIDES, value=milliseconds_per_image)
    report.finish({f"training step of DiT-{args.size}/2, an image's share": lines})


def milliseconds_per_image(name):
    return lambda row: None if (time := milliseconds(name)(row)) is None else time / row["batch"]


FLAGS = {
    "tokens-per-step": dict(type=positive, default=1024, help="a batch has at least one image"),
    "size": dict(choices=SIZES, default="S", help="of the DiT"),
}

if __name__ == "__main__":
    main(parse_args(__doc__, **FLAGS))
