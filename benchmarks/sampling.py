"""Measures images per second of a whole sampling run: 50 steps of DDPM with classifier-free guidance, both halves in one batch:

    python -m benchmarks.sampling --quick                           DiT-S/2, on 2 CPU cores within 5 minutes
    python -m benchmarks.sampling --compile                         DiT-XL/2, compiled as sample.py does it, to a CUDA graph
"""

from functools import partial

import torch

from benchmarks.flags import parse_args
from benchmarks.report import Report, lines_of, milliseconds, plain, ratio
from benchmarks.sides import SIDES, build_model, of_size
from benchmarks.timing import time_in_turns
from diffusion import create_diffusion
from diffusion.guidance import Guidance, guided
from diffusion.samplers import ddpm
from machine.flags import positive
from mixers.running import prepare_to_sample

STEPS = 50
NAMES = ("attention", "pdessm", "floor")
GUIDANCE = Guidance(scale=1.5)


def rate(name):
    """Makes the column of a side's images per second."""
    return lambda row: 1e3 * row["batch"] / ms if (ms := milliseconds(name)(row)) else None


COLUMNS = {
    **plain("model", "tokens", "batch"),
    **{f"{name}, images/s": rate(name) for name in NAMES},
    "pdessm/attention": ratio("attention", "pdessm"),
    "floor/pdessm": ratio("pdessm", "floor"),
}


def main(args):
    if args.compile not in (None, "default"):
        raise SystemExit(f"--compile {args.compile}: sampling is compiled as sample.py does it, in a mode of its own")
    size, inputs, batch = ("S", (16, 32), args.batch or 1) if args.quick else ("XL", (32, 64), args.batch or 16)
    how = dict(precision="bf16" if args.device.type == "cuda" else "fp32", compile=bool(args.compile))
    report = Report("sampling", args, COLUMNS, steps=STEPS, sampler="ddpm", guidance=GUIDANCE.scale)
    for side in inputs:
        run = partial(sampling_run, args.device, args.backend, batch, STEPS, **how, **of_size(size, side))
        sides = {name: partial(run, mixer=SIDES[name]) for name in NAMES}
        times = time_in_turns(sides, args.device, args.seconds)
        report.add(model=f"DiT-{size}/2", tokens=(side // 2) ** 2, batch=batch, sides=times)
    lines = lines_of(report.contents["rows"], NAMES, value=rate)
    report.finish({f"{STEPS} steps, DiT-{size}/2, batch {batch}": lines}, unit="images per second")


def sampling_run(device, backend, batch, steps, precision, compile, **options):
    """Returns a function that takes all steps from noise to images. precision, compile and backend: the flags of sample.py;
    options: those of build_model."""
    model = build_model(device, **options).eval().requires_grad_(False)
    prepare_to_sample(model, device, precision, compile, backend)
    diffusion = create_diffusion(str(steps))
    noise = torch.randn(batch, model.in_channels, *model.input_size, device=device)
    labels = torch.randint(model.num_classes, (batch,), device=device)
    network = guided(model, diffusion, GUIDANCE)
    return partial(ddpm, diffusion, network, noise, clip_denoised=False, model_kwargs=dict(y=labels))


FLAGS = {"batch": dict(type=positive, help="images at once; by default 16, or 1 with --quick")}

if __name__ == "__main__":
    main(parse_args(__doc__, **FLAGS))
