"""Runs a benchmark with tiny models and sizes, to test that it works, not how fast anything is:

    python -m benchmarks.rehearsal table5 --quick --device cpu
"""

import sys
from importlib import import_module
from inspect import signature

from benchmarks.flags import parse_args

SIZE = (16, 1, 2)  # hidden size, depth, heads
SIZES = dict.fromkeys(("XL", "L", "B", "S"), SIZE)
MODEL = dict(hidden_size=16, depth=1, num_heads=2, in_channels=3, num_classes=10, learn_sigma=False)
# By the name of a benchmark, or of what it shares with another, its constants.
TINY = {
    "table5": dict(PAPER={(32, 8): (1.0, 2.0), (64, 8): (3.0, 4.0), (256, 2): (5.0, 6.0)}, MODEL=MODEL),
    "sides": dict(SIZES=SIZES),
    "mixer": dict(HEADS={16: 2}, GRIDS=[(2, 2), (2, 3)], BATCH=1),
    "pairwise": dict(DIM=16, HEADS=2, BATCHES=(4,), SIZES=(2, 64), FOLDS=2, ROWS=8),
    "selective_scan": dict(CHANNELS=4, SIZES=[(1, 3, 2), (2, 4, 2)]),
    "step": dict(INPUTS=(4, 8)),
    "every_mixer": dict(BATCHES={4: 2}, SIDES={name: dict(model="DiT-N/4", mixer=name) for name in ("attention", "pdessm")}),
    "memory": dict(TOKENS=[16], CHANNELS=16, HEADS=2, BATCH=1),
    "sampling": dict(STEPS=2),
    "timing": dict(SAMPLE_MS=0.1, MOST_ROUNDS=3),
    "kernel_grids": dict(GRIDS=[(2, 2), (2, 33)], CHANNELS=(3,)),
    "tiles": dict(SIDES=((16, 16),), LENGTHS=(), CHANNELS=(4,), WARPS=(8,), STAGES=(1,), TOKENS=256, WIDTH=5),
    "slowest": dict(CALLS=1),
}


def shrink(name, set_value=setattr):
    """Gives a benchmark, and what it shares with others, its tiny constants; set_value may be monkeypatch.setattr."""
    for module in (name, "sides", "timing"):
        for constant, value in TINY.get(module, {}).items():
            set_value(import_module(f"benchmarks.{module}"), constant, value)


if __name__ == "__main__":
    name = sys.argv.pop(1)
    shrink(name)
    benchmark = import_module(f"benchmarks.{name}")
    args = parse_args(benchmark.__doc__, **getattr(benchmark, "FLAGS", {}))
    values = vars(args) | dict(args=args)
    benchmark.main(**{name: values[name] for name in signature(benchmark.main).parameters})
