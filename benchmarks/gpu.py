"""Runs everything that needs a GPU, the most important first, within a few minutes:

    python -m benchmarks.gpu --minutes 25
    python -m benchmarks.gpu --rehearse       the same on a CPU within 6 minutes, with tiny sizes and Triton's interpreter

Every stage is a process with a time limit of its own. Its output goes to <out>/<stage>.log, its tables and pictures to <out>,
and how it ended to <out>/gpu.json, at once. Started again, this goes on with the stages that have not begun, and then with
those that have not passed; to run some once more, name them in --stages. --checkout is a clone of facebookresearch/DiT;
--cifar10 and --flowers are folders of images.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import NamedTuple

from benchmarks import ROOT, commit
from machine.files import write_json
from machine.stops import STATUS

LEAST = 20     # no stage begins with fewer seconds left
FAREWELL = 30  # seconds for a stage to save its work once its time is over
ABOUT = "import json, torch; from benchmarks.report import machine; print(json.dumps(machine(torch.device({device!r}))))"


class Stage(NamedTuple):
    """A command, its time limit in minutes, what it adds to the environment, and the flag without which it is skipped."""

    name: str
    minutes: float
    command: list
    environment: dict = {}  # noqa: RUF012  (never changed)
    wants: str = ""


def stages(out, checkout, cifar10, flowers, rehearse):
    """Returns the stages in their order. checkout, cifar10 and flowers: paths, or None."""

    def module(name, *flags):
        return ["-m", f"benchmarks.{name}", *map(str, flags)]

    def benchmark(name, *flags):
        on = ["--device", "cpu", "--threads", 1, "--quick"] if rehearse else ["--backend", "auto"]
        return module("rehearsal", name, *on, *flags, "--out", out) if rehearse else module(name, *on, *flags, "--out", out)

    def paper(script, data):
        small = dict(SCALE="small", STEPS="2", IMAGES="32", SAMPLING_STEPS="2", WORK=str(out / script)) if rehearse else {}
        rows = dict(ROWS=str(out / f"{script}.jsonl"), PYTHON=sys.executable)
        return ["bash", f"reproduce/{script}.sh", str(data)], small | rows

    def tests():
        """Returns pytest's arguments: only files with the mark `gpu`, since others may need packages that are missing there."""
        files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
        if rehearse:  # the suite has tried the others
            files = [path for path in files if path.stem.endswith("_on_gpu")]
        flags = ["-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--junitxml", out / "tests.xml"]
        flags += [] if rehearse else ["-n", "8", "-vv"]  # every result at once: what is stopped has no summary
        return ["-m", "pytest", *map(str, flags), *map(str, sorted(files))]

    few = ["--seconds", 0.1 if rehearse else 2]
    kernels, step = 3 if rehearse else 60, ["--tokens-per-step", 64 if rehearse else 2**15]
    table1, small = paper("table1_cifar10", cifar10)
    flowers102, others = paper("table3_flowers", flowers)
    return [
        Stage("environment", 1, ["-c", ABOUT.format(device="cpu" if rehearse else "cuda")]),
        Stage("kernels", 2, benchmark("kernel_grids", "--seconds", kernels)),
        Stage("step", 2, benchmark("step", *step, *few)),
        Stage("table8", 2, benchmark("table8", *few)),
        Stage("memory", 2, benchmark("memory")),
        Stage("tests", 6, tests()),
        Stage("tiles", 5, benchmark("tiles", *(["--table", out / "tiles.json"] if rehearse else []))),
        Stage("tuned", 2, benchmark("kernel_grids", "--seconds", kernels)),
        Stage("layer", 4, benchmark("mixer", *few)),
        Stage("sampling", 4, benchmark("sampling", "--batch", 4, *few)),
        Stage("table5", 3, benchmark("table5", *few)),
        Stage("table9", 2, benchmark("table9", *few)),
        *(Stage(f"step-{size}", 2, benchmark("step", "--size", size, *step, *few)) for size in ("B", "L", "XL")),
        Stage("checkout", 3, module("checkout", checkout, *(["--mixers", "pdessm"] if rehearse else [])), {}, "checkout"),
        Stage("profiles", 2, benchmark("slowest")),
        Stage("table1", 60, table1, small, "cifar10"),
        Stage("flowers", 60, flowers102, others, "flowers"),
    ]


def main(argv=None):
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rehearse:
        write_pictures(args.cifar10)
    planned = stages(args.out, args.checkout, args.cifar10, args.flowers, args.rehearse)
    if unknown := set(args.stages or ()) - {stage.name for stage in planned}:
        raise SystemExit(f"no stage {', '.join(sorted(unknown))}; known: {', '.join(stage.name for stage in planned)}")
    given = {name: value for name, value in vars(args).items() if value}
    results, end = read(args.out / "gpu.json"), monotonic() + 60 * args.minutes
    for stage in sorted(planned, key=lambda stage: "seconds" in results.get(stage.name, {})):
        before = results.get(stage.name, {})
        if stage.name not in args.stages if args.stages else before.get("state") == "passed":
            continue
        left = end - monotonic()
        if stage.wants and stage.wants not in given:
            result = dict(state="skipped", why=f"give --{stage.wants}")
        elif left < LEAST:
            result = before or dict(state="skipped", why=f"no time left of {args.minutes:g} minutes")
        else:
            print(f"{stage.name} ...", flush=True)
            result = run(stage, min(60 * stage.minutes, left), args.out, environment(args.rehearse))
            print(table({stage.name: result}, [stage.name]), flush=True)
        results[stage.name] = result
        write_json(args.out / "gpu.json", dict(stages=results), "results")
    print(table(results, [stage.name for stage in planned]))
    ends = {results[stage.name]["state"] for stage in planned if stage.name in results}
    if "failed" in ends or (args.rehearse and ends != {"passed"}):
        raise SystemExit(1)


def write_pictures(folder):
    """Writes as many pictures as a batch of the small tables, of noise."""
    folder.mkdir(exist_ok=True)
    for number in range(64):
        (folder / f"{number}.ppm").write_bytes(b"P6 32 32 255\n" + Random(number).randbytes(3 * 32 * 32))


def environment(rehearse):
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    here = dict(PYTHONPATH=paths, PYTHONUNBUFFERED="1")
    on_cpu = dict(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1", REHEARSE="1", OMP_NUM_THREADS="1", PROCESSES="1")
    return os.environ | here | (on_cpu if rehearse else {})


def run(stage, seconds, out, environment):
    """Runs a stage for at most so many seconds, and returns how it ended: passed, failed, or out of time."""
    log, start = out / f"{stage.name}.log", monotonic()
    command = stage.command if stage.command[0] == "bash" else [sys.executable, *stage.command]
    with open(log, "wb") as file:
        streams = dict(stdout=file, stderr=subprocess.STDOUT)
        child = subprocess.Popen(command, cwd=ROOT, env=environment | stage.environment, start_new_session=True, **streams)
        try:
            child.wait(seconds)
            state = "passed" if child.returncode == 0 else "out of time" if child.returncode == STATUS else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            finish(child)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return dict(
        state=state, seconds=round(monotonic() - start, 1), date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(), command=" ".join(command), said=lines[-1:] if state == "passed" else lines[-8:],
    )  # fmt: skip


def finish(child):
    """Ends a stage and all that it has started: first so that they may save what they have, then for good. A shell ends at
    once, before the command that it waits for."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = monotonic() + FAREWELL
        with suppress(ProcessLookupError):                                 # none of them is left
            os.killpg(child.pid, number)
            while monotonic() < end:
                child.poll()  # else it would stay in the group once it has ended
                os.killpg(child.pid, 0)
                sleep(0.05)


def read(path):
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def table(results, names):
    """Returns a line per stage: how it ended, after how many seconds, and its last line of output."""
    lines = []
    for name in names:
        result = results.get(name, dict(state="not run"))
        said = result.get("why") or (result.get("said") or [""])[-1].strip()
        lines.append(f"{name:12} {result['state']:12} {result.get('seconds', ''):>7}  {said[:90]}".rstrip())
    return "\n".join(lines)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=25, help="for all stages together")
    add("--rehearse", action="store_true", help="see on a CPU that every stage works")
    add("--stages", nargs="+", metavar="NAME", help="these alone, also if they have passed")
    add("--out", type=Path, help="folder of results; by default results/gpu, or results/rehearsal")
    add("--checkout", type=Path, help="a clone of facebookresearch/DiT, whose scripts the overlay runs")
    add("--cifar10", type=Path, help="where cifar-10-batches-py lies, for Table 1")
    add("--flowers", type=Path, help="where flowers-102 lies, for Table 3")
    args = parser.parse_args(argv)
    args.out = (args.out or ROOT / "results" / ("rehearsal" if args.rehearse else "gpu")).resolve()
    if args.rehearse:
        args.checkout = args.checkout or ROOT / "tests" / "checkout"
        args.cifar10 = args.flowers = args.out / "pictures"
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STATUS))  # so that the stage that runs is ended, too
    main()
