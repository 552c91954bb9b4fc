"""Suggestions: what a selector that matches nothing was probably meant to say."""

from __future__ import annotations

from collections.abc import Sequence

from trainc.compiler.inventory import Inventory
from trainc.compiler.select import Target, empty_parts, select
from trainc.dsl.diagnostics import nearest
from trainc.dsl.values import Glob, OfType, Selector


def suggestion(selector: Selector, inventory: Inventory, target: Target) -> str | None:
    """Return a help line for the first part of `selector` that misses and has something like it in the model."""
    parts = empty_parts(selector, inventory, target)
    return next((h for part in parts if (h := _for_part(part, inventory, target))), None)


def _for_part(part: Selector, inventory: Inventory, target: Target) -> str | None:
    if isinstance(part, OfType):
        types = {name for module in inventory.modules for name in module.types}
        found = [near for name in part.names if (near := nearest(name, types))]
        return f"did you mean `type({', '.join(found)})`?" if found else None
    if not isinstance(part, Glob):
        return None
    near = _nearest_glob(part.pattern, [m.name.split(".") for m in inventory.modules if m.name])
    if near is None:
        return None
    count = len(select(Glob(near), inventory, target))
    what = target if count != 1 else target.removesuffix("s")
    return f'did you mean `"{near}"` ({count} {what})?'


def _nearest_glob(pattern: str, names: Sequence[Sequence[str]]) -> str | None:
    """Return `pattern` with each segment before a `**` that misses replaced by the nearest one at its place."""
    segments, fixed = pattern.split("."), []
    for i, segment in enumerate(segments):
        if segment == "**":
            fixed += segments[i:]
            break
        here = {name[i] for name in names if len(name) > i}
        known = segment in here or any(c in segment for c in "*?")
        near = segment if known else nearest(segment, here)
        if near is None:
            return None
        fixed.append(near)
    return ".".join(fixed) if fixed != segments else None
