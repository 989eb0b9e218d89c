"""Averages of weights that look back over a share of the run so far; after the run, others of their kind can be made from two
(Karras et al., 2024, "Analyzing and improving the training dynamics of diffusion models", section 3).

At step t such an average weighs the weights of step s by (gamma + 1) s^gamma / t^(gamma + 1). Its length is the standard
deviation of s, in units of t. Those of several checkpoints and lengths span nearly all others.
"""

from functools import cache
from pathlib import Path

import numpy as np

from checkpoints.read import average_of_length, lengths_of, load_checkpoint

# For a random walk, averages reconstructed with a smaller residual had at most 1.2 times the error of using the nearer kept
# average, and mostly less than half of it.
LARGEST_RESIDUAL = 0.1


@cache
def exponent(length):
    """Returns the gamma of a length: the largest root of (gamma + 1) / length^2 = (gamma + 2)^2 (gamma + 3)."""
    s = length**-2
    return np.roots([1, 7, 16 - s, 12 - s]).real.max()


def overlap(t, gamma, u, delta):
    """Computes the integral of the product of two averages' weights, at steps t and u with exponents gamma and delta."""
    shorter = np.minimum(t, u)
    ratios = (shorter / t) ** (gamma + 1) * (shorter / u) ** (delta + 1)
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * ratios / shorter


def shares(steps, lengths, step, length):
    """Returns how much of each average, at steps (n,) with lengths (n,), makes up the one of that length at `step`: (n,), by
    least squares of their weights over the run, and so that they add up to 1."""
    t, gamma = np.asarray(steps, float) / step, np.array([exponent(one) for one in lengths])
    gram = overlap(t[:, None], gamma[:, None], t, gamma)
    found = np.linalg.lstsq(gram, overlap(t, gamma, 1.0, exponent(length)), rcond=None)[0]
    return found / found.sum()


def residual(steps, lengths, step, length, found):
    """Computes how far averages in these `shares` are from the one of that length at `step`: the root of the integral of the
    squared difference of their weights over the run, in units of the one's own."""
    t, gamma, wanted = np.asarray(steps, float) / step, np.array([exponent(one) for one in lengths]), exponent(length)
    norm = overlap(1.0, wanted, 1.0, wanted)
    made = found @ overlap(t[:, None], gamma[:, None], t, gamma) @ found
    return np.sqrt(max(0, made - 2 * found @ overlap(t, gamma, 1.0, wanted) + norm) / norm)


def reconstruct(path, length):
    """Returns (weights, args), as `load_checkpoint` does, of the average of that length at a run's checkpoint, reconstructed
    from the averages in it and in earlier checkpoints. ValueError if there are none, or too few."""
    path = Path(path)
    stored = load_checkpoint(path)[1]
    kept = lengths_of(stored)
    if not (kept and path.stem.isdecimal()):
        raise ValueError(
            f"--ema-length {length:g}: {path} is not the checkpoint of a run that kept averages to make it of, as train.py "
            "does with --ema-lengths 0.05 0.1"
        )
    there = [file for file in path.parent.iterdir() if file.suffix in (".pt", ".dcp") and file.stem.isdecimal()]
    files = {int(file.stem): file for file in (*there, path)}
    parts = [(step, one) for step in sorted(files) if 0 < step <= int(path.stem) for one in kept]
    found = shares(*zip(*parts), int(path.stem), length)
    if (error := residual(*zip(*parts), int(path.stem), length, found)) > LARGEST_RESIDUAL:
        raise ValueError(
            f"--ema-length {length:g}: the averages of lengths {' and '.join(map('{:g}'.format, kept))} in {len(parts) // 2} "
            f"checkpoints make it with an error of {error:.0%}, above {LARGEST_RESIDUAL:.0%}; ask for a length nearer to "
            "those two, or keep more checkpoints (--ckpt-every, --keep-last)"
        )
    weights = {}
    for (step, one), share in zip(parts, found):
        for name, w in load_checkpoint(files[step], average_of_length(one))[0].items():
            weights[name] = weights.get(name, 0) + share * w.double()
    return {name: w.float() for name, w in weights.items()}, stored
