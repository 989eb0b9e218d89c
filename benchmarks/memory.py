"""Peak memory of training by tokens: of one mixer layer, and of a DiT of depth 3 with its optimiser:

    python -m benchmarks.memory --quick      up to 4,096 tokens, on 2 CPU cores within 5 minutes
    python -m benchmarks.memory

384 channels, 6 heads, batch 4; weights, gradients and AdamW's moments are in it. On GPUs it is what PyTorch's allocator
handed out at most; on CPUs (Linux, glibc) what a fresh process grew by at most, after the same work on 4 tokens, while
the C library hands back at once what is freed: what it would keep varies by a quarter from run to run.
"""

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import isqrt
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.sides import SIDES, layer_pass, training_step
from benchmarks.timing import Report, is_out_of_memory, limit_memory, lines_of, parse_args, proc_value, release_memory, rounded
from machine.processes import return_freed_memory
from pde_ssm import set_backend

BATCH, CHANNELS, HEADS = 4, 384, 6
TOKENS = [16, 64, 256, 1024, 4096, 16384]
QUICK_TOKENS = 4096


def layer(side, args, n):
    return layer_pass(args, SIDES[side], BATCH, CHANNELS, HEADS, (n, n), training=True)


def model(side, args, n):
    sizes = dict(hidden_size=CHANNELS, depth=3, num_heads=HEADS)
    return training_step(args, BATCH, mixer=SIDES[side], input_size=2 * n, patch_size=2, **sizes)


WHAT = {"layer": layer, "model": model}


def megabytes(name):
    return lambda row: side["peak_mb"] if isinstance(side := row["sides"].get(name), dict) else None


def ratio(row):
    attention, pdessm = (megabytes(name)(row) for name in ("attention", "pdessm"))
    return f"{attention / pdessm:.2f}x" if attention and pdessm else None


COLUMNS = {
    "what": lambda row: row["what"],
    "tokens": lambda row: row["tokens"],
    **{f"{name}, MB": megabytes(name) for name in SIDES},
    "attention/pdessm": ratio,
}


def main(args):
    if args.device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise SystemExit("peak memory on CPUs is read from /proc, which only Linux has")
    report = Report("memory", args, COLUMNS, batch=BATCH, channels=CHANNELS, heads=HEADS)
    measure = peak_on_gpu if args.device.type == "cuda" else peak_of_process
    for what in WHAT:
        for tokens in TOKENS:
            if args.quick and tokens > QUICK_TOKENS:
                print(f"{what:>9}  {tokens:>9,}  left out by --quick")
                continue
            report.add(what=what, tokens=tokens, sides={name: measure(what, name, args, isqrt(tokens)) for name in SIDES})
    rows = report.contents["rows"]
    panels = {}
    for what in WHAT:
        mine = [row for row in rows if row["what"] == what]
        panels[f"training, {what}"] = lines_of(mine, SIDES, value=megabytes)
    report.finish(panels, unit="megabytes at the peak")


def peak_on_gpu(what, side, args, n):
    release_memory(args.device)
    before = torch.cuda.memory_allocated(args.device)
    torch.cuda.reset_peak_memory_stats(args.device)
    return run(what, side, args, n) or dict(peak_mb=rounded((torch.cuda.max_memory_allocated(args.device) - before) / 1e6))


def peak_of_process(what, side, args, n):
    """In a process of its own, since an allocator keeps what it once had."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.sides"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(grow, what, side, args, n).result()
        except BrokenProcessPool:
            return "does not fit into memory: its process was killed"


def grow(what, side, args, n):
    torch.set_num_threads(args.threads)
    set_backend(args.backend)
    limit_memory()
    run(what, side, args, 2)  # what comes once: threads, imports, kernels
    release_memory(args.device)
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = proc_value("/proc/self/status", "VmRSS")
    return run(what, side, args, n) or dict(peak_mb=rounded((proc_value("/proc/self/status", "VmHWM") - before) * 1.024e-3))


def run(what, side, args, n):
    """Two steps, of which the second has the optimiser's moments; returns what went wrong."""
    try:
        step = WHAT[what](side, args, n)
        step()
        step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return "does not fit into memory"


if __name__ == "__main__":
    main(parse_args(__doc__))
