"""One process or many: what torchrun started, and how a command ends."""

import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist


class Processes(NamedTuple):
    """This process's place: rank of size, and its device."""

    rank: int
    size: int
    device: torch.device

    def barrier(self):
        if self.size > 1:
            dist.barrier()


def launch(command, args):
    """Runs command(args, processes) under `python` or `torchrun`, NCCL on CUDA and gloo on CPUs.

    What the user or the machine got wrong (ValueError, OSError) ends it with one line and exit status 1 instead of a
    traceback; `python -X dev` shows the traceback.
    """
    try:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: PyTorch finds no CUDA device here; use --device cpu")
        if "RANK" not in os.environ:
            command(args, Processes(0, 1, torch.device(device)))
            return
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
                raise ValueError(f"there are {torch.cuda.device_count()} CUDA devices here, too few for --nproc_per_node")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        command(args, Processes(dist.get_rank(), dist.get_world_size(), torch.device(device)))
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {_one_line(error)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _one_line(error):
    """The message; of an error that crossed from a data worker, which carries a traceback as text, the last line."""
    message = str(error).strip()
    if "Original Traceback" in message:
        message = message.splitlines()[-1].partition(": ")[2]
    return message
