"""Imports modules of other people's checkouts, whose names are those of modules here."""

import importlib
import sys
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
# A checkout has modules with these names too, and imports by its scripts must find the checkout's.
OURS = {path.stem for path in HERE.glob("*.py")} | {path.parent.name for path in HERE.glob("*/__init__.py")}
OURS = {name for name in OURS if not name.startswith(("overlay", "pde_ssm"))}


@contextmanager
def imports_of(folder):
    """Makes imports resolve as for a script in `folder`: from this repository only the operator can be imported, and nothing is
    written to __pycache__. Afterwards, the modules of `folder` are removed from sys.modules and ours are restored."""
    folder = Path(folder).resolve()
    path, dont_write, there = sys.path[:], sys.dont_write_bytecode, set(sys.modules)
    ours = [name for name in there if name.partition(".")[0] in OURS and lies_in(sys.modules[name], HERE)]
    ours = {name: sys.modules.pop(name) for name in ours}
    sys.path[:] = [str(folder), *(entry for entry in path if Path(entry).resolve() != HERE)]
    sys.dont_write_bytecode = True
    sys.meta_path.insert(0, Operator)
    try:
        yield
    finally:
        sys.meta_path.remove(Operator)
        for name in set(sys.modules) - there | ours.keys():
            if lies_in(sys.modules.get(name), folder):
                del sys.modules[name]
        sys.modules.update(ours)
        sys.path[:], sys.dont_write_bytecode = path, dont_write


class Operator:
    """Finds pde_ssm.py, and the kernels beside it, which it imports only when it needs them."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path or [str(HERE)]) if name.startswith("pde_ssm") else None


def lies_in(module, folder):
    """Tells whether a module's file is somewhere below `folder`."""
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    return place is not None and Path(place).resolve().is_relative_to(folder)


def load(folder, *names):
    """Imports modules of a checkout by name. OSError if it has none of that name, ValueError if one cannot be imported."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    with imports_of(folder):
        for name in names:
            if not (folder / f"{name}.py").is_file() and not (folder / name / "__init__.py").is_file():
                raise FileNotFoundError(f"{folder} is not a checkout of DiT or of a child: it has no {name}.py")
        try:
            return [importlib.import_module(name) for name in names]
        except ImportError as error:
            raise ValueError(f"a module of {folder} cannot be imported: {error}") from error
