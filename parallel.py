"""One process or many: what torchrun started, what a command is given, and how it ends."""

import ctypes
import os
import re
import sys
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


class Processes(NamedTuple):
    """This process's place: rank of size, and its device."""

    rank: int
    size: int
    device: torch.device

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def any(self, *flags):
        """Which of the flags are true on some process."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(map(bool, raised.tolist()))

    def mean(self, x):
        """The mean over all processes of a tensor, which is overwritten."""
        if self.size > 1:
            dist.all_reduce(x)
        return x / self.size

    def share(self, value):
        """What rank 0 has, on every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]


ALONE = Processes(0, 1, torch.device("cpu"))


def launch(command, args):
    """Runs command(args, processes) under `python` or `torchrun`, NCCL on CUDA and gloo on CPUs.

    What the user or the machine got wrong (ValueError, OSError) ends it with one line and exit status 1 instead of a
    traceback; `python -X dev` shows the traceback.
    """
    try:
        device = choose_device(args.device)
        if device.type == "cpu":
            keep_freed_memory()
        if "RANK" not in os.environ:
            command(args, Processes(0, 1, device))
            return
        # torchrun's store still holds the addresses of workers that it has started again since.
        store, rank, size = next(rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
        command(args, Processes(dist.get_rank(), dist.get_world_size(), device))
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {_one_line(error)}")
    except RuntimeError as error:
        # Where another process has ended with its own message, all that is left to say is that it did.
        if sys.flags.dev_mode or not dist.is_initialized() or not re.search("onnection (closed|reset) by peer", str(error)):
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: stopped, because another process did")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def choose_device(name):
    """The device that --device names, cuda being this process's own one; ValueError if there is no such device."""
    there = torch.cuda.device_count()
    if name is None:
        name = "cuda" if there else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (index and not index.isdigit())):
        raise ValueError(f"--device {name} is none of cpu, cuda and cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    index = int(index or os.environ.get("LOCAL_RANK", 0))
    if index >= there:
        raise ValueError(f"--device {name}: CUDA device {index} is wanted and PyTorch finds {there}; use --device cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt knows them by these numbers


def keep_freed_memory():
    """Lets this process keep the memory of tensors that are gone, as PyTorch's allocator does on GPUs.

    On CPUs PyTorch leaves it to the C library. glibc hands large pieces back to the system, which has to clear every page
    that it gives out again: that can take as long as the computation.
    """
    with suppress(AttributeError, OSError):                                # another C library, which knows no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def return_freed_memory():
    """The opposite, so that the memory of this process is that of its tensors: for measuring, not for speed."""
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)


def _one_line(error):
    """The message; of an error that crossed from a data worker, which carries a traceback as text, the last line."""
    message = str(error).strip()
    if "Original Traceback" in message:
        message = message.splitlines()[-1].partition(": ")[2]
    return message

