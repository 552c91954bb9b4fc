"""Which values an expression can have at all: bounds of a number, and whether a condition can be true.

Bounds may be too wide, never too narrow: what lies outside of them cannot happen.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator

from trainc.dsl.text.record import Record
from trainc.dsl.values.expressions import Binary, Call, Expr, Items, Name, Number, Quantity, Unary


class Bounds(Record):
    """The numbers from `low` to `high`, in `unit` where they count something."""

    low: float
    high: float
    unit: str | None = None

    @property
    def constant(self) -> bool:
        """Whether they hold a single number."""
        return self.low == self.high


ANYTHING = Bounds(-math.inf, math.inf)
BoundsOf = Callable[[str], Bounds]
"""What is known of a name: `progress`, a counter, a signal, the place of a layer."""
Convert = Callable[[float, str, str], float | None]
"""A number of one unit in another, None where that is not known."""


def no_names(name: str) -> Bounds:
    """Return that nothing is known of a name."""
    return ANYTHING


def same_unit_only(amount: float, unit: str, wanted: str) -> float | None:
    """Convert a number only to its own unit."""
    return amount if unit == wanted else None


def bounds(value: Expr, names: BoundsOf = no_names) -> Bounds:
    """Return the bounds of a number, `ANYTHING` where they are not known."""
    match value:
        case Number(number):
            return Bounds(number, number)
        case Quantity(duration):
            return Bounds(duration.amount, duration.amount, duration.unit)
        case Name(id):
            return names(id)
        case Unary("neg", x):
            inner = bounds(x, names)
            return Bounds(-inner.high, -inner.low, inner.unit)
        case Binary("+" | "-" | "*" | "/" as op, left, right):
            return _arithmetic(op, bounds(left, names), bounds(right, names))
        case Binary("then", left, right):
            return _hull(bounds(left, names), bounds(right, names))
        case Call():
            return _call(value, names)
    return ANYTHING


def constant_value(value: Expr) -> float | None:
    """Return the value of an expression without names and schedules; None for any other, or where it has a unit."""
    found = bounds(value)
    return found.low if found.constant and found.unit in (None, "run") else None


def _hull(*found: Bounds) -> Bounds:
    return Bounds(min(x.low for x in found), max(x.high for x in found))


def _arithmetic(op: str, left: Bounds, right: Bounds) -> Bounds:
    units = {left.unit, right.unit} - {None}
    if len(units) > 1 or (op == "/" and right.unit):
        return ANYTHING
    if op == "/" and right.constant and right.low == 0:
        return Bounds(math.inf, math.inf)
    if op == "/" and right.low <= 0 <= right.high:
        return ANYTHING
    if op == "-":
        op, right = "+", Bounds(-right.high, -right.low)
    if op == "+":
        ends = [left.low + right.low, left.high + right.high]
    else:
        work = operator.mul if op == "*" else operator.truediv
        ends = [work(a, b) for a in (left.low, left.high) for b in (right.low, right.high)]
    if any(map(math.isnan, ends)):
        return ANYTHING
    return Bounds(min(ends), max(ends), next(iter(units), None))


def _call(call: Call, names: BoundsOf) -> Bounds:
    if call.function in ("min", "max"):
        found = [bounds(x, names) for x in call.args]
        pick = min if call.function == "min" else max
        if len({x.unit for x in found}) > 1:
            return ANYTHING
        return Bounds(pick(x.low for x in found), pick(x.high for x in found), found[0].unit)
    if call.function == "abs":
        inner = bounds(call.args[0], names)
        ends = abs(inner.low), abs(inner.high)
        return Bounds(0 if inner.low <= 0 <= inner.high else min(ends), max(ends), inner.unit)
    if call.function == "since_best":
        return names("step").replace(low=0)
    if call.function in ("sqrt", "exp"):
        return Bounds(0, math.inf)
    given = dict(call.kwargs)
    first = call.args[0] if call.args else None
    one = Number(1)
    match call.function:
        case "warmup":
            return _hull(Bounds(1, 1), bounds(given.get("from", Number(0)), names))
        case "constant":
            return bounds(given.get("value", first or one), names)
        case "cosine" | "linear" | "cubic" | "exponential":
            end = given.get("to", first or Number(0))
            return _hull(bounds(end, names), bounds(given.get("from", one), names))
        case "inverse_sqrt":
            return Bounds(0, 1)
        case "wsd":
            return _hull(Bounds(0, 1), bounds(given.get("to", Number(0)), names))
        case "step":
            factor = bounds(given.get("factor", one), names)
            return Bounds(0, max(1, factor.high) ** _points(call)) if factor.low >= 0 else ANYTHING
    return ANYTHING


def _points(call: Call) -> int:
    at = dict(call.kwargs).get("at", call.args[0] if call.args else None)
    return len(at.items) if isinstance(at, Items) else max(1, len(call.args))


def can_be_true(value: Expr, names: BoundsOf, convert: Convert = same_unit_only) -> bool:
    """Say whether a condition can be true; True where that is not known."""
    match value:
        case Binary("and", left, right):
            each = can_be_true(left, names, convert) and can_be_true(right, names, convert)
            return each and not _exclude(_conjunction(value), names)
        case Binary("or", left, right):
            return can_be_true(left, names, convert) or can_be_true(right, names, convert)
        case Unary("not", inner):
            return can_be_false(inner, names, convert)
        case Binary("is", left, Name("nan" | "inf")):
            known = bounds(left, names)
            return math.isinf(known.low) or math.isinf(known.high)
        case Binary("<" | ">" | "<=" | ">=" | "==" | "!=" as op, left, right):
            pair = in_one_unit(bounds(left, names), bounds(right, names), convert)
            return pair is None or _comparable(op, *pair)
    return True


def _conjunction(value: Expr) -> Iterator[Expr]:
    """Yield the parts of `a and b and ...`."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Binary) and item.op == "and":
            todo += [item.right, item.left]
        else:
            yield item


def _exclude(parts: Iterable[Expr], names: BoundsOf) -> bool:
    """Say whether comparisons of one number with constants exclude each other, as `x > 3 and x < 2`."""
    lowest: dict[str, tuple[float, bool]] = {}
    highest: dict[str, tuple[float, bool]] = {}
    for part in parts:
        if not isinstance(part, Binary) or part.op not in ("<", "<=", ">", ">=", "=="):
            continue
        number, limit, op = part.left, bounds(part.right, names), part.op
        if not limit.constant:
            number, limit, op = part.right, bounds(part.left, names), _MIRRORED[part.op]
        if not limit.constant:
            continue
        key, strict = f"{number} in {limit.unit}", op in "<>"
        if op in (">", ">=", "=="):
            lowest[key] = max(lowest.get(key, (-math.inf, False)), (limit.low, strict))
        if op in ("<", "<=", "=="):
            high = highest.get(key, (math.inf, True))
            highest[key] = min(high, (limit.low, not strict))
    for key, (low, open_low) in lowest.items():
        top, closed = highest.get(key, (math.inf, True))
        if low > top or (low == top and (open_low or not closed)):
            return True
    return False


_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "==": "=="}
_OPPOSITE = {"<": ">=", ">": "<=", "<=": ">", ">=": "<", "==": "!=", "!=": "=="}


def can_be_false(value: Expr, names: BoundsOf, convert: Convert = same_unit_only) -> bool:
    """Say whether a condition can be false; True where that is not known."""
    match value:
        case Binary("and", left, right):
            return can_be_false(left, names, convert) or can_be_false(right, names, convert)
        case Binary("or", left, right):
            return can_be_false(left, names, convert) and can_be_false(right, names, convert)
        case Unary("not", inner):
            return can_be_true(inner, names, convert)
        case Binary(op, left, right) if op in _OPPOSITE:
            return can_be_true(Binary(_OPPOSITE[op], left, right), names, convert)
    return True


def in_one_unit(left: Bounds, right: Bounds, convert: Convert) -> tuple[Bounds, Bounds] | None:
    """Return both in one unit, None where one cannot be converted; a percentage alone is a plain number."""
    units = [x.unit for x in (left, right)]
    if units[0] == units[1] or None in units:
        return left, right
    moves_left = left.unit == "run" or (left.constant and right.unit != "run")
    moved, other = (left, right) if moves_left else (right, left)
    assert moved.unit is not None
    assert other.unit is not None
    ends = [convert(x, moved.unit, other.unit) for x in (moved.low, moved.high)]
    if ends[0] is None or ends[1] is None:
        return None
    new = Bounds(ends[0], ends[1], other.unit)
    return (new, other) if moves_left else (other, new)


def _comparable(op: str, left: Bounds, right: Bounds) -> bool:
    """Say whether a comparison is true for some number of each."""
    match op:
        case "<":
            return left.low < right.high
        case "<=":
            return left.low <= right.high
        case ">":
            return left.high > right.low
        case ">=":
            return left.high >= right.low
        case "==":
            return left.low <= right.high and right.low <= left.high
    return not (left.constant and right.constant and left.low == right.low)
