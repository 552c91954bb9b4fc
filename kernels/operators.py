"""Importing this module registers every operator of the `trainc` namespace and finds the functions that call them.

Operators are found on disk: every file of a room but `library`, except the Triton sources (`triton_*.py`), which their
first launch imports. A file names its public functions in `__all__`.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from trainc import kernels


def _modules() -> Iterator[ModuleType]:
    """Import every operator file; yield the modules."""
    for room in iter_modules(kernels.__path__, f"{kernels.__name__}."):
        if not room.ispkg or room.name.endswith(".library"):
            continue
        path = import_module(room.name).__path__
        for file in iter_modules(path):
            if not file.name.startswith("triton_"):
                yield import_module(f"{room.name}.{file.name}")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(module, name) for module in _modules() for name in getattr(module, "__all__", ())
}
