"""The rows of every_mixer.sh: what is compared, what a run measured, and the table and picture of all.

    python -m reproduce.every_mixer --collect results/every_mixer reproduce/results/every_mixer.json

joins the rows of finished runs with those that the file has, prints the tables, and draws the pictures beside the file. Times
and memory are those of `python -m benchmarks.every_mixer`.
"""

import argparse
import json
from datetime import date
from math import inf
from pathlib import Path
from statistics import mean, median

import torch
from PIL import Image

from benchmarks.every_mixer import DIT, SIDES, costs
from benchmarks.report import count_threads, machine
from checkpoints.build import create_network
from machine.files import alone_in, read_rows, whole_file, write_json
from mixers import kind_of, mixer_options
from reproduce.strips import sheet, strip

SETS = ("cifar10", "flowers")
TOKENS = 256  # of the table of times: the middle of those that the benchmark measures
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
    """Writes <folder>/row.json of a finished run, or of one that failed, with the sentence that says why. What an earlier row
    has of samples that are gone by now stays."""
    before = json.loads(path.read_text()) if (path := folder / "row.json").exists() else {}
    row = before | dict(data=data, name=name, seed=int(seed), steps=int(steps), objective=objective)
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
    if (folder / "bits.json").exists():
        measured = json.loads((folder / "bits.json").read_text())
        (network,) = measured["networks"].values()
        row |= dict(bits_per_dimension=network["bits_per_dimension"], bits_of=[measured["images"], measured["steps"]])
    commands = [line.split(" ", 1) for line in (folder / "commands.txt").read_text().splitlines()]
    row["commands"] = [dict(command=command, seconds=int(seconds)) for seconds, command in commands]
    row |= dict(machine=about.get("gpu") or f"{about['processor']}, {count_threads(about)}", torch=torch.__version__)
    write_json(path, row | dict(date=str(date.today())), "row")


def build(settings):
    """Returns a new network with the settings of a run on pixels, as its checkpoint has them."""
    given = {name: value for name, value in settings.items() if value is not None}
    given |= dict(in_channels=3, learn_sigma=settings["objective"] == "diffusion")
    given |= dict(mixer_options=mixer_options(settings["mixer"], settings))
    return create_network(given, 2 * (settings["image_size"],))


def collect(work, results):
    """Adds the rows of all runs under `work` to a file of rows, and prints a table of each number of steps."""
    with alone_in(results.parent):  # another script may be at work on other runs, or other rows
        rows = {key(row): row for row in (json.loads(results.read_text()) if results.exists() else [])}
        rows |= {key(row): row for row in (json.loads(path.read_text()) for path in sorted(work.glob("*/*/row.json")))}
        write_json(results, list(rows.values()), "rows")
    times = read_times(results.parent)
    for setting in sorted(set(map(setting_of, rows.values()))):
        mine = [row for row in rows.values() if setting_of(row) == setting]
        objective, steps, precision = setting
        print(tabulate(mine, f"{objective}, {steps:,} steps, {precision}"))
        picture = results.with_name(f"{results.stem}-{objective}-{steps}-{precision}.png")
        draw(picture, mine, times)
    if times:
        print(tabulate_times(times))
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


def tabulate(rows, title):
    """Writes what all rows of one setting measured as Markdown, by the loss on the first data set: losses, distances and
    bits per dimension, of several seeds the mean and range, and the costs."""
    sets = [data for data in SETS if any(row["data"] == data for row in rows)]
    with_bits = {row["data"] for row in rows if bits(row)}  # of flowers the networks predict the image, which has no likelihood
    columns = [(data, what) for data in sets for what in MEASURED if what != "bits" or data in with_bits]
    header = [f"`--mixer`, by its loss on {sets[0]}", *(f"{data}, {what}" for data, what in columns)]
    lines = []
    for name in [name for name in SIDES if any(row["name"] == name for row in rows)]:
        mine = [row for row in rows if row["name"] == name]
        cells = [cell([row for row in mine if row["data"] == data], *MEASURED[what]) for data, what in columns]
        counted = next((row for row in mine if "parameters" in row), None)
        counts = [f"{counted['parameters']:,}", f"{counted['multiply_adds'] / 1e6:,.1f}"] if counted else ["", ""]
        losses = [loss(row) for row in mine if row["data"] == sets[0] and loss(row) is not None]
        lines.append((mean(losses) if losses else inf, [label(name), *cells, *counts]))
    compared = sorted({(row["data"], *row["compared"]) for row in rows if "compared" in row})
    notes = [f"{data}: {n:,} samples against {against:,} images, {features}" for data, n, against, features in compared]
    table = markdown([*header, "parameters", "10^6 multiply-adds"], [line for _, line in sorted(lines)])
    return "\n".join([f"**{title}**", "", *table, "", *notes, ""])


def tabulate_times(times):
    """Writes what a training step takes as Markdown, by its time at TOKENS tokens."""
    tokens = sorted({n for of_name in times.values() for n in of_name})
    header = [f"`--mixer`, by its time at {TOKENS} tokens", *(f"ms, {n:,} tokens" for n in tokens)]
    lines = []
    for name, of_name in [(name, times[name]) for name in SIDES if name in times]:
        sides = [of_name.get(n, "") for n in tokens]
        middle = of_name.get(TOKENS, "")
        cells = [side if isinstance(side, str) else f"{side['median_ms']:,.0f}" for side in sides]
        if not isinstance(middle, str):
            cells += [f"{middle['peak_mb']:,.0f}", f"{middle['parameters']:,}", f"{middle['multiply_adds'] / 1e6:,.0f}"]
        lines.append((inf if isinstance(middle, str) else middle["median_ms"], [label(name), *cells]))
    header += [f"MB, {TOKENS} tokens", "parameters", f"10^6 multiply-adds, {TOKENS} tokens"]
    return "\n".join(markdown(header, [line for _, line in sorted(lines)]))


def label(name):
    """Returns how tables call a row: by the flags of its mixer, or in brackets by its system."""
    side = SIDES[name]
    _, _, *flags = flags_of(**side)
    return f"({name})" if side["model"] != DIT else f"`{' '.join(flags[1:]) or 'attention'}`"


def markdown(header, lines):
    return [f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines]]


def loss(row):
    return row.get("held_out_loss", {}).get(str(row["steps"]))


def distance(row):
    return row.get("metrics", {}).get(DISTANCE)


def bits(row):
    return row.get("bits_per_dimension", [None])[0]


MEASURED = {"loss": (loss, ".4f"), "distance": (distance, ".1f"), "bits": (bits, ".3f")}  # how each is read and written


def cell(rows, value, form):
    """Writes the mean of the seeds, and of several their range and number, and why others have none."""
    values = [value(row) for row in rows if value(row) is not None]
    spread = f" ({min(values):{form}} to {max(values):{form}}, {len(values)} seeds)" if len(values) > 1 else ""
    summary = [f"{mean(values):{form}}{spread}"] if values else []
    failures = [f"{row['failure']} (seed {row['seed']})" for row in rows if "failure" in row and value(row) is None]
    return "; ".join(summary + failures)


def draw(path, rows, times):
    """Draws the loss of every name against the time of a training step and against multiply-adds, a row for each data set."""
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
        of_set = [row for row in rows if row["data"] == data and loss(row)]
        for axis, (quantity, what) in zip(line, axes_of.items()):
            draw_losses(axis, of_set, what, times)
            axis.set(xscale="log", xlabel=quantity, ylabel="held-out loss", title=data)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # labels of more places would overlap
            axis.xaxis.set_major_formatter(EngFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.spines[["top", "right"]].set_visible(False)
    with whole_file(path, "plot") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def draw_losses(axis, rows, what, times):
    """Draws the loss of every name against `what` it takes: of several seeds the mean, and a line from the least to the
    largest. What is FAR from the median stands at the upper or lower edge, with its value. PDEs are green."""
    middle = median(map(loss, rows)) if rows else 1
    for name in SIDES:
        mine = [row for row in rows if row["name"] == name]
        side = mine[0] if mine and what in mine[0] else times.get(name, {}).get(64)
        if mine and what in (side or ()):
            losses = [loss(row) for row in mine]
            height = mean(losses)
            shown, least, most = (min(max(each, middle / FAR), middle * FAR) for each in (height, min(losses), max(losses)))
            colour = "#009e73" if kind_of(SIDES[name].get("mixer", "attention")).name == "pde" else "#0072b2"
            axis.plot(side[what], shown, "v" if height < shown else "^" if height > shown else "o", color=colour)
            axis.vlines(side[what], least, most, color=colour)
            label = name if height == shown else f"{name}: {height:.3g}"
            axis.annotate(label, (side[what], shown), (4, 3), textcoords="offset points", fontsize=7)


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
