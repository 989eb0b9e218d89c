"""Repeats the paper's Table 9, the forward pass of DiT at patch 2 by size of the model:

    python -m benchmarks.table9 --quick      input size 64 at batch 1, on 2 CPU cores within 5 minutes; XL is in Table 8
    python -m benchmarks.table9              the paper's 256 at batch 4, for a GPU

The plot is against the parameters of DiT with attention, since the number of tokens is the same.
"""

from benchmarks.flags import parse_args
from benchmarks.forward import measure
from benchmarks.report import lines_of, lines_of_paper
from benchmarks.sides import SIDES

# (size, patch): seconds of attention and of PDE-SSM in the paper
PAPER = {("S", 2): (0.9863, 0.1519), ("B", 2): (2.1223, 0.4773), ("L", 2): (5.9323, 1.6020), ("XL", 2): (10.4162, 2.3435)}


def millions(row):
    return row["parameters"]["attention"] / 1e6


def main(args):
    cells = {model: times for model, times in PAPER.items() if not (args.quick and model[0] == "XL")}
    report = measure("table9", args, cells)
    rows = report.contents["rows"]
    paper = {} if args.quick else lines_of_paper(rows, millions)
    lines = lines_of(rows, SIDES, against=millions) | paper
    report.finish({f"forward pass at patch 2, {rows[0]['tokens']:,} tokens": lines}, axis="million parameters of DiT")


if __name__ == "__main__":
    main(parse_args(__doc__))
