"""Where else a run's numbers and pictures are shown, besides its folder: functions of the folder, the run's settings
and the step after which it goes on that return track(step, numbers, picture=None), numbers by name, the path of a PNG."""

import json
import os
from uuid import uuid4

import numpy as np
from PIL import Image

from machine.files import whole_file


def tensorboard(folder, settings, first=0):
    """Event files in the folder: `tensorboard --logdir results`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise OSError(f"--tracker tensorboard: pip install tensorboard ({error})") from error
    writer = SummaryWriter(folder, purge_step=first + 1 if first else None)
    writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```")

    def track(step, numbers, picture=None):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        if picture:
            with Image.open(picture) as image:
                writer.add_image("samples", np.asarray(image), step, dataformats="HWC")
        writer.flush()  # a run that is killed has shown what it wrote

    return track


def weights_and_biases(folder, settings, first=0):
    """A run of the project pde-ssm-dit, which goes on when training does. Without an account, or as WANDB_MODE has it, kept
    in the folder for `wandb sync`.

    A kill takes along what wandb had not written yet. So a run that goes on first shows again what its folder knows: offline
    all of it, in place of what was kept before, and online what the account has not got.
    """
    try:
        import wandb
    except ImportError as error:
        raise OSError(f"--tracker wandb: pip install wandb ({error})") from error
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    identity = folder / "wandb-id.txt"
    if not identity.exists():
        with whole_file(identity, "id of the run") as file:
            file.write(uuid4().hex[:8].encode())
    for before in folder.glob("wandb/offline-run-*") if mode in ("offline", "dryrun") else []:
        os.renames(before, folder / "wandb-before" / before.name)  # where `wandb sync` does not look
    known = dict(id=identity.read_text(), resume="allow")
    try:
        run = wandb.init(project="pde-ssm-dit", name=folder.name, dir=folder, config=settings, mode=mode, **known)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise OSError(f"--tracker wandb does not begin: {reason}; WANDB_MODE=offline keeps the run in its folder") from error
    begun = run.step

    def track(step, numbers, picture=None):
        if step >= begun:  # of a run that goes on, the account has got the others
            run.log(numbers | ({"samples": wandb.Image(str(picture))} if picture else {}), step=step)

    for step, numbers, picture in shown_before(folder, first):
        track(step, numbers, picture)
    return track


def shown_before(folder, last):
    """(step, numbers, picture) of all that a run's folder has up to step `last`, in order."""
    log = folder / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    shown = [(row["step"], numbers_of(row), None) for row in rows]
    shown += [(int(path.stem), {}, path) for path in folder.glob("samples/*.png")]
    return sorted((entry for entry in shown if entry[0] <= last), key=lambda entry: entry[0])


def numbers_of(row):
    """What trackers show of a line of the log."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}


TRACKERS = {"tensorboard": tensorboard, "wandb": weights_and_biases}
