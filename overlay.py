"""Runs the scripts of an untouched DiT checkout, or of one of its children, with another mixer of tokens:

    torchrun --nproc_per_node=8 overlay.py ../DiT/train.py --mixer pdessm --model DiT-XL/2 --data-path /imagenet/train
    python overlay.py ../DiT/sample.py --model DiT-XL/2 --ckpt results/000-DiT-XL-2/checkpoints/0400000.pt
    python overlay.py --diff ../DiT --model DiT-S/2      (what --mixer pdessm changes in its models)
    python overlay.py --check ../DiT                     (whether this repository's own DiT agrees with it)

The overlay removes the mixers' flags (--mixer, --pde-* and others) from the arguments and leaves the rest to the script. The
script's own code builds a model with attention; then the overlay replaces the attention layers, with random numbers of their
own. So everything else that is random (initial weights, noise, data) is the same as without the overlay, and no initialiser
touches a mixer. It works in the processes of torchrun and accelerate, but not in those that a script starts by itself.
"""

import argparse
import json
import os
import re
import runpy
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch

from comparing.checkouts import HERE, imports_of
from comparing.exchange import Exchange, describe, exchanging, say, shapes
from mixers import MIXERS, add_mixer_flags, build_mixer, mixer_options
from mixers.pde import MIXER, read_hybrid
from pde_ssm import options_from_weights


def main(argv):
    args, rest = mixer_flags().parse_known_args(argv)
    if rest and not rest[0].startswith("-"):
        script, arguments = Path(rest[0]), rest[1:]
        if not script.is_file():
            raise FileNotFoundError(f"{script}: no such script" + (", but a folder" if script.is_dir() else ""))
        mixer, options = choose_mixer(args.mixer, vars(args), args.attention_class, arguments)
        run(script, arguments, mixer, options, args.attention_class)
        return
    args = parse_args(argv)
    if args.diff:
        from comparing.diff import diff, diff_table

        mixer = args.mixer or "pdessm"
        exchange = Exchange(mixer, mixer_options(mixer, vars(args)), args.diff, args.attention_class)
        if mixer == "attention":
            raise ValueError("--diff compares attention with another mixer; give --mixer")
        found = diff(args.diff, exchange, args.model)
        print(json.dumps(found, indent=1) if args.json else diff_table(found))
        return
    from comparing.check import check, check_table

    if args.mixer or args.model or args.attention_class:
        raise ValueError("--check compares with attention at every size; --mixer, --model and --attention-class are for --diff")
    rows = check(args.check)
    print(json.dumps(rows, indent=1) if args.json else check_table(rows))
    if wrong := [row["what"] for row in rows if not row["agrees"]]:
        raise ValueError(f"{len(wrong)} of {len(rows)} comparisons disagree: {', '.join(wrong)}")


def run(script, arguments, mixer, options, attention_class):
    """Runs a script as `python script arguments` would, with another mixer in the models that its checkout's code builds."""
    say(f"{script} runs as it is, with {describe(mixer, options)}")
    say("torch.load may read an argparse.Namespace, which torch >= 2.6 refuses; Python writes no __pycache__")
    exchange = None if mixer == "attention" else Exchange(mixer, options, checkout_of(script), attention_class)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # for processes of data loaders that start afresh
    argv, sys.argv = sys.argv, [str(script), *arguments]
    try:
        with imports_of(script.parent), torch.serialization.safe_globals([argparse.Namespace]), exchanging(exchange):
            runpy.run_path(str(script), run_name="__main__")
            if exchange:
                exchange.require_any()
    except RuntimeError as error:
        if "loading state_dict" in str(error) and re.search(r"\.pde\.\w", str(error)):
            raise ValueError(f"the checkpoint does not fit {describe(mixer, options)}: it has another mixer") from error
        raise
    finally:
        sys.argv = argv


def checkout_of(script):
    """Returns the git repository that a script lies in, or its folder if there is none."""
    folder = script.resolve().parent
    return next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), folder)


def choose_mixer(mixer, settings, attention_class, arguments):
    """Returns (name, options) of the mixer that the flags name, or else of the one with which a checkpoint among the script's
    arguments was trained. ValueError if the two contradict each other.

    mixer: what --mixer says, or None. settings: a dict of all that the flags say.
    """
    path, stored, hybrid = stored_mixer(arguments)
    if stored and mixer == "attention":
        raise ValueError(f"--mixer attention contradicts {path}, which mixes tokens by a PDE; leave the flag out")
    mixer = mixer or ("pdessm" if stored else "attention")
    options = mixer_options(mixer, settings)
    if mixer == "attention" and attention_class:
        raise ValueError("--attention-class means nothing to --mixer attention")
    if not stored:
        return mixer, options
    kept = options_from_weights(stored) | hybrid
    if kept["conditioned"]:
        raise ValueError(f"the PDEs of {path} are conditioned, but the blocks of a checkout pass no vector to their mixers")
    with torch.device("meta"):
        asked = build_mixer(mixer, stored["pde.R.weight"].shape[1], 8, (16, 16), 0, **options)
    same = shapes(asked.state_dict()) == shapes(stored)
    same = same and (MIXER.named[mixer] | options).get("attention_every") == hybrid.get("attention_every")
    if (options or mixer != "pdessm") and not same:
        asked, kept = describe(mixer, options), describe("pdessm", kept)
        raise ValueError(f"{asked} contradicts {path}, which has {kept}; leave the flags out")
    return "pdessm", kept


def stored_mixer(arguments):
    """Returns (path, weights of its first mixer, options that `read_hybrid` finds) for the first argument that is a checkpoint
    with PDEs, or (None, {}, {}).

    A checkpoint with attention is ignored: it may be that of an encoder that the script also reads.
    """
    for argument in arguments:
        path = argument.partition("=")[2] if argument.startswith("--") else argument
        if not path.endswith((".pt", ".pth", ".ckpt")):
            continue
        weights = {}
        with suppress(Exception), torch.serialization.safe_globals([argparse.Namespace]):  # reading it is the script's business
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            weights = dict(contents.get("ema", contents.get("model", contents)))
        for name in map(str, weights):
            if name.endswith(".pde.equation.g0"):
                prefix = name.removesuffix("pde.equation.g0")
                first = {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}
                return path, first, read_hybrid(weights, prefix)
    return None, {}, {}


def mixer_flags():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--mixer", choices=MIXERS, help="read off a checkpoint among the script's arguments, or attention, unless given")
    add_mixer_flags(add)
    add("--attention-class", metavar="module:Class", help="what to replace, where a checkout has an attention of its own")
    return parser


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="Run a script of an untouched DiT checkout with another mixer, or compare with it.",
        usage="overlay.py SCRIPT [mixer's flags] [the script's arguments] | --diff FOLDER | --check FOLDER",
        parents=[mixer_flags()],
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--diff", type=Path, metavar="FOLDER", help="show what the mixer changes in a model of a checkout")
    what.add_argument("--check", type=Path, metavar="FOLDER", help="compare this repository's DiT with a checkout's")
    parser.add_argument("--model", help="of --diff; the first S/2 unless given")
    parser.add_argument("--json", action="store_true", help="of --diff and --check: print JSON")
    return parser.parse_args(argv)


def is_ours(error):
    """Tells whether an exception was raised in this repository's code, and not in a script or a library."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    rooms = {HERE, *(package.parent for package in HERE.glob("*/__init__.py"))}
    return Path(frame.f_code.co_filename).resolve().parent in rooms


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode or not is_ours(error):
            raise
        sys.exit(f"overlay.py: error: {error}")
