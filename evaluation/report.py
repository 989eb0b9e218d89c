"""Compares two sides and reports the numbers and what they are based on, as lines of text, warnings and JSON."""

import json
import math
import sys

import torch

from evaluation.metrics import SPLIT, metrics_of
from evaluation.sides import held_in_words, images_in_words, sizes_in_words, without_tf32
from machine.files import whole_file


def left_out(ref, sample, network, kid=False, prefix=""):
    """Finds the metrics that two sides, Sources or Sides, hold too little for: {name: a line that says what is missing}.
    ValueError if that is every metric."""
    wanted, lines = metrics_of(network, kid, prefix), {}
    for metric in wanted:
        images, statistics = f"{metric.images} image{'s' * (metric.images > 1)}", f"{metric.features} statistics"
        for side in (sample,) if metric.of_samples else (ref, sample):
            by_statistics = metric.from_statistics and side.statistics
            enough = metric.features in side.statistics if by_statistics else side.shown >= metric.images
            if not enough:
                either = f"{images} or {statistics}" if metric.from_statistics else images
                needs = f"{statistics} too" if by_statistics else either
                lines[metric.name] = f"{metric.name}: not without {needs} a side, and {side.name} holds {held_in_words(side)}"
    if len(lines) == len(wanted):
        raise ValueError("; ".join(lines.values()))
    return lines


def look_ahead(ref, sample, network, processes, kid=False, prefix=""):
    """Prints, before a network runs, which images of two Sources and which metrics are left out. ValueError if no metric is
    left, or if a process would get no image."""
    for source in (ref, sample):
        if 0 < source.shown < processes.size:
            raise ValueError(f"the {source.shown} images of {source.name} are fewer than the {processes.size} processes")
    say([*ref.remarks, *sample.remarks, *left_out(ref, sample, network, kid, prefix).values()], processes)


def say(lines, processes):
    """Prints lines to standard error, each once, from one process."""
    for line in dict.fromkeys(lines) if processes.rank == 0 else ():
        print(line, file=sys.stderr)


@torch.no_grad()
def compare(ref, sample, network, exact=False, kid=False, prefix="", progress=False):
    """Computes every metric that two Sides allow: a dict of floats by name, in ADM's order. A metric that cannot be computed,
    for example because features are too large, is NaN, and a line of standard error says why."""
    missing, results = left_out(ref, sample, network, kid, prefix), {}
    with without_tf32():
        for metric in metrics_of(network, kid, prefix, exact, progress):
            if metric.name not in missing:
                try:
                    numbers = metric.compute(ref, sample)
                except (ValueError, OSError, MemoryError, RuntimeError) as error:  # RuntimeError: PyTorch has no memory
                    print(f"{metric.name}: {error}", file=sys.stderr)
                    numbers = [math.nan] * len(metric.numbers)
                results |= dict(zip(metric.numbers, numbers))
    return results


def warnings_of(results, ref, sample):
    """Lists what a reader of the numbers must know, a line each: too few images, images of different sizes."""
    found = []
    for side in (ref, sample):
        for features, (mu, _) in side.statistics.items():
            if side.counted is not None and side.counted <= len(mu):
                found.append(
                    f"{side.counted:,} images of {side.name} are not more than the {len(mu):,} {features} features: their "
                    "covariance is singular and the distance biased upwards; compare it only at equal numbers of images"
                )
        if len(side.sizes) > 1:
            sizes = f"{len(side.sizes)} sizes, {sizes_in_words(side)}"
            found.append(f"{side.name} has images of {sizes}; each is resized for the network")
    if ref.sizes and sample.sizes and ref.sizes != sample.sizes:
        sizes = f"references of {sizes_in_words(ref)} and samples of {sizes_in_words(sample)}"
        found.append(f"{sizes}; all are resized for the network")
    last = sample.shown % SPLIT
    if "Inception Score" in results and sample.shown > SPLIT and 0 < last < SPLIT / 2:
        found.append(
            f"the last split of the Inception Score has {last:,} of {SPLIT:,} images and counts as much as the others, which "
            f"lowers it (as in ADM's evaluator); compare it at multiples of {SPLIT:,}"
        )
    return found


def report(results, ref, sample, network, to=None, prefix=""):
    """Prints results and what each is based on, and writes them as JSON to the file `to`; if `to` is "-", prints only the JSON.
    prefix: as in `compare`. ValueError, at the end, for results that are not finite, which are left out."""
    wrong = [f"{name} is {value}" for name, value in results.items() if not math.isfinite(value)]
    results = {name: value for name, value in results.items() if math.isfinite(value)}
    warnings = warnings_of(results, ref, sample)
    layer = f"{network.dim} features of {network.name}"
    row = {"features": layer, "warnings": warnings}
    for role, side in (("reference", ref), ("samples", sample)):
        row[role] = dict(source=side.name, images=side.shown, size=sizes_in_words(side), images_in_statistics=side.counted)
    text = json.dumps(results | row, indent=1)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if to == "-":
        print(text)
    else:
        print(f"Reference: {_describe(ref)}\nSamples: {_describe(sample)}")
        metrics = {number: metric for metric in metrics_of(network, True, prefix) for number in metric.numbers}
        for name, value in results.items():
            print(f"{name}: {value:<20} ({_basis(metrics[name], ref, sample, network)})")
        if to:
            with whole_file(to, "metrics") as file:
                file.write(f"{text}\n".encode())
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: no number to report")


def _describe(side):
    if side.pool is None:
        return f"{side.name}, statistics only"
    size = f" of {sizes_in_words(side)}" if side.sizes else ""
    return f"{side.name}, {images_in_words(side)}{size}" + ("" if side.shown == side.counted else ", and statistics")


def _basis(metric, ref, sample, network):
    """Names the images and features that a metric's numbers rest on."""
    features = f"{2023 if metric.features == 'spatial' else network.dim} features of {network.name}"
    if metric.of_samples:
        return f"{sample.shown:,} samples; {features}"
    n, m = (side.counted if metric.from_statistics else side.shown for side in (sample, ref))
    return f"{_count(n)} samples and {_count(m)} references; {features}"


def _count(n):
    return "an unknown number of" if n is None else f"{n:,}"
