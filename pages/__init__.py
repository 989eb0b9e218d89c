"""The pages of app.py: each file computes what its page shows, and lays it out with Gradio, which only that needs.

    checkpoints.py    which checkpoints may be opened; a model that is; mistakes as one sentence
    operator.py       page 1: one PDE, its kernel, and what it makes of a picture
    samples.py        page 2: samples, step by step, and the command that draws the same
    two_models.py     page 3: the same noise through two checkpoints
"""
