"""Counts a network's floating-point operations, and gives a device's peak speed and the memory used."""

import math
import resource
import sys

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

# Dense 10^12 operations per second by the maker's data sheets, as PyTorch computes: sums of bf16 and fp16 products in
# float32. By the first words of the device's name: bf16 and fp16, TF32, float32 without tensor cores.
PEAKS = {
    "NVIDIA B200": (2250, 1125, 75),
    "NVIDIA H200": (989, 494, 67),
    "NVIDIA H100 80GB HBM3": (989, 494, 67),
    "NVIDIA A100": (312, 156, 19.5),
    "NVIDIA L40S": (362, 183, 91.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
}
OTHERS = ("NVL", "Laptop", "4090 D")  # slower ones whose names begin alike


@torch.no_grad()
def forward_flops(model, *inputs):
    """Counts the operations of a forward pass: matrix products, attention and convolutions as PyTorch does, four times as many
    for complex matrices, and 2.5 n log2 n for each real Fourier transform of n points, half the usual of a complex one (on CPUs
    short ones are matrix products, which take more operations and less time)."""

    def product(a, b, *_, **__):
        return (8 if a.is_complex() else 2) * a.numel() * b.shape[-1]

    def fourier(shape, dims):
        return round(2.5 * math.prod(shape) * math.log2(math.prod(shape[dim] for dim in dims)))

    product._get_raw = True  # the counter then passes tensors, not their shapes
    aten = torch.ops.aten
    counts = {
        aten.mm: product,
        aten.bmm: product,
        aten._fft_r2c: lambda shape, dims, *_, **__: fourier(shape, dims),
        aten._fft_c2r: lambda shape, dims, *_, out_shape, **__: fourier(out_shape, dims),
    }
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        model(*inputs)
    return counter.get_total_flops()


def training_flops(model, images):
    """Counts the operations of a training step on that many images as three forward passes, without computing anything. What
    --grad-checkpointing computes twice counts once."""
    tensors = {name: x.to("meta") for name, x in (*model.named_parameters(), *model.named_buffers())}
    x = torch.empty(images, model.in_channels, *model.input_size, device="meta")
    t, y = (torch.empty(images, dtype=torch.long, device="meta") for _ in range(2))
    return 3 * forward_flops(lambda *inputs: functional_call(model, tensors, inputs), x, t, y)


def peak_flops(device, precision, tf32):
    """Returns the device's peak operations per second, by its data sheet, in that precision of PRECISIONS; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    known = [peaks for start, peaks in PEAKS.items() if name.startswith(start) and not any(other in name for other in OTHERS)]
    return known[0][0 if precision != "fp32" else 1 if tf32 else 2] * 1e12 if known else None


def peak_memory(device):
    """Returns bytes: on CUDA the most that tensors took since the last call, on CPUs the most that the process ever took."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
