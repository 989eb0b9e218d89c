"""Builds C++ kernels at their first use: a compiler (CXX, else g++ or c++) compiles them, in a second or two, into the user's
cache (XDG_CACHE_HOME, else ~/.cache)."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-std=c++17", "-Wno-psabi"]


def load(source, *flags):
    """Returns the compiled kernels of a C++ file and None, or None and the reason why there are none. Builds them unless they
    are cached; flags are passed to the compiler after FLAGS."""
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in ("g++", "c++") if shutil.which(name)][:1]
        if not compiler:
            return None, "there is no C++ compiler: install g++, or name another in CXX"
        command = [*compiler, *FLAGS, *flags]
        texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
        key = hashlib.sha256("\n".join([*texts, *command, processor()]).encode()).hexdigest()[:16]
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pde_ssm", f"{key}.so")
        if path.exists():
            with suppress(OSError):                                        # a damaged file raises it, and is built again
                return ctypes.CDLL(str(path)), None
        build([*command, str(source)], path)
        return ctypes.CDLL(str(path)), None
    except (OSError, RuntimeError, ValueError) as error:                   # there is no home folder, or CXX has an open quote
        way_out = "; CXX names another compiler, XDG_CACHE_HOME another folder for them"
        return None, f"the kernels of {source.parent.name}/{source.name} could not be built: {error}{way_out}"


def found(library, what="PDEs"):
    """Returns whether a library, a function with the results of `load`, has kernels; warns once for each reason if it has
    none."""
    _, reason = library()
    if reason:
        warnings.warn(f"{reason}; {what} on CPUs run by PyTorch's operations, which are slower", stacklevel=2)
    return reason is None


def kernel(library, name):
    """Returns a kernel of a library. RuntimeError where there are none, as in a program that was exported elsewhere."""
    kernels, reason = library()
    if reason:
        raise RuntimeError(reason)
    return getattr(kernels, name)


def address(tensor):
    """Returns where a tensor's values lie, 0 for None. ValueError for one that is not in the processor's memory, where a kernel
    would crash: a weight on another device than the tokens, or that was never loaded."""
    if tensor is None:
        return 0
    if not tensor.is_cpu:
        where = f"tokens are on the CPU, and a tensor of shape {tuple(tensor.shape)} is on {tensor.device}"
        raise ValueError(f"{where}: load the weights, or move the layer to the device of its tokens")
    return tensor.data_ptr()


def processor():
    """Returns the processor's name and features, on which compiled code depends: different machines can share one home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return " ".join([platform.machine(), platform.processor(), *features])


def build(command, path):
    """Compiles the kernels into a file. OSError with the compiler's first error message."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:           # others may build it too and must see whole files
        result = subprocess.run([*command, "-o", f"{folder}/kernels.so"], capture_output=True, text=True)
        if result.returncode:
            lines = result.stderr.splitlines()
            raise OSError(next((line for line in lines if "error" in line), f"{command[0]} failed"))
        with open(f"{folder}/kernels.so", "rb") as file:
            os.fsync(file.fileno())                                        # loading a truncated file would crash the process
        os.replace(f"{folder}/kernels.so", path)
