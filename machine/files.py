"""Files that are either whole or absent, and folders that one process at a time may use."""

import fcntl
import json
import logging
import os
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger("train")


@contextmanager
def whole_file(path, what):
    """Opens a file for writing under a temporary name and renames it to `path` at the end, so that `path` is whole or absent. A
    device or a pipe is written directly, and a link stays a link."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        with open(path, "wb") as file:
            yield file
        return
    path = path.resolve() if path.is_symlink() else path
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # On a full disk PyTorch's writer raises an error about positions, whose context is the OSError with the reason.
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"could not write the {what} {path}: {reason}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def partial_path(path):
    """Returns a temporary name beside `path` that no other process has: in two containers, process ids may be equal."""
    return Path(f"{path}.{os.uname().nodename}.{os.getpid()}.partial")


@contextmanager
def alone_in(folder):
    """Waits until no other process holds this folder so, and holds it to the end: for a file there that is read, changed and
    written. It leaves no file behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems lock no folders
            logger.warning(f"Another process may write to {folder} at the same time: it cannot be locked ({error})")
        yield
    finally:
        os.close(handle)


def write_json(path, contents, what):
    """Writes plain values as JSON that is whole or not there."""
    with whole_file(path, what) as file:
        file.write((json.dumps(contents, indent=1) + "\n").encode())


def read_rows(path):
    """Returns the rows of a file of JSON lines, without one that was cut short; none if there is no such file."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def append_row(path, row):
    """Appends a row to a file of JSON lines: on a line of its own, even if the one before was cut short."""
    with named(path, "log"), open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
        cut = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut + json.dumps(row).encode() + b"\n")


def rewrite(file, text, what):
    """Gives an open file other contents: one that holds a lock, which a new file of its name would not."""
    with named(file.name, what):
        file.truncate(0)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def named(path, what):
    """Has an OSError say which file could not be written: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"could not write the {what} {path}: {error}") from error


def check_writable(path, flag, *endings):
    """Raises an OSError, which names the flag that gave the path, unless a file can be written there, and a ValueError unless
    its name has one of these endings. So a checkpoint or an archive given by mistake is not overwritten."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"{flag} {path}: not a file in a folder that can be written")
    if path.suffix not in endings and (path.is_file() or not path.exists()):  # devices and pipes have none
        raise ValueError(f"{flag} {path} should end in {' or '.join(endings)}")


def make_folder(path, flag):
    """Makes a folder, with those above it, unless it exists, and returns it. An OSError names the flag that gave the path."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OSError(f"{flag} {path}: a file is where a folder is needed") from error
    return Path(path)


def lock(file, folder):
    """Locks a folder for this process as long as it keeps a file in it open. ValueError if another process holds the lock.

    It is a POSIX lock: kill -9 releases it, and processes forked to read images do not hold it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"another process is at work in {folder}; wait for its end, or stop it") from error
    except OSError as error:  # some network file systems have no locks
        logger.warning(f"Nothing keeps a second process out of {folder}: it cannot be locked ({error})")
