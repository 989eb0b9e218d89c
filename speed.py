"""How a network runs: its precision, compiled or not, and by which kernels. It changes a result by rounding alone."""

import os
import platform
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch

from pde_ssm import BACKENDS, PDESSM, Diagonal, set_backend

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_speed_flags(add):
    """The flags that train.py, sample.py and sample_ddp.py share: `add` is add_argument of a command's parser."""
    add("--precision", choices=PRECISIONS, default="fp32", help="of the matrix products; weights and PDEs stay float32")
    add("--compile", action="store_true", help="by torch.compile, for which the first step takes about a minute longer")
    kernels = dict(choices=BACKENDS, default="default", dest="backend")  # no option of the mixer, so no pde_*
    add("--deterministic", action="store_true", help="ask MKL, PyTorch and cuDNN for the same bits every time; may be slower")
    add("--pde-backend", **kernels, help="of the PDE: C++ kernels on CPUs; PyTorch; C++; Triton, for GPUs; or what kernels can")


def be_deterministic():
    """Asks MKL, PyTorch, cuDNN and cuBLAS for the same bits every time; MKL for those of any number of threads, too.

    MKL reads its mode at its first product of matrices, cuBLAS at its first handle, so this comes before either. On AMD
    processors MKL has one mode only, and its sums are the same for any number of threads anyway.
    """
    strict = {"AVX512": "AVX512,STRICT", "AVX2": "AVX2,STRICT"}.get(torch.backends.cpu.get_cpu_capability(), "COMPATIBLE")
    os.environ.setdefault("MKL_CBWR", strict)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which only finds faults, and costs time
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def rounding(processes):
    """Describes what the last bits of a result depend on besides its settings: a dict of plain values."""
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


def processor():
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def in_precision(network, precision, device):
    """The network with its matrix products in that precision; parameters, inputs and outputs stay float32."""
    if precision == "fp32":
        return network

    def run(*inputs, **kwargs):
        with torch.autocast(device.type, PRECISIONS[precision]):
            return network(*inputs, **kwargs).float()

    return run


def prepare_to_sample(model, args, device):
    """Makes every call of a trained model follow --deterministic, --precision, --compile and --pde-backend, on that device.
    ValueError where the machine cannot. Its weights must not change afterwards."""
    if args.deterministic:
        be_deterministic()
    choose_backend(args.backend, model, device)
    forward = in_precision(model.forward, args.precision, device)
    if args.compile:
        check_compiler(device)
        keep_symbols(model)
        forward = compile_whole(forward, device)
    model.forward = forward  # of this one model: forward_with_cfg calls it, too


def compile_whole(network, device):
    """The network, compiled for each shape of its inputs as one piece; on GPUs it runs as a CUDA graph.

    A graph writes its output where it wrote the one before, which samplers may still need: they get a copy.
    """
    if device.type != "cuda":
        return torch.compile(network, fullgraph=True, dynamic=False)
    graph = torch.compile(network, fullgraph=True, dynamic=False, mode="reduce-overhead")
    return lambda *inputs, **kwargs: graph(*inputs, **kwargs).clone()


def keep_symbols(model):
    """Lets compiled networks take the PDEs' symbols for constants, computed once, as networks that are not compiled do."""
    for layer in model.modules():
        if isinstance(layer, Diagonal):
            symbol, rows = cache(layer.symbol), cache(layer.rows)
            layer.symbol = torch.compiler.assume_constant_result(lambda h, w, symbol=symbol: symbol(h, w))
            layer.rows = torch.compiler.assume_constant_result(lambda rows=rows: rows())


def check_compiler(device):
    """ValueError if torch.compile lacks what it needs on CPUs."""
    compiler = os.environ.get("CXX") or "g++"
    if device.type == "cpu" and not shutil.which(compiler.split()[0]):
        raise ValueError(f"--compile needs a C++ compiler on CPUs and finds no {compiler}; install it, or name another in CXX")


def choose_backend(name, model, device):
    """What runs the model's PDEs on that device, by the names of `set_backend`. ValueError if it cannot."""
    set_backend(name)
    layer = next((layer for layer in model.modules() if isinstance(layer, PDESSM)), None)
    if name in ("cpp", "triton") and layer:
        u = torch.zeros(1, layer.dim, *model.grid_size, device=device)
        c = torch.zeros(1, layer.dim, device=device) if layer.conditioned else None
        try:
            with torch.no_grad():
                deepcopy(layer).to(device)(u, c)  # one of the layers tries
        except ValueError as error:
            reason = str(error).partition(";")[0]
            raise ValueError(f"--pde-backend {name}: {reason}; --pde-backend auto takes PyTorch there") from error
