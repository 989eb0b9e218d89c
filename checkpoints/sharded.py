"""Checkpoints in pieces: a folder into which every process writes its part of the tensors, by PyTorch's distributed
checkpointing, and from which any number of processes reads them."""

import os
import pickle
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from machine.files import whole_file

SETTINGS = "settings.pt"  # what is not a tensor, and the checksums of the other files


def save_sharded(path, tensors, **contents):
    """Writes dicts of tensors to a folder under a temporary name, which the first process renames. Every process calls it."""
    partial = Path(f"{path}.partial")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save(tensors, checkpoint_id=partial)
        sums = [None] * dist.get_world_size()
        mine = [*partial.glob(f"__{dist.get_rank()}_*"), *([partial / ".metadata"] if first else [])]
        dist.all_gather_object(sums, {file.name: checksum(file) for file in mine})
        if first:
            write_settings(partial, contents | dict(files={name: value for part in sums for name, value in part.items()}))
            shutil.rmtree(path, ignore_errors=True)
            os.rename(partial, path)
    except (dcp.api.CheckpointException, OSError) as error:
        reason = str(error).strip().splitlines()[-1]  # of a full disk PyTorch says that a position is unexpected
        raise OSError(f"could not write the checkpoint {path}; is the disk full? {reason}") from error
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()


def write_settings(path, contents):
    """Writes what is not a tensor into the folder."""
    with whole_file(path / SETTINGS, "settings") as file:
        torch.save(contents, file)


def checksum(path):
    value = 0
    with open(path, "rb") as file:
        while part := file.read(2**24):
            value = zlib.crc32(part, value)
    return value


def read_settings(path):
    """Returns what a folder holds besides tensors. ValueError if it is no such folder."""
    try:
        return torch.load(Path(path, SETTINGS), weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        raise ValueError(f"{path} is damaged or no checkpoint ({SETTINGS} cannot be read)") from error


def check_pieces(path):
    """Reads the whole folder. ValueError if a byte of it is missing or has changed."""
    for name, value in read_settings(path)["files"].items():
        if not Path(path, name).is_file() or checksum(Path(path, name)) != value:
            raise ValueError(f"{path} is damaged ({name})")


def load_sharded(path, tensors):
    """Reads into dicts of tensors, whole or sharded, those of the same names. Every process calls it.

    ValueError for tensors of other names or sizes.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is no mistake
            dcp.load(tensors, storage_reader=Reader(path))
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit or is damaged: {str(error).strip().splitlines()[-1]}") from error


def read_whole(path, part):
    """Returns one of the dicts of tensors that were saved, as whole tensors on the CPU."""
    metadata = Reader(path).read_metadata().state_dict_metadata
    named = {name.removeprefix(f"{part}."): entry for name, entry in metadata.items() if name.startswith(f"{part}.")}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in named.items()}
    load_sharded(path, {part: tensors})
    return tensors


class Reader(dcp.FileSystemReader):
    """Reads nothing but tensors: PyTorch's own unpickles the index, and values that are no tensors, without looking."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path, ".metadata"), "rb") as file:
            try:
                return Index(file).load()
            except Exception as error:  # the unpickler raises nearly anything on damaged bytes
                raise ValueError(f"{self.path} is damaged or no checkpoint ({error})") from error


class Index(pickle.Unpickler):
    """Makes up the index from its own classes and no others."""

    known = {  # noqa: RUF012
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorProperties", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata", "MetadataIndex",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64"},
        "pathlib": {"PosixPath", "PurePosixPath"},
    }  # fmt: skip

    def find_class(self, module, name):
        module = "pathlib" if module == "pathlib._local" else module       # as Python 3.13 calls it, and no other version
        if name in self.known.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index holds {module}.{name}")
