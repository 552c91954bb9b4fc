"""Find the modules or parameters that a selector matches, by name, in registration order.

What is shared has several names and owners: each simple selector looks at all of them, and matches if one fits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal, TypeAlias

from trainc.compiler.model.inventory import Inventory, ModuleEntry, ParameterEntry
from trainc.compiler.structure.places import Place
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
    if isinstance(selector, v.Expect):
        yield selector, len(select(selector.selector, inventory, target))
    for part in _parts(selector):
        yield from expectations(part, inventory, target)


def leaves(selector: v.Selector) -> Iterable[v.Selector]:
    """Yield the simple selectors that `selector` is made of."""
    parts = _parts(selector)
    if not parts:
        yield selector
    for part in parts:
        yield from leaves(part)


def _parts(selector: v.Selector) -> tuple[v.Selector, ...]:
    if isinstance(selector, v.Expect | v.Where):
        return (selector.selector,)
    if isinstance(selector, v.Union | v.Intersection | v.Difference):
        return selector.left, selector.right
    return ()


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
            return {
                e.name
                for e in entries
                if e.name in inside and any(_holds(condition, e, place) for place in e.places)
            }
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
            return lambda e: any(low <= place.depth <= high for place in e.places)
        case v.All():
            return lambda e: True
        case v.Trainable():
            return lambda e: e.trainable
        case v.Matrices():
            return lambda e: e.matrix
    raise AssertionError(f"unhandled selector {selector!r}")


def _glob_matches(pattern: tuple[str, ...], entry: Entry) -> bool:
    """Match any of the entry's names; a parameter is also matched by any module that contains it."""
    for name in (entry.name, *entry.aliases):
        segments = _segments(name)
        if isinstance(entry, ModuleEntry):
            if _matches(pattern, segments):
                return True
            continue
        if any(_matches(pattern, segments[:end]) for end in range(len(segments), 0, -1)):
            return True
    return False


def repeated_part(pattern: str, parameter: ParameterEntry) -> str:
    """Return the shortest leading part of a parameter's name that `pattern` matches up to its last `*` segment.

    Of `"stages.*.blocks.*"` this is the name of one block; it is empty for a pattern without such a segment.
    """
    segments = tuple(pattern.split("."))
    stars = [i for i, segment in enumerate(segments) if "*" in segment and segment != "**"]
    if not stars:
        return ""
    wanted = segments[: stars[-1] + 1]
    for name in (parameter.name, *parameter.aliases):
        parts = _segments(name)
        for end in range(1, len(parts) + 1):
            if _matches(wanted, parts[:end]):
                return ".".join(parts[:end])
    return ""


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
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
}


def _holds(condition: v.Expr, entry: Entry, place: Place) -> bool:
    match condition:
        case v.Binary(op="and", left=a, right=b):
            return _holds(a, entry, place) and _holds(b, entry, place)
        case v.Binary(op="or", left=a, right=b):
            return _holds(a, entry, place) or _holds(b, entry, place)
        case v.Unary(op="not", x=a):
            return not _holds(a, entry, place)
        case v.Binary(op=op, left=a, right=b) if op in _COMPARE:
            return _COMPARE[op](_measure(a, entry, place), _measure(b, entry, place))
    raise ValueError(
        f"`where` needs a comparison of {', '.join(WHERE_NAMES)}, such as `where numel > 1000`"
    )


def _measure(expression: v.Expr, entry: Entry, place: Place) -> float:
    match expression:
        case v.Number(value=value):
            return value
        case v.Name(id="numel" | "ndim" as name):
            return float(getattr(entry, name))
        case v.Name(id="depth" | "block" as name):
            return float(getattr(place, name))
        case v.Unary(op="neg", x=a):
            return -_measure(a, entry, place)
        case v.Binary(op="*", left=a, right=b):
            return _measure(a, entry, place) * _measure(b, entry, place)
        case v.Binary(op="+", left=a, right=b):
            return _measure(a, entry, place) + _measure(b, entry, place)
    raise ValueError(
        f"`where` compares {', '.join(WHERE_NAMES)}, numbers, and their sums and products"
    )
