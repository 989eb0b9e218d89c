"""One process or several: joins those that torchrun started, runs a command on them, and ends it cleanly."""

import atexit
import ctypes
import os
import re
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from machine.stops import Stopped, end_readers, install_handlers, outlived_terminal, postpone

# Processes wait for one another this long, because some work is done by one of them alone: fetching weights, joining a data
# set's files, writing checkpoints and 50,000 images. One that dies is noticed at once, by the others or by what started them.
PATIENCE = timedelta(hours=12)
FAREWELL = 30  # most seconds that a process may take to exit while others still run
# Texts in PyTorch's RuntimeErrors when the machine runs out of a resource.
SHORT = "t allocate memory|not enough memory|hared memory|unable to mmap|oo many open files|o space left|ancdata"


class Processes(NamedTuple):
    """This process's place: rank of size, and its device.

    Its methods are calls of torch.distributed, as those of accelerate.utils are, which would first make a PartialState: that
    chooses a number of threads on CPUs, on which last bits depend, and takes 0.3 seconds to import.
    """

    rank: int
    size: int
    device: torch.device

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_process_first(self):
        """Lets rank 0 run the body before all others do: what it fetches or makes there, they find."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def any(self, *flags):
        """Returns which of the flags are true on some process. It waits for the processes and not for their GPUs."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32, device="cpu")
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(map(bool, raised.tolist()))

    def mean(self, x):
        """Returns the mean over all processes of a tensor, which is overwritten."""
        if self.size > 1:
            dist.all_reduce(x)
        return x / self.size

    def share(self, value):
        """Returns the value that rank 0 has, on every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather(self, value):
        """Returns the values that the processes have, in their order, on every process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


ALONE = Processes(0, 1, torch.device("cpu"))


def launch(command, args):
    """Runs command(args, processes) under `python` or `torchrun`, with gloo for tensors on CPUs and NCCL for those on GPUs.

    A command without a --device runs on CPUs.

    What the user or the machine got wrong (ValueError, OSError) ends it with one line and exit status 1 instead of a
    traceback; `python -X dev` shows the traceback.
    """
    with suppress(AttributeError):  # the stream may be no text file
        sys.stdout.reconfigure(errors="backslashreplace")  # as for stderr: no name raises an error
    with outlived_terminal():
        try:
            install_handlers()
            processes = join(choose_device(getattr(args, "device", "cpu")))
            command(args, processes)
            sys.stdout.flush()  # errors of delayed writing show here
            processes.barrier()  # some launchers terminate the others when one process exits
        except BaseException as error:
            postpone()
            end_readers()
            name, reason = os.path.basename(sys.argv[0]), None if sys.flags.dev_mode else explain(error)
            if isinstance(error, Stopped):
                print(f"{name}: stopped by {error}", file=sys.stderr)
            end = error if reason is None else SystemExit(f"{name}: error: {reason}")
            if dist.is_initialized():
                leave(end)
            raise end  # noqa: B904
    if dist.is_initialized():
        dist.destroy_process_group()


def join(device):
    """Returns this process's place among those that torchrun started, or alone. ValueError if RANK makes no sense."""
    if device.type == "cpu":
        keep_freed_memory()
    if "RANK" not in os.environ:
        return Processes(0, 1, device)
    rank, size = os.environ["RANK"], os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(f"RANK is {rank!r} and WORLD_SIZE {size!r}: torchrun sets both; without RANK there is one process")
    store, rank, size = next(rendezvous("env://"))
    store.set_timeout(PATIENCE)
    # torchrun's store still holds the addresses of workers that it has started again since.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return Processes(rank, size, device)


def explain(error):
    """Returns one line on an error; None for an unforeseen one, whose traceback says more."""
    short = isinstance(error, RuntimeError) and re.search(SHORT, str(error))
    if short or isinstance(error, (ValueError, OSError, MemoryError, torch.OutOfMemoryError)):
        return one_line(error)
    network, joined = isinstance(error, (dist.DistNetworkError, dist.DistStoreError)), dist.is_initialized()
    if network and not joined:
        return f"the processes do not find one another: {one_line(error)}; torchrun --standalone takes a port that is free"
    # If another process has ended with its own message, this one only reports that.
    if joined and (network or re.search("onnection (closed|reset) by peer", str(error))):
        return "stopped, because another process did"
    return None


def leave(end):
    """Exits this one of several processes with the exception's message. A normal exit would wait for the others, which may be
    waiting for this one. Functions registered with atexit, such as wandb's last upload, get half a minute."""
    if not isinstance(end, SystemExit):
        sys.excepthook(type(end), end, end.__traceback__)
        end = SystemExit(1)
    if isinstance(end.code, str):
        sys.stderr.write(f"{end.code}\n")  # in one piece: others may be writing theirs
        end = SystemExit(1)
    with suppress(OSError):  # output that a full disk has no room for must not keep this process from leaving
        sys.stderr.flush(), sys.stdout.flush()
    out = threading.Timer(FAREWELL, os._exit, [end.code or 0])
    out.daemon = True
    out.start()
    atexit._run_exitfuncs()
    os._exit(end.code or 0)


def choose_device(name):
    """Returns the device that --device names, cuda being this process's own one. ValueError if there is no such device."""
    there = torch.cuda.device_count()
    if name is None:
        name = "cuda" if there else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (index and not index.isdecimal())):
        raise ValueError(f"--device {name} is none of cpu, cuda and cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", 0))
    if index and place and there > 1:
        raise ValueError(f"--device {name} is one GPU for several processes; --device cuda gives each its own")
    index = int(index or place)
    if index >= there:
        fewer = f" or at most {there} processes" if there and place else ""
        raise ValueError(f"--device {name}: CUDA device {index} is wanted and PyTorch finds {there}; use --device cpu{fewer}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt knows them by these numbers


def keep_freed_memory():
    """Makes this process keep the memory of freed tensors, as PyTorch's allocator does on GPUs.

    On CPUs PyTorch leaves this to the C library. glibc returns large blocks to the system, which has to clear every page before
    it hands it out again: that can take as long as the computation.
    """
    with suppress(AttributeError, OSError):                                # another C library, which knows no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def return_freed_memory():
    """Undoes keep_freed_memory, so that the memory of this process is that of its tensors: for measuring, not for speed."""
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)


def one_line(error):
    """Returns an error's message in one line: the last line if it came from a data worker, whose traceback it carries as text;
    the first if it is PyTorch's own, which goes on with places in its code; and the error's type where that says too little."""
    message = str(error).strip()
    if "Original Traceback" in message:
        return message.splitlines()[-1].partition(": ")[2]
    if isinstance(error, ValueError | OSError) and message:
        return message
    kind = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    return ": ".join(filter(None, [kind, message])).splitlines()[0].removeprefix("RuntimeError: ")
