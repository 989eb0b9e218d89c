"""The kinds of numbers that flags accept: one rule per kind, the same in every command, checked before a command begins.

Each is an argparse `type`, so that argparse says in one line which flag was wrong and what it accepts.
"""

import argparse
import math
import re

LARGEST = 2**63 - 1  # of an integer in a tensor
USE = "%(prog)s FLAGS; --help lists them"  # the usage of commands whose flags would push an error off the screen


def _number(read, holds, what):
    def parse(text):
        try:
            number = read(text)
        except (ValueError, OverflowError):
            number = math.nan
        if not (number <= LARGEST and holds(number)):  # which NaN and infinity never are
            limit = f" to {LARGEST}" if LARGEST < number < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {what}{limit}")
        return number

    parse.what = what
    return parse


positive = _number(int, lambda n: n >= 1, "a whole number from 1")                # sizes, steps, counts
not_negative = _number(int, lambda n: n >= 0, "a whole number from 0")            # counts that may be none; seeds
above_zero = _number(float, lambda x: x > 0, "a finite number above 0")           # rates, norms, seconds
from_zero = _number(float, lambda x: x >= 0, "a finite number from 0")            # strengths, weights
finite = _number(float, math.isfinite, "a finite number")                         # lengths to either side
share = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")             # places between noise and image
probability = _number(float, lambda x: 0 < x < 1, "a number above 0 and below 1")  # of an event
ema_length = _number(float, lambda x: 0.005 <= x <= 0.25, "a number from 0.005 to 0.25")  # in units of the run
decay = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")        # of a running average


def group(parser, title):
    """Returns two functions like add_argument for a new group of flags: one, and one for flags that may change on --resume."""
    add = parser.add_argument_group(title).add_argument
    return add, lambda *names, **how: may_change(add(*names, **how))


def may_change(flag):
    """Marks a flag, as add_argument returns it, as one that may change when a run goes on."""
    flag.may_change = True


def marked_may_change(parser):
    """Returns the names of the settings whose flags are so marked."""
    return {flag.dest for flag in parser._actions if getattr(flag, "may_change", False)}


def class_label(text):
    """Returns the number of a class, or else its name: "007" is a name, since numbers have no leading zeros."""
    return int(text) if re.fullmatch(r"0|-?[1-9][0-9]*", text) else text


class Default(int):
    """A default that can be told from the same number when it is given."""


def image_size(text):
    """Reads a side, "48", or "32x48" as (height, width)."""
    sides = [positive(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text} is neither a side nor HxW")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)
