"""Prints the tables of the paper, and of the papers of other systems, beside what was measured here, as Markdown:

    python -m reproduce.tables                                 every file of rows in reproduce/results
    python -m reproduce.tables reproduce/results/table1_cifar10.jsonl

and, called by the scripts of the tables, a new row:

    python -m reproduce.tables --record ROWS TABLE SCALE SYSTEM FOLDER CHECKPOINT

A row has everything that its numbers rest on: commands, seed, steps, sampler, images, features, seconds, machine. Below a table
stand the commands of one of its rows.

The paper does not say which coupling its PDE-SSM-DiT has: below its row stands one of ours for each coupling that was run.
"""

import argparse
import json
import re
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from statistics import mean

HERE = Path(__file__).parent
OURS = {"PDE-SSM-DiT-g": {}, "PDE-SSM-DiT-gla": {}}  # systems of ours beside all of the paper's
# The paper's figures, by table and system: parameters in millions, and metrics by their names there. Systems without figures
# are ours.
PAPER = {
    "table1_cifar10": {
        "DiT": {"parameters": 29.6, "MSE": 0.0382, "FID": 4.25},
        "U-Net": {"parameters": 32.6, "MSE": 0.0378, "FID": 4.19},
        "PDE-SSM-DiT": {"parameters": 34.2, "MSE": 0.0376, "FID": 4.18},
    }
    | OURS,
    "table2_imagenet64": {
        "DiT": {"parameters": 33, "FID": 22.9},
        "U-Net": {"parameters": 32, "FID": 22.2},
        "PDE-SSM-DiT": {"parameters": 31, "FID": 22.1},
    }
    | OURS,
    "table3_celebahq64": {"DiT": {"FID": 9.17}, "U-Net": {"FID": 11.06}, "PDE-SSM-DiT": {"FID": 7.01}} | OURS,
    "table3_lsun_church": {"DiT": {"FID": 55.04}, "U-Net": {"FID": 51.56}, "PDE-SSM-DiT": {"FID": 40.71}} | OURS,
    "table3_flowers": {"DiT": {"FID": 61.50}, "U-Net": {"FID": 57.20}, "PDE-SSM-DiT": {"FID": 49.56}} | OURS,
    "table4_celebahq256": {
        "DiT": {"parameters": 32.99, "MSE": 0.0802, "FID": 21.08},
        "PDE-SSM-DiT": {"parameters": 26.48, "MSE": 0.0537, "FID": 18.36},
    },
    "table7_ablation": {
        "Baseline": {"FID": 1.108},
        "Diffusion+Reaction": {"FID": 1.441},
        "Diffusion+Convection": {"FID": 1.015},
        "Convection": {"FID": 1.065},
        "Diffusion": {"FID": 0.711},
        "Reaction": {"FID": 0.617},
    },
    "table2_dis_cifar10": {
        "DiS": {"parameters": 28, "FID": 3.25},
        "U-ViT": {"parameters": 44, "FID": 3.11},
        "PDE-SSM-DiT-g": {},
    },
    "table3_dis_celeba64": {"U-ViT": {"parameters": 44, "FID": 2.87}, "DiS": {"parameters": 28}, "PDE-SSM-DiT-g": {}},
    "table2_lamamba": {
        "LaMamba-S": {"parameters": 32, "FID": 55.68},
        "DiT-S": {"parameters": 33, "FID": 68.40},
        "PDE-SSM-DiT-g-S": {},
        "LaMamba-B": {"parameters": 127, "FID": 29.71},
        "DiT-B": {"parameters": 130, "FID": 43.47},
        "PDE-SSM-DiT-g-B": {},
        "LaMamba-XL": {"parameters": 656, "FID": 12.86},
        "DiT-XL": {"parameters": 675, "FID": 19.47},
        "PDE-SSM-DiT-g-XL": {},
    },
    "table3_lamamba": {
        "LaMamba": {"FID": 55.68},
        "without-attention": {"FID": 69.78},
        "without-shifts": {"FID": 58.81},
        "global-attention": {"FID": 53.74},
    },
    "table10_imagenet256": {
        "DiT": {"FID": 48.44, "sFID": 9.04, "Inception Score": 30.78, "Precision": 0.45, "Recall": 0.53},
        "PDE-SSM-DiT": {"FID": 49.37, "sFID": 11.21, "Inception Score": 34.09, "Precision": 0.47, "Recall": 0.48},
    },
}
# Remarks on those figures, printed with the tables.
REMARKS = {
    "table2_dis_cifar10": "DiS's paper gives S 384 channels, which are 30.9 million parameters; its code has 368, which are "
    "the paper's 28. The Gflops of its Table 1 leave out all that its Mamba layers compute, and so stand nowhere here. "
    "U-ViT's figure is of a recipe and a sampler of its own.",
    "table3_dis_celeba64": "U-ViT's figure, as its public code gives it, is of a recipe and a sampler of its own. DiS's own "
    "is missing: the text of its paper from which this was made has the caption of that table without the numbers.",
    "table2_lamamba": "LaMamba's S and B have 34.1 and 134.5 million parameters here, those with the paper's multiply-adds; "
    "its counts will be of an earlier version than the public code. That code has one configuration, XL: 652 million. Its L "
    "cannot be told from its text. The paper trains without decay of weights, its code with 0.01; here there is none.",
    "table3_lamamba": "10^9 multiply-adds, the paper's and ours: 3.19 and 3.18; without attention 2.45 and 2.46; without "
    "shifts 3.19 and 3.18; with global attention, which has no relative positions here, 4.24 and 4.22.",
}

LOSS = "held-out loss"
COUPLINGS = ("diagonal", "pairwise")  # systems of ours are named <the paper's>-<coupling>


def record(rows, table, scale, system, folder, checkpoint):
    """Appends the row of a finished run to the file `rows`; a row is written whole or not at all."""
    import torch  # here, since printing needs nothing but this file and the rows

    from benchmarks.report import count_threads, machine
    from machine.files import alone_in, whole_file
    from training.runs import rows_until

    contents = torch.load(checkpoint, map_location="cpu", weights_only=True)
    args = contents["args"]
    log = rows_until(Path(checkpoint).parent.parent, contents["step"])  # the run may have gone on
    commands = [line.split(" ", 2) for line in Path(folder, "commands.txt").read_text().splitlines()]
    metrics = json.loads(Path(folder, "metrics.json").read_text())
    sampling = json.loads(Path(metrics["samples"]["source"].removesuffix(".npz"), "settings.json").read_text())
    about = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    row = dict(
        table=table, scale=scale, system=system, seed=args["global_seed"], objective=args["objective"],
        predict=args.get("predict") or "velocity", precision=args["precision"],
        data="/".join(Path(args["data_path"]).parts[-2:]), image_size=args["image_size"],
        batch=args["global_batch_size"], model=args["model"],
        coupling=(args.get("pde_coupling") or "diagonal") if args["mixer"] != "attention" else None,
        parameters=sum(value.numel() for value in contents["ema"].values()), steps=log[-1]["step"],
        training_loss=[entry["loss"] for entry in log if "loss" in entry][-1],
        **{name: value for entry in log for name, value in entry.items() if name.startswith("held_out")},
        sampler=sampling["sampler"], sampling_steps=sampling["num_sampling_steps"], metrics=metrics,
        commands=[dict(command=command, processes=int(n), seconds=int(seconds)) for seconds, n, command in commands],
        machine=about.get("gpu") or f"{about['processor']}, {count_threads(about)}",
        torch=torch.__version__, date=str(date.today()),
    )  # fmt: skip
    rows = Path(rows)
    with alone_in(rows.parent):  # another script may be at work on other systems or seeds
        before = rows.read_text() if rows.exists() else ""
        with whole_file(rows, "rows") as file:
            file.write((before + json.dumps(row) + "\n").encode())


def tabulate(table, rows):
    """Writes one table as Markdown: the paper's figures, then ours for each setting that was run, with the loss on held-out
    images also where the paper has none."""
    metrics = list(next(iter(PAPER[table].values())))  # the first has figures of all
    measured = metrics + [LOSS] * ("MSE" not in metrics and any("held_out_loss" in row for row in rows))
    settings = {}
    for row in rows:  # a later run of the same seed replaces an earlier one
        sampler = f"{row['sampling_steps']} steps of {row['sampler']}"
        metrics_of = row["metrics"]
        trained = row["scale"], _objective(row), row.get("precision", "fp32"), row["steps"], row.get("batch")
        images = metrics_of["samples"]["images"], metrics_of["reference"]["images_in_statistics"]
        key = *trained, sampler, metrics_of["features"], *images
        settings.setdefault(key, {}).setdefault(row["system"], {})[row["seed"]] = row
    header = ["", *(f"{_heading(name)}, paper" for name in metrics)]
    lines, ours = {}, {row["system"] for row in rows}
    for system, figures in PAPER[table].items():
        lines[system] = [system, *(_plain(figures[name]) if name in figures else "" for name in metrics)]
        for coupling in COUPLINGS:
            if f"{system}-{coupling}" in ours:
                lines[f"{system}-{coupling}"] = [f"{system}, {coupling}", *[""] * len(metrics)]
    notes = []
    for number, (key, systems) in enumerate(settings.items(), 1):
        scale, objective, precision, steps, batch, sampler, features, images, references = key
        header += [f"{_ours(name, features)} [{number}]" for name in measured]
        for system, line in lines.items():
            runs = list(systems.get(system, {}).values())
            line += [_summary([_figure(row, name) for row in runs]) for name in measured]
        made = [row for runs in systems.values() for row in runs.values()]
        data = "".join(sorted({f", {row['data']}" for row in made if "data" in row}))
        where, torch, dates = (sorted({row[name] for row in made}) for name in ("machine", "torch", "date"))
        of_batch = f" of {batch}" if batch else ""  # older rows do not say
        notes.append(
            f"[{number}] {scale} scale{data}, {objective}, {steps:,} steps{of_batch} in {precision}, {features}, "
            f"{images:,} samples by {sampler} against {references:,} images, "
            f"{_seeds(systems)}; {' and '.join(where)}, PyTorch {' and '.join(torch)}, "
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {made[0]['system']} by"
        )
        notes += ["", *(f"    {run['command']}" for run in made[0]["commands"]), ""]
    table_lines = [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines.values()]]
    remark = [REMARKS[table], ""] if table in REMARKS else []
    return "\n".join([f"**{table}**", "", *table_lines, "", *notes, *remark])


def _seeds(systems):
    """Says which seeds a setting has, and which of its systems have others than most; systems: name -> rows by seed."""
    seeds_of = {system: tuple(sorted(runs)) for system, runs in systems.items()}
    usual = Counter(seeds_of.values()).most_common(1)[0][0]
    others = [f"{system} {', '.join(map(str, seeds))}" for system, seeds in seeds_of.items() if seeds != usual]
    return f"seed{'s' * (len(usual) > 1)} {', '.join(map(str, usual))}" + f" (but {'; '.join(others)})" * bool(others)


def _objective(row):
    """Returns, in words, the training objective and the image size of a row, as far as it records them: older rows do not."""
    size = f" at {row['image_size']} x {row['image_size']}" if "image_size" in row else ""
    return row["objective"] + (" by images" if row.get("predict") == "x" else "") + size


def _figure(row, name):
    """Returns a row's value of the metric that the paper calls `name`, or None."""
    if name == "parameters":
        return row["parameters"] / 1e6
    if name == LOSS:
        return row.get("held_out_loss")
    if name == "MSE":
        return row.get("held_out_mse", row["training_loss"])
    return next((value for key, value in row["metrics"].items() if _same(key, name)), None)


def _same(key, name):
    """Tells whether `key` is our name for the paper's `name`. FID of other features is called FD-EfficientNet and the like."""
    return key == name or (name == "FID" and re.match(r"(FID|FD)\b", key) is not None)


def _heading(name):
    return "parameters (M)" if name == "parameters" else name


def _ours(name, features):
    if name == "FID" and features != "2048 features of inception":
        return "Frechet distance, ours"
    return f"{_heading(name)}, ours"


def _summary(values):
    values = [value for value in values if value is not None]
    if not values:
        return ""
    spread = f" ({_plain(min(values))} to {_plain(max(values))})" if len(values) > 1 and min(values) < max(values) else ""
    return _plain(mean(values)) + spread


def _plain(value):
    return f"{value:.4g}"


def read(file):
    """Returns the rows of a file. SystemExit if it is one of something else."""
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    except ValueError:  # no JSON, or no text
        rows = [None]
    if not all(isinstance(row, dict) and row.get("table") in PAPER for row in rows):
        sys.exit(f"tables.py: error: {file} holds other things than rows, which the scripts reproduce/table*.sh write")
    return rows


def main(files):
    files = [Path(file) for file in files] or sorted((HERE / "results").glob("table*.jsonl"))
    if missing := [str(file) for file in files if not file.is_file()]:
        sys.exit(f"tables.py: error: no rows in {', '.join(missing)}; the scripts reproduce/table*.sh write them")
    rows = [row for file in files for row in read(file)]
    for table in PAPER:
        if chosen := [row for row in rows if row["table"] == table]:
            print(tabulate(table, chosen))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The paper's tables beside ours.")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--record", nargs=6, metavar=("ROWS", "TABLE", "SCALE", "SYSTEM", "FOLDER", "CHECKPOINT"))
    arguments = parser.parse_args()
    if arguments.record:
        record(*arguments.record)
    else:
        main(arguments.files)
