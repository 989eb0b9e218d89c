"""Repeats the paper's Table 5, the time of a training step by image size and patch, beside attention in both its forms:

    python -m benchmarks.table5 --quick          cells of at most 1,024 tokens at batch 4, on 2 CPU cores within 5 minutes
    python -m benchmarks.table5 --batch 16       all cells; on a GPU the naive attention of the largest wants --batch 2

DiT of hidden size 384 and depth 3 on images of 3 channels, 6 heads, AdamW; PDE-SSM with the diagonal coupling. The paper names
its GPU (RTX 6000 Ada), and neither its batch size nor its kind of attention. Its PDE column depends on the image and not on the
patch, in time and in parameters (12.76 to 13.27 million; see docs/paper.md), so its ratio is not of equal tokens, as ours is.
"""

from functools import partial

from benchmarks.flags import parse_args
from benchmarks.report import Report, columns_beside_paper, lines_of, lines_of_paper, plain
from benchmarks.sides import SIDES, count_parameters, training_step
from benchmarks.timing import time_in_turns
from machine.flags import positive

# (image, patch): seconds of attention and of PDE-SSM in the paper
PAPER = {
    (32, 2): (1.09e-1, 2.14e-2), (32, 4): (3.34e-2, 2.40e-2), (32, 8): (1.60e-2, 2.40e-2),
    (64, 2): (4.66e-1, 5.58e-2), (64, 4): (9.92e-2, 5.77e-2), (64, 8): (3.24e-2, 5.84e-2),
    (128, 2): (3.00, 2.24e-1), (128, 4): (4.70e-1, 2.05e-1), (128, 8): (1.44e-1, 1.96e-1),
    (256, 2): (3.42e1, 8.48e-1), (256, 4): (3.32, 8.47e-1), (256, 8): (5.07e-1, 8.96e-1),
}  # fmt: skip
MODEL = dict(hidden_size=384, depth=3, num_heads=6, in_channels=3, num_classes=10, learn_sigma=False)
QUICK_TOKENS = 1024
COLUMNS = {
    **plain("image", "patch", "tokens"),
    **columns_beside_paper(SIDES),
}


def main(args):
    report = Report("table5", args, COLUMNS, batch=args.batch, **MODEL)
    for (image, patch), (attention, pdessm) in PAPER.items():
        tokens = (image // patch) ** 2
        if args.quick and tokens > QUICK_TOKENS:
            print(f"{image:>9}  {patch:>9}  {tokens:>9,}  left out by --quick")
            continue
        options = dict(input_size=image, patch_size=patch, **MODEL)
        step = partial(training_step, args.device, args.batch, compile=args.compile, **options)
        times = time_in_turns({name: partial(step, mixer=mixer) for name, mixer in SIDES.items()}, args.device, args.seconds)
        report.add(
            image=image, patch=patch, tokens=tokens, parameters=count_parameters(**options), sides=times,
            paper=dict(attention_ms=1e3 * attention, pdessm_ms=1e3 * pdessm),
        )  # fmt: skip
    rows = report.contents["rows"]
    report.finish({"training step, hidden 384, depth 3": lines_of(rows, SIDES) | lines_of_paper(rows)})


FLAGS = {"batch": dict(type=positive, default=4, help="images of a step")}

if __name__ == "__main__":
    main(parse_args(__doc__, **FLAGS))
