"""The values of the language: frozen, hashable, comparable, and JSON both ways."""

from __future__ import annotations

from typing import Any

from trainc.dsl.values.durations import UNITS, Duration, ImportPath, Range, Unit
from trainc.dsl.values.expressions import (
    BINARY,
    COMPARISONS,
    Binary,
    Call,
    Expr,
    Items,
    Name,
    Number,
    Quantity,
    Unary,
    called,
    walk,
)
from trainc.dsl.values.selectors import (
    All,
    DepthRange,
    Difference,
    Expect,
    Glob,
    Intersection,
    Ndim,
    OfType,
    Role,
    Scoped,
    Selector,
    Trainable,
    Union,
    Where,
)
from trainc.dsl.values.value import Value, plain_number

__all__ = [
    "BINARY",
    "COMPARISONS",
    "UNITS",
    "All",
    "Binary",
    "Call",
    "DepthRange",
    "Difference",
    "Duration",
    "Expect",
    "Expr",
    "Glob",
    "ImportPath",
    "Intersection",
    "Items",
    "Name",
    "Ndim",
    "Number",
    "OfType",
    "Quantity",
    "Range",
    "Role",
    "Scoped",
    "Selector",
    "Trainable",
    "Unary",
    "Union",
    "Unit",
    "Value",
    "Where",
    "called",
    "expr_from_json",
    "from_json",
    "plain_number",
    "selector_from_json",
    "to_json",
    "walk",
]

Json = Any

_PLAIN = {All: "all", Trainable: "trainable"}
_PAIRS = {Union: "union", Intersection: "intersection", Difference: "difference"}
_PAIR_OF = {tag: kind for kind, tag in _PAIRS.items()}


def to_json(value: Any) -> Json:
    """Return a value as nested lists, strings and numbers; plain Python values stay as they are."""
    match value:
        case Duration(amount, unit):
            return ["dur", amount, unit]
        case Quantity(duration):
            return to_json(duration)
        case Range(low, high):
            return ["range", low, high]
        case ImportPath(module, attribute):
            return ["path", f"{module}:{attribute}"]
        case Number(number):
            return ["num", number]
        case Name(name):
            return ["name", name]
        case Call(function, args, kwargs):
            return [
                "call",
                function,
                [to_json(x) for x in args],
                {k: to_json(x) for k, x in kwargs},
            ]
        case Items(items):
            return ["list", *map(to_json, items)]
        case Unary(op, x):
            return [op, to_json(x)]
        case Binary("is", left, Name(state)):
            return ["is", to_json(left), state]
        case Binary(op, left, right):
            return [op, to_json(left), to_json(right)]
        case Glob(text):
            return ["glob", text]
        case OfType(names):
            return ["type", list(names)]
        case Ndim(n):
            return ["ndim", n]
        case Role(name):
            return ["role", name]
        case DepthRange(low, high):
            return ["depth", low, high]
        case All() | Trainable():
            return [_PLAIN[type(value)]]
        case Where(selector, condition):
            return ["where", to_json(selector), to_json(condition)]
        case Union(left, right) | Intersection(left, right) | Difference(left, right):
            return [_PAIRS[type(value)], to_json(left), to_json(right)]
        case Expect(selector, count):
            return ["expect", to_json(selector), count]
        case Scoped(number, on):
            return ["on", number, None if on is None else to_json(on)]
        case list() | tuple():
            return [to_json(item) for item in value]
        case _:
            return value


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
        case [
            "dur",
            amount,
            ("steps" | "samples" | "tokens" | "epochs" | "seconds" | "run") as unit,
        ]:
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
        case ["where", selector, condition]:
            return Where(selector_from_json(selector), expr_from_json(condition))
        case [("union" | "intersection" | "difference") as tag, left, right]:
            return _PAIR_OF[tag](selector_from_json(left), selector_from_json(right))
        case ["expect", selector, int(count)]:
            return Expect(selector_from_json(selector), count)
        case ["on", number, on]:
            return Scoped(number, None if on is None else selector_from_json(on))
        case _:
            raise ValueError(f"{data!r} is not a value of the language")
