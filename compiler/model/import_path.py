"""Import what a spec names: from installed packages, the spec's folder and those above, or the working directory."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from trainc.dsl.text.nearest import suggest
from trainc.dsl.values.value_json import ImportPath

_SEARCHED: list[Path] = []


class ImportProblem(Exception):
    """A callable could not be imported or called; `rule`, `help` and `field` are those of the diagnostic."""

    def __init__(
        self, rule: str, message: str, help: str | None = None, field: str = "path"
    ) -> None:
        super().__init__(message)
        self.rule, self.help, self.field = rule, help, field


@contextmanager
def searching(spec: Path | None) -> Iterator[None]:
    """Inside this block, also import from the spec's folder, the folders above and the working directory."""
    added = [] if spec is None else [spec.resolve().parent, *spec.resolve().parent.parents]
    before = list(_SEARCHED)
    _SEARCHED[:] = [*added, Path.cwd(), *before]
    try:
        yield
    finally:
        _SEARCHED[:] = before


def import_attribute(path: ImportPath) -> Any:
    """Return the object `path` names.

    Raises ImportProblem (`import-failed`) when the module or the attribute is not there, or its import fails.
    """
    _make_reachable(path.module)
    try:
        found: Any = import_module(path.module)
    except ModuleNotFoundError as error:
        raise ImportProblem(
            "import-failed",
            f"there is no module `{error.name}`",
            "install the module, or put it in the folder of the spec or in a folder above",
        ) from error
    except Exception as error:
        raise ImportProblem(
            "import-failed", f"importing `{path.module}` fails with {type(error).__name__}: {error}"
        ) from error
    for name in path.attribute.split("."):
        if not hasattr(found, name):
            raise ImportProblem(
                "import-failed",
                f"`{path.module}` has no `{path.attribute}`",
                _nearest(name, vars(found)),
            )
        found = getattr(found, name)
    return found


def call(path: ImportPath, arguments: dict[str, Any], rule: str) -> Any:
    """Return the result of the callable; raises ImportProblem: `wrong-argument`, or `rule` when the call fails."""
    target = import_attribute(path)
    if not callable(target):
        raise ImportProblem("wrong-argument", f"`{path}` is not callable")
    _check_arguments(path, target, arguments)
    try:
        return target(**arguments)
    except Exception as error:
        raise ImportProblem(
            rule, f"`{path.attribute}` fails: {type(error).__name__}: {error}"
        ) from error


def _check_arguments(path: ImportPath, target: Any, arguments: dict[str, Any]) -> None:
    """Raise ImportProblem, with the field, for arguments that the callable's signature does not take."""
    try:
        signature = inspect.signature(target)
    except ValueError:
        return  # without a signature, only the call can tell
    named = [
        n
        for n, p in signature.parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    takes = f"the arguments are: {', '.join(named) or 'none'}"
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for name in arguments:
            if name not in named:
                message = f"`{path.attribute}` takes no argument `{name}`"
                raise ImportProblem("wrong-argument", message, _nearest(name, named) or takes, name)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        message = f"`{path.attribute}` cannot be called with these arguments: {error}"
        raise ImportProblem("wrong-argument", message, takes) from error


def _make_reachable(module: str) -> None:
    """Put the first searched folder that holds `module` at the end of the import path, once."""
    top = module.partition(".")[0]
    if top in sys.modules or PathFinder.find_spec(top) is not None:
        return
    for folder in _SEARCHED:
        if PathFinder.find_spec(top, [str(folder)]) is not None:
            sys.path.append(str(folder))
            return


def _nearest(name: str, options: Iterable[str]) -> str | None:
    return suggest(name, [o for o in options if not o.startswith("_")])
