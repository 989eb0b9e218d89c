"""Runs the shell scripts of reproduce/, with a pretender in place of Python."""

import os
import subprocess
import sys

from commands import ROOT

# In place of Python: writes down the command and makes the files that the real one would. It starts hundreds of times, and
# so goes without site and pathlib, which take most of its time.
PRETENDER = f"""#!{sys.executable} -S
import os, sys
with open(os.environ["SEEN"], "a") as file:
    print(repr(sys.argv[1:]), file=file)
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
def touch(*parts):
    os.makedirs(os.path.join(*parts[:-1]), exist_ok=True)
    open(os.path.join(*parts), "a").close()
if sys.argv[1] == "-c":
    print(1)
elif "train.py" in sys.argv:
    touch(flags["--results-dir"], "000", "checkpoints", "%07d.pt" % int(flags["--max-steps"]))
elif "sample_ddp.py" in sys.argv:
    touch(flags["--sample-dir"], "samples.npz")
elif "--make-ref" in flags:
    open(sys.argv[sys.argv.index("--make-ref") + 2], "a").close()
"""


def run_script(name, data, folder, **environment):
    environment = os.environ | {"WORK": str(folder / "runs"), "ROWS": str(folder / "rows.jsonl")} | environment
    command = ["bash", str(ROOT / "reproduce" / name), str(data)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def commands_of(name, folder, **environment):
    """The commands that a script would run."""
    pretender, seen = folder / "python", folder / "seen"
    pretender.write_text(PRETENDER)
    pretender.chmod(0o755)
    seen.unlink(missing_ok=True)
    done = run_script(name, folder, folder, PYTHON=str(pretender), SEEN=str(seen), **environment)
    assert done.returncode == 0, done.stderr
    return [eval(line) for line in seen.read_text().splitlines()]
