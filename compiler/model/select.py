"""Which modules or parameters of an inventory a selector matches, by name, in registration order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal, TypeAlias

from trainc.compiler.model.inventory import Inventory, ModuleEntry, ParameterEntry
from trainc.dsl.text.vocabulary import WHERE_NAMES
from trainc.dsl.values import value_json as v

Entry: TypeAlias = ModuleEntry | ParameterEntry
Target: TypeAlias = Literal["modules", "parameters"]


def select(selector: v.Selector, inventory: Inventory, target: Target) -> tuple[str, ...]:
    """Return the names that `selector` matches; `expect` counts are checked by `expectations`."""
    entries: tuple[Entry, ...] = inventory.modules if target == "modules" else inventory.parameters
    chosen = _names(selector, entries)
    return tuple(e.name for e in entries if e.name in chosen)


def expectations(
    selector: v.Selector, inventory: Inventory, target: Target
) -> Iterable[tuple[v.Expect, int]]:
    """Yield every `expect` in `selector` with the number of names that its inner selector matches."""
    match selector:
        case v.Expect(selector=inner):
            yield selector, len(select(inner, inventory, target))
            yield from expectations(inner, inventory, target)
        case v.Where(selector=inner):
            yield from expectations(inner, inventory, target)
        case (
            v.Union(left=a, right=b)
            | v.Intersection(left=a, right=b)
            | v.Difference(left=a, right=b)
        ):
            yield from expectations(a, inventory, target)
            yield from expectations(b, inventory, target)


def leaves(selector: v.Selector) -> Iterable[v.Selector]:
    """Yield the simple selectors that `selector` is made of."""
    match selector:
        case v.Expect(selector=inner) | v.Where(selector=inner):
            yield from leaves(inner)
        case (
            v.Union(left=a, right=b)
            | v.Intersection(left=a, right=b)
            | v.Difference(left=a, right=b)
        ):
            yield from leaves(a)
            yield from leaves(b)
        case _:
            yield selector


def empty_parts(selector: v.Selector, inventory: Inventory, target: Target) -> Iterable[v.Selector]:
    """Yield the leaves of `selector` that match nothing by themselves: the likely misspellings."""
    return (part for part in leaves(selector) if not select(part, inventory, target))


def _names(selector: v.Selector, entries: tuple[Entry, ...]) -> set[str]:
    match selector:
        case v.Union(left=a, right=b):
            return _names(a, entries) | _names(b, entries)
        case v.Intersection(left=a, right=b):
            return _names(a, entries) & _names(b, entries)
        case v.Difference(left=a, right=b):
            return _names(a, entries) - _names(b, entries)
        case v.Expect(selector=inner):
            return _names(inner, entries)
        case v.Where(selector=inner, condition=condition):
            inside = _names(inner, entries)
            return {e.name for e in entries if e.name in inside and _holds(condition, e)}
    test = _test(selector)
    return {e.name for e in entries if test(e)}


def _test(selector: v.Selector) -> Callable[[Entry], bool]:
    match selector:
        case v.Glob(pattern=pattern):
            segments = tuple(pattern.split("."))
            return lambda e: _glob_matches(segments, e)
        case v.OfType(names=names):
            wanted = set(names)
            return lambda e: not wanted.isdisjoint(e.types)
        case v.Ndim(n=n):
            return lambda e: e.ndim == n
        case v.Role(name=role):
            return lambda e: role in e.roles
        case v.DepthRange(low=low, high=high):
            return lambda e: low <= e.place.depth <= high
        case v.All():
            return lambda e: True
        case v.Trainable():
            return lambda e: e.trainable
    raise AssertionError(f"unhandled selector {selector!r}")


def _glob_matches(pattern: tuple[str, ...], entry: Entry) -> bool:
    """Match the entry's own name; a parameter is also matched by any module it lies in."""
    if isinstance(entry, ModuleEntry):
        return _matches(pattern, _segments(entry.name))
    for name in (entry.name, *entry.aliases):
        segments = _segments(name)
        if any(_matches(pattern, segments[:end]) for end in range(len(segments), 0, -1)):
            return True
    return False


def _segments(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")) if name else ()


@lru_cache(maxsize=65536)
def _matches(pattern: tuple[str, ...], name: tuple[str, ...]) -> bool:
    """Match segment by segment; `*` stays within one segment, `**` takes any number of them, also none."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return _matches(pattern[1:], name) or (bool(name) and _matches(pattern, name[1:]))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _matches(pattern[1:], name[1:])


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
}


def _holds(condition: v.Expr, entry: Entry) -> bool:
    match condition:
        case v.Binary(op="and", left=a, right=b):
            return _holds(a, entry) and _holds(b, entry)
        case v.Binary(op="or", left=a, right=b):
            return _holds(a, entry) or _holds(b, entry)
        case v.Unary(op="not", x=a):
            return not _holds(a, entry)
        case v.Binary(op=op, left=a, right=b) if op in _COMPARE:
            return _COMPARE[op](_measure(a, entry), _measure(b, entry))
    raise ValueError(
        f"`where` needs a comparison of {', '.join(WHERE_NAMES)}, such as `where numel > 1000`"
    )


def _measure(expression: v.Expr, entry: Entry) -> float:
    match expression:
        case v.Number(value=value):
            return value
        case v.Name(id="numel"):
            return entry.numel
        case v.Name(id="ndim"):
            return entry.ndim
        case v.Name(id="depth"):
            return entry.place.depth
        case v.Name(id="block"):
            return entry.place.block
        case v.Unary(op="neg", x=a):
            return -_measure(a, entry)
        case v.Binary(op="*", left=a, right=b):
            return _measure(a, entry) * _measure(b, entry)
        case v.Binary(op="+", left=a, right=b):
            return _measure(a, entry) + _measure(b, entry)
    raise ValueError(
        f"`where` compares {', '.join(WHERE_NAMES)}, numbers, and their sums and products"
    )
