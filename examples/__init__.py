"""Short examples of the operator in other projects, one page each: `python -m examples.<name>`."""
