"""Shows where the time of a PDE-SSM layer and of a training step of DiT-S/2 goes on a CPU: operations by PyTorch's profiler, in
milliseconds of one pass.

    python -m benchmarks.cpu_profile

float32; the layer has 384 channels and a batch of 4, the step 1,024 tokens or one image.

Matrix products are listed with their rate in GFLOP/s; that of the largest shows what the processor can reach.
"""

from math import prod

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.sides import layer_pass, of_size, training_step
from machine.precision import processor
from machine.processes import keep_freed_memory
from pde_ssm_kernels import cpu

MATRICES = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2)}  # which operands are matrices
LEAST_SHARE = 0.006  # of the time; operations with less are added up
CPU = torch.device("cpu")


def operations(run, calls, device=CPU):
    """Lists (name, shapes of the operands, how often, milliseconds in all) in one call of `run`, the longest first: operations
    on a CPU, kernels on a GPU."""
    for _ in range(max(2, calls // 6)):
        run()
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, record_shapes=True) as recorded:
        for _ in range(calls):
            run()
    rows = []
    for row in recorded.key_averages(group_by_input_shape=True):
        if gpu and row.device_type is not DeviceType.CUDA:
            continue  # an operation, whose kernels have rows of their own
        ms = (row.self_device_time_total if gpu else row.self_cpu_time_total) / calls / 1e3
        rows.append((row.key, list(filter(None, row.input_shapes)), row.count // calls, ms))
    return sorted(rows, key=lambda row: -row[3])


def rate(name, shapes, count, ms):
    """Writes the GFLOP/s of `count` products of matrices of these shapes; nothing for other operations."""
    if name not in MATRICES:
        return ""
    (*batch, rows, inner), (*_, columns) = (shapes[i] for i in MATRICES[name])
    return f"{2e-6 * count * prod(batch) * rows * inner * columns / ms:.0f} GFLOP/s"


def report(title, run, calls, device=CPU):
    rows = operations(run, calls, device)
    total, rest = sum(ms for *_, ms in rows), 0
    print(f"\n{title}: {total:.2f} ms")
    for name, shapes, count, ms in rows:
        if ms < LEAST_SHARE * total:
            rest += ms
            continue
        sizes = " ".join("x".join(map(str, shape)) for shape in shapes[:3])
        what = f"{count} {name.removeprefix('aten::')}"
        print(f"{ms:9.2f} ms {ms / total:5.0%}  {what:26} {sizes:44} {rate(name, shapes, count, ms)}".rstrip())
    print(f"{rest:9.2f} ms {rest / total:5.0%}  all others")


def show_kernels():
    """Names the C++ kernels for the profiler, to which they are not operations."""
    run = cpu.run

    def recorded(name, *tensors, **sizes):
        with record_function(f"pde_ssm_kernels.cpu.{name}"):
            run(name, *tensors, **sizes)

    cpu.run = recorded


if __name__ == "__main__":
    keep_freed_memory()
    show_kernels()
    print(f"{processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    for side in (4, 8, 16, 32, 64):
        for training in (False, True):
            title = f"layer, {side} x {side} tokens, {'forward and backward' if training else 'forward'}"
            report(title, layer_pass(CPU, "pdessm", 4, 384, 6, (side, side), training=training), calls=30)
    for side in (16, 32, 64):
        for mixer in ("pdessm", "attention"):
            run = training_step(CPU, max(1, 1024 // side**2), mixer=mixer, **of_size("S", 2 * side))
            report(f"training step of DiT-S/2, {mixer}, {side} x {side} tokens", run, calls=6 if side < 64 else 3)
