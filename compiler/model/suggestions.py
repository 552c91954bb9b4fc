"""Suggestions for selectors that match nothing, and for classes that do not exist."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import nn

from trainc.compiler.model.inventory import Inventory
from trainc.compiler.model.select import Target, leaves, select
from trainc.dsl.text.nearest import nearest, suggest
from trainc.dsl.values.value_json import Glob, OfType, Selector


def suggestion(selector: Selector, inventory: Inventory, target: Target) -> str | None:
    """Return a help line for the first part of `selector` that matches nothing but resembles a name in the model."""
    missing = (part for part in leaves(selector) if not select(part, inventory, target))
    return next((h for part in missing if (h := _for_part(part, inventory, target))), None)


def unknown_classes(selector: Selector, inventory: Inventory) -> dict[str, str | None]:
    """Return the names in `type(...)` that are classes neither of the model nor of torch.nn, with a help line each.

    A spec may serve several models, so a class of torch.nn is known even where this model does not use it.
    """
    own = {name for module in inventory.modules for name in module.types}
    found: dict[str, str | None] = {}
    for part in leaves(selector):
        for name in part.names if isinstance(part, OfType) else ():
            if name not in own and name not in _torch_classes():
                found[name] = suggest(name, own) or suggest(name, _torch_classes())
    return found


@cache
def _torch_classes() -> frozenset[str]:
    """Return the names of the modules that torch.nn defines."""
    found, todo = {"Module"}, [nn.Module]
    while todo:
        below = todo.pop().__subclasses__()
        todo += below
        found |= {c.__name__ for c in below if c.__module__.startswith("torch.nn.modules.")}
    return frozenset(found)


def _for_part(part: Selector, inventory: Inventory, target: Target) -> str | None:
    if isinstance(part, OfType):
        types = {name for module in inventory.modules for name in module.types}
        unknown = [name for name in part.names if name not in types]
        found = [near for name in unknown if (near := nearest(name, types))]
        if found:
            return f"did you mean `type({', '.join(found)})`?"
        if not unknown and target == "parameters":
            return f"the modules that `{part}` matches have no parameters of their own"
        return None
    if not isinstance(part, Glob):
        return None
    near = _nearest_glob(part.pattern, [m.name.split(".") for m in inventory.modules if m.name])
    if near is None:
        return None
    count = len(select(Glob(near), inventory, target))
    what = target if count != 1 else target.removesuffix("s")
    return f'did you mean `"{near}"` ({count} {what})?'


def _nearest_glob(pattern: str, names: Sequence[Sequence[str]]) -> str | None:
    """Return `pattern` with each segment that matches nothing, up to a `**`, replaced by the nearest name."""
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
