"""Commands that measure time and memory."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit():
    """Returns the commit that is checked out, with a plus if files differ from it; None outside a clone."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "*.py"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.strip() + ("+" if changed.strip() else "")
