"""Runs every benchmark, one after the other, each in a process of its own, with the flags that it is given:

    python -m benchmarks.all --quick
"""

import subprocess
import sys

NAMES = (
    "mixer", "pairwise", "selective_scan", "table5", "table8", "table9", "step", "every_mixer", "memory", "sampling",
    "faster_sampling",
)  # fmt: skip

if __name__ == "__main__":
    failed = []
    for name in NAMES:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]).returncode:
            failed.append(name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
