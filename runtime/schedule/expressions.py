"""Compile expressions over the clock and measured signals, given as nested lists, to Python functions.

A value has a unit where its counter or signal has one, so that `tokens > 3 epochs` compares like
with like. A percentage is a plain number beside plain numbers and a fraction of the run beside a
counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainc.runtime.schedule.clock import COUNTERS, Clock, RunLength
from trainc.runtime.schedule.operations import ARITHMETIC, COMPARISONS, MATHS, STATES, divide
from trainc.runtime.schedule.time_span import TimeSpan, Unit, snap
from trainc.runtime.schedule.unit_conversion import UnitConversion

Values = Mapping[str, float]
Function = Callable[[Clock, Values], float]

SIGNAL_UNITS: Mapping[str, Unit] = {"batch": "samples", "micro_batch": "samples", "step": "steps"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled expression: its function, the position where it ends, its unit."""

    at: Function
    end: float | None = None
    unit: Unit | None = None
    constant: bool = False
    condition: bool = False

    def constant_value(self) -> float:
        """Return the value of a constant."""
        return self.at(Clock(), {})


def names_read(expression: Any) -> Iterator[str]:
    """Yield the names that an expression reads, except counters of the clock and `progress`."""
    if isinstance(expression, Mapping):
        for part in expression.values():
            yield from names_read(part)
    elif isinstance(expression, Sequence) and not isinstance(expression, str):
        if len(expression) == 2 and expression[0] == "name":
            if expression[1] not in (*COUNTERS, "progress"):
                yield expression[1]
        else:
            for part in expression:
                yield from names_read(part)


@dataclass
class Expressions:
    """Compiles expressions for a run; `Schedules` adds schedule functions.

    `signal_units` is the unit of each signal of a clause that counts something. All methods that
    compile raise ValueError for an expression that has no meaning.
    """

    units: UnitConversion
    length: RunLength
    signal_units: Mapping[str, Unit]

    def compile(self, expression: Any, start: float = 0.0) -> Compiled:
        """Compile one expression; its schedule functions begin at position `start`."""
        match expression:
            case bool():
                raise ValueError(f"`{expression}` is not a number")
            case int() | float():
                return self._constant(float(expression))
            case ["num", value]:
                return self._constant(float(value))
            case ["dur", amount, unit]:
                span = TimeSpan(float(amount), unit)
                return self._constant(span.amount, span.unit)
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
                a, b = self._in_one_unit(self._number(left, start), self._number(right, start))
                return replace(self._apply(COMPARISONS[op], a, b), unit=None, condition=True)
        raise ValueError(f"`{expression}` is not an expression")

    def call(
        self, name: str, args: Sequence[Any], options: Mapping[str, Any], start: float
    ) -> Compiled:
        """Compile the call of a function of `MATHS`."""
        least, most = (1, math.inf) if name in ("min", "max") else (1, 1)
        if options or not least <= len(args) <= most:
            raise ValueError(
                f"`{name}` takes {'numbers' if most > 1 else 'one number'} and no named argument"
            )
        values = [self._number(arg, start) for arg in args]
        if name in ("sqrt", "log", "exp"):
            return replace(self._apply(MATHS[name], *values), unit=None)
        for index in range(1, len(values)):
            values[0], values[index] = self._in_one_unit(values[0], values[index])
        # Once more, since the first may have taken its unit from a later one.
        values[1:] = [self._in_one_unit(values[0], value)[1] for value in values[1:]]
        return self._apply(
            MATHS[name] if len(values) > 1 or name == "abs" else lambda x: x, *values
        )

    def then(self, left: Any, right: Any, start: float) -> Compiled:
        """Raise ValueError: only schedules have `then`."""
        raise ValueError("`then` joins two schedules: this expression is not a schedule")

    def _number(self, expression: Any, start: float) -> Compiled:
        value = self.compile(expression, start)
        if value.condition:
            raise ValueError("expected a number, found a condition")
        return value

    def _condition(self, expression: Any, start: float) -> Compiled:
        value = self.compile(expression, start)
        if not value.condition:
            raise ValueError("expected a condition such as `loss > 2`, found a number")
        return value

    def _constant(self, number: float, unit: Unit | None = None) -> Compiled:
        return Compiled(lambda clock, env: number, unit=unit, constant=True)

    def _name(self, name: str) -> Compiled:
        if name in COUNTERS:
            unit = name
            return Compiled(lambda clock, env: clock.read(unit), unit=unit)
        if name == "progress":
            return Compiled(lambda clock, env: self.length.progress(clock))

        def look_up(clock: Clock, env: Values) -> float:
            try:
                return env[name]
            except KeyError:
                known = ", ".join(sorted(env)) or "(none)"
                raise ValueError(f"`{name}` has no value here: write one of {known}") from None

        return Compiled(look_up, unit=self.signal_units.get(name, SIGNAL_UNITS.get(name)))

    def _apply(self, function: Callable[..., float], *values: Compiled) -> Compiled:
        """Return a function of compiled values; it ends where the last of them ends."""
        ends = [value.end for value in values if value.end is not None]
        parts = [value.at for value in values]
        if len(parts) == 2:
            left, right = parts
            at: Function = lambda clock, env: function(left(clock, env), right(clock, env))  # noqa: E731
        else:
            at = lambda clock, env: function(*(part(clock, env) for part in parts))  # noqa: E731
        constant = all(value.constant for value in values)
        return Compiled(at, max(ends, default=None), values[0].unit, constant)

    def _arithmetic(self, op: str, left: Compiled, right: Compiled) -> Compiled:
        if op in "+-":
            return self._apply(ARITHMETIC[op], *self._in_one_unit(left, right))
        units = [value.unit for value in (left, right) if value.unit not in (None, "run")]
        if op == "/" and len(units) == 2:
            return replace(self._apply(divide, *self._in_one_unit(left, right)), unit=None)
        divides = op == "/" and right.unit in units
        unit = units[0] if len(units) == 1 and not divides else None
        return replace(self._apply(ARITHMETIC[op], left, right), unit=unit)

    def _logic(self, word: str, left: Compiled, right: Compiled) -> Compiled:
        pick: Callable[..., float] = (
            (lambda a, b: a and b) if word == "and" else (lambda a, b: a or b)
        )
        return replace(self._apply(pick, left, right), condition=True)

    def _state(self, value: Compiled, state: str) -> Compiled:
        if state not in STATES:
            raise ValueError(f"`is {state}` is not a condition: use `is {'`, `is '.join(STATES)}`")
        return replace(self._apply(STATES[state], value), unit=None, condition=True)

    def _in_one_unit(self, left: Compiled, right: Compiled) -> tuple[Compiled, Compiled]:
        """Return both values in one unit; a value without a unit stays as it is."""
        if left.unit == right.unit or None in (left.unit, right.unit):
            return left, right
        convert_left = left.unit == "run" or (
            left.constant and right.unit != "run" and not right.constant
        )
        if convert_left:
            return self._convert(left, right), right
        return left, self._convert(right, left)

    def _convert(self, value: Compiled, other: Compiled) -> Compiled:
        """Return `value` in the unit of `other`."""
        assert value.unit is not None
        assert other.unit is not None
        unit = other.unit
        factor = self.units.convert(TimeSpan(1, value.unit), unit, self.length)
        if value.constant:
            return self._constant(snap(value.constant_value() * factor), unit)
        return replace(value, at=lambda clock, env: value.at(clock, env) * factor, unit=unit)
