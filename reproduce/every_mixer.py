"""The rows of every_mixer.sh: what is compared, what a run measured, and the table and picture of all.

    python -m reproduce.every_mixer --collect results/every_mixer reproduce/results/every_mixer.json

joins the rows of finished runs with those that the file has, prints the tables, and draws the pictures beside the file. Times
and memory are those of `python -m benchmarks.every_mixer`.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from statistics import mean, median

import torch
from PIL import Image

from benchmarks.every_mixer import DIT, SIDES, costs
from benchmarks.report import count_threads, machine
from checkpoints.build import create_network
from machine.files import read_rows, whole_file, write_json
from mixers import kind_of, mixer_options
from reproduce.strips import sheet, strip

SETS = ("cifar10", "flowers")
DISTANCE = "FD-EfficientNet"
KEPT = ("model", "mixer", "predict", "precision", "lr", "global_batch_size", "image_size", "num_classes")  # of a run's settings
SHOWN = 8  # samples of each row that are kept as a picture
FAR = 1.15  # from the median of a data set, as a factor: losses beyond it are drawn at the edge of the plot, with their values


def flags_of(model, mixer="attention", **options):
    """Returns the flags of train.py that build a side of the benchmark."""
    flags = ["--model", model]
    if mixer != "attention":
        flags += ["--mixer", mixer]
    for name, value in options.items():
        flags += [kind_of(mixer).flag_of(name), *([] if value is True else [str(value)])]
    return flags


def print_names(patch):
    """Prints a line for each row of the comparison: its name, a tab, and its flags, with networks on patches of that size."""
    for name, side in SIDES.items():
        print(name, " ".join(flags_of(**side | dict(model=side["model"].replace("/4", f"/{patch}")))), sep="\t")


def record(folder, data, name, seed, steps, objective, failure=None):
    """Writes <folder>/row.json of a finished run, or of one that failed, with the sentence that says why."""
    row = dict(data=data, name=name, seed=int(seed), steps=int(steps), objective=objective)
    about = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if failure:
        row["failure"] = failure
    for checkpoint in folder.glob(f"*/checkpoints/{int(steps):07}.pt"):  # one, unless training failed
        log = read_rows(checkpoint.parent.with_name("log.jsonl"))
        row["held_out_loss"] = {str(entry["step"]): entry["held_out_loss"] for entry in log if "held_out_loss" in entry}
        settings = torch.load(checkpoint, map_location="cpu", weights_only=True)["args"]
        with torch.device("meta"):
            row |= {name: settings.get(name) for name in KEPT} | costs(build(settings))
    for metrics in folder.glob("samples/*.json"):
        measured = json.loads(metrics.read_text())
        row["metrics"] = {name: value for name, value in measured.items() if isinstance(value, float)}
        row["compared"] = [measured["samples"]["images"], measured["reference"]["images_in_statistics"], measured["features"]]
        with whole_file(folder / "samples.png", "picture") as file:
            strip(metrics.with_suffix(".npz"), SHOWN).save(file, format="png")
    commands = [line.split(" ", 1) for line in (folder / "commands.txt").read_text().splitlines()]
    row["commands"] = [dict(command=command, seconds=int(seconds)) for seconds, command in commands]
    row |= dict(machine=about.get("gpu") or f"{about['processor']}, {count_threads(about)}", torch=torch.__version__)
    write_json(folder / "row.json", row | dict(date=str(date.today())), "row")


def build(settings):
    """Returns a new network with the settings of a run on pixels, as its checkpoint has them."""
    given = {name: value for name, value in settings.items() if value is not None}
    given |= dict(in_channels=3, learn_sigma=settings["objective"] == "diffusion")
    given |= dict(mixer_options=mixer_options(settings["mixer"], settings))
    return create_network(given, 2 * (settings["image_size"],))


def collect(work, results):
    """Adds the rows of all runs under `work` to a file of rows, and prints a table of each number of steps."""
    rows = {key(row): row for row in (json.loads(results.read_text()) if results.exists() else [])}
    rows |= {key(row): row for row in (json.loads(path.read_text()) for path in sorted(work.glob("*/*/row.json")))}
    write_json(results, list(rows.values()), "rows")
    times = read_times(results.parent)
    for setting in sorted(set(map(setting_of, rows.values()))):
        mine = [row for row in rows.values() if setting_of(row) == setting]
        objective, steps, precision = setting
        print(tabulate(mine, times, f"{objective}, {steps:,} steps, {precision}"))
        picture = results.with_name(f"{results.stem}-{objective}-{steps}-{precision}.png")
        draw(picture, mine, times)
    for runs in sorted({path.parent.parent for path in work.glob("*/*/samples.png")}):
        draw_samples(runs, results.with_name(f"{results.stem}-{runs.name}-samples.png"))


def setting_of(row):
    """Returns what all rows of one table have in common."""
    return row["objective"], row["steps"], row.get("precision", "fp32")


def key(row):
    return row["data"], row["name"], row["seed"], setting_of(row)


def read_times(folder):
    """Returns name -> tokens -> what the benchmark measured of that side, a dict or a sentence; none without its file."""
    found = [path for path in (folder / "every_mixer-cpu-quick.json", folder / "every_mixer-cpu.json") if path.exists()]
    times = {}
    for path in found:
        for row in json.loads(path.read_text())["rows"]:
            for name, side in row["sides"].items():
                times.setdefault(name, {})[row["tokens"]] = side
    return times


def tabulate(rows, times, title):
    """Writes one table as Markdown: of every name the losses and distances of its seeds, and its costs."""
    sets = [data for data in SETS if any(row["data"] == data for row in rows)]
    tokens = sorted({n for of_name in times.values() for n in of_name})
    header = ["", *(f"{data}, {what}" for data in sets for what in ("held-out loss", DISTANCE))]
    header += ["parameters", "million multiply-adds", *(f"{unit}, {n:,} tokens" for unit in ("ms", "MB") for n in tokens)]
    lines = []
    for name in [name for name in SIDES if any(row["name"] == name for row in rows)]:
        mine = [row for row in rows if row["name"] == name]
        cells = [cell([row for row in mine if row["data"] == data], value) for data in sets for value in (loss, distance)]
        counted = next((row for row in mine if "parameters" in row), None)
        counts = [f"{counted['parameters']:,}", f"{counted['multiply_adds'] / 1e6:.4g}"] if counted else ["", ""]
        of_name = [times.get(name, {}).get(n) for n in tokens]
        measured = [
            side if isinstance(side, str) else f"{side[what]:.4g}" if what in (side or ()) else ""
            for what in ("median_ms", "peak_mb")
            for side in of_name
        ]
        lines.append([name, *cells, *counts, *measured])
    table = [f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines]]
    compared = sorted({(row["data"], *row["compared"]) for row in rows if "compared" in row})
    notes = [f"{data}: {n:,} samples against {against:,} images, {features}" for data, n, against, features in compared]
    return "\n".join([f"**{title}**", "", *table, "", *notes, ""])


def loss(row):
    return row.get("held_out_loss", {}).get(str(row["steps"]))


def distance(row):
    return row.get("metrics", {}).get(DISTANCE)


def cell(rows, value):
    """Writes the mean of the seeds, their range and how many they are, and why others have none."""
    values = [value(row) for row in rows if value(row) is not None]
    spread = f" ({min(values):.4g} to {max(values):.4g}, {len(values)} seeds)" if len(values) > 1 else " (1 seed)"
    summary = [f"{mean(values):.4g}{spread}"] if values else []
    failures = [f"{row['failure']} (seed {row['seed']})" for row in rows if "failure" in row and value(row) is None]
    return "; ".join(summary + failures)


def draw(path, rows, times):
    """Draws the loss of every name against the time of a training step and against multiply-adds, a row for each data set. A
    loss that is FAR from the median of its data set stands at the upper or lower edge, with its value. PDEs are green."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes_of = {"ms of a training step of 64 images, 32 x 32": "median_ms", "multiply-adds of one image": "multiply_adds"}
    sets = [data for data in SETS if any(row["data"] == data for row in rows)]
    figure, axes = pyplot.subplots(len(sets), 2, figsize=(16, 8 * len(sets)), squeeze=False, layout="constrained")
    for line, data in zip(axes, sets):
        losses = [loss(row) for row in rows if row["data"] == data and loss(row)]
        middle = median(losses) if losses else 1
        for axis, (quantity, what) in zip(line, axes_of.items()):
            for name in SIDES:
                mine = [row for row in rows if (row["data"], row["name"]) == (data, name) and loss(row)]
                side = mine[0] if mine and what in mine[0] else times.get(name, {}).get(64)
                if mine and what in (side or ()):
                    height = mean(map(loss, mine))
                    place = side[what], min(max(height, middle / FAR), middle * FAR)
                    style = "v" if height < place[1] else "^" if height > place[1] else "o"
                    label = name if style == "o" else f"{name}: {height:.3g}"
                    pde = kind_of(SIDES[name].get("mixer", "attention")).name == "pde"
                    axis.plot(*place, style, color="#009e73" if pde else "#0072b2")
                    axis.annotate(label, place, (4, 3), textcoords="offset points", fontsize=7)
            axis.set(xscale="log", xlabel=quantity, ylabel="held-out loss", title=data)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # labels of more places would overlap
            axis.xaxis.set_major_formatter(EngFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.spines[["top", "right"]].set_visible(False)
    with whole_file(path, "plot") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def draw_samples(runs, out):
    """Joins samples of the lowest seed of every row of one data set into a picture, with their names."""
    strips = {}
    for name in SIDES:
        if of_name := sorted(runs.glob(f"{name}-[0-9]*/samples.png"), key=lambda path: int(path.parent.name.rsplit("-", 1)[1])):
            strips[name] = Image.open(of_name[0])
    sheet(strips, out, colours=64)


def main(argv=None):
    parser = argparse.ArgumentParser(description="The comparison of all mixers and systems.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--names", metavar="PATCH", nargs="?", const=DIT.partition("/")[2], help="print what is compared")
    what.add_argument("--collect", nargs=2, type=Path, metavar=("WORK", "RESULTS"), help="join the rows, print the tables")
    row = "FOLDER", "SET", "NAME", "SEED", "STEPS", "OBJECTIVE", "FAILURE"
    parser.add_argument("--record", nargs=7, metavar=row, help="write the row of a run before")
    given = parser.parse_args(argv)
    if given.record:
        record(Path(given.record[0]), *given.record[1:])
    if given.names:
        print_names(given.names)
    else:
        collect(*given.collect)


if __name__ == "__main__":
    main()
