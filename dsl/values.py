"""The values of the language: frozen, hashable, comparable, and JSON both ways."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

UNITS = ("steps", "samples", "tokens", "epochs", "seconds", "run")
ROLES = ("norm", "bias", "embedding", "attention", "mlp", "head")
BINARY = ("or", "and", "<", ">", "<=", ">=", "==", "is", "then", "+", "-", "*", "/")

Json = Any


def tidy(value: float) -> float:
    """Return a finite number, as an int where it is whole, so that 2 and 2.0 are one value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, found {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError("the number is too large")
    return int(value) if value == int(value) and abs(value) < 2**53 else float(value)


class Value:
    """What all values share: text in the language, and a schema for pydantic fields."""

    __slots__ = ()

    def __str__(self) -> str:
        from trainc.dsl.format import format_value

        return format_value(self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        from trainc.dsl.fields import schema_of

        return schema_of(cls)


@dataclass(frozen=True, slots=True)
class Duration(Value):
    """A stretch of training; unit `run` is a fraction of the whole run, written `5%`."""

    amount: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"`{self.unit}` is not a unit; units are {', '.join(UNITS)}")
        object.__setattr__(self, "amount", tidy(self.amount))



@dataclass(frozen=True, slots=True)
class Range(Value):
    """The numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", tidy(self.low))
        object.__setattr__(self, "high", tidy(self.high))
        if self.low > self.high:
            raise ValueError(f"the range ends at {self.high}, before it begins at {self.low}")


@dataclass(frozen=True, slots=True)
class ImportPath(Value):
    """A Python object by name, written `"module:attribute"`; naming it imports nothing."""

    module: str
    attribute: str

    def __post_init__(self) -> None:
        for part in (self.module, self.attribute):
            if not all(name.isidentifier() for name in part.split(".")):
                raise ValueError(f"`{part}` is not a dotted Python name")


# Expressions ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Number(Value):
    """A plain number."""

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", tidy(self.value))


@dataclass(frozen=True, slots=True)
class Quantity(Value):
    """A duration inside an expression."""

    duration: Duration


@dataclass(frozen=True, slots=True)
class Name(Value):
    """A name: `depth`, a signal such as `gns` or `gns.noise`."""

    id: str


@dataclass(frozen=True, slots=True)
class Call(Value):
    """A function of the language; keyword arguments are kept sorted by name."""

    function: str
    args: tuple[Expr, ...] = ()
    kwargs: tuple[tuple[str, Expr], ...] = ()

    def __post_init__(self) -> None:
        pairs = self.kwargs.items() if isinstance(self.kwargs, Mapping) else self.kwargs
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "kwargs", tuple(sorted(pairs)))


@dataclass(frozen=True, slots=True)
class Unary(Value):
    """`-x` (op `neg`) or `not x` (op `not`)."""

    op: str
    x: Expr


@dataclass(frozen=True, slots=True)
class Binary(Value):
    """Two operands and one of `BINARY`; `x is nan` is `Binary("is", x, Name("nan"))`."""

    op: str
    left: Expr
    right: Expr


Expr = Number | Quantity | Name | Call | Unary | Binary

# Selectors -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Glob(Value):
    """Names by pattern: `*` is one segment, `**` is any number of them."""

    pattern: str


@dataclass(frozen=True, slots=True)
class OfType(Value):
    """Modules by class name, and the parameters they own."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(sorted(set(self.names))))


@dataclass(frozen=True, slots=True)
class Ndim(Value):
    """Parameters with `n` axes."""

    n: int


@dataclass(frozen=True, slots=True)
class Role(Value):
    """What plays one of `ROLES`."""

    name: str


@dataclass(frozen=True, slots=True)
class DepthRange(Value):
    """What lies between two depths; 0 is the input, 1 the head."""

    low: float
    high: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", tidy(self.low))
        object.__setattr__(self, "high", tidy(self.high))


@dataclass(frozen=True, slots=True)
class All(Value):
    """Everything."""


@dataclass(frozen=True, slots=True)
class Trainable(Value):
    """What requires a gradient."""


@dataclass(frozen=True, slots=True)
class Where(Value):
    """Those of a selection that fulfil a condition on `numel`, `ndim`, `depth` or `block`."""

    selector: Selector
    condition: Expr


@dataclass(frozen=True, slots=True)
class Union(Value):
    """`left | right`."""

    left: Selector
    right: Selector


@dataclass(frozen=True, slots=True)
class Intersection(Value):
    """`left & right`."""

    left: Selector
    right: Selector


@dataclass(frozen=True, slots=True)
class Difference(Value):
    """`left - right`."""

    left: Selector
    right: Selector


@dataclass(frozen=True, slots=True)
class Expect(Value):
    """A selection that must have `count` members."""

    selector: Selector
    count: int


Selector = (
    Glob | OfType | Ndim | Role | DepthRange | All | Trainable | Where
    | Union | Intersection | Difference | Expect
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scoped(Value):
    """A number for some parameters, written `0.1 on mats`; `on` None means for all of them."""

    value: float
    on: Selector | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", tidy(self.value))


def called(function: str, *args: Expr, **kwargs: Expr) -> Call:
    """Build a `Call` the short way."""
    return Call(function, args, tuple(kwargs.items()))


def walk(value: Expr | Selector) -> Iterable[Value]:
    """Yield a value and everything inside it, outermost first."""
    todo: list[Any] = [value]
    while todo:
        item = todo.pop()
        yield item
        if isinstance(item, Call):
            todo += [*item.args, *(x for _, x in item.kwargs)]
        elif isinstance(item, Unary):
            todo.append(item.x)
        elif isinstance(item, (Binary, Union, Intersection, Difference)):
            todo += [item.left, item.right]
        elif isinstance(item, Where):
            todo += [item.selector, item.condition]
        elif isinstance(item, Expect):
            todo.append(item.selector)


# JSON ----------------------------------------------------------------------------------------

_PLAIN = {All: "all", Trainable: "trainable"}
_PAIRS = {Union: "union", Intersection: "intersection", Difference: "difference"}
_PAIR_OF = {tag: kind for kind, tag in _PAIRS.items()}


def to_json(value: Any) -> Json:
    """Return nested lists, strings and numbers; lists and plain values pass through."""
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
            return ["call", function, [to_json(x) for x in args], {k: to_json(x) for k, x in kwargs}]
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
    """Return the value that `to_json` wrote; a bare `dur` is a Duration, inside another a Quantity."""
    match data:
        case ["dur", amount, str(unit)]:
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
