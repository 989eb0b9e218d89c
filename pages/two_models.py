"""Page 3, two models: the same noise through two checkpoints, and where the images differ."""

from pages.checkpoints import checkpoints_in, one_sentence, open_checkpoint
from pages.samples import DRAWING, appear, controls, read_how


def check_alike(first, second, how):
    """Raises a ValueError unless both checkpoints draw as many images from the same noise."""
    shapes = [(opened.model.in_channels, *opened.model.input_size) for opened in (first, second)]
    if shapes[0] != shapes[1]:
        sizes = [" x ".join(map(str, shape)) for shape in shapes]
        raise ValueError(f"{first.path} draws from noise of {sizes[0]}, {second.path} from {sizes[1]}: it cannot be the same")
    if len(how.labels(first.model)) != len(how.labels(second.model)):
        raise ValueError("choose classes that both have: without any, the two draw different numbers of images")


def difference(images, others):
    """Returns the absolute difference of images, uint8 (n, H, W, 3), and its mean as a share of the whole range."""
    apart = (images.int() - others.int()).abs()
    return apart.byte(), apart.double().mean().item() / 255


def build(folders, device):
    """Lays the page out. Returns the event of a visit, its inputs and outputs."""
    import gradio as gr

    def look_around(*paths):
        found = checkpoints_in(folders)
        there = [path if path in found else found[min(i, len(found) - 1)] if found else None for i, path in enumerate(paths)]
        return [gr.update(choices=found, value=path) for path in there]

    def offer(path):
        with one_sentence():
            classes = open_checkpoint(path, folders, device).classes() if path else []
        return gr.update(choices=classes, value=[text for _, text in classes[:4]])

    def draw_both(path, other, classes, each, *rest):
        with one_sentence():
            first, second = (open_checkpoint(one, folders, device) for one in (path, other))
            how = read_how(classes, each, *rest[:2], None, *rest[2:])
            check_alike(first, second, how)
            commands = "\n".join(how.command(*one) for one in ((path, "first.png"), (other, "second.png")))
            for images, calls in appear(first, how):
                left = how.sheet(images, first.model)
                yield left, None, None, f"{calls} calls of the first network", commands
            for others, calls in appear(second, how):
                right = how.sheet(others, second.model)
                yield left, right, None, f"{calls} calls of the second network", commands
            apart, mean = difference(images, others)
            said = f"The pictures differ by {mean:.1%} of the range on average."
            yield left, right, how.sheet(apart, first.model), said, commands

    with gr.Row():
        path = gr.Dropdown([], label="first checkpoint", elem_id="first")
        other = gr.Dropdown([], label="second checkpoint", elem_id="second")
    with gr.Row():
        with gr.Column():
            more = dict(multiselect=True, allow_custom_value=True, info="of both; names or numbers, chosen or typed")
            classes = gr.Dropdown([], label="classes", **more)
            each = gr.Slider(1, 8, 2, step=1, label="images", info="of each class")
        with gr.Column():
            rest = controls()
    go = gr.Button("Draw both from the same noise", variant="primary", elem_id="draw-both")
    with gr.Row():
        shown = [
            gr.Image(label=label, format="png", elem_id=name, buttons=["download"])
            for label, name in (("first", "left"), ("second", "right"), ("difference", "apart"))
        ]
    state = gr.Markdown(elem_id="both-state")
    commands = gr.Textbox(label="the commands that draw these", lines=2, buttons=["copy"])
    path.change(offer, path, classes)
    inputs, outputs = [path, other, classes, each, *rest], [*shown, state, commands]
    go.click(draw_both, inputs, outputs, show_progress="hidden", concurrency_id=DRAWING)
    return look_around, [path, other], [path, other]
