"""Repeats the paper's Table 8, the forward pass of DiT-XL by patch:

    python -m benchmarks.table8 --quick      input size 64 at batch 1, on 2 CPU cores within 5 minutes, with 10 GB of memory
    python -m benchmarks.table8              the paper's 256 at batch 4, for a GPU
"""

from benchmarks.flags import parse_args
from benchmarks.forward import measure
from benchmarks.report import lines_of, lines_of_paper
from benchmarks.sides import SIDES

# (size, patch): seconds of attention and of PDE-SSM in the paper
PAPER = {("XL", 8): (0.1288, 0.1509), ("XL", 4): (0.9633, 0.6315), ("XL", 2): (10.4166, 2.3376)}


def main(args):
    report = measure("table8", args, PAPER)
    rows = report.contents["rows"]
    paper = {} if args.quick else lines_of_paper(rows)
    report.finish({"forward pass, DiT-XL": lines_of(rows, SIDES) | paper})


if __name__ == "__main__":
    main(parse_args(__doc__))
