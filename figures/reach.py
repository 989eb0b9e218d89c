"""How far a layer sees: its effective receptive field (Luo et al., 2016), by gradients, and so for any mixer."""

import math

import torch
from timm.models.vision_transformer import Attention

from figures.page import COLOURS, new_page, tidy
from pde_ssm import receptive_field


def reach_of(layer, channels=32):
    """Returns how far that many channels of the middle token, evenly spread, see in a layer, in tokens: (n,).

    It is the root mean square of the distance, weighted by the channel's response to a token, the norm of its gradient. From
    the middle token, distances on the torus and in the plane are the same.
    """
    D = layer.tokens.shape[2]
    chosen = torch.linspace(0, D - 1, min(channels, D)).round().long().tolist()
    with torch.enable_grad():
        tokens = layer.tokens.clone().requires_grad_()
        answers = layer.mix(tokens)[:, _middle(layer)].sum(0)              # (D,)
        strengths = [torch.autograd.grad(answers[c], tokens, retain_graph=True)[0].norm(dim=2).mean(0) for c in chosen]
    return _about_the_middle(torch.stack(strengths), layer)


def attention_distance(layer):
    """Returns how far the heads of timm's attention look from the middle token, in tokens: (heads,), root mean squares weighted
    by attention; None for another mixer."""
    module, x = layer.module, layer.tokens
    if not isinstance(module, Attention):
        return None
    with torch.no_grad():
        q, k, _ = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)     # (B, heads, N, d) each
        q, k = module.q_norm(q)[:, :, _middle(layer)], module.k_norm(k)
        weights = (torch.einsum("bhd,bhnd->bhn", q, k) * module.scale).softmax(-1)
    return _about_the_middle(weights.mean(0), layer)


def uniform_reach(grid):
    """Returns the reach of a layer that sees every token of a grid (h, w) alike."""
    return receptive_field(torch.ones(grid, dtype=torch.float64)).item()


def _middle(layer):
    h, w = layer.grid
    return layer.prefix + h // 2 * w + w // 2


def _about_the_middle(strengths, layer):
    """Returns the mean distance of strengths (n, N) from the middle token: (n,)."""
    h, w = layer.grid
    return receptive_field(strengths[:, layer.prefix :].unflatten(1, (h, w)).roll((-(h // 2), -(w // 2)), (1, 2)))


def draw_reach(systems):
    """Draws a panel for each {title: (grid, [(reach (n,), heads (heads,) or None) of each layer])}."""
    heading = "How far the middle token sees: effective receptive field of channels"
    figure, axes = new_page(1, len(systems), 4.6, 3.6, heading, sharey=True)
    for axis, (title, (grid, layers)) in zip(axes.flat, systems.items()):
        for number, (reach, heads) in enumerate(layers, start=1):
            spread = torch.linspace(-0.22, 0.22, len(reach))
            first = number == 1
            axis.plot(number + spread, sorted(reach), ".", color=COLOURS[0], markersize=3, label="channels" if first else None)
            median = reach.median().item()
            axis.plot([number - 0.3, number + 0.3], [median] * 2, color="black", label="their median" if first else None)
            if heads is not None:
                label = "heads' attention" if first else None
                axis.plot([number] * len(heads), heads, "D", color=COLOURS[1], markersize=4, label=label)
        axis.axhline(uniform_reach(grid), color="#555555", linestyle=":", label="all tokens alike")
        axis.set_xticks(range(1, len(layers) + 1, math.ceil(len(layers) / 12)))
        tidy(axis, title=f"{title}, {grid[0]} x {grid[1]} tokens", xlabel="layer", ylabel="reach, in tokens")
        axis.title.set_fontsize(9)
        axis.legend(frameon=False, fontsize=7)
    axes[0, 0].set_ylim(0)  # of all panels, and last, since what is drawn later would move the upper end
    return figure
