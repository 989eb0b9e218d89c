"""Times the forward pass of DiT models, beside attention in both its forms: what Tables 8 and 9 of the paper share."""

from functools import partial

from benchmarks.report import Report, columns_beside_paper, plain
from benchmarks.sides import SIDES, count_parameters, forward_pass, of_size
from benchmarks.timing import time_in_turns

COLUMNS = {
    **plain("model", "tokens"),
    **columns_beside_paper(SIDES),
}


def measure(table, args, cells):
    """Times the cells of a table and returns its Report.

    cells: (size, patch) -> seconds of attention and of PDE-SSM in the paper, at input size 256 and batch 4.
    """
    side, batch = (64, 1) if args.quick else (256, 4)
    report = Report(table, args, COLUMNS, input_size=side, batch=batch)
    if args.quick:
        print("--quick: input size 64 and batch 1 in place of 256 and 4, which the paper's figures are for")
    for (size, patch), (attention, pdessm) in cells.items():
        options = of_size(size, side, patch)
        model = partial(forward_pass, args.device, batch, compile=args.compile, **options)
        times = time_in_turns({name: partial(model, mixer=mixer) for name, mixer in SIDES.items()}, args.device, args.seconds)
        report.add(
            model=f"DiT-{size}/{patch}", tokens=(side // patch) ** 2, parameters=count_parameters(**options), sides=times,
            paper=dict(attention_ms=1e3 * attention, pdessm_ms=1e3 * pdessm),
        )  # fmt: skip
    return report
