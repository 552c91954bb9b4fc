"""Compile training methods, written as `.train` specs, into PyTorch programs.

Names resolve on first use, so `import trainc` and `trainc check` never load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainc import functional as functional
    from trainc.compiler.catalog import catalog as catalog
    from trainc.compiler.catalog import check as check
    from trainc.compiler.driver.compile import compile as compile
    from trainc.compiler.driver.compile import plan as plan
    from trainc.compiler.driver.saved_program import load as load
    from trainc.compiler.influence.recorded_run import checkpoint_loader as checkpoint_loader
    from trainc.compiler.program.program import Program as Program
    from trainc.dsl.resolve.spec import Spec as Spec
    from trainc.dsl.resolve.statements import Clause as Clause
    from trainc.dsl.text.errors import SpecError as SpecError
    from trainc.runtime.step.action import RollBack as RollBack
    from trainc.runtime.step.action import StopRun as StopRun

    __version__: str

_HOME = {
    "Clause": "trainc.dsl.resolve.statements",
    "Program": "trainc.compiler.program.program",
    "RollBack": "trainc.runtime.step.action",
    "Spec": "trainc.dsl.resolve.spec",
    "SpecError": "trainc.dsl.text.errors",
    "StopRun": "trainc.runtime.step.action",
    "catalog": "trainc.compiler.catalog",
    "check": "trainc.compiler.catalog",
    "checkpoint_loader": "trainc.compiler.influence.recorded_run",
    "compile": "trainc.compiler.driver.compile",
    "load": "trainc.compiler.driver.saved_program",
    "plan": "trainc.compiler.driver.compile",
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
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, "__version__"})
