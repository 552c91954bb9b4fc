"""Expressions over the clock and measured signals, as nested lists, made into Python functions.

A value carries a unit where it has one, so that `tokens > 3 epochs` compares like with like. A
fraction written in percent is a plain number beside plain numbers and a part of the run beside a
counter.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainc.runtime.schedule.clock import Clock, Duration, RunLength, Unit, UnitConversion, tidy

Values = Mapping[str, float]
Function = Callable[[Clock, Values], float]

COUNTERS: tuple[Unit, ...] = ("steps", "samples", "tokens", "epochs", "seconds")
SIGNAL_UNITS: Mapping[str, Unit] = {"batch": "samples", "micro_batch": "samples", "step": "steps"}


@dataclass(frozen=True, slots=True)
class Value:
    """A compiled expression: its function, the position where it ends, its unit."""

    at: Function
    end: float | None = None
    unit: Unit | None = None
    constant: bool = False
    condition: bool = False

    def now(self) -> float:
        """Return the value of a constant."""
        return self.at(Clock(), {})


def _propagate(pick: Callable[..., float]) -> Callable[..., float]:
    """Return `pick` with a NaN argument giving NaN, whatever its place."""
    return lambda *values: math.nan if any(map(math.isnan, values)) else pick(*values)


def _divide(left: float, right: float) -> float:
    if right == 0:
        return math.nan if left == 0 or math.isnan(left) else math.copysign(math.inf, left)
    return left / right


def _total(function: Callable[[float], float], below: float) -> Callable[[float], float]:
    """Return `function` with NaN outside its domain, `below` at 0 and infinity on overflow."""

    def call(x: float) -> float:
        try:
            return function(x) if x != 0 else below
        except ValueError:
            return math.nan
        except OverflowError:
            return math.inf

    return call


MATHS: Mapping[str, Callable[..., float]] = {
    "min": _propagate(min),
    "max": _propagate(max),
    "sqrt": _total(math.sqrt, 0.0),
    "log": _total(math.log, -math.inf),
    "exp": _total(math.exp, 1.0),
    "abs": abs,
}
ARITHMETIC: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _divide,
}
COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": lambda left, right: left < right or left > right,
}
STATES: Mapping[str, Callable[[float], bool]] = {
    "nan": math.isnan,
    "inf": math.isinf,
    "finite": math.isfinite,
}


def names(expression: Any) -> Iterator[str]:
    """Yield the names an expression reads, counters of the clock left out."""
    if isinstance(expression, Mapping):
        for part in expression.values():
            yield from names(part)
    elif isinstance(expression, Sequence) and not isinstance(expression, str):
        if len(expression) == 2 and expression[0] == "name":
            if expression[1] not in (*COUNTERS, "progress"):
                yield expression[1]
        else:
            for part in expression:
                yield from names(part)


class Expressions:
    """Compiles expressions for a run; schedule functions are added by a subclass."""

    def __init__(
        self,
        units: UnitConversion,
        length: RunLength,
        signal_units: Mapping[str, Unit] | None = None,
    ) -> None:
        self.units = units
        self.length = length
        self.signal_units = {**SIGNAL_UNITS, **(signal_units or {})}

    def compile(self, expression: Any, start: float = 0.0) -> Value:
        """Compile one expression whose schedule pieces begin at position `start`."""
        match expression:
            case bool():
                raise ValueError(f"`{expression}` is no number")
            case int() | float():
                return self._constant(float(expression))
            case ["num", value]:
                return self._constant(float(value))
            case ["dur", amount, unit]:
                duration = Duration(float(amount), unit)
                return self._constant(duration.amount, duration.unit)
            case ["name", name]:
                return self._name(name)
            case ["neg", inner]:
                value = self._number(inner, start)
                return replace(value, at=lambda clock, env: -value.at(clock, env))
            case ["not", inner]:
                value = self._condition(inner, start)
                return replace(value, at=lambda clock, env: not value.at(clock, env))
            case ["and" | "or" as word, left, right]:
                return self._logic(
                    word, self._condition(left, start), self._condition(right, start)
                )
            case ["is", inner, state]:
                return self._state(self._number(inner, start), state)
            case ["then", left, right]:
                return self.then(left, right, start)
            case ["call", name, args, options]:
                return self.call(name, args, options, start)
            case ["call", name, args]:
                return self.call(name, args, {}, start)
            case [op, left, right] if op in ARITHMETIC:
                return self._arithmetic(op, self._number(left, start), self._number(right, start))
            case [op, left, right] if op in COMPARISONS:
                a, b = self._alike(self._number(left, start), self._number(right, start))
                return replace(self._apply(COMPARISONS[op], a, b), unit=None, condition=True)
        raise ValueError(f"`{expression}` is no expression")

    def call(
        self, name: str, args: Sequence[Any], options: Mapping[str, Any], start: float
    ) -> Value:
        """Compile the call of a mathematical function."""
        if name not in MATHS:
            raise ValueError(f"there is no function `{name}`: known are {', '.join(MATHS)}")
        least, most = (1, math.inf) if name in ("min", "max") else (1, 1)
        if options or not least <= len(args) <= most:
            raise ValueError(
                f"`{name}` takes {'numbers' if most > 1 else 'one number'}, nothing by name"
            )
        values = [self._number(arg, start) for arg in args]
        if name in ("sqrt", "log", "exp"):
            return replace(self._apply(MATHS[name], *values), unit=None)
        for index in range(1, len(values)):
            values[0], values[index] = self._alike(values[0], values[index])
        # Once more, since the first may have taken its unit from a later one.
        values[1:] = [self._alike(values[0], value)[1] for value in values[1:]]
        return self._apply(
            MATHS[name] if len(values) > 1 or name == "abs" else lambda x: x, *values
        )

    def then(self, left: Any, right: Any, start: float) -> Value:
        """Compile a sequence; only schedules have one."""
        raise ValueError("`then` joins schedules")

    def _number(self, expression: Any, start: float) -> Value:
        value = self.compile(expression, start)
        if value.condition:
            raise ValueError("a condition stands where a number is expected")
        return value

    def _condition(self, expression: Any, start: float) -> Value:
        value = self.compile(expression, start)
        if not value.condition:
            raise ValueError("a number stands where a condition such as `loss > 2` is expected")
        return value

    def _constant(self, number: float, unit: Unit | None = None) -> Value:
        return Value(lambda clock, env: number, unit=unit, constant=True)

    def _name(self, name: str) -> Value:
        if name in COUNTERS:
            unit = name
            return Value(lambda clock, env: clock.read(unit), unit=unit)
        if name == "progress":
            return Value(lambda clock, env: self.length.progress(clock))

        def look_up(clock: Clock, env: Values) -> float:
            try:
                return env[name]
            except KeyError:
                known = ", ".join(sorted(env)) or "none"
                raise ValueError(f"`{name}` has no value here; known are: {known}") from None

        return Value(look_up, unit=self.signal_units.get(name))

    def _apply(self, function: Callable[..., float], *values: Value) -> Value:
        """Return the function of values; it ends where the last of them ends."""
        ends = [value.end for value in values if value.end is not None]
        parts = [value.at for value in values]
        if len(parts) == 2:
            left, right = parts
            at: Function = lambda clock, env: function(left(clock, env), right(clock, env))  # noqa: E731
        else:
            at = lambda clock, env: function(*(part(clock, env) for part in parts))  # noqa: E731
        constant = all(value.constant for value in values)
        return Value(at, max(ends, default=None), values[0].unit, constant)

    def _arithmetic(self, op: str, left: Value, right: Value) -> Value:
        if op in "+-":
            return self._apply(ARITHMETIC[op], *self._alike(left, right))
        units = [value.unit for value in (left, right) if value.unit not in (None, "run")]
        if op == "/" and len(units) == 2:
            return replace(self._apply(_divide, *self._alike(left, right)), unit=None)
        divides = op == "/" and right.unit in units
        unit = units[0] if len(units) == 1 and not divides else None
        return replace(self._apply(ARITHMETIC[op], left, right), unit=unit)

    def _logic(self, word: str, left: Value, right: Value) -> Value:
        pick: Callable[..., float] = (
            (lambda a, b: a and b) if word == "and" else (lambda a, b: a or b)
        )
        return replace(self._apply(pick, left, right), condition=True)

    def _state(self, value: Value, state: str) -> Value:
        if state not in STATES:
            raise ValueError(f"`is {state}` is no condition: use `is {'`, `is '.join(STATES)}`")
        return replace(self._apply(STATES[state], value), unit=None, condition=True)

    def _alike(self, left: Value, right: Value) -> tuple[Value, Value]:
        """Return both values in one unit; what has no unit stays as it is."""
        if left.unit == right.unit or None in (left.unit, right.unit):
            return left, right
        turn_left = left.unit == "run" or (
            left.constant and right.unit != "run" and not right.constant
        )
        if turn_left:
            return self._turn(left, right), right
        return left, self._turn(right, left)

    def _turn(self, value: Value, other: Value) -> Value:
        """Return `value` in the unit of `other`."""
        assert value.unit is not None
        assert other.unit is not None
        unit = other.unit
        factor = self.units.convert(Duration(1, value.unit), unit, self.length)
        if value.constant:
            return self._constant(tidy(value.now() * factor), unit)
        return replace(value, at=lambda clock, env: value.at(clock, env) * factor, unit=unit)
