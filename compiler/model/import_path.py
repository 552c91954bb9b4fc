"""Import what a spec names, from where its author would expect: beside the spec, above it, or the working directory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from trainc.dsl.values.value_json import ImportPath

_SEARCHED: list[Path] = []


class ImportProblem(Exception):
    """A callable could not be imported or called; `rule` is the diagnostic's, the message is for the user."""

    def __init__(
        self, rule: str, message: str, help: str | None = None, field: str = "path"
    ) -> None:
        super().__init__(message)
        self.rule, self.help, self.field = rule, help, field


@contextmanager
def searching(spec: Path | None) -> Iterator[None]:
    """Also look beside `spec`, in the folders above it and in the working directory inside this block."""
    added = [] if spec is None else [spec.resolve().parent, *spec.resolve().parent.parents]
    before = list(_SEARCHED)
    _SEARCHED[:] = [*added, Path.cwd(), *before]
    try:
        yield
    finally:
        _SEARCHED[:] = before


def load(path: ImportPath) -> Any:
    """Return the object `path` names.

    Raises ImportProblem (`import-failed`) when the module or the attribute is not there, or its import fails.
    """
    _make_reachable(path.module)
    try:
        found: Any = import_module(path.module)
    except ModuleNotFoundError as error:
        raise ImportProblem("import-failed", f"there is no module `{error.name}`") from error
    except Exception as error:
        raise ImportProblem("import-failed", f"importing `{path.module}` fails: {error}") from error
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
    """Return what the callable gives; raises ImportProblem with `wrong-argument`, or `rule` when the call fails."""
    target = load(path)
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
    """Raise ImportProblem, at the field, for arguments that the callable's signature does not take."""
    import inspect

    try:
        signature = inspect.signature(target)
    except ValueError:
        return  # no signature to be had: the call itself will tell
    named = [
        n
        for n, p in signature.parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    takes = f"it takes {', '.join(named)}" if named else "it takes no arguments"
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for name in arguments:
            if name not in named:
                message = f"`{path.attribute}` takes no argument `{name}`"
                raise ImportProblem("wrong-argument", message, _nearest(name, named) or takes, name)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        message = f"`{path.attribute}` cannot be called like this: {error}"
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
    from trainc.dsl.text.nearest import suggest

    return suggest(name, [o for o in options if not o.startswith("_")])
