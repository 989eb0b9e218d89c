"""The one timer, and what every benchmark does with its times: a table, JSON and a plot.

The sides of a comparison take turns in one process, in a new order every round, so that a machine that slows down or
speeds up does so for all of them; each has been called before, untimed. A sample is as many calls in a row as fill
SAMPLE_MS, on a GPU between two CUDA events; medians and quartiles are those of the samples. Inputs are the same
in every call, so small ones lie in the cache for every side, as they do between the layers of a network.
"""

import argparse
import gc
import json
import math
import os
import platform
import random
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import linear_regression, median, quantiles
from time import perf_counter

import torch

from machine.flags import above_zero, positive
from machine.precision import processor
from machine.processes import choose_device, keep_freed_memory
from pde_ssm import set_backend

ROOT = Path(__file__).parent.parent
SAMPLE_MS = 5.0   # a sample is at least as long
ROUNDS = 3        # at least, however long a call takes
MOST_ROUNDS = 200


def parse_args(description, argv=None, **flags):
    """The flags that all benchmarks share, and others by name: dict(default=...) as argparse takes them."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and smaller sizes: within 5 minutes on 2 CPU cores")
    add("--device", help="cpu, cuda or cuda:N; by default a GPU if there is one")
    add("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of PyTorch; by default all its cores")
    add("--seconds", type=above_zero, help="for each row of the table, beyond 3 rounds; 10, or 4 with --quick")
    add("--compile", nargs="?", const="default", metavar="MODE", help="torch.compile every side, e.g. reduce-overhead")
    add("--backend", choices=("default", "torch", "auto"), default="default", help="of the PDE: see set_backend in pde_ssm.py")
    add("--out", type=Path, default=ROOT / "reproduce" / "results", help="folder of the JSON and the plot")
    for name, options in flags.items():
        add(f"--{name}", **options)
    args = parser.parse_args(argv)
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.threads < 1:
        parser.error(f"--threads {args.threads} is below 1")
    args.seconds = args.seconds or (4 if args.quick else 10)
    torch.set_num_threads(args.threads)
    set_backend(args.backend)
    if args.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in training
    else:
        keep_freed_memory()  # as every command does
        limit_memory()
    return args


def time_in_turns(sides, args):
    """Times functions against each other.

    sides: name -> a function that returns the function to time, called once; it and its first calls are not timed.
    Returns name -> dict(median_ms, quartiles_ms, samples, calls), calls being those of one sample, or for what does not
    fit into memory the words that say so.
    """
    results, ready = dict.fromkeys(sides, "does not fit into memory"), {}
    for name, build in sides.items():
        release_memory(args.device)  # of what did not fit, or of the row before
        if call := prepare(build, args.device):
            ready[name] = call
    samples = {name: [] for name in ready}
    order, deal, start = list(ready), random.Random(0), perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= ROUNDS and perf_counter() - start > args.seconds:
            break
        deal.shuffle(order)
        for name in order:
            samples[name].append(sample_ms(*ready[name], args.device))
    for name, times in samples.items():
        low, _, high = (rounded(ms) for ms in quantiles(times, n=4, method="inclusive"))
        middle = rounded(median(times))
        results[name] = dict(median_ms=middle, quartiles_ms=[low, high], samples=len(times), calls=ready[name][1])
    return results


def prepare(build, device):
    """The function to time, called before, and how many calls make a sample; None for what does not fit into memory."""
    try:
        call = build()
        return call, warm_up(call, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def rounded(value):
    return float(f"{value:.4g}")


def warm_up(call, device):
    """Three calls, or fewer if they take longer than a second; returns how many calls make a sample."""
    start, least = perf_counter(), math.inf
    for _ in range(3):
        least = min(least, sample_ms(call, 1, device))
        if perf_counter() - start > 1:
            break
    return max(1, math.ceil(SAMPLE_MS / least))


def sample_ms(call, calls, device):
    """Milliseconds of one call, the mean of so many in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / calls
    start = perf_counter()
    for _ in range(calls):
        call()
    return 1e3 * (perf_counter() - start) / calls


def is_out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def release_memory(device):
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def limit_memory():
    """Makes what the machine has no memory for an error in this process, where Linux would kill it or a neighbour."""
    try:
        import resource

        free = 2**10 * proc_value("/proc/meminfo", "MemAvailable")
        used = 2**10 * proc_value("/proc/self/status", "VmData")
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    except (ImportError, OSError):  # not Linux
        return
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()) != "max":
        free = min(free, int(most) - int((group / "memory.current").read_text()))
    limit = used + int(0.9 * free)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def proc_value(path, name):
    """The number after `name:` in a file of /proc, mostly in KiB."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))


def machine(device):
    """What the times depend on."""
    about = dict(processor=processor(), cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads())
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        about |= dict(gpu=card.name, gpu_memory_gb=round(card.total_memory / 1e9), cuda=torch.version.cuda)
    versions = dict(python=platform.python_version())
    for package in ("torch", "timm", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return about | dict(system=platform.system(), versions=versions)


def commit():
    """The commit that is checked out, with a plus if files differ from it; None outside a clone."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "*.py"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.strip() + ("+" if changed.strip() else "")


class Report:
    """Rows of a benchmark: printed as a table while they come, and kept in <out>/<name>-<device>[-quick].json.

    columns: name -> a function of a row, whose result (a number, text, or None for nothing) is printed.
    settings: what is the same for all rows.
    """

    def __init__(self, name, args, columns, **settings):
        device = machine(args.device).get("gpu", "cpu").lower().replace(" ", "-")
        compiled = f"compiled-{args.compile}" if args.compile else ""
        backend = "" if args.backend == "default" else args.backend
        parts = [name, device, backend, compiled, "quick" if args.quick else ""]
        self.path = args.out / f"{'-'.join(filter(None, parts))}.json"
        self.columns = columns
        precision = "bfloat16 autocast" if args.device.type == "cuda" else "float32"
        self.contents = dict(
            command=" ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]]),
            date=datetime.now(UTC).date().isoformat(), commit=commit(), machine=machine(args.device),
            settings=dict(precision=precision, pdessm="diagonal", backend=args.backend, compile=args.compile, **settings),
            rows=[],
        )  # fmt: skip
        about = self.contents["machine"]
        print(f"{about.get('gpu') or about['processor']}, {count_threads(about)}, {precision}, {about['versions']}")
        print(", ".join(f"{key} {value}" for key, value in settings.items()))
        print("  ".join(f"{column:>{max(9, len(column))}}" for column in columns), flush=True)

    def add(self, **row):
        self.contents["rows"].append(row)
        cells = [(column, as_text(value(row))) for column, value in self.columns.items()]
        print("  ".join(f"{text:>{max(9, len(column))}}" for column, text in cells), flush=True)
        for name, side in row["sides"].items():
            if isinstance(side, str):
                print(f"{'':9}  {name} {side}", flush=True)
        self.save()

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(self.contents, indent=1) + "\n")
        os.replace(partial, self.path)

    def finish(self, panels, unit="milliseconds", axis="tokens"):
        """Plots title -> label -> [(tokens, value), ...] beside the JSON, with their slopes."""
        print(f"Saved {self.path}")
        try:
            import matplotlib
        except ImportError:
            print("No plot: matplotlib is not installed")
            return
        matplotlib.use("Agg")
        path = self.path.with_suffix(".png")
        draw(panels, axis, unit, path, self.contents)
        print(f"Saved {path}")


def count_threads(about):
    return "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"


def as_text(value):
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def milliseconds(name):
    """The column of a side's median."""
    return lambda row: side.get("median_ms") if isinstance(side := row["sides"].get(name), dict) else None


def ratio(above, below):
    """The column of two sides' medians, one divided by the other."""

    def column(row):
        times = [milliseconds(name)(row) for name in (above, below)]
        return f"{times[0] / times[1]:.2f}x" if all(times) else None

    return column


def paper_ratio(row):
    """The column of the paper's own ratio."""
    return f"{row['paper']['attention_ms'] / row['paper']['pdessm_ms']:.2f}x"


def columns_beside_paper(names):
    """Milliseconds of each side, their ratios, and the paper's."""
    return {
        **{f"{name}, ms": milliseconds(name) for name in names},
        "attention/pdessm": ratio("attention", "pdessm"),
        "naive/pdessm": ratio("naive", "pdessm"),
        "pdessm/floor": ratio("pdessm", "floor"),
        "paper's": paper_ratio,
    }


def tokens(row):
    return row["tokens"]


def line(rows, value, against=tokens):
    """[(tokens, value), ...] of the rows that have the value, with the mean of those of as many tokens."""
    places = {}
    for row in rows:
        if value(row):
            places.setdefault(against(row), []).append(value(row))
    return [(n, sum(values) / len(values)) for n, values in sorted(places.items())]


def lines_of(rows, names, value=milliseconds, against=tokens):
    """What a plot draws of the sides of these names: name -> [(tokens, value(name)(row)), ...]."""
    lines = {name: line(rows, value(name), against) for name in names}
    return {name: places for name, places in lines.items() if places}


def lines_of_paper(rows, against=tokens):
    return {
        f"paper: {name}": line(rows, lambda row, name=name: row["paper"][f"{name}_ms"], against)
        for name in ("attention", "pdessm")
    }


def slope(places):
    """Exponent p of value ~ tokens^p, by least squares over the sizes from a sixteenth of the largest on; None for fewer than
    two sizes."""
    places = [(math.log(n), math.log(value)) for n, value in places if 16 * n >= places[-1][0]]
    return linear_regression(*zip(*places)).slope if len(places) > 1 else None


# A side has its colour in every plot, told apart by the colour-blind too; labels of other names get those that are left.
COLOURS = {
    "attention": "#0072b2", "naive": "#d55e00", "pdessm": "#009e73", "diagonal": "#009e73", "floor": "#555555",
    "pairwise": "#cc79a7", "coupled": "#e69f00", "timm": "#56b4e9",
}  # fmt: skip
MORE_COLOURS = ["#8c564b", "#7f3fbf", "#bcbd22", "#d4a0a0"]


def draw(panels, name, unit, path, contents):
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogFormatter

    colours, more = dict(COLOURS), iter(MORE_COLOURS)
    columns, rows = min(2, len(panels)), math.ceil(len(panels) / 2)
    size = (5.2 * columns, 4.4 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels.items()):
        for label, places in lines.items():
            exponent = slope(places)
            style = dict(linestyle=":", markersize=3) if label.startswith("paper") else dict(markersize=5)
            text = label if exponent is None else f"{label}, slope {exponent:.2f}"
            side = label.removeprefix("paper: ")
            if side not in colours:
                colours[side] = next(more)
            axis.plot(*zip(*places), marker="o", color=colours[side], label=text, linewidth=1.5, **style)
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel=unit, title=title)
        ticks = []
        for n in sorted({n for places in lines.values() for n, _ in places}):
            if not ticks or n >= 2.5 * ticks[-1]:
                ticks.append(n)
        axis.set_xticks(ticks)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axis.grid(which="major", color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        beside = dict(loc="center left", bbox_to_anchor=(1, 0.5)) if len(lines) > 6 else {}
        axis.legend(frameon=False, fontsize=8, **beside)
    about, settings = contents["machine"], contents["settings"]
    place = about.get("gpu") or f"{about['processor']}, {count_threads(about)}"
    figure.suptitle(f"{place}, {settings['precision']}, PyTorch {about['versions']['torch']}", fontsize=9, color="#555555")
    partial = path.with_suffix(f".{os.getpid()}.partial.png")
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    os.replace(partial, path)
