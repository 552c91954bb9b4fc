"""The operators and the arithmetic of constructs as plain functions, for your own code.

Operators are found on disk, in the folders of `trainc.kernels`, and need nothing but torch. What constructs offer is
found in the catalog, when it is asked for. `make docs` writes the types of all to functional.pyi.
"""

from importlib import import_module
from typing import Any

from trainc.kernels.operators import FUNCTIONS

_OWN = "trainc.compiler.per_example.functional"
_MEASURED = ("measured_parameters", "per_example_sq_norms")

globals().update(FUNCTIONS)


def _offered() -> dict[str, str]:
    """Return the modules of the functions that are no operators, by name."""
    from trainc.compiler.catalog import catalog

    paths = (path.split(":") for construct in catalog().values() for path in construct.functions)
    return dict.fromkeys(_MEASURED, _OWN) | {name: module for module, name in paths}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*FUNCTIONS, *_offered()})
    module = None if name.startswith("_") else _offered().get(name)
    if module is None:
        raise AttributeError(f"module 'trainc.functional' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(module), name)
    return found


def __dir__() -> list[str]:
    return sorted({*FUNCTIONS, *_offered()})
