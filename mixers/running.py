"""How a network runs: its precision, compiled or not, and by which kernels. It changes a result by rounding alone."""

import torch

import pde_ssm_kernels
from machine.flags import may_change
from machine.precision import PRECISIONS, be_deterministic, check_compiler, compile_whole, in_precision
from pde_ssm import BACKENDS, PDESSM, set_backend
from pde_ssm_kernels.kept import freeze


def add_speed_flags(add):
    """Adds the flags that train.py, sample.py and sample_ddp.py share: `add` is add_argument of a command's parser."""
    add("--precision", choices=PRECISIONS, default="fp32", help="of the matrix products; weights and PDEs stay float32")
    minute = "compile the network with torch.compile; the first step then takes about a minute longer"
    may_change(add("--compile", action="store_true", help=minute))
    kernels = dict(choices=BACKENDS, default="default", dest="backend")  # names with pde_ are options of the mixer
    same_bits = "make MKL, PyTorch and cuDNN give bitwise identical results every time; may be slower"
    may_change(add("--deterministic", action="store_true", help=same_bits))
    choices = "of the PDE: C++ on CPUs, else PyTorch; PyTorch; C++; Triton, for GPUs; any kernel; or the plain equations"
    may_change(add("--pde-backend", **kernels, help=choices))


def prepare_to_sample(model, device, precision="fp32", compile=False, backend="default", deterministic=False):
    """Moves a trained model to that device and prepares it to run there in this precision, compiled or not, with that backend
    of the PDE, and, if deterministic, bitwise reproducibly. ValueError if the machine cannot do that. The weights must not
    change afterwards."""
    if deterministic:
        be_deterministic()
    choose_backend(backend, model, device)
    model.to(device)  # before it warms up there
    forward = in_precision(model.forward, precision, device)
    if compile:
        check_compiler(device)
        freeze(model)
        if device.type == "cuda":  # warm up first, so that caches of layers and kernels do not live in a CUDA graph's memory
            x, y = torch.zeros(1, model.in_channels, *model.input_size, device=device), torch.zeros(1, dtype=int, device=device)
            with torch.no_grad():
                forward(x, y.float(), y)
        forward = compile_whole(forward, device)
    model.forward = forward  # set on the model, so that forward_with_cfg calls it too


def choose_backend(name, model, device):
    """Sets the backend of the model's PDEs, by its name in `set_backend`. ValueError if it cannot run them on that device."""
    set_backend(name)
    layer = next((layer for layer in model.modules() if isinstance(layer, PDESSM)), None)
    if name in ("cpp", "triton") and layer and layer.coupling == "diagonal":
        reason = pde_ssm_kernels.why_not(name, torch.empty(1, *model.grid_size, layer.equation.dim, device=device))
        if reason:
            raise ValueError(f"--pde-backend {name}: {reason}; --pde-backend auto takes PyTorch there")
