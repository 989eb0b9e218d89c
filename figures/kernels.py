"""Green's functions in space: the PDE's response to a single bright token (the paper's Figure 1)."""

import math

import torch

from figures.layers import mixers_of
from figures.page import new_page, show_picture
from pde_ssm import PDESSM, green_symbol, receptive_field

# The paper's four: widths are standard deviations along two axes, the first turned by an angle in degrees, and shifts go to
# the right and down, all in sides of the picture at tau = 1.
EXAMPLES = {
    "localised": dict(widths=(0.04, 0.04)),
    "directionally blurred": dict(widths=(0.14, 0.03), angle=30),
    "shifted": dict(widths=(0.04, 0.04), shift=(0.22, -0.15)),
    "all together": dict(widths=(0.12, 0.04), angle=-40, shift=(-0.15, 0.15), reaction=-0.5),
}


def coefficients(widths=(0.0, 0.0), angle=0.0, shift=(0.0, 0.0), reaction=0.0):
    """Returns K (2, 2), b (2,) and r, float64, of the PDE that does the following by tau = 1.

    Diffusion makes a Gaussian with the standard deviations `widths` along its axes, of which the first points `angle` degrees
    from right to down; convection moves it by `shift`, right and down; reaction multiplies it by exp(reaction). Lengths are in
    sides of the picture.
    """
    turn, (first, second) = math.radians(angle), widths
    axes = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    K = axes @ torch.diag(torch.tensor([first**2, second**2], dtype=torch.float64) / 2) @ axes.T
    return K, -torch.tensor(shift, dtype=torch.float64), torch.tensor(reaction, dtype=torch.float64)


def green_function(grid, *how, **named):
    """Returns the Green's function (h, w), float64, of the PDE of these arguments of `coefficients` at tau = 1 on a grid
    (h, w), with its source at token (0, 0)."""
    K, b, r = coefficients(*how, **named)
    return torch.fft.irfft2(green_symbol(K, b, r, K.new_ones(()), *grid), s=grid)


def measure(kernel):
    """Returns the numbers of a Green's function (h, w): where its centre of mass is and its standard deviations along x and y,
    in sides of the picture and wherever on the torus it lies, its sum, and how far a token sees, in tokens."""
    h, w = kernel.shape
    weight, numbers = kernel.double().abs(), {}
    for axis, n, along in (("x", w, weight.sum(0)), ("y", h, weight.sum(1))):
        places = torch.arange(n, dtype=torch.float64, device=kernel.device) / n
        centre = torch.angle((along * torch.polar(torch.ones_like(places), 2 * math.pi * places)).sum()) / (2 * math.pi)
        from_centre = places - centre
        from_centre = from_centre - from_centre.round()
        mean = (along * from_centre).sum() / along.sum()
        numbers[f"shift_{axis}"] = (centre + mean).item()
        numbers[f"std_{axis}"] = ((along * (from_centre - mean) ** 2).sum() / along.sum()).sqrt().item()
    return numbers | dict(sum=kernel.sum().item(), reach=receptive_field(kernel).item())


def chosen_kernels(grid, chosen=None):
    """Returns the Green's functions of Figure 1, or that of chosen arguments of `coefficients`: {title: (h, w)}."""
    if chosen:
        return {"chosen": green_function(grid, **chosen)}
    return {title: green_function(grid, **how) for title, how in EXAMPLES.items()}


def kernels_of_layers(model, count=8):
    """Returns `count` Green's functions of each PDE of a network, evenly spread over its channels as sorted by how far they
    see, by the number of its layer: {1: [(h, w), ...], ...}. ValueError for a network without PDEs."""
    mixers = [[part for part in mixer.modules() if isinstance(part, PDESSM)] for mixer in mixers_of(model)]
    layers = {number: parts[0] for number, parts in enumerate(mixers, start=1) if parts}  # others are a hybrid's attention
    if not layers:
        raise ValueError("the checkpoint's mixer has no Green's functions; reach and spectrum measure every mixer")
    rows = {}
    for number, layer in layers.items():
        kernels = layer.kernel(*model.grid_size).flatten(0, -3).cpu()      # (channels, h, w)
        ranks = receptive_field(kernels).argsort()
        rows[number] = [kernels[ranks[place]] for place in torch.linspace(0, len(ranks) - 1, count).round().long()]
    return rows


def draw_chosen(kernels):
    """Draws {title: (h, w)} side by side, each about the source of its PDE in the middle."""
    figure, axes = new_page(1, len(kernels), 2.6, 2.7, "Green's functions, the source in the middle (+)")
    for axis, (title, kernel) in zip(axes.flat, kernels.items()):
        _show(axis, kernel)
        axis.plot(kernel.shape[1] // 2, kernel.shape[0] // 2, "k+", markersize=8, markeredgewidth=0.8)
        axis.set_title(title, fontsize=9)
        for ticks, n in ((axis.set_xticks, kernel.shape[1]), (axis.set_yticks, kernel.shape[0])):
            ticks([0, n // 2, n - 1], ["-1/2", "0", "1/2"], fontsize=7)
        axis.set_xlabel("x, in sides of the picture", fontsize=8)
    return figure


def draw_layers(rows, title):
    """Draws the kernels of each layer in a row, from narrow to wide."""
    first = next(iter(rows.values()))
    (h, w), columns = first[0].shape, len(first)
    heading = f"{title}: Green's functions on {h} x {w} tokens, narrow to wide\nabove each, how far it sees, in tokens"
    figure, axes = new_page(len(rows), columns, 1.1, 1.25, heading)
    for line, (number, kernels) in zip(axes, rows.items()):
        for axis, kernel in zip(line, kernels):
            _show(axis, kernel)
            axis.set_title(f"{receptive_field(kernel).item():.1f}", fontsize=7, pad=2)
        line[0].set_ylabel(f"layer {number}", fontsize=8)
    return figure


def _show(axis, kernel):
    """Shows a kernel about its source; white is nothing, red positive, blue negative."""
    h, w = kernel.shape
    peak = kernel.abs().max().item() or 1
    show_picture(axis, kernel.roll((h // 2, w // 2), (0, 1)), cmap="RdBu_r", vmin=-peak, vmax=peak, interpolation="nearest")
