"""The operator in other people's work, a page each: `python -m examples.<name>`."""
