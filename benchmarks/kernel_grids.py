"""Compares the Triton kernels with PyTorch's operations in float64, values and gradients, on grids and types of every kind:

    python -m benchmarks.kernel_grids --seconds 120

Square grids come first, then flat ones. After that many seconds it says which are left. It ends with status 1 if any differs.
"""

import math
import sys
from time import perf_counter

import torch

import pde_ssm
from benchmarks.flags import parse_args
from machine.processes import one_line
from pde_ssm_kernels import gpu

SIDES = (16, 8, 32, 64, 128, 1, 2, 3, 5, 7, 15, 17, 24, 31, 33, 48, 63, 65, 96, 127)
GRIDS = [(side, side) for side in SIDES] + [grid for side in SIDES for grid in ((side, 3), (3, side), (side, 40))]
CHANNELS = (5, 64)
IMAGES = 3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of the largest value


def main(device, seconds):
    start, wrong, done, worst = perf_counter(), [], 0, dict.fromkeys(TOLERANCE, 0.0)
    cases = [(grid, channels, dtype) for grid in GRIDS for channels in CHANNELS for dtype in TOLERANCE]
    for grid, channels, dtype in cases:
        if perf_counter() - start > seconds:
            break
        try:
            error = largest_error(grid, channels, dtype, device)
            found = f"{error:.1e}"
        except Exception as problem:  # of Triton's compiler, or of a launch: the other cases may be right
            error, found = math.inf, one_line(problem)
        worst[dtype], done = max(worst[dtype], error), done + 1
        if not error <= TOLERANCE[dtype]:                                  # nor NaN
            wrong.append(f"{grid[0]} x {grid[1]}, {channels} channels, {dtype}: {found}")
            print(f"DIFFERS  {wrong[-1]}", flush=True)
    found = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
    print(f"{done} of {len(cases)} cases; largest error, of the largest value: {found}; {len(wrong)} differ")
    if wrong:
        sys.exit(1)


def largest_error(grid, channels, dtype, device):
    """Returns the largest error of the result and both gradients, each relative to its largest value."""
    torch.manual_seed(0)
    v = torch.randn(IMAGES, *grid, channels, device=device).to(dtype).requires_grad_()
    symbol = torch.randn(2, grid[0], grid[1] // 2 + 1, channels, device=device, requires_grad=True)
    gradient = torch.randn_like(v)
    mine = gpu.evolve(v, symbol)
    wide, wide_symbol = (x.detach().double().requires_grad_() for x in (v, symbol))
    expected = pde_ssm.irfft2(torch.complex(*wide_symbol).movedim(-1, 0) * pde_ssm.rfft2(wide), wide)
    ours = mine, *torch.autograd.grad(mine, (v, symbol), gradient)
    theirs = expected, *torch.autograd.grad(expected, (wide, wide_symbol), gradient.double())
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(ours, theirs))


if __name__ == "__main__":
    args = parse_args(__doc__)
    main(args.device, args.seconds)
