"""The pages of app.py: each file computes the contents of its page, and lays it out with Gradio, which only the layout needs.

    checkpoints.py    the checkpoints that may be opened, an opened model, and a visitor's mistakes as one sentence
    operator.py       page 1: one PDE, its kernel, and its effect on a picture
    samples.py        page 2: samples, step by step, and the command that draws the same
    two_models.py     page 3: the same noise through two checkpoints
"""
