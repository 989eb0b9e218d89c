"""The folder of a run, with log.txt for people and log.jsonl for programs, and a tracker that shows the same elsewhere."""

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from images.folders import describe_classes
from machine.cost import peak_memory
from machine.files import append_row, lock, make_folder, read_rows, whole_file
from machine.processes import one_line
from training.trackers import numbers_of

logger = logging.getLogger("train")
warned = set()


def create_experiment(results_dir, model):
    """Makes a new folder <results_dir>/<index>-<model>, with the index after the highest existing one, and returns it."""
    root = make_folder(results_dir, "--results-dir")
    indexed = [re.match(r"(\d{3,5})-", entry.name, re.ASCII) for entry in root.iterdir()]  # a date has more digits
    for index in count(max((int(found[1]) for found in indexed if found), default=-1) + 1):
        folder = root / f"{index:03d}-{model.replace('/', '-')}"
        with suppress(FileExistsError):  # another run took it just now
            folder.mkdir()
            break
    (folder / "checkpoints").mkdir()
    return folder


def open_folder(folder, results_dir, model):
    """Returns the folder of a resumed run, or else a new one, and makes training log to its log.txt as long as that can be
    written. ValueError if another process is using the folder."""
    opened, folder = ("reopened", folder) if folder else ("created", create_experiment(results_dir, model))
    log = logging.FileHandler(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
    lock(log.stream, folder)
    log.handleError = lambda record: warn_once(f"Writing to {log.baseFilename} failed, and training goes on: {sys.exception()}")
    log_to(log)
    logger.info(f"Experiment directory {opened} at {folder}")
    return folder


@contextmanager
def removed_on_failure(folder):
    """Removes the folder of a run that its body fails to begin, which holds nothing yet; None removes nothing."""
    try:
        yield
    except BaseException:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def log_to(handler):
    """Adds a handler, whose lines begin with the time, to the log of training."""
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)


@contextmanager
def best_effort(what):
    """Turns an error in its body into a warning, each once: for work that training can do without."""
    try:
        yield
    except Exception as error:
        warn_once(f"{what} failed, and training goes on: {one_line(error)}")


def warn_once(message):
    if message not in warned:
        warned.add(message)  # added first: logging the warning may itself fail and call this again
        logger.warning(message)


class Journal(NamedTuple):
    """Where the numbers and pictures of a run go: its folder, and track(step, numbers, picture=None) if a tracker has them.
    Of several processes only the first one writes."""

    folder: Path
    writes: bool = True
    track: Callable | None = None

    def write_row(self, row):
        """Appends a dict with a step to log.jsonl, and gives its numbers to the tracker."""
        if not self.writes:
            return
        with best_effort("Writing to log.jsonl"):
            append_row(self.folder / "log.jsonl", row)
        if self.track:
            with best_effort("Tracking"):
                self.track(row["step"], numbers_of(row))


def rows_until(folder, step):
    """Returns the rows of a folder's log.jsonl up to a step, without a truncated line."""
    return [row for row in read_rows(folder / "log.jsonl") if row["step"] <= step]


def seen_at(folder, step):
    """Returns the names of a folder's outputs for a step: those of its numbers in log.jsonl, and "samples" if there are any."""
    names = {name for row in rows_until(folder, step) if row["step"] == step for name in row}
    return names | ({"samples"} if (folder / "samples" / f"{step:07d}.png").exists() else set())


def forget_rows_after(folder, step):
    """Removes the rows of later steps, which will be written again, from a folder's log.jsonl."""
    rows = rows_until(folder, step)
    with whole_file(folder / "log.jsonl", "log") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def describe(model, begun_from, dataset, held_out, path, probe=None):
    """Logs a model's size, the lines on its initial weights, the training images and their path, and what a probe compares."""
    logger.info(f"DiT Parameters: {sum(p.numel() for p in model.parameters()):,}")
    classes = f" of {dataset.num_classes} classes" if dataset.num_classes else ""
    remarks = dict.fromkeys(line for images in (dataset, held_out) if images for line in images.remarks)
    named = describe_classes(dataset.classes) if dataset.num_classes else []
    for line in (*begun_from, f"Dataset contains {len(dataset):,} images{classes} ({path or 'digits'})", *remarks, *named):
        logger.info(line)
    there, asked = dataset.num_classes, model.num_classes
    if there < asked:
        few = f"The images have {there} classes, fewer than --num-classes {asked}"
        logger.info(f"{few}: those from number {there} on will stay untrained")
    if probe:
        logger.info(probe.describe())


def describe_steps(total, loader, batch_size, parts, processes):
    """Logs how many steps there are and how many images each has, over all processes and on each, in that many parts."""
    where = f"{processes.size} x {processes.device.type}"
    logger.info(f"Training for {total:,} steps ({total / len(loader):.1f} epochs) on {where}...")
    in_parts = f" in {parts} parts" if parts > 1 else ""
    logger.info(f"A step has {batch_size:,} images, {loader.batch_size:,} on each process{in_parts}")


def log_interval(step, losses, seconds, cost, processes, write_row, rate=None):
    """Logs the mean of the losses since the last call; the speed, in steps and in operations per process; this process's peak
    memory; and the learning rate if it varies. cost: flops of a step, and the device's peak flops per second or None. rate: the
    function from a step to its learning rate, or None."""
    if processes.rank == 0 and losses:
        row = dict(step=step, loss=torch.stack(losses).mean().item(), steps_per_sec=len(losses) / seconds)
        flops, peak = row["steps_per_sec"] * cost[0] / processes.size, cost[1]
        row |= dict(gflops_per_sec=flops / 1e9, peak_memory_gb=peak_memory(processes.device) / 1e9)
        row |= (dict(utilisation=flops / peak) if peak else {}) | (dict(lr=rate(step)) if rate else {})
        logger.info(
            f"(step={step:07d}) Train Loss: {row['loss']:.4f}, Train Steps/Sec: {row['steps_per_sec']:.2f}, "
            f"GFLOP/s: {row['gflops_per_sec']:,.2f}{f' ({flops / peak:.1%} of the peak)' if peak else ''}, "
            f"Peak Memory: {row['peak_memory_gb']:.2f} GB{f', Learning Rate: {rate(step):.3g}' if rate else ''}"
        )
        write_row(row)


def log_scale(step, scale, write_row):
    """Logs that a step was skipped because of float16's scale, and the new scale."""
    logger.info(f"(step={step:07d}) Skipped: float16 cannot hold the scaled gradients, whose scale is now {scale:g}")
    write_row(dict(step=step, scale=scale))


def log_skipped(step, in_a_row, images, write_row):
    """Logs the images, by their numbers, of a step whose loss or gradient was not finite."""
    logger.info(f"(step={step:07d}) Skipped, {in_a_row} in a row: the loss or a gradient is not finite")
    write_row(dict(step=step, skipped=in_a_row, images=images))


def too_many_skipped(step, in_a_row, images):
    """Returns the ValueError that ends a run after that many consecutive steps that were not finite."""
    some = ", ".join(map(str, images[:8])) + (", ..." if len(images) > 8 else "")
    return ValueError(
        f"steps {step - in_a_row + 1} to {step} had no finite loss and gradient, the last one with images {some} of the "
        "data set; log.jsonl has all of them; a lower --lr, --max-grad-norm or --precision fp32 may help"
    )
