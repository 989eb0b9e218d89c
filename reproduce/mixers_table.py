"""Adds the runs of mixers.sh in results/mixers to reproduce/results/mixers.json, and prints the table of all:

    python -m reproduce.mixers_table
"""

import json
import re
from pathlib import Path
from statistics import mean

from machine.files import whole_file

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "reproduce" / "results" / "mixers.json"
STEPS = 1200


def main(runs=ROOT / "results" / "mixers", results=RESULTS):
    contents = json.loads(results.read_text())
    for log in sorted(runs.glob("*/*/*/log.jsonl")):
        objective, (mixer, seed) = log.parts[-4], log.parts[-3].rsplit("-", 1)
        curve = held_out(log)
        if str(STEPS) in curve:
            contents["mixers"][mixer].setdefault(objective, {})[seed] = curve
    pairs_in_a_line = re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", json.dumps(contents, indent=1))
    with whole_file(results, "table") as file:
        file.write((pairs_in_a_line + "\n").encode())
    print("held-out loss after 1,200 steps: mean (lowest to highest) of the number of seeds")
    for mixer, entry in contents["mixers"].items():
        print(f"{mixer:20}", *(f"{objective} {summary(entry.get(objective, {})):38}" for objective in ("diffusion", "flow")))


def held_out(log):
    """Reads {step: [loss, mean squared error]} of one run."""
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if "held_out_loss" in row]
    return {str(row["step"]): [round(row["held_out_loss"], 5), round(row["held_out_mse"], 5)] for row in rows}


def summary(seeds):
    losses = [curve[str(STEPS)][0] for curve in seeds.values()]
    return f"{mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}) of {len(losses)}" if losses else "-"


if __name__ == "__main__":
    main()
