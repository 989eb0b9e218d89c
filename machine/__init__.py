"""Processes, signals, flags, precision and files: what every command needs of a machine, whatever it computes."""

try:
    import fcntl  # noqa: F401
    import resource  # noqa: F401
except ImportError as error:
    raise SystemExit(f"this runs on Linux and macOS, and on Windows inside WSL: {error}") from error
