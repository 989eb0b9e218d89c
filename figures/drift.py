"""How the PDE's coefficients moved in training."""

import torch

from figures.page import COLOURS, logarithmic, new_page, tidy
from pde_ssm import PDESSM

QUANTITIES = {
    "width": "sqrt(2 tau K), in tokens: the geometric mean\nof the Gaussian's two axes",
    "stretch": "the longer axis of the Gaussian\nas a multiple of the shorter",
    "shift": "tau |b|, in tokens",
    "growth": "tau r",
    "tau": "tau",
}


def coefficients_of(model):
    """Returns, for each PDE of a network, what its coefficients K, b, r and tau do: {quantity of QUANTITIES: (n,)}; where
    channels share a PDE, those of a channel and itself. Absent terms have none. ValueError for a network without PDEs."""
    layers = [layer for layer in model.modules() if isinstance(layer, PDESSM)]
    if not layers:
        raise ValueError("the checkpoint has no PDEs, whose coefficients could move")
    return [_coefficients(layer, max(model.grid_size)) for layer in layers]


def _coefficients(layer, tokens):
    K, b, r, tau = (x.detach().double().cpu() for x in layer.coefficients())
    if r.ndim == 3:                                                        # (groups, c, c)
        own = torch.eye(r.shape[1], dtype=torch.bool).expand(r.shape)
        tau = tau[:, None].expand(r.shape[:2]).flatten()
        K, b, r = K[own], b[own], r[own]
    found, terms = {}, layer.equation.terms
    if "diffusion" in terms:
        axes = (2 * tau[..., None] * torch.linalg.eigvalsh(K).clamp_min(0)).sqrt() * tokens        # (..., 2), rising
        found |= dict(width=axes.prod(-1).sqrt(), stretch=axes[..., 1] / axes[..., 0].clamp_min(1e-9))
    if "convection" in terms:
        found["shift"] = tau * b.norm(dim=-1) * tokens
    if "reaction" in terms:
        found["growth"] = tau * r
    return {name: x.flatten() for name, x in (found | dict(tau=tau)).items()}


def draw_drift(initial, trained, title):
    """Draws a panel for each quantity: boxes of the layers' channels, initial and trained (quartiles, and the central 90%)."""
    names = [name for name in QUANTITIES if name in initial[0]]
    figure, axes = new_page(1, len(names), 3.1, 3.6, f"{title}: coefficients of the channels' PDEs, before and after training")
    for axis, name in zip(axes.flat, names):
        for layers, offset, colour in ((initial, -0.18, COLOURS[6]), (trained, 0.18, COLOURS[1])):
            places = [number + offset for number in range(1, len(layers) + 1)]
            look = dict(facecolor=colour, alpha=0.6, linewidth=0.5)
            values = [layer[name].numpy() for layer in layers]
            axis.boxplot(
                values, positions=places, widths=0.3, whis=(5, 95), showfliers=False, patch_artist=True, boxprops=look,
                medianprops=dict(color="black"), manage_ticks=False,
            )  # fmt: skip
            axis.plot([], [], "s", color=colour, label="initial" if layers is initial else "trained")
        if name in ("width", "stretch", "tau"):
            logarithmic(axis)
        axis.set_xticks(range(1, len(initial) + 1))
        tidy(axis, title=name, xlabel="layer")
        axis.set_ylabel(QUANTITIES[name], fontsize=8)
        axis.title.set_fontsize(9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
