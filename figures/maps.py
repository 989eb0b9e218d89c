"""Maps of each layer's mixer for an image (the paper's Figure 6)."""

import torch
from torch.nn.functional import adaptive_avg_pool2d

from figures.page import new_page, show_picture


def disc(side):
    """Returns a synthetic image (3, side, side) in [-1, 1]: a bright disc, a third of the picture wide, on a dark ground."""
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side - 0.5] * 2, indexing="ij")
    inside = (x.square() + y.square()).sqrt() < 1 / 6
    colour = torch.tensor([0.8, 0.3, -0.4]).view(3, 1, 1)
    return torch.where(inside, colour, torch.full((3, side, side), -0.6))


def map_of(layer):
    """Returns the mixer's result for the first image as one number per token, (h, w): the distance of the token's vector from
    the mean, by which the layer distinguishes tokens."""
    grid = layer.mixed[0, layer.prefix :].float()
    return (grid - grid.mean(0)).norm(dim=1).view(layer.grid)


def likeness(picture, found):
    """Returns the correlation, -1 to 1, of a map (h, w) with how far the image (C, H, W) is from its mean there."""
    contrast = (picture - picture.mean((1, 2), keepdim=True)).norm(dim=0)
    contrast = adaptive_avg_pool2d(contrast[None], found.shape)[0]
    return torch.corrcoef(torch.stack([contrast.flatten().to(found), found.flatten()]))[0, 1].nan_to_num().item()


def draw_maps(rows, title):
    """Draws a row for each (label, shown image (H, W, 3) of 0 to 1, [(likeness, map), ...]): the image and the layers' maps."""
    depth = len(rows[0][2])
    side = 1.25 if depth <= 12 else 0.8
    heading = f"{title}: what each layer's mixer makes of the image, and its correlation with the image's contrast"
    figure, axes = new_page(len(rows), depth + 1, side, side + 0.15, heading)
    for line, (label, shown, maps) in zip(axes, rows):
        show_picture(line[0], shown)
        line[0].set_ylabel(label, fontsize=8)
        for number, (axis, (alike, found)) in enumerate(zip(line[1:], maps), start=1):
            show_picture(axis, found, cmap="viridis", interpolation="nearest")
            axis.set_title(f"layer {number}: {alike:+.2f}" if side > 1 else f"{number}: {alike:+.2f}", fontsize=7, pad=2)
    return figure
