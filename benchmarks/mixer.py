"""Times one mixer layer alone, the forward pass for evaluation, and forward and backward, by tokens:

    python -m benchmarks.mixer --quick      on 2 CPU cores within 5 minutes
    python -m benchmarks.mixer

Batch 4; 384 channels (6 heads, as in DiT-S) and 1152 (16 heads, as in DiT-XL); every coupling, on square and other grids.
pairwise, whose pieces take seconds a pass there, is left out above 1,024 tokens.
"""

from functools import partial

from benchmarks.flags import parse_args
from benchmarks.report import Report, lines_of, milliseconds, plain, ratio
from benchmarks.sides import Floor, NaiveAttention, layer_pass
from benchmarks.timing import time_in_turns
from pde_ssm import COUPLINGS

BATCH = 4
HEADS = {384: 6, 1152: 16}
GRIDS = [(4, 4), (8, 8), (12, 20), (15, 17), (16, 16), (24, 40), (32, 32), (32, 64), (64, 64), (128, 128)]
SIDES = {
    "attention": dict(mixer="attention"),
    "naive": dict(mixer=NaiveAttention),
    **{coupling: dict(mixer="pdessm", coupling=coupling) for coupling in COUPLINGS},
    "floor": dict(mixer=Floor),
}
COLUMNS = {
    **plain("channels"),
    "grid": lambda row: "{} x {}".format(*row["grid"]),
    **plain("tokens", "pass"),
    **{f"{name}, ms": milliseconds(name) for name in SIDES},
    "attention/diagonal": ratio("attention", "diagonal"),
    "naive/diagonal": ratio("naive", "diagonal"),
    "diagonal/floor": ratio("diagonal", "floor"),
}


def main(args):
    report = Report("mixer", args, COLUMNS, batch=BATCH)
    if args.quick:
        print("--quick leaves out the blank cells")
    for dim, heads in HEADS.items():
        for grid in GRIDS:
            for training in (False, True):
                sides = quick_sides(dim, grid) if args.quick else sides_of(grid)
                if not sides:
                    continue
                name = "forward and backward" if training else "forward"
                how = dict(batch=BATCH, dim=dim, heads=heads, grid=grid, training=training, compile=args.compile)
                layer = partial(layer_pass, args.device, **how)
                times = time_in_turns({side: partial(layer, **SIDES[side]) for side in sides}, args.device, args.seconds)
                report.add(channels=dim, grid=grid, tokens=grid[0] * grid[1], **{"pass": name}, sides=times)
    rows = report.contents["rows"]
    panels = {}
    for dim in HEADS:
        for name in ("forward", "forward and backward"):
            mine = [row for row in rows if row["channels"] == dim and row["pass"] == name]
            panels[f"{name}, {dim} channels"] = lines_of(mine, SIDES)
    report.contents["growth"] = {title: times for title, lines in panels.items() if (times := growth(lines))}
    report.save()
    for title, times in report.contents["growth"].items():
        print(f"{title}: from 4,096 to 16,384 tokens", ", ".join(f"{side} {value:.1f}x" for side, value in times.items()))
    report.finish(panels)


def sides_of(grid):
    return [side for side in SIDES if side != "pairwise" or grid[0] * grid[1] <= 1024]


def quick_sides(dim, grid):
    tokens = grid[0] * grid[1]
    if dim == min(HEADS):
        return [side for side in SIDES if tokens <= {"diagonal": 2**14, "floor": 2**14, "attention": 2**12}.get(side, 256)]
    return ["attention", "diagonal", "floor"] if tokens in (64, 256, 1024) else []


def growth(lines):
    """Computes by how much the time of each side grows from 4,096 to 16,384 tokens, where both were measured."""
    times = {side: dict(line) for side, line in lines.items()}
    return {side: at[16384] / at[4096] for side, at in times.items() if {4096, 16384} <= at.keys()}


if __name__ == "__main__":
    main(parse_args(__doc__))
