"""Times functions against each other: the one timer of the benchmarks.

The sides of a comparison take turns in one process, in a new order every round, so that a machine that slows down or
speeds up does so for all of them; each has been called before, untimed. A sample is as many calls in a row as fill
SAMPLE_MS, on a GPU between two CUDA events; medians and quartiles are those of the samples. Inputs are the same
in every call, so small ones lie in the cache for every side, as they do between the layers of a network.
"""

import gc
import math
import random
from contextlib import contextmanager
from statistics import median, quantiles
from time import perf_counter

import torch

from machine.processes import one_line

SAMPLE_MS = 5.0   # a sample is at least as long
ROUNDS = 3        # at least, however long a call takes
MOST_ROUNDS = 200


def time_in_turns(sides, device, seconds):
    """Times functions against each other.

    sides:   name -> a function that returns the function to time, called once; it and its first calls are not timed.
    seconds: no round begins after this many seconds, except the first ROUNDS.
    Returns name -> dict(median_ms, quartiles_ms, samples, calls), calls being those of one sample. For a side that does
    not fit into memory, or fails, it returns a sentence that says so; the others are timed.
    """
    results, ready = {}, {}
    for name, build in sides.items():
        release_memory(device)  # of a side that did not fit, or of the row before
        with noted(name, results):
            call = build()
            ready[name] = call, warm_up(call, device)
    samples = {name: [] for name in ready}
    order, deal, start = list(ready), random.Random(0), perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= ROUNDS and perf_counter() - start > seconds:
            break
        deal.shuffle(order)
        for name in order:
            with noted(name, results):  # several at once may need more memory than each alone
                samples[name].append(sample_ms(*ready[name], device))
        order = [name for name in order if name not in results]
    for name in order:
        times = samples[name]
        low, _, high = (rounded(ms) for ms in quantiles(times, n=4, method="inclusive"))
        middle = rounded(median(times))
        results[name] = dict(median_ms=middle, quartiles_ms=[low, high], samples=len(times), calls=ready[name][1])
    return {name: results[name] for name in sides}


@contextmanager
def noted(name, results):
    """Turns what a side raises inside into its result, a sentence."""
    try:
        yield
    except Exception as error:  # Triton's are of no kind of their own
        results[name] = "does not fit into memory" if is_out_of_memory(error) else f"failed: {one_line(error)}"


def rounded(value):
    """Rounds a number to four digits."""
    return float(f"{value:.4g}")


def warm_up(call, device):
    """Calls the function three times, or fewer if that takes longer than a second; returns how many calls make a sample."""
    start, least = perf_counter(), math.inf
    for _ in range(3):
        least = min(least, sample_ms(call, 1, device))
        if perf_counter() - start > 1:
            break
    return max(1, math.ceil(SAMPLE_MS / least))


def sample_ms(call, calls, device):
    """Returns the milliseconds of one call, averaged over `calls` in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / calls
    start = perf_counter()
    for _ in range(calls):
        call()
    return 1e3 * (perf_counter() - start) / calls


def is_out_of_memory(error):
    """Tells whether an error of PyTorch means that memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def release_memory(device):
    """Gives cached GPU memory back to the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
