"""Import what a spec names: from the spec's folder and those above, the working directory, or installed packages."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from trainc.dsl.text.nearest import suggest
from trainc.dsl.values.value_json import ImportPath

_SEARCHED: list[Path] = []
_TAKEN: dict[str, Path] = {}
"""The folders that modules of specs were imported from, by the name of the outermost package."""
_TRUSTED: ContextVar[frozenset[str] | None] = ContextVar("trusted", default=None)
"""What may be imported; None for anything, as a spec that the user runs may."""


class ImportProblem(Exception):
    """What a field names could not be imported, called or read; the rest is that of the diagnostic."""

    def __init__(
        self,
        rule: str,
        message: str,
        help: str | None = None,
        field: str = "path",
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.rule, self.help, self.field, self.notes = rule, help, field, tuple(notes)


@contextmanager
def only_trusted(names: Iterable[str]) -> Iterator[None]:
    """Inside this block, import nothing but classes of torch.optim, and these modules, or paths `module:attribute`."""
    token = _TRUSTED.set(frozenset(names))
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_trusted(path: ImportPath) -> bool:
    """Say whether a path may be imported here."""
    names = _TRUSTED.get()
    parts = path.module.split(".")
    modules = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return (
        names is None
        or bool(names & {*modules, f"{path.module}:{path.attribute}"})
        or (path.module == "torch.optim" and "." not in path.attribute)
    )


@contextmanager
def searching(spec: Path | None) -> Iterator[None]:
    """Inside this block, import first from the spec's folder, the folders above and the working directory."""
    added = [] if spec is None else [spec.resolve().parent, *spec.resolve().parent.parents]
    before = list(_SEARCHED)
    _SEARCHED[:] = [*added, Path.cwd(), *before]
    try:
        yield
    finally:
        _SEARCHED[:] = before


def spec_folder() -> Path:
    """Return the folder of the spec that is being compiled; the working directory for one that is no file."""
    return _SEARCHED[0] if _SEARCHED else Path.cwd()


def import_attribute(path: ImportPath) -> Any:
    """Return the object `path` names.

    Raises ImportProblem (`import-failed`) when the module or the attribute is not there, or its import fails.
    """
    if not is_trusted(path):
        raise ImportProblem(
            "import-failed",
            f"`{path}` is named by a file and not trusted",
            "only what a spec names is imported, and what the caller of `trainc.load` trusts",
        )
    _make_reachable(path.module)
    try:
        found: Any = import_module(path.module)
    except ModuleNotFoundError as error:
        where = _file(path.module.partition(".")[0])
        taken = f": `{path.module.partition('.')[0]}` is {where}" if where else ""
        raise ImportProblem(
            "import-failed", f"there is no module `{error.name}`{taken}", _looked()
        ) from error
    except Exception as error:
        raise ImportProblem(
            "import-failed",
            f"importing `{path.module}` fails with {type(error).__name__}: {error}",
            _looked(),
        ) from error
    for name in path.attribute.split("."):
        if not hasattr(found, name):
            raise ImportProblem(
                "import-failed",
                f"`{path.module}` ({_file(path.module) or 'built in'}) has no `{path.attribute}`",
                _nearest(name, vars(found)),
            )
        found = getattr(found, name)
    return found


def import_callable(path: ImportPath, field: str = "path") -> Any:
    """Return the callable that `path` names; raises ImportProblem, at the field it stands in, where there is none."""
    try:
        found = import_attribute(path)
    except ImportProblem as problem:
        problem.field = field
        raise
    if not callable(found):
        raise ImportProblem("wrong-argument", f"`{path}` is not callable", field=field)
    return found


def call(path: ImportPath, arguments: dict[str, Any], rule: str) -> Any:
    """Return the result of the callable; raises ImportProblem: `wrong-argument`, or `rule` when the call fails."""
    target = import_callable(path)
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
    """Let `module` be imported from the first searched folder that has it, before installed modules of its name.

    The folder is put first on the import path, as Python does with the folder of a script. What is imported already
    stays, but for a module that another spec's folder gave.
    """
    top = module.partition(".")[0]
    folder = next((f for f in dict.fromkeys(_SEARCHED) if _holds(f, module)), None)
    if folder is None:
        return
    if top in sys.modules:
        if _TAKEN.get(top, folder) == folder:
            return
        for name in [n for n in sys.modules if n.partition(".")[0] == top]:
            del sys.modules[name]
    _TAKEN[top] = folder
    sys.path.insert(0, str(folder))
    found = PathFinder.find_spec(top, [str(folder)])
    if found is not None and found.origin is None:
        # A folder without __init__.py, which Python would look for after every installed package.
        sys.modules[top] = module_from_spec(found)


def _holds(folder: Path, module: str) -> bool:
    """Say whether a folder has a module: as a file, or as a package with or without `__init__.py`."""
    top, _, rest = module.partition(".")
    try:
        found = PathFinder.find_spec(top, [str(folder)])
    except (ImportError, ValueError):
        return False
    if found is None:
        return False
    place = folder.joinpath(*module.split("."))
    inside = bool(rest) and (
        place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
    )
    return found.origin is not None or inside


def _file(module: str) -> str | None:
    """Return the file or folder of an imported module; None for one that is not imported or has none."""
    loaded = sys.modules.get(module)
    place = getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", ())), None)
    return None if place is None else _shown(Path(place))


def _looked() -> str:
    """Return where a module was looked for."""
    beside = f"in {_shown(_SEARCHED[0])} and the folders above, " if len(_SEARCHED) > 1 else ""
    return (
        f"trainc looked {beside}in the working directory, and among installed packages: install the module, or put it"
        " in the folder of the spec or in a folder above"
    )


def _shown(path: Path) -> str:
    """Return a path, relative to the working directory if it is inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _nearest(name: str, options: Iterable[str]) -> str | None:
    return suggest(name, [o for o in options if not o.startswith("_")])
