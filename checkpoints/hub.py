"""Models on Hugging Face's hub and in folders of its format: locates their files, and uploads folders."""

import re
from pathlib import Path

from backbones.pretrained import WEIGHTS

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".dcp")
PIPELINE = ("model_index.json", "transformer/*", "vae/*", "scheduler/*")  # of diffusers


def locate(name):
    """Returns the path of a checkpoint named by --ckpt. For a folder that save_pretrained wrote, it is the file of weights; for
    an id on the hub, owner/name, the same file in the hub's cache, fetched if missing, or a folder of diffusers there. Other
    names are returned unchanged. OSError for an id that cannot be fetched."""
    if Path(name, WEIGHTS).is_file():
        return str(Path(name, WEIGHTS))
    if Path(name).exists() or not ID.fullmatch(str(name)) or Path(name).suffix in FILES:
        return name
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            return hf_hub_download(name, WEIGHTS)
        except EntryNotFoundError as error:
            folder = snapshot_download(name, allow_patterns=list(PIPELINE))
            if not Path(folder, PIPELINE[0]).is_file():
                raise error
            return folder
    except Exception as error:  # of the network, of which there are many kinds
        reason = " ".join(str(error).split())
        raise OSError(f"no checkpoint at {name}, and no model of that name to be had from the hub: {reason[:300]}") from error


def push(folder, repository):
    """Says what is in a folder, and uploads it to the hub as the model of that id. ValueError without a login, OSError if it
    fails."""
    from huggingface_hub import HfApi, get_token

    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    listed = ", ".join(f"{path.relative_to(folder)} ({path.stat().st_size / 1e6:,.1f} MB)" for path in files)
    api = HfApi()
    print(f"To be uploaded to {api.endpoint}/{repository}: {listed}")
    if not get_token():
        raise ValueError("uploading needs a login: run `hf auth login`, or set HF_TOKEN to one's token; nothing was sent")
    try:
        api.create_repo(repository, exist_ok=True)
        where = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload the model")
    except Exception as error:  # of the network, of which there are many kinds
        raise OSError(f"could not upload to {api.endpoint}/{repository}: {' '.join(str(error).split())[:300]}") from error
    print(f"Uploaded: {where.commit_url}")
