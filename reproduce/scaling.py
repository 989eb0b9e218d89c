"""Collects the runs of scaling.sh: loss against parameters, multiply-adds, steps and seconds, with fitted slopes.

    python -m reproduce.scaling results/scaling

Writes reproduce/results/scaling.json and .png. Seconds are steps times the time of one, measured here, all sides in turns.
Slopes are those of log loss against log cost over the sizes, at the last step. The loss of flow matching cannot fall to zero,
since a velocity contains noise that no network can know; so slopes compare mixers with each other and mean nothing alone.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from statistics import linear_regression, mean

import torch

from benchmarks.plot import styles
from benchmarks.sides import training_step
from benchmarks.timing import time_in_turns
from checkpoints.read import read_checkpoint
from machine.cost import training_flops
from machine.files import read_rows, whole_file, write_json
from reproduce.every_mixer import build

RESULTS = Path(__file__).parent / "results"
COSTS = {
    "parameters": "parameters",
    "multiply_adds": "multiply-adds of all steps",
    "steps": "steps, widest",
    "seconds": "seconds of all steps",
}


def runs_in(work):
    """Reads one entry per run that is finished, with a finite loss: what it was, and its held-out loss by step."""
    for log in sorted(work.glob("*/*/log.jsonl")):
        checkpoints = sorted((log.parent / "checkpoints").glob("*.pt"))
        settings = read_checkpoint(checkpoints[-1])["args"] if checkpoints else {}
        rows = [row for row in read_rows(log) if row.get("held_out_loss") is not None]
        if settings and rows and rows[-1]["step"] == settings["max_steps"]:
            names = ("model", "mixer", "global_seed", "global_batch_size", "image_size", "max_steps")
            losses = {row["step"]: row["held_out_loss"] for row in rows}
            yield {name: settings[name] for name in names} | dict(settings=settings, loss=losses)


def measured(runs, device):
    """Returns the runs with their seeds together: parameters, operations and milliseconds of a step, and losses by step."""
    kinds = {(run["model"], run["mixer"]): run for run in runs}
    sides, entries = {}, []
    for kind, run in kinds.items():
        sides[kind] = partial(training_step, device, run["global_batch_size"], build=build, settings=run["settings"])
    times = time_in_turns(sides, device, seconds=8 * len(sides))
    for (model, mixer), run in kinds.items():
        time, batch = times[model, mixer], run["global_batch_size"]
        if isinstance(time, str):
            raise SystemExit(f"a step of {model} with {mixer} cannot be timed: {time}")
        with torch.device("meta"):
            network = build(run["settings"])
        same = [run for run in runs if (run["model"], run["mixer"]) == (model, mixer)]
        steps = [step for step in same[0]["loss"] if all(step in run["loss"] for run in same)]
        losses = {step: [run["loss"][step] for run in same] for step in steps}
        entries.append(dict(
            model=model, mixer=mixer, seeds=[run["global_seed"] for run in same], held_out_loss=losses,
            parameters=sum(p.numel() for p in network.parameters()), batch=batch, image_size=run["image_size"],
            step_multiply_adds=training_flops(network, batch) // 2, step_ms=time["median_ms"],
        ))  # fmt: skip
    return sorted(entries, key=lambda entry: entry["parameters"])


def curves(entries, cost):
    """Returns by mixer the (cost, mean loss) of each size at its last step, or of the widest at every step."""
    lines = {}
    for mixer in dict.fromkeys(entry["mixer"] for entry in entries):
        sizes = sorted((e for e in entries if e["mixer"] == mixer), key=lambda e: e["parameters"])
        if cost == "steps":
            lines[mixer] = [(int(step), mean(losses)) for step, losses in sizes[-1]["held_out_loss"].items()]
        else:
            lines[mixer] = [(cost_of(entry, cost), mean(list(entry["held_out_loss"].values())[-1])) for entry in sizes]
    return lines


def cost_of(entry, cost):
    steps = int(list(entry["held_out_loss"])[-1])
    by_step = {"multiply_adds": entry["step_multiply_adds"], "seconds": entry["step_ms"] / 1000}
    return entry["parameters"] if cost == "parameters" else steps * by_step[cost]


def slope(line):
    """Fits p of loss ~ cost^p, None for a single size."""
    return linear_regression(*zip(*[(math.log(x), math.log(y)) for x, y in line])).slope if len(line) > 1 else None


def draw(file, entries):
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 8), layout="constrained")
    for axis, (cost, label) in zip(axes.flat, COSTS.items()):
        lines = curves(entries, cost)
        for (mixer, line), (colour, marker) in zip(lines.items(), styles(list(lines)).values()):
            fitted = slope(line)
            text = mixer if fitted is None else f"{mixer}, slope {fitted:.3f}"
            axis.plot(*zip(*line), marker=marker, color=colour, label=text)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="held-out loss")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))           # labels of more places would overlap
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.yaxis.set_major_locator(LogLocator(subs=[n / 10 for n in range(10, 100)], numticks=99))    # every 0.01
        axis.yaxis.set_major_formatter("{x:.2f}")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_minor_formatter(NullFormatter())
        axis.grid(which="both", color="#dddddd", linewidth=0.6)
        axis.legend(frameon=False)
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def table(entries):
    """Returns the table of all sizes, and that of the slopes, as Markdown."""
    lines = ["| model | mixer | parameters | GMACs a step | ms a step | seeds | held-out loss |", "|---|---|" + "---:|" * 5]
    for entry in entries:
        losses = list(entry["held_out_loss"].values())[-1]
        spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
        work = f"{entry['step_multiply_adds'] / 1e9:.1f} | {entry['step_ms']:.0f}"
        names = f"| {entry['model']} | {entry['mixer']} | {entry['parameters']:,}"
        lines.append(f"{names} | {work} | {len(losses)} | {mean(losses):.4f}{spread} |")
    mixers = list(curves(entries, "steps"))
    lines += ["", f"| slope against | {' | '.join(mixers)} |", "|---|" + "---:|" * len(mixers)]
    for cost, label in COSTS.items():
        fitted = map(slope, curves(entries, cost).values())
        lines.append(f"| {label} | " + " | ".join("-" if p is None else f"{p:.3f}" for p in fitted) + " |")
    return "\n".join(lines)


def main(work, device):
    runs = list(runs_in(work))
    if not runs:
        raise SystemExit(f"{work} has no finished run of reproduce/scaling.sh")
    entries = measured(runs, device)
    command = f"STEPS={runs[0]['max_steps']} bash reproduce/scaling.sh DATA"
    contents = dict(command=command, device=str(device), torch=torch.__version__, runs=entries)
    write_json(RESULTS / "scaling.json", contents, "results")
    with whole_file(RESULTS / "scaling.png", "picture") as file:
        draw(file, entries)
    print(table(entries))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    main(**vars(parser.parse_args()))
