"""The paths along which pictures are read."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixers.orders import ORDERS, follow, places, put_back, steps

PUBLIC = {"continuous": "lamamba.{}", "zigzag": "zigma.zigzag.{}"}
grids = pytest.mark.parametrize("grid_size", [(1, 1), (1, 4), (5, 1), (3, 4), (5, 5)])


@pytest.mark.parametrize("order", PUBLIC)
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_public_paths(golden, order, n):
    """Those of LaMamba-Diff at 27b3c1d and ZigMa at 37d837b."""
    public = golden("scan_paths.npz")[PUBLIC[order].format(n)]
    assert torch.equal(torch.stack([path.places(n, n) for path in ORDERS[order]]), public)


@pytest.mark.parametrize("grid_size", [(2, 3), (3, 2), (3, 3), (4, 4), (4, 5)])
def test_public_paths_and_steps_of_plainmamba(golden, grid_size):
    """At 0975a1d."""
    numbers, name, paths = golden("scan_paths.npz"), "plainmamba.{}x{}".format(*grid_size), ORDERS["plain"]
    assert torch.equal(torch.stack([path.places(*grid_size) for path in paths]), numbers[name])
    assert torch.equal(steps(paths, grid_size, torch.empty(0)).T, numbers[f"{name}.direction"])


def test_cross_is_rows_and_columns_from_either_end():
    rows, columns = [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]
    assert [path.places(2, 3).tolist() for path in ORDERS["cross"]] == [rows, columns, rows[::-1], columns[::-1]]


@grids
@pytest.mark.parametrize("order", ORDERS)
def test_every_path_meets_every_token_once(order, grid_size):
    tokens, paths = torch.randn(2, grid_size[0] * grid_size[1], 3), ORDERS[order]
    sequences = follow(tokens, paths, grid_size)
    for k, path in enumerate(paths):
        numbers = path.places(*grid_size)
        assert numbers.sort().values.tolist() == list(range(tokens.shape[1]))
        assert torch.equal(sequences[:, :, k], tokens[:, numbers])
        assert torch.equal(put_back(sequences[:, :, k : k + 1], (path,), grid_size), tokens)
    torch.testing.assert_close(put_back(sequences, paths, grid_size), len(paths) * tokens)


@grids
@pytest.mark.parametrize("order", ["continuous", "zigzag", "plain"])
def test_a_snake_steps_from_neighbour_to_neighbour(order, grid_size):
    for numbers in (path.places(*grid_size) for path in ORDERS[order]):
        row, column = numbers // grid_size[1], numbers % grid_size[1]
        assert (row.diff().abs() + column.diff().abs() == 1).all()


class Devices(TorchDispatchMode):
    """Keeps the kinds of the devices on which tensors are made."""

    def __init__(self):
        super().__init__()
        self.kinds = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        self.kinds |= {x.device.type for x in tree_leaves(made) if isinstance(x, torch.Tensor)}
        return made


@pytest.mark.parametrize("order", ORDERS)
def test_paths_are_made_on_the_device_of_their_tokens(order):
    """Also in a compiled network, whose CUDA graph would end wherever something runs on a CPU."""
    with Devices() as made:
        for find in (places, steps):
            find(ORDERS[order], (3, 4), torch.empty(0, device="meta"))
    assert made.kinds == {"meta"}
