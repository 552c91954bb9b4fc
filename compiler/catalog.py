"""The catalog: constructs found on disk and through the entry-point group `trainc.constructs`, never listed by hand."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import walk_packages

from trainc.compiler import constructs
from trainc.dsl.construct import KINDS, Catalog, Construct

GROUP = "trainc.constructs"


class CatalogError(Exception):
    """A construct cannot be listed: its file, kind or name is wrong."""


@cache
def catalog() -> Catalog:
    """Return every construct by (kind, name); raises CatalogError when two claim one name."""
    found: dict[tuple[str, str], type[Construct]] = {}
    for module in walk_packages(constructs.__path__, constructs.__name__ + "."):
        if module.ispkg:
            continue
        *_, kind, name = module.name.split(".")
        _add(found, _only_construct(module.name), kind, name)
    for entry in entry_points(group=GROUP):
        kind, _, name = entry.name.partition(".")
        _add(found, entry.load(), kind, name)
    return found


def _only_construct(module: str) -> type[Construct]:
    declared = [
        value
        for value in vars(import_module(module)).values()
        if isinstance(value, type) and issubclass(value, Construct) and value.__module__ == module
    ]
    if len(declared) != 1:
        raise CatalogError(f"{module} declares {len(declared)} constructs, not one")
    return declared[0]


def _add(found: dict[tuple[str, str], type[Construct]], construct: type[Construct], kind: str, name: str) -> None:
    if kind not in KINDS or not name:
        raise CatalogError(f"{construct.__module__}: `{kind}.{name}` is not KIND.NAME with a kind of the language")
    other = found.get((kind, name))
    if other is not None:
        raise CatalogError(f"`{kind} {name}` is declared by {other.__module__} and by {construct.__module__}")
    construct.kind, construct.name = kind, name
    found[kind, name] = construct
