"""Shows the resources that the Triton kernels use on a Hopper GPU, without one: registers, spilled bytes, shared memory.

    python -m benchmarks.kernel_resources
"""

import re
import subprocess
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pde_ssm_kernels import gpu as kernels
from pde_ssm_kernels.tiles import tile

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
OF_TOKENS = {"v", "out", "gradient", "v_gradient"}
FLOAT32 = {"symbol", "matrices", "v_hat", "g_hat", "symbol_gradient"}


def resources(kernel, dtype, constants, options):
    """Returns (registers of a thread, bytes of spilled ones, bytes of shared memory), for channels in multiples of 16."""
    pointers = dict.fromkeys(OF_TOKENS, "*bf16" if dtype == torch.bfloat16 else "*fp32") | dict.fromkeys(FLOAT32, "*fp32")
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    by_16 = [i for i, name in enumerate(kernel.arg_names) if name in pointers or name == "C"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in by_16})
    compiled = triton.compile(source, target=HOPPER, options=options)
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, compiled.metadata.shared


def cases(side, dtype):
    """Yields (kernel, constants, options of the launch) of what pde_ssm_kernels/gpu.py launches on side x side tokens."""
    v = torch.empty(1, side, side, 384, dtype=dtype, device="meta")
    if kernels.at_once(side, side):
        yield kernels.forward_kernel, *kernels.constants("forward", v)
        yield kernels.backward_kernel, *kernels.constants("backward", v)
        return
    of_tokens, of_frequencies = kernels.padded(side), kernels.padded(side // 2 + 1)
    for name, constants in dict(
        along_x=dict(W=of_tokens, F=of_frequencies, x_stride=1),
        along_y=dict(H=of_tokens, SIGN=1),
        back_along_x=dict(W=of_tokens, F=of_frequencies, c_stride=1),
        correlate_along_y=dict(H=of_tokens),
    ).items():
        kernel, t = getattr(kernels, f"{name}_kernel"), tile(name, of_tokens, device=v.device)
        blocks = dict(XB=min(t.block, of_tokens), YB=min(t.block, of_tokens), FB=min(t.block, of_frequencies), CB=t.channels)
        blocks = {block: size for block, size in blocks.items() if block in kernel.arg_names}
        yield kernel, constants | blocks | dict(P=kernels.precision()), t.options()


def main():
    print(f"{'tokens':10}{'type':16}{'kernel':28}{'registers':>10}{'spilled':>10}{'shared':>10}")
    for side in (16, 32, 64, 128):
        for dtype in (torch.bfloat16, torch.float32):
            for kernel, constants, options in cases(side, dtype):
                figures = "".join(f"{n:10,}" for n in resources(kernel, dtype, constants, options))
                print(f"{f'{side} x {side}':10}{dtype!s:16}{kernel.__name__:28}{figures}")


if __name__ == "__main__":
    main()
