"""Processes, signals, flags, precision and files: what every command needs of a machine, whatever it computes."""
