"""The values of the language: frozen, hashable, comparable, and JSON both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainc.dsl.values.durations import UNITS as UNITS
from trainc.dsl.values.durations import Duration as Duration
from trainc.dsl.values.durations import ImportPath as ImportPath
from trainc.dsl.values.durations import Range as Range
from trainc.dsl.values.durations import Unit as Unit
from trainc.dsl.values.expressions import BINARY as BINARY
from trainc.dsl.values.expressions import COMPARISONS as COMPARISONS
from trainc.dsl.values.expressions import Binary as Binary
from trainc.dsl.values.expressions import Call as Call
from trainc.dsl.values.expressions import Expr as Expr
from trainc.dsl.values.expressions import Items as Items
from trainc.dsl.values.expressions import Name as Name
from trainc.dsl.values.expressions import Number as Number
from trainc.dsl.values.expressions import Quantity as Quantity
from trainc.dsl.values.expressions import Unary as Unary
from trainc.dsl.values.expressions import called as called
from trainc.dsl.values.expressions import walk as walk
from trainc.dsl.values.selectors import All as All
from trainc.dsl.values.selectors import DepthRange as DepthRange
from trainc.dsl.values.selectors import Difference as Difference
from trainc.dsl.values.selectors import Expect as Expect
from trainc.dsl.values.selectors import Glob as Glob
from trainc.dsl.values.selectors import Intersection as Intersection
from trainc.dsl.values.selectors import Matrices as Matrices
from trainc.dsl.values.selectors import Ndim as Ndim
from trainc.dsl.values.selectors import OfType as OfType
from trainc.dsl.values.selectors import Role as Role
from trainc.dsl.values.selectors import Scoped as Scoped
from trainc.dsl.values.selectors import Selector as Selector
from trainc.dsl.values.selectors import Trainable as Trainable
from trainc.dsl.values.selectors import Union as Union
from trainc.dsl.values.selectors import Where as Where
from trainc.dsl.values.value import Value as Value
from trainc.dsl.values.value import plain_number as plain_number

Json = Any

_PAIRS = {"union": Union, "intersection": Intersection, "difference": Difference}
# Values written as their tag and their fields, in order.
_TAGS: dict[type, str] = {
    Duration: "dur", Range: "range", Number: "num", Name: "name", Glob: "glob", OfType: "type",
    Ndim: "ndim", Role: "role", DepthRange: "depth", All: "all", Trainable: "trainable", Matrices: "matrices",
    Where: "where", Expect: "expect", Scoped: "on", **{kind: tag for tag, kind in _PAIRS.items()},
}  # fmt: skip


def to_json(value: Any) -> Json:
    """Return a value as nested lists, strings and numbers; plain Python values stay as they are."""
    match value:
        case Quantity(duration):
            return to_json(duration)
        case ImportPath(module, attribute):
            return ["path", f"{module}:{attribute}"]
        case Call(function, args, kwargs):
            return ["call", function, to_json(args), {key: to_json(x) for key, x in kwargs}]
        case Items(items):
            return ["list", *map(to_json, items)]
        case Scoped(Number(number), on):
            return ["on", number, to_json(on)]
        case Unary(op, x):
            return [op, to_json(x)]
        case Binary("is", left, Name(state)):
            return ["is", to_json(left), state]
        case Binary(op, left, right):
            return [op, to_json(left), to_json(right)]
        case Value():
            fields: tuple[str, ...] = value.__match_args__
            return [_TAGS[type(value)], *(to_json(getattr(value, name)) for name in fields)]
        case list() | tuple():
            return [to_json(item) for item in value]
    return value


def expressions_in(value: Any) -> Iterator[Expr]:
    """Yield the expressions that the value of a field holds: itself, or those of its entries."""
    if isinstance(value, Expr):
        yield value
    elif isinstance(value, Scoped):
        yield from expressions_in(value.value)
    elif isinstance(value, tuple):
        for entry in value:
            yield from expressions_in(entry)


def expr_from_json(data: Json) -> Expr:
    """Return the expression that `to_json` wrote."""
    value = from_json(data)
    if isinstance(value, Duration):
        return Quantity(value)
    if not isinstance(value, Expr):
        raise ValueError(f"{data!r} is not an expression")
    return value


def selector_from_json(data: Json) -> Selector:
    """Return the selector that `to_json` wrote."""
    value = from_json(data)
    if not isinstance(value, Selector):
        raise ValueError(f"{data!r} is not a selector")
    return value


def from_json(data: Json) -> Any:
    """Return the value that `to_json` wrote; a bare `dur` is a Duration, not a Quantity."""
    match data:
        case ["dur", amount, unit] if unit in UNITS:
            return Duration(amount, unit)
        case ["range", low, high]:
            return Range(low, high)
        case ["path", str(path)]:
            module, _, attribute = path.partition(":")
            return ImportPath(module, attribute)
        case ["num", number]:
            return Number(number)
        case ["name", str(name)]:
            return Name(name)
        case ["call", str(function), list(args), dict(kwargs)]:
            named = {key: expr_from_json(x) for key, x in kwargs.items()}
            return called(function, *map(expr_from_json, args), **named)
        case ["list", *items]:
            return Items(tuple(map(expr_from_json, items)))
        case [("neg" | "not") as op, x]:
            return Unary(op, expr_from_json(x))
        case ["is", x, str(state)]:
            return Binary("is", expr_from_json(x), Name(state))
        case [str(op), left, right] if op in BINARY:
            return Binary(op, expr_from_json(left), expr_from_json(right))
        case ["glob", str(text)]:
            return Glob(text)
        case ["type", list(names)]:
            return OfType(tuple(names))
        case ["ndim", int(n)]:
            return Ndim(n)
        case ["role", str(name)]:
            return Role(name)
        case ["depth", low, high]:
            return DepthRange(low, high)
        case ["all"]:
            return All()
        case ["trainable"]:
            return Trainable()
        case ["matrices"]:
            return Matrices()
        case ["where", selector, condition]:
            return Where(selector_from_json(selector), expr_from_json(condition))
        case [str(tag), left, right] if tag in _PAIRS:
            return _PAIRS[tag](selector_from_json(left), selector_from_json(right))
        case ["expect", selector, int(count)]:
            return Expect(selector_from_json(selector), count)
        case ["on", value, on]:
            given = expr_from_json(value) if isinstance(value, list) else value
            return Scoped(given, None if on is None else selector_from_json(on))
        case _:
            raise ValueError(f"{data!r} is not a value of the language")
