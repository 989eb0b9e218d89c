"""Times --compile and --precision bf16 of sample.py: two steps of DDPM with guidance, by the same model in four ways:

    python -m benchmarks.faster_sampling --quick                    DiT-S/2, on 2 CPU cores within 10 minutes
    python -m benchmarks.faster_sampling                            DiT-XL/2, as CUDA graphs on a GPU

`first` is what compiling adds to the first run, with nothing taken from a cache.
"""

from functools import partial
from time import perf_counter

import torch._inductor.config

from benchmarks.flags import parse_args
from benchmarks.report import Report, lines_of, milliseconds, plain, ratio
from benchmarks.sampling import FLAGS, sampling_run
from benchmarks.sides import of_size
from benchmarks.timing import rounded, time_in_turns

STEPS = 2
WAYS = {
    "plain": dict(precision="fp32", compile=False),
    "compiled": dict(precision="fp32", compile=True),
    "bf16": dict(precision="bf16", compile=False),
    "both": dict(precision="bf16", compile=True),
}
COLUMNS = {
    **plain("model", "mixer", "tokens", "batch"),
    "plain, ms": milliseconds("plain"),
    **{f"plain/{way}": ratio("plain", way) for way in WAYS if way != "plain"},
    **{f"first {way}, s": lambda row, way=way: row["first_s"].get(way) for way in ("compiled", "both")},
}


def main(args):
    size, inputs, batch = ("S", (16, 32), args.batch or 1) if args.quick else ("XL", (32, 64), args.batch or 16)
    report = Report("faster_sampling", args, COLUMNS, steps=STEPS, sampler="ddpm")
    for mixer in ("attention", "pdessm"):
        for side in inputs:
            first = {}
            run = partial(sampling_run, args.device, args.backend, batch, STEPS, mixer=mixer, **of_size(size, side))
            sides = {way: partial(first_timed, way, first, partial(run, **how)) for way, how in WAYS.items()}
            with torch._inductor.config.patch(force_disable_caches=True):
                times = time_in_turns(sides, args.device, args.seconds)
            row = dict(model=f"DiT-{size}/2", mixer=mixer, tokens=(side // 2) ** 2, batch=batch, sides=times)
            ran = [way for way in WAYS if milliseconds(way)(row)]
            report.add(**row, first_s={way: rounded(first[way] - milliseconds(way)(row) / 1e3) for way in ran})
    rows = report.contents["rows"]
    panels = {mixer: lines_of([row for row in rows if row["mixer"] == mixer], WAYS) for mixer in ("attention", "pdessm")}
    report.finish({f"{STEPS} steps, DiT-{size}/2, {mixer}, batch {batch}": lines for mixer, lines in panels.items()})


def first_timed(way, first, build):
    """Builds a sampling run and runs it once; the seconds of that go to first[way]."""
    run = build()
    start = perf_counter()
    run()
    first[way] = perf_counter() - start
    return run


if __name__ == "__main__":
    main(parse_args(__doc__, **FLAGS))
