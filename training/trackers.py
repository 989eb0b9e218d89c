"""Shows a run's numbers and pictures outside its folder, in any service for which accelerate has a tracker.

TRACKERS holds functions of the folder, the run's settings and the step after which it resumes. Each returns
track(step, numbers, picture=None), with numbers by name and the path of a PNG. A tracker's package is imported when chosen,
and `check_installed` says beforehand whether that will work.
"""

import json
import os
from functools import partial
from importlib import import_module
from uuid import uuid4

import numpy as np
from PIL import Image

from machine.files import read_rows, whole_file

PROJECT = "pde-ssm-dit"
# Variables by which accelerate detects several processes. They are hidden from it, since only one process tracks, and it would
# otherwise choose a number of threads, on which the last bits of results depend.
SEVERAL = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_installed(name):
    """Imports what a tracker needs besides accelerate. OSError if that is not installed."""
    try:
        import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise OSError(f"--tracker {name}: pip install {name} ({error})") from error


def start(name, title, /, **how):
    """Returns accelerate's tracker of that name, begun under a title. how: further arguments of its class. OSError if it does
    not begin."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    hidden = {variable: os.environ.pop(variable) for variable in SEVERAL if variable in os.environ}
    try:
        PartialState(cpu=True)  # without which accelerate's trackers do not log
    finally:
        os.environ |= hidden
    tracker = LOGGER_TYPE_TO_CLASS[name](title, **how)
    try:
        tracker.start()
    except Exception as error:
        advice = "; WANDB_MODE=offline keeps the run in its folder" if name == "wandb" else ""
        raise OSError(f"--tracker {name} does not begin: {' '.join(str(error).split())}{advice}") from error
    return tracker


def tensorboard(folder, settings, first=0):
    """Writes event files into the folder: `tensorboard --logdir results`."""
    how = dict(logging_dir=folder.parent, purge_step=first + 1 if first else None)
    tracker = start("tensorboard", folder.name, **how)
    tracker.tracker.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```")

    def track(step, numbers, picture=None):
        if picture:
            with Image.open(picture) as image:
                tracker.log_images({"samples": np.asarray(image)[None]}, step=step, dataformats="NHWC")
        tracker.log(numbers, step=step)  # which flushes: a run that is killed has shown what it wrote

    return track


def weights_and_biases(folder, settings, first=0):
    """Shows a run in Weights & Biases, and resumes it there when training resumes. Without an account, or if WANDB_MODE says
    so, it stays in the folder for `wandb sync`.

    A kill loses what wandb had not written yet. So a resumed run first shows again what its folder holds: offline all of it,
    replacing what was written before, and online what the account does not have.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    identity = folder / "wandb-id.txt"
    if not identity.exists():
        with whole_file(identity, "id of the run") as file:
            file.write(uuid4().hex[:8].encode())
    for before in folder.glob("wandb/offline-run-*") if mode in ("offline", "dryrun") else []:
        os.renames(before, folder / "wandb-before" / before.name)  # where `wandb sync` does not look
    known = dict(id=identity.read_text(), resume="allow")
    tracker = start("wandb", PROJECT, name=folder.name, dir=folder, config=settings, mode=mode, **known)
    begun = tracker.tracker.step

    def track(step, numbers, picture=None):
        if step >= begun:  # of a run that goes on, the account has got the others
            tracker.log(numbers | ({"samples": wandb.Image(str(picture))} if picture else {}), step=step)

    for step, numbers, picture in shown_before(folder, first):
        track(step, numbers, picture)
    return track


def other(name, arguments, folder, settings, first=0):
    """Shows a run in one of accelerate's other trackers. A run that goes on begins a new one there, of the later steps.

    arguments: a function of the folder that returns title and further arguments of the tracker's class.
    """
    title, how = arguments(folder)
    tracker = start(name, title, **how)
    plain = {key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value) for key, value in settings.items()}
    tracker.store_init_configuration(plain)

    def track(step, numbers, picture=None):
        if numbers:
            tracker.log(numbers, step=step)
        if picture and hasattr(tracker, "log_images"):  # not comet_ml, mlflow, dvclive and trackio
            with Image.open(picture) as image:
                pixels = np.asarray(image)
            tracker.log_images({"samples": [pixels] if name == "swanlab" else pixels}, step=step)

    return track


def shown_before(folder, last):
    """Returns (step, numbers, picture) of all that a run's folder has up to step `last`, in order."""
    shown = [(row["step"], numbers_of(row), None) for row in read_rows(folder / "log.jsonl")]
    shown += [(int(path.stem), {}, path) for path in folder.glob("samples/*.png") if path.stem.isdecimal()]
    return sorted((entry for entry in shown if entry[0] <= last), key=lambda entry: entry[0])


def numbers_of(row):
    """Returns what trackers show of a row of the log."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}


# By tracker: the title that accelerate's class takes first, and further arguments for its library.
OTHERS = {
    "aim": lambda folder: (folder.name, dict(logging_dir=folder)),
    "clearml": lambda folder: (PROJECT, dict(task_name=folder.name)),
    "comet_ml": lambda folder: (PROJECT, {}),
    "dvclive": lambda folder: (PROJECT, dict(dir=str(folder / "dvclive"))),
    "mlflow": lambda folder: (PROJECT, dict(run_name=folder.name)),
    "swanlab": lambda folder: (PROJECT, dict(experiment_name=folder.name, logdir=str(folder / "swanlab"))),
    "trackio": lambda folder: (PROJECT, dict(name=folder.name)),
}
TRACKERS = {"tensorboard": tensorboard, "wandb": weights_and_biases}
TRACKERS |= {name: partial(other, name, arguments) for name, arguments in OTHERS.items()}
