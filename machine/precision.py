"""Sets how a network runs on a machine: its precision, compilation, and what makes its last bits reproducible."""

import os
import platform
import shutil
from pathlib import Path

import torch

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def allow_tf32(allowed=True):
    """Lets GPUs round the factors of float32 products and convolutions to TF32, which takes tensor cores, or forbids it."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def be_deterministic():
    """Makes MKL, PyTorch, cuDNN and cuBLAS give the same bits every time, and MKL also for any number of threads.

    MKL reads its mode at its first matrix product and cuBLAS at its first handle, so call this before either. On AMD
    processors MKL has only one mode, and its sums are the same for any number of threads anyway.
    """
    strict = {"AVX512": "AVX512,STRICT", "AVX2": "AVX2,STRICT"}.get(torch.backends.cpu.get_cpu_capability(), "COMPATIBLE")
    os.environ.setdefault("MKL_CBWR", strict)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which only finds faults, and costs time
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def rounding(processes):
    """Returns what the last bits of a result depend on besides its settings: a dict of plain values."""
    gpu = processes.device.type == "cuda"
    return dict(
        processor=torch.cuda.get_device_name(processes.device) if gpu else processor(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        processes=processes.size,
        mkl=os.environ.get("MKL_CBWR", "default"),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        torch=str(torch.__version__),
    )


def count_cores():
    """Returns how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def in_precision(network, precision, device):
    """Returns the network with its matrix products in that precision; parameters, inputs and outputs stay float32."""
    if precision == "fp32":
        return network

    def run(*inputs, **kwargs):
        with torch.autocast(device.type, PRECISIONS[precision]):
            return network(*inputs, **kwargs).float()

    return run


def compile_whole(network, device):
    """Returns the network, compiled in one piece for each shape of its inputs; on GPUs it runs as a CUDA graph.

    A graph overwrites its previous output, which samplers may still need, so they get a copy.
    """
    if device.type != "cuda":
        return torch.compile(network, fullgraph=True, dynamic=False)
    graph = torch.compile(network, fullgraph=True, dynamic=False, mode="reduce-overhead")
    return lambda *inputs, **kwargs: graph(*inputs, **kwargs).clone()


def compile_blocks(blocks):
    """Compiles the forward pass of every block, once for all that are alike, and for each shape of its inputs."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * len(blocks))  # of one function, which blocks of many sizes share
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def check_compiler(device):
    """Raises a ValueError if torch.compile lacks what it needs on CPUs."""
    compiler = os.environ.get("CXX") or "g++"
    if device.type == "cpu" and not shutil.which(compiler.split()[0]):
        raise ValueError(f"--compile needs a C++ compiler on CPUs and finds no {compiler}; install it, or name another in CXX")
