"""Functions that all pictures share: the figure, its axes, and writing it."""

from pathlib import Path
from textwrap import wrap

from machine.files import whole_file

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")  # told apart by the colour-blind too
FORMATS = (".png", ".svg")


def new_page(rows, columns, width, height, title, **how):
    """Returns a figure of matplotlib, width x height inches a panel, and its axes (rows, columns). ValueError if matplotlib is
    not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("pictures need matplotlib, which is not installed: pip install matplotlib") from error
    figure = Figure(figsize=(max(columns * width, 4), rows * height + 0.6), layout="constrained")
    lines = (wrap(line, int(13 * figure.get_figwidth())) for line in title.splitlines())
    figure.suptitle("\n".join(line for some in lines for line in some), fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def save_page(figure, path):
    """Writes a figure as .png or .svg, whole or not at all."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "figures"}), whole_file(path, "picture") as file:
        metadata = {"Date": None} if Path(path).suffix == ".svg" else None  # the same numbers make the same file
        figure.savefig(file, format=Path(path).suffix[1:], dpi=120, metadata=metadata)


def tidy(axis, **labels):
    """Gives a panel of lines or points its labels, a light grid and no frame around it."""
    axis.set(**labels)
    axis.grid(which="major", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def logarithmic(axis):
    """Makes the vertical axis of a panel logarithmic, with plain numbers."""
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks("{x:.3g}")
    axis.tick_params(axis="y", which="both", labelsize=7)


def show_picture(axis, pixels, **how):
    """Shows a picture (h, w) or (h, w, 3) without ticks."""
    axis.set(xticks=[], yticks=[])
    return axis.imshow(pixels, **how)
