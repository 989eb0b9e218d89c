"""Checkouts of DiT and of projects derived from it: imports their modules, exchanges their attention, compares with them."""
