"""Times how much of a grid each Triton kernel may take at once, with how many warps and stages, and writes what is fastest on
this GPU into pde_ssm_kernels/tiles.json, which the kernels read:

    python -m benchmarks.tiles
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from benchmarks.flags import parse_args
from benchmarks.timing import sample_ms
from machine.files import alone_in, whole_file
from machine.precision import count_cores
from pde_ssm_kernels import gpu, tiles
from pde_ssm_kernels.tiles import Tile

SIDES = ((16, 16), (32, 32), (16, 32), (32, 16))  # padded, of grids that one program holds
LENGTHS = (64, 128)                               # padded, of an axis of larger ones
PASSES = ("along_x", "along_y", "back_along_x", "correlate_along_y")
CHANNELS, WARPS, STAGES, BLOCKS = (1, 2, 4, 8, 16, 32), (4, 8), (1, 2), (16, 32)
TOKENS, WIDTH = 2**16, 384
ROUNDS = 5
GAIN = 0.98  # a tile gets an entry only if its time is below this fraction of the untuned tile's


def main(device, table):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    problems = [(kernel, sides) for kernel in tiles.ON_CHIP for sides in SIDES]
    problems += [(kernel, (length,)) for length in LENGTHS for kernel in PASSES]
    if device.type == "cuda":
        compile_ahead([(kernel, sides, tile) for kernel, sides in problems for tile in candidates(kernel, sides)], device)
    found = {}
    for kernel, sides in problems:
        times = {tile: time_of(kernel, sides, tile, device) for tile in candidates(kernel, sides)}
        best, before = min(times, key=times.get), times[tiles.untuned(kernel, *sides)]
        print(f"{tiles.key(kernel, *sides):28} {before:.4f} ms, {times[best]:.4f} ms by {best}", flush=True)
        if times[best] < GAIN * before:
            found[tiles.key(kernel, *sides)] = list(best)
        write(table, name, found)  # written at once, so that an interrupted run keeps what it has tuned
    print(f"Saved {table}: {json.dumps({name: found})}")


def write(table, name, found):
    """Writes what was found on a GPU into a table, beside what others have there."""
    with alone_in(table.parent), whole_file(table, "table") as file:
        others = json.loads(table.read_text()) if table.exists() else {}
        entries = ",\n".join(f"{json.dumps(card)}: {json.dumps(entry)}" for card, entry in (others | {name: found}).items())
        file.write(f"{{\n{entries}\n}}\n".encode())


def candidates(kernel, sides):
    """Returns the tiles to try, that of no table first."""
    first, on_chip = tiles.untuned(kernel, *sides), kernel in tiles.ON_CHIP
    channels = [n for n in CHANNELS if n <= 2 * first.channels and (on_chip or n >= 16)]       # more do not fit on chip
    others = product(channels, (0,) if on_chip else BLOCKS, WARPS, STAGES)
    return list(dict.fromkeys([first, *(Tile(*tile) for tile in others)]))


def time_of(kernel, sides, tile, device, rounds=ROUNDS):
    """Returns the milliseconds of a launch, the median of so many rounds, or infinity where the GPU has no room for it."""
    launch = launcher(kernel, sides, device)
    table = tiles.tuned(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    before = table.get(tiles.key(kernel, *sides))
    table[tiles.key(kernel, *sides)] = tile
    try:
        launch()
        return median(sample_ms(launch, 3, device) for _ in range(rounds))
    except Exception as error:  # of Triton's compiler, or of a launch
        print(f"{tiles.key(kernel, *sides)}: not {tile}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return float("inf")
    finally:
        del table[tiles.key(kernel, *sides)]
        if before:
            table[tiles.key(kernel, *sides)] = before


def launcher(kernel, sides, device):
    """Returns a function that launches a kernel on bfloat16 tokens of a grid of these padded sides."""
    h, w = sides if len(sides) == 2 else (sides * 2)
    v = torch.randn(max(1, TOKENS // (h * w)), h, w, WIDTH, device=device).bfloat16()
    symbol = torch.randn(2, h, w // 2 + 1, WIDTH, device=device)
    if kernel == "forward":
        return partial(gpu.run, v, symbol)
    if kernel == "backward":
        return partial(gpu.run_backward, v, v, symbol)
    x, y, back = gpu.matrices_along(h, w, device)
    v_hat = gpu.along_x(v, x)
    return {
        "along_x": partial(gpu.along_x, v, x),
        "along_y": partial(gpu.multiply_along_y, v_hat, symbol / symbol.norm(), y, 1),
        "back_along_x": partial(gpu.back_along_x, v_hat, back, torch.empty_like(v)),
        "correlate_along_y": partial(gpu.correlate_along_y, v_hat, v_hat, y),
    }[kernel]


def compile_ahead(work, device):
    """Launches everything once in several processes, so that all processors compile, into the cache that Triton keeps."""
    with ProcessPoolExecutor(min(12, count_cores()), mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(time_of, device=device, rounds=1), *zip(*work)))


FLAGS = {"table": dict(type=Path, default=tiles.TABLE, help="the file that gets the result")}

if __name__ == "__main__":
    args = parse_args(__doc__, **FLAGS)
    main(args.device, args.table)
