"""The flags of the optimiser and of the averages of weights, and the learning rate of each step."""

import argparse
import math

from machine.flags import above_zero, decay, ema_length, from_zero, not_negative, positive


def add_learning_flags(add, vary):
    """Adds the flags of train.py that say how weights change, by `group` of machine/flags.py."""
    add("--lr", type=above_zero, default=1e-4, help="learning rate of AdamW, constant unless the next two say otherwise")
    more = "factor of --lr for the coefficients of PDEs, most of which are logarithms"
    add("--lr-coefficients", type=above_zero, default=1.0, metavar="TIMES", help=more)
    add("--warmup-steps", type=not_negative, default=0, metavar="STEPS", help="steps in which the learning rate rises from 0")
    add("--lr-schedule", choices=("constant", "cosine"), default="constant", help="after warm-up; cosine falls to 0 at the end")
    add("--weight-decay", type=from_zero, default=0.0, help="of AdamW, for every parameter")
    betas = dict(type=decay, nargs=2, metavar=("BETA1", "BETA2"), default=[0.9, 0.999])
    add("--adam-betas", **betas, help="decays of AdamW's averages of gradients and of their squares")
    add("--max-grad-norm", type=above_zero, help="scale larger gradients down to this norm")
    vary("--max-skipped", type=positive, default=20, metavar="STEPS", help="stop after this many non-finite steps in a row")
    add("--ema-decay", type=decay, nargs="+", default=[0.9999], help="decays of averages of weights; sampling uses the first")
    lengths = "also keep two averages that look back over these shares of the run, for --ema-length of sample.py"
    add("--ema-lengths", type=ema_length, nargs=2, metavar="L", help=lengths)
    warmup = "let averages start fast, so that short runs can be sampled; without it their decay is constant, as upstream's"
    add("--ema-warmup", action=argparse.BooleanOptionalAction, default=True, help=warmup)


def learning_rate(lr, warmup, schedule, total):
    """Returns the function from a step, 1 to `total`, to its learning rate, or None if that is constant. It rises linearly over
    `warmup` steps; then, for "cosine", it falls along half a cosine. ValueError if no step is left for the cosine."""
    if schedule == "constant":
        return (lambda step: lr * min(step / warmup, 1)) if warmup else None
    if warmup >= total:
        raise ValueError(f"--warmup-steps {warmup:,} leave none of the {total:,} steps for --lr-schedule cosine")

    def rate(step):
        if step <= warmup:
            return lr * step / warmup
        return lr * (1 + math.cos(math.pi * (step - 1 - warmup) / (total - warmup))) / 2

    return rate
