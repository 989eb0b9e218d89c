"""Handles early ends of a command: signals, the death of processes that read images for it, and the loss of its terminal."""

import errno
import multiprocessing.connection
import os
import signal
import sys
from contextlib import contextmanager, suppress

# Signals by which users, terminals and clusters ask a command to stop.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOPS = [number for number in signal.Signals if number.name in NAMES]
STATUS = 75  # exit status after one of these signals: os.EX_TEMPFAIL, which says that the command may be started again
received = []  # names of the signals that this process has received
_postponed = False


class Stopped(SystemExit):
    """An end that a signal has announced. str() of it is the signal's name."""

    def __init__(self, name):
        super().__init__(STATUS)
        self.name = name

    def __str__(self):
        return self.name


def install_handlers():
    """Makes these signals raise Stopped from now on, at any point of the program, unless they are ignored (nohup)."""
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def _note(number, frame):
    name = signal.Signals(number).name
    again = name == "SIGINT" and name in received
    received.append(name)
    if again or not _postponed:
        raise Stopped(name)
    if name == "SIGINT":
        with suppress(OSError):  # not by print(), which may be running already when a signal comes
            os.write(2, b"\nstopping; what was learnt is saved first, unless Ctrl-C comes once more\n")


def postpone():
    """Makes signals only be recorded in `received` from now on, without raising; a second Ctrl-C still raises."""
    global _postponed
    _postponed = True


@contextmanager
def postponed(wait=True):
    """Delays Stopped, which signals raise, to the end of the body; with wait=False, signals raise it at once again."""
    global _postponed
    before, _postponed = _postponed, wait
    try:
        _raise_noted()
        yield
    finally:
        _postponed = before
    _raise_noted()


def _raise_noted():
    if received and not _postponed:
        raise Stopped(received[0])


def ignore_stops(worker):
    """Makes a process that reads images ignore stop signals, which are meant for the process that it reads for."""
    os.setpgid(0, 0)
    sys.excepthook = lambda *error: None  # silences the thread that hands over images, when the main process closes its end
    for number in STOPS:
        if number != signal.SIGTERM:  # the main process ends its readers by SIGTERM
            signal.signal(number, signal.SIG_IGN)


def read_batches(loader):
    """Yields the batches of a DataLoader. OSError if one of its processes has died, Stopped if a stop signal has ended it."""
    batches = iter(loader)
    readers = multiprocessing.active_children()
    if readers:
        # PyTorch's handler would raise at any point of this process, even while it saves; next() detects the death as well.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if isinstance(error, (ConnectionError, EOFError)):  # a reader has closed its connection and is about to exit
                gone = multiprocessing.connection.wait([reader.sentinel for reader in readers], timeout=10)
                [reader.join() for reader in readers if reader.sentinel in gone]
            for ended in (reader.exitcode for reader in readers if reader.exitcode is not None):
                if -ended in STOPS:
                    raise Stopped(signal.Signals(-ended).name) from error
                how = f"by {signal.Signals(-ended).name}" if ended < 0 else f"with status {ended}"
                advice = "if memory or shared memory (/dev/shm) ran out, fewer --num-workers need less"
                raise OSError(f"a process that reads images has ended {how}; {advice}") from error
            raise
        yield batch


@contextmanager
def time_limit(seconds, message):
    """Raises an OSError if what happens inside takes longer."""

    def expire(number, frame):
        raise OSError(message)

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def end_readers():
    """Ends all processes that read images for this one, including those that hang or are suspended."""
    for reader in multiprocessing.active_children():
        reader.kill()
        reader.join(timeout=10)


class DetachableStream:
    """A stream that survives the closing of its other end, as by a closed terminal or by `head`: later output is discarded, and
    work goes on. A stream that is not needed survives any other error, too."""

    def __init__(self, stream, needed):
        self._stream, self._needed = stream or open(os.devnull, "w"), needed  # noqa: SIM115  (None if closed from the start)

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        return self._attempt(self._stream.write, text)

    def flush(self):
        return self._attempt(self._stream.flush)

    def _attempt(self, act, *args):
        try:
            return act(*args)
        except OSError as error:
            if self._needed and error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def outlived_terminal():
    """Lets the body continue when the terminal, or the reader of standard output and standard error, has gone."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = DetachableStream(sys.stdout, needed=True), DetachableStream(sys.stderr, needed=False)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
