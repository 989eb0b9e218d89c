"""The operator in other people's work, forty lines each: `python -m examples.<name>`."""
