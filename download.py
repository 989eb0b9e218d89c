"""Pre-trained DiT weights by name."""

import os
from contextlib import suppress
from pathlib import Path
from time import time

from checkpoints.hub import locate
from checkpoints.read import load_checkpoint, read_checkpoint
from machine.files import partial_path

PRETRAINED = "https://dl.fbaipublicfiles.com/DiT/models/"
ABANDONED = 3600  # seconds after which a part of a file that has not grown is of a download that was killed
pretrained_models = {"DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt"}


def public_checkpoint(model=None, mixer=None, image_size=None, num_classes=None):
    """Names the public checkpoint of these settings, None being its own. ValueError if there is none of them."""
    wanted = (model or "DiT-XL/2", mixer or "attention", image_size or 256, num_classes or 1000)
    if wanted not in {("DiT-XL/2", "attention", size, 1000) for size in (256, 512)}:
        raise ValueError("without --ckpt there is only DiT-XL/2 with attention, 1000 classes, at --image-size 256 or 512")
    return f"DiT-XL-2-{wanted[2]}x{wanted[2]}.pt"


def find_checkpoint(name):
    """Returns the path of a checkpoint, fetching it if it is missing: for one of pretrained_models, its file under
    pretrained_models/; for a folder or id of the hub, the result of `locate`; else `name`. OSError if fetching fails."""
    if name not in pretrained_models:
        return locate(name)
    path = os.path.join("pretrained_models", name)
    if not os.path.isfile(path):
        from torch.hub import download_url_to_file

        os.makedirs("pretrained_models", exist_ok=True)
        partial = partial_path(path)
        for left in Path("pretrained_models").glob(f"{name}.*.partial"):
            with suppress(OSError):
                if time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()
        try:
            download_url_to_file(PRETRAINED + name, partial)
            read_checkpoint(partial)  # a connection that ends early raises no error
            os.replace(partial, path)
        except (OSError, ValueError) as error:
            raise OSError(f"could not fetch {PRETRAINED + name} ({error}); put it at {path}, or give --ckpt") from error
        finally:
            with suppress(OSError):
                os.unlink(partial)
    return path


def find_model(model_name):
    """Reads the state dict of a pre-trained model by name, or of a checkpoint by path (of its EMA, if it has one)."""
    return load_checkpoint(find_checkpoint(model_name))[0]


if __name__ == "__main__":
    try:
        for model in sorted(pretrained_models):
            print(find_checkpoint(model))
    except OSError as error:
        raise SystemExit(f"download.py: error: {error}") from None
