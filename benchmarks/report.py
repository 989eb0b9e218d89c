"""Reports a benchmark's times as a table, JSON and a plot, and defines the columns and lines that these show."""

import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from operator import itemgetter

import torch

from benchmarks import commit
from benchmarks.attention import chosen
from benchmarks.plot import draw
from machine.files import whole_file, write_json
from machine.precision import count_cores, processor


def machine(device):
    """Describes what times depend on: processor, cores, threads, GPU, versions."""
    about = dict(processor=processor(), cores=count_cores(), threads=torch.get_num_threads())
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


class Report:
    """Prints the rows of a benchmark as a table while they come, and keeps them in <out>/<name>-<device>[-quick].json.

    columns:  name -> a function of a row, whose result (a number, text, or None for an empty cell) is printed.
    args:     the flags of benchmarks/flags.py.
    settings: values that are the same for all rows.
    """

    def __init__(self, name, args, columns, **settings):
        about = machine(args.device)
        device = about.get("gpu", "cpu").lower().replace(" ", "-")
        compiled = f"compiled-{args.compile}" if args.compile else ""
        backend = "" if args.backend == "default" else args.backend
        parts = [name, device, backend, compiled, "quick" if args.quick else ""]
        self.path = args.out / f"{'-'.join(filter(None, parts))}.json"
        self.columns = columns
        precision = "bfloat16 autocast" if args.device.type == "cuda" else "float32"
        self.contents = dict(
            command=" ".join(["python -m", f"benchmarks.{name.partition('-')[0]}", *sys.argv[1:]]),
            date=datetime.now(UTC).date().isoformat(), commit=commit(), machine=about,
            settings=dict(precision=precision, pdessm="diagonal", backend=args.backend, compile=args.compile, **settings),
            rows=[],
        )  # fmt: skip
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
        if chosen:
            self.contents["attention"] = chosen
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.contents, "results")

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
        about, settings = self.contents["machine"], self.contents["settings"]
        place = about.get("gpu") or f"{about['processor']}, {count_threads(about)}"
        title = f"{place}, {settings['precision']}, PyTorch {about['versions']['torch']}"
        with whole_file(path, "plot") as file:
            draw(file, panels, xlabel=axis, ylabel=unit, title=title)
        print(f"Saved {path}")


def count_threads(about):
    return "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"


def as_text(value):
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def plain(*names):
    """Makes the columns of what rows hold under these names."""
    return {name: itemgetter(name) for name in names}


def milliseconds(name):
    """Makes the column of a side's median, in milliseconds."""
    return lambda row: side.get("median_ms") if isinstance(side := row["sides"].get(name), dict) else None


def ratio(above, below):
    """Makes the column of two sides' medians, one divided by the other."""

    def column(row):
        times = [milliseconds(name)(row) for name in (above, below)]
        return f"{times[0] / times[1]:.2f}x" if all(times) else None

    return column


def paper_ratio(row):
    """Returns the cell of the paper's own ratio."""
    return f"{row['paper']['attention_ms'] / row['paper']['pdessm_ms']:.2f}x"


def columns_beside_paper(names):
    """Makes the columns of each side's milliseconds, their ratios, and the paper's ratio."""
    return {
        **{f"{name}, ms": milliseconds(name) for name in names},
        "attention/pdessm": ratio("attention", "pdessm"),
        "naive/pdessm": ratio("naive", "pdessm"),
        "pdessm/floor": ratio("pdessm", "floor"),
        "paper's": paper_ratio,
    }


tokens = itemgetter("tokens")


def line(rows, value, against):
    """Returns [(tokens, value), ...] of the rows that have the value, averaged over rows of equally many tokens."""
    places = {}
    for row in rows:
        if value(row):
            places.setdefault(against(row), []).append(value(row))
    return [(n, sum(values) / len(values)) for n, values in sorted(places.items())]


def lines_of(rows, names, value=milliseconds, against=tokens):
    """Returns what a plot draws of the sides of these names: name -> [(tokens, value(name)(row)), ...]."""
    lines = {name: line(rows, value(name), against) for name in names}
    return {name: places for name, places in lines.items() if places}


def lines_of_paper(rows, against=tokens):
    """Returns what a plot draws of the paper's times."""
    return {
        f"paper: {name}": line(rows, lambda row, name=name: row["paper"][f"{name}_ms"], against)
        for name in ("attention", "pdessm")
    }
