"""The flags that all benchmarks share, and the set-up that follows from them."""

import argparse
import os
import resource
from pathlib import Path

import torch

from machine.flags import above_zero, positive
from machine.precision import allow_tf32, count_cores
from machine.processes import choose_device, keep_freed_memory
from pde_ssm import set_backend

RESULTS = Path(__file__).parent.parent / "reproduce" / "results"


def parse_args(description, argv=None, **flags):
    """Reads the flags that all benchmarks share, and others by name: dict(default=...) as argparse takes them."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and smaller sizes: within 5 minutes on 2 CPU cores")
    add("--device", help="cpu, cuda or cuda:N; by default a GPU if there is one")
    add("--threads", type=positive, default=count_cores(), help="of PyTorch; by default all its cores")
    add("--seconds", type=above_zero, help="for each row of the table, beyond 3 rounds; 10, or 4 with --quick")
    add("--compile", nargs="?", const="default", metavar="MODE", help="torch.compile every side, e.g. reduce-overhead")
    add("--backend", choices=("default", "torch", "auto"), default="default", help="of the PDE: see set_backend in pde_ssm.py")
    add("--out", type=Path, default=RESULTS, help="folder of the JSON and the plot")
    for name, options in flags.items():
        add(f"--{name}", **options)
    args = parser.parse_args(argv)
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    there = next(place for place in (args.out.absolute(), *args.out.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        parser.error(f"--out {args.out} is no folder that can be written")
    args.seconds = args.seconds or (4 if args.quick else 10)
    torch.set_num_threads(args.threads)
    set_backend(args.backend)
    if args.device.type == "cuda":
        allow_tf32()  # as in training
    else:
        keep_freed_memory()  # as every command does
        limit_memory()
    return args


def limit_memory():
    """Makes allocating more memory than the machine has an error in this process; Linux would kill it, or another process."""
    try:
        free = 2**10 * proc_value("/proc/meminfo", "MemAvailable")
        used = 2**10 * proc_value("/proc/self/status", "VmData")
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    except OSError:  # not Linux
        return
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()) != "max":
        free = min(free, int(most) - int((group / "memory.current").read_text()))
    limit = used + int(0.9 * free)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def proc_value(path, name):
    """Reads the number after `name:` in a file of /proc, mostly in KiB."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))
