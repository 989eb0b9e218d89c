"""Plots times by tokens, both on logarithmic axes, with the exponent of each line."""

import math
from statistics import linear_regression

# A side has the same colour in every plot, from a palette safe for colour blindness; other labels get the remaining colours,
# and, if there are more labels, the colours repeat with another marker.
COLOURS = {
    "attention": "#0072b2", "naive": "#d55e00", "pdessm": "#009e73", "diagonal": "#009e73", "floor": "#555555",
    "pairwise": "#cc79a7", "coupled": "#e69f00", "timm": "#56b4e9",
}  # fmt: skip
MORE_COLOURS = ["#8c564b", "#7f3fbf", "#bcbd22", "#d4a0a0", "#17becf", "#1a1a80"]
MARKERS = "osv^D*"


def styles(labels):
    """Returns the colour and the marker of each label."""
    others = [label for label in labels if label not in COLOURS]
    more = {label: (MORE_COLOURS[i % 6], MARKERS[(i // 6 + 1) % 6]) for i, label in enumerate(others)}
    return {label: (COLOURS[label], MARKERS[0]) for label in labels if label in COLOURS} | more


def slope(places):
    """Fits the exponent p of value ~ tokens^p by least squares over the sizes from a sixteenth of the largest on; None for
    fewer than two sizes."""
    places = [(math.log(n), math.log(value)) for n, value in places if 16 * n >= places[-1][0]]
    return linear_regression(*zip(*places)).slope if len(places) > 1 else None


def draw(file, panels, xlabel, ylabel, title):
    """Draws panels, title -> label -> [(tokens, value), ...], two in a row, as a PNG into an open binary file."""
    from matplotlib import pyplot

    style_of = styles(dict.fromkeys(label.removeprefix("paper: ") for lines in panels.values() for label in lines))
    columns, rows = min(2, len(panels)), math.ceil(len(panels) / 2)
    size = (5.2 * columns, 4.4 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (heading, lines) in zip(axes.flat, panels.items()):
        for label, places in lines.items():
            exponent = slope(places)
            style = dict(linestyle=":", markersize=3) if label.startswith("paper") else dict(markersize=5)
            text = label if exponent is None else f"{label}, slope {exponent:.2f}"
            colour, marker = style_of[label.removeprefix("paper: ")]
            axis.plot(*zip(*places), marker=marker, color=colour, label=text, linewidth=1.5, **style)
        axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=heading)
        set_ticks(axis, sorted({n for places in lines.values() for n, _ in places}))
        axis.grid(which="major", color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        beside = dict(loc="center left", bbox_to_anchor=(1, 0.5)) if len(lines) > 6 else {}
        axis.legend(frameon=False, fontsize=8, **beside)
    figure.suptitle(title, fontsize=9, color="#555555")
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def set_ticks(axis, sizes):
    """Labels the sizes that were measured, except those that would touch the one before, and values in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    ticks = []
    for n in sizes:
        if not ticks or n >= 2.5 * ticks[-1]:
            ticks.append(n)
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
