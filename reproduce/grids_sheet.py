"""Joins the six grids of samples that grids.sh drew of a data set into one picture:

    python -m reproduce.grids_sheet digits
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from machine.files import whole_file

ROOT = Path(__file__).parent.parent
SYSTEMS, OBJECTIVES = ("DiT", "U-Net", "PDE-SSM-DiT"), ("diffusion", "flow")
BAR = 18  # pixels of a title


def main(name, grids=ROOT / "results" / "grids", results=ROOT / "reproduce" / "results"):
    """Writes <results>/grids-<name>.png: a row for each objective, a column for each system, at half the size."""
    found = {(s, o): Image.open(grids / f"{name}-{s}-{o}" / "samples.png").reduce(2) for o in OBJECTIVES for s in SYSTEMS}
    width, height = found[SYSTEMS[0], OBJECTIVES[0]].size
    sheet = Image.new("RGB", (len(SYSTEMS) * width, len(OBJECTIVES) * (height + BAR)), "white")
    for (system, objective), grid in found.items():
        x, y = SYSTEMS.index(system) * width, OBJECTIVES.index(objective) * (height + BAR)
        ImageDraw.Draw(sheet).text((x + 4, y + 3), f"{system}, {objective}", fill="black", font_size=11)
        sheet.paste(grid, (x, y + BAR))
    with whole_file(results / f"grids-{name}.png", "picture") as file:
        sheet.quantize(256).save(file, format="png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
