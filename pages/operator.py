"""Page 1, the operator: one PDE whose coefficients can be moved, its Green's function, and what it makes of a picture."""

from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from figures.kernels import coefficients, draw_chosen, measure
from images.dataset import cropped
from images.folders import read_image
from pages.checkpoints import one_sentence
from pde_ssm import R_MAX, TERMS, green_symbol

SHOWN = 320  # pixels of a picture's side on the page
EQUATION = {
    "diffusion": r"\nabla\!\cdot(K\,\nabla h)",
    "convection": r"b\cdot\nabla h",
    "reaction": r"r\,h",
}
EXPONENT = {"diffusion": r"-k^\top K\,k", "convection": r"i\,b\cdot k", "reaction": "r"}


def evolve(pixels, K, b, r, tau):
    """Returns the Green's function (h, w), its source at token (0, 0), and what the PDE makes of a picture (C, h, w) by the
    time tau, on the torus."""
    grid = pixels.shape[-2:]
    symbol = green_symbol(K, b, r, tau, *grid)                             # (h, w // 2 + 1)
    return torch.fft.irfft2(symbol, s=grid), torch.fft.irfft2(symbol * torch.fft.rfft2(pixels), s=grid)


def chosen(width_1, width_2, angle, b_x, b_y, r, tau, terms):
    """Returns K (2, 2), b (2,), r and tau, float64, of the sliders: zero for terms that are off, and tau r at most R_MAX, as in
    PDESSM."""
    K, b, r = coefficients((width_1, width_2), angle, (-b_x, -b_y), min(r, R_MAX / tau))
    K, b, r = (x if term in terms else torch.zeros_like(x) for x, term in zip((K, b, r), TERMS))
    return K, b, r, torch.tensor(tau, dtype=torch.float64)


@lru_cache(maxsize=8)
def picture(path, grid):
    """Returns the picture in a file, or without one a flower, as a network on pixels sees it: (3, grid, grid) in [-1, 1]."""
    return cropped(read_image(path, Path(path).name) if path else flower(), grid).double()


@lru_cache
def flower():
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("flower.jpg"))


def to_show(pixels):
    """Returns (3, h, w) in [-1, 1] as an enlarged uint8 (H, W, 3), each token a square."""
    scale = max(1, SHOWN // pixels.shape[-1])
    shown = (127.5 * pixels + 128).clamp(0, 255).byte().permute(1, 2, 0)   # (h, w, 3)
    return shown.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()


def in_numbers(kernel, K, b, r, tau, terms):
    """Returns the equation of the terms that are on, with its numbers, and beside what it says of the kernel what was measured
    on the grid: Markdown."""
    right = " + ".join(EQUATION[term] for term in TERMS if term in terms) or "0"
    exponent = " + ".join(EXPONENT[term] for term in TERMS if term in terms) or "0"
    (Kxx, Kxy), (_, Kyy) = K.tolist()
    (b_x, b_y), found = b.tolist(), measure(kernel)
    r, tau = r.item(), tau.item()
    rows = {
        "standard deviation along x": ((2 * tau * Kxx) ** 0.5, found["std_x"]),
        "standard deviation along y": ((2 * tau * Kyy) ** 0.5, found["std_y"]),
        "shift to the right": (-tau * b_x, found["shift_x"]),
        "shift down": (-tau * b_y, found["shift_y"]),
        "sum of the kernel": (torch.tensor(tau * r).exp().item(), found["sum"]),
    }
    formulas = (r"$\sqrt{2\tau K_{xx}}$", r"$\sqrt{2\tau K_{yy}}$", r"$-\tau b_x$", r"$-\tau b_y$", r"$e^{\tau r}$")
    matrix = rf"\begin{{pmatrix}} {Kxx:.5f} & {Kxy:.5f} \\ {Kxy:.5f} & {Kyy:.5f} \end{{pmatrix}}"
    lines = [
        rf"$$\frac{{\partial h}}{{\partial t}} = {right}, \qquad \hat h(k, \tau) = e^{{\tau\Lambda(k)}}\,\hat u(k), "
        rf"\qquad \Lambda(k) = {exponent}$$",
        rf"$$K = {matrix}, \quad b = ({b_x:.3f},\ {b_y:.3f}), \quad r = {r:.3f}, \quad \tau = {tau:.2f}$$",
        "| in sides of the picture | | by the equation | measured on the grid |\n|---|---|---:|---:|",
    ]
    table = [f"| {name} | {how} | {a:.4f} | {b:.4f} |" for how, (name, (a, b)) in zip(formulas, rows.items())]
    seen = f"A token sees {found['reach']:.1f} of {kernel.shape[0]} tokens far. Lengths wrap around: the picture is a torus."
    return "\n\n".join([*lines[:2], "\n".join([lines[2], *table]), seen])


def build():
    """Lays the page out; what it computes takes milliseconds. Returns the event of a visit, its inputs and outputs."""
    import gradio as gr

    def show(path, grid, *sliders):
        with one_sentence():
            K, b, r, tau = chosen(*sliders)
            before = picture(path, int(grid))
            kernel, after = evolve(before, K, b, r, tau)
            numbers = in_numbers(kernel, K, b, r, tau, sliders[-1])
            return draw_chosen({"kernel": kernel}), to_show(before), to_show(after), numbers

    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            sliders = [
                gr.Slider(0, 0.3, 0.12, step=0.005, label="K: first width", info="in sides, at τ = 1"),
                gr.Slider(0, 0.3, 0.03, step=0.005, label="K: second width", info="across the first"),
                gr.Slider(-90, 90, 30, step=1, label="K: angle of the first width", info="degrees, from right to down"),
                gr.Slider(-0.5, 0.5, -0.1, step=0.01, label="b, x", info="moves by -τ b, to the right"),
                gr.Slider(-0.5, 0.5, 0.05, step=0.01, label="b, y", info="moves by -τ b, down"),
                gr.Slider(-4, R_MAX, -0.2, step=0.05, label="r", info=f"multiplies by exp(τ r); τ r ≤ {R_MAX:g}"),
                gr.Slider(0.05, 4, 1, step=0.05, label="τ", elem_id="tau"),
                gr.CheckboxGroup(list(TERMS), value=list(TERMS), label="terms"),
            ]
            grid = gr.Slider(8, 256, 128, step=1, label="grid", info="tokens to a side")
        with gr.Column(scale=5):
            with gr.Row():
                kernel = gr.Plot(show_label=False, format="png", elem_id="kernel")
                before = gr.Image(label="the picture", format="png", elem_id="before", buttons=[])
                after = gr.Image(label="at time τ", format="png", elem_id="after", buttons=["download"])
            numbers = gr.Markdown(latex_delimiters=[dict(left=d, right=d, display=len(d) > 1) for d in ("$$", "$")])
            path = gr.File(label="a picture of yours", height=120, elem_id="picture")
    moved = [part.change for part in [path, grid, *sliders]]
    outputs, how = [kernel, before, after, numbers], dict(trigger_mode="always_last", show_progress="hidden")
    gr.on(moved, show, [path, grid, *sliders], outputs, **how)
    return show, [path, grid, *sliders], outputs
