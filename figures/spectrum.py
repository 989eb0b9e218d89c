"""A layer's gain by spatial frequency, measured by its response to a small random disturbance, and so for any mixer."""

import torch

from figures.page import logarithmic, new_page, tidy

DISTURBANCE = 0.01  # of the tokens' root mean square: small enough for a linear response, and far above rounding


def gain_map(layer, seed=0):
    """Returns the gain (h, w) of a layer at each spatial frequency of its grid, in the order of fft2.

    White noise is added to the tokens that the layer is given; the gain is the root of the ratio of two powers, that of the
    change of the result and that of the noise, over all channels and images. Where mixing is linear and every channel has the
    symbol G B, it is |G B| times what R does to the length of a vector.
    """
    x, (h, w) = layer.tokens, layer.grid
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    noise[:, : layer.prefix] = 0
    noise *= DISTURBANCE * x.square().mean().sqrt()
    with torch.no_grad():
        change = layer.mix(x + noise) - layer.mix(x)
    given, found = (_power(part[:, layer.prefix :], h, w) for part in (noise, change))
    return (found / given).sqrt()


def _power(tokens, h, w):                                                  # (B, N, D)
    pictures = tokens.double().unflatten(1, (h, w)).movedim(-1, 1).contiguous()                            # (B, D, h, w)
    return torch.fft.fft2(pictures).abs().square().mean((0, 1))            # (h, w)


def by_frequency(gains):
    """Returns root mean squares of gains (h, w) over rings of frequencies: (n,), for 0 to n - 1 cycles a picture, up to the
    highest that the grid has in all directions."""
    h, w = gains.shape
    fy, fx = (n * torch.fft.fftfreq(n, dtype=torch.float64, device=gains.device) for n in (h, w))
    ring = (fx**2 + fy[:, None] ** 2).sqrt().round().long()
    return torch.stack([gains[ring == n].square().mean().sqrt() for n in range(min(h, w) // 2 + 1)])


def draw_spectrum(systems):
    """Draws a panel for each {title: [gains by frequency (n,) of each layer]}."""
    from matplotlib import colormaps

    heading = "Gain of each layer's mixer by spatial frequency, over all directions and channels"
    figure, axes = new_page(1, len(systems), 4.6, 3.6, heading, sharey=True)
    for axis, (title, layers) in zip(axes.flat, systems.items()):
        for number, gains in enumerate(layers, start=1):
            colour = colormaps["viridis"](0.9 * (number - 1) / max(len(layers) - 1, 1))
            label = f"layer {number}" if len(layers) <= 8 or number in (1, len(layers)) else None
            axis.plot(range(len(gains)), gains, color=colour, linewidth=1.5, marker=".", label=label)
        logarithmic(axis)
        tidy(axis, title=title, xlabel="spatial frequency, in cycles a picture", ylabel="gain")
        axis.title.set_fontsize(9)
        axis.legend(frameon=False, fontsize=7)
    return figure
