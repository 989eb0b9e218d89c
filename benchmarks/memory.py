"""Measures the peak memory of training by tokens: of one mixer layer, and of a DiT of depth 3 with its optimiser:

    python -m benchmarks.memory --quick      up to 4,096 tokens, on 2 CPU cores within 5 minutes
    python -m benchmarks.memory

384 channels, 6 heads, batch 4; weights, gradients and AdamW's moments are included. On GPUs it is the peak of PyTorch's
allocator; on CPUs (Linux, glibc) the peak growth of a fresh process, after the same work on 4 tokens, with the C library set
to return freed memory at once: the memory that it would otherwise keep varies by a quarter from run to run.
"""

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from math import isqrt
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.flags import limit_memory, parse_args, proc_value
from benchmarks.report import Report, lines_of, plain
from benchmarks.sides import SIDES, layer_pass, training_step
from benchmarks.timing import noted, release_memory, rounded
from machine.processes import return_freed_memory
from pde_ssm import set_backend

BATCH, CHANNELS, HEADS = 4, 384, 6
TOKENS = [16, 64, 256, 1024, 4096, 16384]
QUICK_TOKENS = 4096


def layer(mixer, device, compile, n):
    return layer_pass(device, mixer, BATCH, CHANNELS, HEADS, (n, n), training=True, compile=compile)


def model(mixer, device, compile, n):
    sizes = dict(hidden_size=CHANNELS, depth=3, num_heads=HEADS)
    return training_step(device, BATCH, mixer=mixer, input_size=2 * n, patch_size=2, compile=compile, **sizes)


WHAT = {"layer": layer, "model": model}


def megabytes(name):
    return lambda row: side["peak_mb"] if isinstance(side := row["sides"].get(name), dict) else None


def ratio(row):
    attention, pdessm = (megabytes(name)(row) for name in ("attention", "pdessm"))
    return f"{attention / pdessm:.2f}x" if attention and pdessm else None


COLUMNS = {
    **plain("what", "tokens"),
    **{f"{name}, MB": megabytes(name) for name in SIDES},
    "attention/pdessm": ratio,
}


def main(args):
    if args.device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise SystemExit("peak memory on CPUs is read from /proc, which only Linux has")
    report = Report("memory", args, COLUMNS, batch=BATCH, channels=CHANNELS, heads=HEADS)
    where = args.device, args.threads, args.backend
    for what, build in WHAT.items():
        for tokens in TOKENS:
            if args.quick and tokens > QUICK_TOKENS:
                print(f"{what:>9}  {tokens:>9,}  left out by --quick")
                continue
            sides = {}
            for name, mixer in SIDES.items():
                sides[name] = peak(partial(build, mixer, args.device, args.compile), isqrt(tokens), *where)
            report.add(what=what, tokens=tokens, sides=sides)
    rows = report.contents["rows"]
    panels = {}
    for what in WHAT:
        mine = [row for row in rows if row["what"] == what]
        panels[f"training, {what}"] = lines_of(mine, SIDES, value=megabytes)
    report.finish(panels, unit="megabytes at the peak")


def peak(build, n, device, threads, backend):
    """Returns dict(peak_mb) of two steps on n x n tokens, or the words that say that they do not fit."""
    return peak_on_gpu(build, n, device) if device.type == "cuda" else peak_of_process(build, n, threads, backend)


def peak_on_gpu(build, n, device):
    release_memory(device)
    if words := two_steps(build, n):                                       # what comes once: workspaces, a choice of kernels
        return words
    release_memory(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return two_steps(build, n) or dict(peak_mb=rounded((torch.cuda.max_memory_allocated(device) - before) / 1e6))


def peak_of_process(build, n, threads, backend):
    """Measures in a process of its own, since an allocator keeps what it once had."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.sides"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(grow, build, n, threads, backend).result()
        except BrokenProcessPool:
            return "does not fit into memory: its process was killed"


def grow(build, n, threads, backend):
    torch.set_num_threads(threads)
    set_backend(backend)
    limit_memory()
    two_steps(build, 2)  # threads, imports and kernels come once
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = proc_value("/proc/self/status", "VmRSS")
    return two_steps(build, n) or dict(peak_mb=rounded((proc_value("/proc/self/status", "VmHWM") - before) * 1.024e-3))


def two_steps(build, n):
    """Takes two steps, of which the second has the optimiser's moments; returns words if they fail or do not fit."""
    failed = {}
    with noted("steps", failed):
        step = build(n)
        step()
        step()
    return failed.get("steps")


if __name__ == "__main__":
    main(parse_args(__doc__))
