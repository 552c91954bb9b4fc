"""Compile training methods, written as `.train` specs, into PyTorch programs.

Names resolve on first use, so `import trainc` and `trainc check` never load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainc import functional as functional
    from trainc.compiler.artefact import load as load
    from trainc.compiler.catalog import catalog as catalog
    from trainc.compiler.catalog import check as check
    from trainc.compiler.compile import compile as compile
    from trainc.compiler.compile import plan as plan
    from trainc.compiler.program import Program as Program
    from trainc.dsl.diagnostics import SpecError as SpecError
    from trainc.dsl.spec import Clause as Clause
    from trainc.dsl.spec import Spec as Spec

    __version__: str

_HOME = {
    "Clause": "trainc.dsl.spec",
    "Program": "trainc.compiler.program",
    "Spec": "trainc.dsl.spec",
    "SpecError": "trainc.dsl.diagnostics",
    "catalog": "trainc.compiler.catalog",
    "check": "trainc.compiler.catalog",
    "compile": "trainc.compiler.compile",
    "load": "trainc.compiler.artefact",
    "plan": "trainc.compiler.compile",
}

__all__ = [*_HOME, "functional"]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("trainc.functional")
    if name == "__version__":
        from importlib.metadata import version

        return version("trainc")
    if name not in _HOME:
        raise AttributeError(f"module 'trainc' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
