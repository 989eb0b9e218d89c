"""Numbers in flags: one rule for each kind, in every command."""

import argparse
import contextlib
import importlib

import pytest

from machine import flags

COMMANDS = {name: [] for name in ("train", "sample", "sample_ddp", "evaluate", "checkpoints.export", "images.encode")}
COMMANDS |= {"overlay": [[]], "benchmarks.flags": ["about"]}
NEVER = ["nan", "inf", "-inf", "-1", "1e400", "9" * 400, "", "x"]


def numeric_flags(monkeypatch, name):
    """The flags of a command that take numbers, its subcommands' included."""
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: parsers.append(self))
    with contextlib.suppress(AttributeError):  # some look at what was parsed
        importlib.import_module(name).parse_args(*COMMANDS[name])
    found, actions = [], list(parsers[0]._actions)
    for action in actions:
        if isinstance(action, argparse._SubParsersAction):
            actions += [sub for parser in action.choices.values() for sub in parser._actions]
        elif hasattr(action.type, "what") or action.type in (int, float, flags.image_size):
            found.append(action)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_that_takes_a_number_has_one_of_the_rules(monkeypatch, name):
    found = numeric_flags(monkeypatch, name)
    assert found
    assert [action.option_strings for action in found if action.type in (int, float)] == []
    for action in found:
        for text in NEVER:
            with pytest.raises(argparse.ArgumentTypeError, match=r"is not|neither"):
                action.type(text)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (flags.positive, {"1": 1, " 7": 7, str(2**63 - 1): 2**63 - 1}, ["0", "1.5", "1e3", str(2**63)]),
        (flags.not_negative, {"0": 0, "12": 12}, ["0.0", "-0.5"]),
        (flags.above_zero, {"1e-4": 1e-4, "3": 3.0}, ["0", "-0.0"]),
        (flags.from_zero, {"0": 0.0, "1.5": 1.5}, ["-1e-9"]),
        (flags.finite, {"-2": -2.0, "0": 0.0}, ["-inf"]),
        (flags.share, {"0": 0.0, "1": 1.0, ".5": 0.5}, ["1.0001"]),
        (flags.probability, {"0.5": 0.5}, ["0", "1"]),
        (flags.ema_length, {"0.005": 0.005, "0.25": 0.25}, ["0.0049", "0.2501"]),
        (flags.decay, {"0": 0.0, "0.9999": 0.9999}, ["1", "1.0", "2"]),
        (flags.image_size, {"48": 48, "32x48": (32, 48), "32x32": 32}, ["0", "32x", "1x2x3", "-8x8"]),
    ],
    ids=[
        "positive", "not_negative", "above_zero", "from_zero", "finite", "share", "probability", "ema_length", "decay",
        "image_size",
    ],
)
def test_what_each_rule_takes(rule, good, bad):
    assert {text: rule(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            rule(text)


@pytest.mark.parametrize(
    ("command", "flag", "text", "message"),
    [
        ("train", "--max-grad-norm", "-1", "-1 is not a finite number above 0"),
        ("sample", "--time-shift", "0", "0 is not a finite number above 0"),
        ("sample_ddp", "--global-seed", f"{2**63}", f"{2**63} is not a whole number from 0 to {2**63 - 1}"),  # of no tensor
    ],
)
def test_a_wrong_number_ends_in_one_line_that_names_its_flag(capsys, command, flag, text, message):
    with pytest.raises(SystemExit):
        importlib.import_module(command).parse_args([flag, text])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.endswith("FLAGS; --help lists them")
    assert error.endswith(f"error: argument {flag}: {message}")
