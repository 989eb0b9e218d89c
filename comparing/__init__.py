"""Checkouts of DiT and of its children: their imports, the exchange of their attention, comparisons with them."""
