"""Where the time of one PDE-SSM layer goes on a CPU: its operations by PyTorch's profiler, in milliseconds of one pass.

    python reproduce/layer_profile.py [batch]      4 by default; 384 channels, float32, 16 x 16 to 64 x 64 tokens

Products of matrices have their rate in GFLOP/s beside them: that of R, the largest, is what the processor can do.
"""

import argparse
import sys
from math import prod
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.sides import layer_pass
from benchmarks.timing import processor
from parallel import keep_freed_memory

CALLS = 30
LEAST_SHARE = 0.015  # operations with less are added up


def operations(run):
    """(name, shapes of the operands, how often, milliseconds in all) in one call of `run`, the longest first."""
    for _ in range(5):
        run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        for _ in range(CALLS):
            run()
    rows = []
    for row in recorded.key_averages(group_by_input_shape=True):
        rows.append((row.key, list(filter(None, row.input_shapes)), row.count // CALLS, row.self_cpu_time_total / CALLS / 1e3))
    return sorted(rows, key=lambda row: -row[3])


def rate(name, shapes, calls, ms):
    """GFLOP/s of so many products of matrices of these shapes; nothing for other operations."""
    if name not in ("aten::mm", "aten::bmm"):
        return ""
    (*batch, rows, inner), (*_, columns) = shapes
    return f"{2e-6 * calls * prod(batch) * rows * inner * columns / ms:.0f} GFLOP/s"


def report(batch, side, training):
    args = argparse.Namespace(device=torch.device("cpu"), compile=None)
    run = layer_pass(args, "pdessm", batch, 384, 6, (side, side), training=training)
    rows = operations(run)
    total, rest = sum(ms for *_, ms in rows), 0
    print(f"\n{side} x {side} tokens, {'forward and backward' if training else 'forward'}: {total:.2f} ms")
    for name, shapes, calls, ms in rows:
        if ms < LEAST_SHARE * total:
            rest += ms
            continue
        sizes = " ".join("x".join(map(str, shape)) for shape in shapes)
        what = f"{calls} {name.removeprefix('aten::')}"
        print(f"{ms:9.2f} ms {ms / total:5.0%}  {what:26} {sizes:44} {rate(name, shapes, calls, ms)}".rstrip())
    print(f"{rest:9.2f} ms {rest / total:5.0%}  all others")


if __name__ == "__main__":
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    keep_freed_memory()
    print(f"{processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, batch {batch}")
    for side in (16, 32, 64):
        for training in (False, True):
            report(batch, side, training)
