"""Profiles the rows in which PDE-SSM is slowest beside attention, of what benchmarks.mixer and benchmarks.step have written:

    python -m benchmarks.slowest --out reproduce/results
"""

import json

from benchmarks import mixer
from benchmarks.cpu_profile import report
from benchmarks.flags import parse_args
from benchmarks.report import machine, milliseconds
from benchmarks.sides import layer_pass, of_size, training_step

ROWS = 3  # of layers, and as many of steps
CALLS = 6


def main(device, out):
    about = machine(device)
    print(f"{about.get('gpu') or about['processor']}, {about['versions']}")
    for name in ("mixer", "step"):
        rows = sorted(rows_of(out, name, about.get("gpu")), key=lambda row: row["ratio"])
        if not rows:
            print(f"{name}: no rows in {out}; python -m benchmarks.{name} writes them")
        for row in rows[:ROWS]:
            title, run = layer(row, device) if name == "mixer" else step(row, device)
            report(f"{title}: attention takes {row['ratio']:.2f} times as long", run, CALLS, device)


def rows_of(folder, name, gpu):
    """Returns the rows of a benchmark's files in a folder of this GPU, or of CPUs for None, with their settings and ratios."""
    found = []
    for path in folder.glob(f"{name}-*.json"):  # as Report names them
        contents = json.loads(path.read_text())
        if contents["machine"].get("gpu") != gpu:
            continue
        for row in contents["rows"]:
            times = [milliseconds(side)(row) for side in ("attention", "diagonal" if name == "mixer" else "pdessm")]
            if all(times):
                found.append(row | dict(settings=contents["settings"], ratio=times[0] / times[1]))
    return found


def layer(row, device):
    """Returns a title and the function that a row of benchmarks.mixer has timed."""
    training, grid = row["pass"] != "forward", tuple(row["grid"])
    heads = mixer.HEADS.get(row["channels"], 1)
    run = layer_pass(device, "pdessm", row["settings"]["batch"], row["channels"], heads, grid, training=training)
    return f"layer, {row['channels']} channels, {grid[0]} x {grid[1]} tokens, {row['pass']}", run


def step(row, device):
    """Returns a title and the function that a row of benchmarks.step has timed."""
    model = row["settings"]["model"]
    options = of_size(model.removeprefix("DiT-").removesuffix("/2"), row["input"])
    return f"training step of {model}, {row['tokens']:,} tokens", training_step(device, row["batch"], mixer="pdessm", **options)


if __name__ == "__main__":
    args = parse_args(__doc__)
    main(args.device, args.out)
