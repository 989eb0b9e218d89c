"""Pre-trained DiT weights by name."""

import os

from checkpoints.read import load_checkpoint

PRETRAINED = "https://dl.fbaipublicfiles.com/DiT/models/"
pretrained_models = {"DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt"}


def find_checkpoint(name):
    """The path of a checkpoint: `name` itself, or for one of pretrained_models its file under pretrained_models/,
    fetched if it is not there. OSError if it cannot be fetched."""
    if name not in pretrained_models:
        return name
    path = os.path.join("pretrained_models", name)
    if not os.path.isfile(path):
        from torch.hub import download_url_to_file  # writes to a temporary name first

        os.makedirs("pretrained_models", exist_ok=True)
        try:
            download_url_to_file(PRETRAINED + name, path)
        except OSError as error:
            raise OSError(f"could not fetch {PRETRAINED + name} ({error}); put it at {path}, or give --ckpt") from error
    return path


def find_model(model_name):
    """The state dict of a pre-trained model by name, or of a checkpoint by path (of its EMA, if it has one)."""
    return load_checkpoint(find_checkpoint(model_name))[0]


if __name__ == "__main__":
    for model in sorted(pretrained_models):
        print(find_checkpoint(model))
