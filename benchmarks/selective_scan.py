"""Times the selective scan alone, forward, and forward and backward, by tokens, beside that of mambapy:

    python -m benchmarks.selective_scan --quick      leaves out 256 tokens at batch 16
    python -m benchmarks.selective_scan

768 channels, softplus, D and gate, tokens first in memory as a mixer's linear layers leave them. ours: C++ on CPUs; torch: ours
in PyTorch's operations; mambapy: the parallel scan in PyTorch of `pip install --no-deps mambapy==1.2.0`, with softplus and gate
around it; reference: the equations, a token at a time.
"""

from functools import partial

import torch
from torch.nn.functional import silu, softplus

from benchmarks.flags import parse_args
from benchmarks.report import Report, lines_of, milliseconds, plain, ratio
from benchmarks.timing import time_in_turns
from mixers.selective_scan import selective_scan, selective_scan_reference
from pde_ssm import set_backend

CHANNELS = 768
SIZES = [(1, 256, 16), (1, 1024, 16), (1, 256, 1), (1, 1024, 1), (16, 64, 16), (16, 256, 16)]  # batch, tokens, states
NOT_QUICK = (16, 256, 16)
NO_MAMBAPY = "is not installed: pip install --no-deps mambapy==1.2.0"
NAMES = ("ours", "torch", "mambapy", "reference")
COLUMNS = {
    **plain("batch", "tokens", "states", "pass"),
    **{f"{name}, ms": milliseconds(name) for name in NAMES},
    **{f"{name}/ours": ratio(name, "ours") for name in NAMES[1:]},
}


def main(args):
    report = Report("selective_scan", args, COLUMNS, channels=CHANNELS)
    functions = dict(ours=ours(args.backend), torch=ours("torch"), reference=selective_scan_reference)
    missing = {}
    try:
        functions["mambapy"] = load_mambapy()
    except ImportError:
        missing["mambapy"] = NO_MAMBAPY
    for batch, tokens, states in SIZES:
        if args.quick and (batch, tokens, states) == NOT_QUICK:
            continue
        for training in (False, True):
            inputs = make_inputs(args.device, batch, tokens, states)
            sides = {name: partial(scan_pass, scan, inputs, training, args.compile) for name, scan in functions.items()}
            times = time_in_turns(sides, args.device, args.seconds)
            name = "forward and backward" if training else "forward"
            report.add(batch=batch, tokens=tokens, states=states, **{"pass": name}, sides=times | missing)
    rows, panels = report.contents["rows"], {}
    for row in rows:
        key = f"{row['pass']}, batch {row['batch']}, {row['states']} states"
        panels[key] = lines_of([x for x in rows if all(x[part] == row[part] for part in ("pass", "batch", "states"))], NAMES)
    report.finish(panels)


def make_inputs(device, batch, tokens, states):
    """Draws what a mixer gives the scan: A and delta as Mamba's start."""

    def rows(width):
        return torch.randn(batch, tokens, width, device=device).mT

    inputs = dict(u=rows(CHANNELS), delta=rows(CHANNELS), B=rows(states), C=rows(states), z=rows(CHANNELS))
    inputs |= dict(A=-torch.arange(1.0, states + 1, device=device).repeat(CHANNELS, 1), D=torch.ones(CHANNELS, device=device))
    inputs |= dict(delta_bias=torch.full((CHANNELS,), -4.6, device=device))    # softplus of which is 0.01
    return {name: x.requires_grad_() for name, x in inputs.items()}


def scan_pass(scan, inputs, training, compile):
    """Returns the function to time."""
    scan = torch.compile(scan, mode=compile) if compile else scan
    weights = torch.randn_like(inputs["u"])

    def forward():
        with torch.no_grad():
            scan(**inputs, delta_softplus=True)

    def both():
        torch.autograd.grad(scan(**inputs, delta_softplus=True), list(inputs.values()), weights)

    return both if training else forward


def ours(backend):
    """Returns our scan on that backend of `set_backend`."""

    def scan(**inputs):
        set_backend(backend)
        return selective_scan(**inputs)

    return scan


def load_mambapy():
    """Returns mambapy's scan with the arguments of ours. ImportError without that package."""
    from mambapy.mamba import MambaBlock

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        y = MambaBlock.selective_scan(None, u.mT, softplus(delta.mT + delta_bias), A, B.mT, C.mT, D)
        return (y * silu(z.mT)).mT

    return scan


if __name__ == "__main__":
    main(parse_args(__doc__))
