"""Page 2, samples: drawn step by step, with the command that draws the same."""

import shlex
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

from checkpoints.build import for_sampler
from diffusion import create_sampler
from diffusion.drawing import AT_ONCE, choose_classes, draw, name_classes, to_pixels
from diffusion.guidance import create_guidance
from images.samples import make_sheet
from machine.flags import LARGEST, class_label
from pages.checkpoints import checkpoints_in, one_sentence, open_checkpoint

LOOK = 0.1  # seconds between two looks at images on the way
DRAWING = "drawing"  # the queue of all pages that draw: they share the networks, one of which draws at a time
COLUMNS = 4  # of a sheet with one image a class, as in sample.py


class How(NamedTuple):
    """How samples are drawn, as the flags of sample.py say it."""

    classes: tuple[int | str, ...] = ()  # numbers or names; none are those of `choose_classes`
    each: int = 1
    steps: int = 250
    sampler: str | None = None
    scale: float = 4.0
    interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def labels(self, model):
        """Returns the class of each image. ValueError for classes that a model has not, or more images than a page draws."""
        labels = [label for label in choose_classes(model, list(self.classes)) for _ in range(self.each)]
        if len(labels) > AT_ONCE:
            raise ValueError(f"{len(labels)} images are more than the {AT_ONCE} of one page; sample.py draws any number")
        return labels

    def sheet(self, images, model):
        """Returns the images of these labels, uint8 (n, H, W, 3), as the picture that sample.py makes of them."""
        guidance = create_guidance(self.scale, model.in_channels, interval=self.interval)
        captions = None if guidance.drops_classes else name_classes(model, self.labels(model))
        return make_sheet(images, self.each if self.each > 1 else COLUMNS, captions)

    def command(self, path, out="sample.png"):
        """Returns the command that draws the same from the checkpoint at that path."""
        flags = ["--class-labels", *self.classes] if self.classes else []
        flags += ["--sampler", self.sampler] if self.sampler else []
        flags += ["--samples-per-class", self.each, "--num-sampling-steps", self.steps, "--cfg-scale", f"{self.scale:g}"]
        flags += ["--cfg-interval", *(f"{end:g}" for end in self.interval)] if self.interval != (0, 1) else []
        return shlex.join(map(str, ["python", "sample.py", "--ckpt", path, *flags, "--seed", self.seed, "--out", out]))


def read_how(classes, each, seed, steps, sampler, scale, low, high):
    """Returns the How of what a visitor has entered. ValueError for a seed that is none."""
    if seed is None or not 0 <= seed <= LARGEST or seed != int(seed):
        raise ValueError(f"the seed is a whole number from 0, not {seed}")
    classes = tuple(class_label(name.strip()) for name in classes or ())
    return How(classes, int(each), int(steps), sampler or None, scale, (low, high), int(seed))


def appear(opened, how):
    """Yields samples on their way as (uint8 (n, H, W, 3), calls of the network so far), and last of all the finished ones, as
    sample.py draws them.

    The sampler runs in a thread of its own, which the generator polls every LOOK seconds, or less often if decoding its images
    takes long, as on CPUs; the thread ends when the generator is closed.
    """
    labels = how.labels(opened.model)
    objective, sampler = create_sampler(opened.settings["objective"], how.sampler, how.steps, **for_sampler(opened.settings))
    guidance = create_guidance(how.scale, opened.model.in_channels, interval=how.interval)
    calls, latest, left, pause = 0, [], threading.Event(), LOOK

    def watched(objective, network, x, **settings):
        def look(x, t, **labels):
            nonlocal calls
            if left.is_set():
                raise InterruptedError("nobody looks any more")
            calls, latest[:] = calls + 1, [x]
            return network(x, t, **labels)

        return sampler(objective, look, x, **settings)

    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(draw, opened.model, opened.space, objective, watched, labels, how.seed, guidance, progress=False)
        try:
            while wait([drawn], pause).not_done:
                if latest:
                    began = time.perf_counter()
                    yield to_pixels(opened.space.decode(latest.pop())), calls
                    pause = max(LOOK, 4 * (time.perf_counter() - began))
        finally:
            left.set()
    yield drawn.result(), calls


def controls():
    """Lays out what both pages ask for, and returns the components of `read_how` without classes, number of each and
    sampler: seed, steps, guidance and the ends of its interval."""
    import gradio as gr

    with gr.Row():
        seed = gr.Number(0, precision=0, minimum=0, label="seed", min_width=90)
        steps = gr.Slider(1, 250, 50, step=1, label="steps", min_width=140)
    scale = gr.Slider(0, 10, 4, step=0.1, label="guidance", info="1 is none")
    with gr.Row():
        low = gr.Slider(0, 1, 0, step=0.01, label="guided from", info="noise: 0", min_width=140)
        high = gr.Slider(0, 1, 1, step=0.01, label="to", info="image: 1", min_width=140)
    return seed, steps, scale, low, high


def build(folders, device):
    """Lays the page out. Returns the event of a visit, its inputs and outputs."""
    import gradio as gr

    def look_around(path):
        found = checkpoints_in(folders)
        return gr.update(choices=found, value=path if path in found else found[0] if found else None)

    def open_it(path):
        with one_sentence():
            opened = open_checkpoint(path, folders, device) if path else None
        if not opened:
            return gr.update(), gr.update(), ""
        classes, samplers = opened.classes(), opened.samplers()
        first = [text for _, text in classes[:4]]
        return gr.update(choices=classes, value=first), gr.update(choices=samplers, value=samplers[0]), opened.in_words()

    def draw_it(path, classes, each, seed, steps, sampler, scale, low, high):
        with one_sentence():
            opened = open_checkpoint(path, folders, device)
            how, began = read_how(classes, each, seed, steps, sampler, scale, low, high), time.perf_counter()
            for images, calls in appear(opened, how):
                taken = time.perf_counter() - began
                yield how.sheet(images, opened.model), f"{calls} calls of the network, {taken:.1f} s", how.command(path)

    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            path = gr.Dropdown([], label="checkpoint", info=f"in {', '.join(folders)}", elem_id="checkpoint")
            about = gr.Markdown()
            more = dict(multiselect=True, allow_custom_value=True, info="names or numbers, chosen or typed")
            classes = gr.Dropdown([], label="classes", elem_id="classes", **more)
            with gr.Row():
                each = gr.Slider(1, 8, 4, step=1, label="images", info="of each class", min_width=140)
                sampler = gr.Dropdown([], label="sampler", info="of the objective", min_width=120)
            seed, steps, scale, low, high = controls()
            with gr.Row():
                go, stop = gr.Button("Draw", variant="primary", elem_id="draw"), gr.Button("Stop")
        with gr.Column(scale=4):
            sheet = gr.Image(label="samples", format="png", elem_id="samples", buttons=["download", "fullscreen"])
            state = gr.Markdown(elem_id="state")
            command = gr.Textbox(label="the command that draws the same", lines=2, buttons=["copy"], elem_id="command")
    inputs = [path, classes, each, seed, steps, sampler, scale, low, high]
    path.change(open_it, path, [classes, sampler, about])
    drawing = go.click(draw_it, inputs, [sheet, state, command], show_progress="hidden", concurrency_id=DRAWING)
    stop.click(None, cancels=drawing)
    return look_around, path, path
