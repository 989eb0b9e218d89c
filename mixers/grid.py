"""Tokens on their grid, for mixers that need each token's position."""

import math


def on_grid(tokens, grid_size, name):
    """Returns tokens (B, h w, D) as (B, h, w, D), on a square if grid_size is None. ValueError if their number does not match
    the grid; `name` is the mixer's, for the message."""
    h, w = grid_size or (math.isqrt(tokens.shape[1]),) * 2
    if tokens.shape[1] != h * w:
        found = f"the shape {tuple(tokens.shape)} of {tokens.dtype}"
        raise ValueError(f"{name} is on a grid of {h} x {w} = {h * w} tokens (B, N, D), real; it got {found}")
    return tokens.unflatten(1, (h, w))


def checked_grid(grid_size, name):
    """Returns the (h, w) that a mixer was given. ValueError if it was given none, as by models that do not state their grid."""
    if not grid_size:
        raise ValueError(f"{name} has to know the grid of its tokens: grid_size=(h, w)")
    return tuple(grid_size)


def refuse(tokens, call, name, dim=None):
    """Raises a ValueError unless tokens are real (B, N, D), and for arguments, by name, that callers passed besides them: a
    mask, a context or any value but None and False. rope, the positions of tokens, is allowed. Mixers whose first step is no
    linear layer, which would refuse another D, give theirs as dim."""
    fits = tokens.ndim == 3 and 0 not in tokens.shape[1:] and dim in (None, tokens.shape[2])
    if not fits or not tokens.is_floating_point():
        shape = f"(B, N, {'D' if dim is None else dim})"
        raise ValueError(f"{name} mixes real tokens {shape}; it got the shape {tuple(tokens.shape)} of {tokens.dtype}")
    if given := [what for what, value in call.items() if value is not None and value is not False and what != "rope"]:
        raise ValueError(f"{name} mixes a grid of tokens and cannot follow {', '.join(given)}")
