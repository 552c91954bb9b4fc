"""The catalog: every construct, found by the path of its file.

The module of a construct is imported when the construct is first used, so that checking a spec
imports only the constructs that it names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from trainc.dsl.reading.construct import KINDS, Construct
from trainc.dsl.reading.construct_rules import check_rules
from trainc.dsl.text.source import Source

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from trainc.dsl.resolve.resolver import Checked

GROUP = "trainc.constructs"
_HERE = "trainc.compiler.constructs"


class Catalog(Mapping[tuple[str, str], type[Construct]]):
    """Constructs by kind and name; each is imported on first use."""

    def __init__(self, modules: Mapping[tuple[str, str], str]) -> None:
        self._modules = dict(sorted(modules.items()))
        self._loaded: dict[tuple[str, str], type[Construct]] = {}

    def __getitem__(self, key: tuple[str, str]) -> type[Construct]:
        if key not in self._loaded:
            construct = _declared(self._modules[key], *key)
            if construct.rules:
                check_rules(construct, self._loaded.values())
            self._loaded[key] = construct
        return self._loaded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._modules

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@cache
def catalog() -> Catalog:
    """Return every construct of trainc and of installed packages."""
    return catalog_of(_on_disk(), _entry_points())


def catalog_of(own: Mapping[tuple[str, str], str], others: Iterable[EntryPoint]) -> Catalog:
    """Return the catalog of trainc's constructs and those of entry points, `regularize.pace = package.module`."""
    modules = dict(own)
    for entry in others:
        kind, _, name = entry.name.partition(".")
        if kind not in KINDS or not name.isidentifier():
            raise ValueError(
                f"the entry point `{entry.name} = {entry.value}` must be named `kind.name`, with a kind of"
                f" {', '.join(KINDS)}"
            )
        key = (kind, name)
        if key in modules:
            raise ValueError(
                f"two constructs are called `{kind} {name}`, `{modules[key]}` and `{entry.value}`: remove one"
                " of the packages"
            )
        modules[key] = entry.value
    return Catalog(modules)


def check(spec: Source | Path | str, overrides: Iterable[str] = ()) -> Checked:
    """Check a spec: a path, a name that ends in `.train` or is a file, or the text itself."""
    from trainc.dsl.resolve.resolver import load_spec

    if isinstance(spec, str):
        spec = path_of(spec) or spec
    return load_spec(spec, catalog(), overrides)


def path_of(text: str) -> Path | None:
    """Return the path that a string names; None where it is the text of a spec."""
    named = "\n" not in text and (text.endswith(".train") or _is_file(text))
    return Path(text) if named else None


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _on_disk() -> dict[tuple[str, str], str]:
    found = {}
    constructs = Path(__file__).with_name("constructs")
    for path in sorted(constructs.glob("*/**/*.py")):
        if not path.name.startswith("_"):
            kind, *folders, name = path.relative_to(constructs).with_suffix("").parts
            found[kind, name] = ".".join((_HERE, kind, *folders, name))
    return found


def _entry_points() -> Iterable[EntryPoint]:
    """Return the entry points; reading all metadata is slow, so first look whether one names trainc's group."""
    if not any(map(_names_group, dict.fromkeys(sys.path))):
        return ()
    from importlib.metadata import entry_points

    return sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))


def _names_group(place: str) -> bool:
    """Say whether a package installed in a folder has entry points in trainc's group."""
    with suppress(OSError), os.scandir(place or ".") as entries:
        for entry in entries:
            if entry.name.endswith((".dist-info", ".egg-info")):
                with suppress(OSError):
                    if GROUP.encode() in Path(entry.path, "entry_points.txt").read_bytes():
                        return True
    return False


def _declared(module_name: str, kind: str, name: str) -> type[Construct]:
    """Return the one construct that a module declares, and set its kind and name."""
    module = import_module(module_name)
    declared = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Construct)
        and value.__module__ == module.__name__
    ]
    if len(declared) != 1:
        raise ValueError(
            f"`{module_name}` must declare one construct, but declares {len(declared)}"
        )
    construct = declared[0]
    construct.kind, construct.name = kind, name
    return construct
