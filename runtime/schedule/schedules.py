"""Schedules: pure functions of the clock, compiled from expressions.

A piece is a multiplier. It begins where the piece before it ended (at the start of the run if
there is none) and reads its durations from there; `a then b` is a until its end, then b, and
nothing carries over: give `from` where b should not begin at 1. All durations are converted to the
unit of the run's length when the schedule is compiled, so a schedule stays exact in that unit when
the batch changes.

A ramp of d steps has the value (t + 1) / d at its step t, counted from 0, so that the first step
is not lost; in another unit the 1 is the size of one step, and 0 in seconds. A decay has the
progress t / d: it begins at its full value.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from trainc.runtime.schedule.clock import Clock, Duration, RunLength, Unit, UnitConversion
from trainc.runtime.schedule.expressions import COUNTERS, MATHS, Expressions, Value
from trainc.runtime.schedule.functions import PIECES, SHAPES, Axis, Kind

Schedule = Callable[[Clock, Mapping[str, float]], float]
Condition = Callable[[Clock, Mapping[str, float]], bool]

# The builders' own names for arguments that are Python's words or another builder's name.
_RENAMED = {"from": "begin", "warmup": "rise"}


class Schedules(Expressions):
    """Compiles expressions that may hold schedule functions and `then`."""

    def __init__(
        self,
        units: UnitConversion,
        length: RunLength,
        signal_units: Mapping[str, Unit] | None = None,
    ) -> None:
        super().__init__(units, length, signal_units)
        self.axis = Axis.of(units, length)

    def call(
        self, name: str, args: Sequence[Any], options: Mapping[str, Any], start: float
    ) -> Value:
        """Compile the call of a schedule function from `start` on, or of a mathematical one."""
        if name in MATHS:
            return super().call(name, args, options, start)
        if name not in PIECES:
            known = ", ".join([*PIECES, *MATHS])
            raise ValueError(f"there is no function `{name}`: known are {known}")
        piece = PIECES[name]
        arguments = {
            _RENAMED.get(key, key): self._argument(
                f"`{key}` of `{name}`", piece.arguments[key], given
            )
            for key, given in piece.given(name, args, options).items()
        }
        return piece.build(self.axis, start, **arguments)

    def then(self, left: Any, right: Any, start: float) -> Value:
        """Compile `left then right`; `right` begins where `left` ends."""
        if left[0] == "*" and right[0] == "call":
            raise ValueError(
                "`*` binds tighter than `then`: write `3e-4 * (warmup(5%) then cosine())`, "
                "or give what follows `then` a factor of its own"
            )
        first = self._number(left, start)
        end, stop = first.end, self.axis.stop
        if end is None:
            raise ValueError(
                "what stands before `then` has no end: use a schedule such as `warmup(5%)`"
            )
        if end >= stop:
            last = "as long as the run" if math.isinf(end) else f"to {self.axis.say(end)}"
            raise ValueError(
                f"what stands before `then` lasts {last} in a run of {self.axis.say(stop)}: "
                "give it a shorter `over`, or what follows is never reached"
            )
        following = self._number(right, end)
        position, before, after = self.axis.position, first.at, following.at
        return Value(
            lambda clock, values: (before if position(clock) < end else after)(clock, values),
            following.end,
            first.unit or following.unit,
        )

    def _argument(self, where: str, kind: Kind, expression: Any) -> Any:
        """Compile one argument of a schedule function to what its builder takes."""
        if kind == "duration":
            return self._duration(where, expression)
        if kind == "points":
            points = [self._duration(where, item) for item in _items(expression)]
            if not points or sorted(set(points)) != points:
                raise ValueError(f"{where} must rise from point to point")
            return points
        if kind == "shape":
            shape = expression[1] if isinstance(expression, list | tuple) else expression
            if shape not in SHAPES:
                raise ValueError(f"{where} is one of {', '.join(SHAPES)}, not `{shape}`")
            return SHAPES[shape]
        value = self._number(expression, 0.0)
        if value.unit not in (None, "run"):
            raise ValueError(f"{where} is a number such as `0.1` or `10%`, not one of {value.unit}")
        return value.at

    def _duration(self, where: str, expression: Any) -> float:
        """Return a duration in the unit of the axis."""
        value = self._number(expression, 0.0)
        if not value.constant or value.unit is None:
            raise ValueError(f"{where} is a duration such as `100 steps` or `5%`")
        return self.units.convert(Duration(value.now(), value.unit), self.axis.unit, self.length)


def _items(expression: Any) -> list[Any]:
    """Return the items of a list expression; anything else is a list of one."""
    match expression:
        case ["list", [[*_], *_] as items]:
            return list(items)
        case ["list", *items]:
            return list(items)
        case [[*_], *_]:
            return list(expression)
    return [expression]


def compile_schedule(
    expression: Any,
    units: UnitConversion,
    length: RunLength,
    signal_units: Mapping[str, Unit] | None = None,
) -> Schedule:
    """Compile a number-valued expression to a function of the clock and of named values.

    The values give `depth`, `block`, `blocks` and signals; `signal_units` says in which unit a
    signal is measured.
    """
    value = Schedules(units, length, signal_units).compile(expression)
    if value.condition:
        raise ValueError("a condition stands where a schedule is expected")
    return value.at


def compile_condition(
    expression: Any,
    units: UnitConversion,
    length: RunLength,
    signal_units: Mapping[str, Unit] | None = None,
) -> Condition:
    """Compile a condition likewise; a comparison with NaN is false."""
    value = Schedules(units, length, signal_units).compile(expression)
    if not value.condition:
        raise ValueError("a number stands where a condition such as `loss > 2` is expected")
    return cast("Condition", value.at)


def table(
    expression: Any,
    units: UnitConversion,
    length: RunLength,
    values: Mapping[str, float] | None = None,
    percents: Sequence[float] = tuple(range(0, 101, 5)),
) -> list[dict[str, float | None]]:
    """Sample a schedule over the run: rows of percent, the clock in all units, and value.

    Where the steps of the run are known a row stands at a whole step; the row at 100 is the end of
    the last one.
    """
    schedule = compile_schedule(expression, units, length)
    rows: list[dict[str, float | None]] = []
    for percent in percents:
        counters = moment(units, length, percent / 100)
        clock = Clock(samples_per_epoch=int(units.samples_per_epoch or 0) or None)
        for unit in ("steps", "samples", "tokens", "seconds"):
            # Between whole steps, in a run measured in something else, counters are not whole.
            setattr(clock, unit, counters[unit] or 0)
        rows.append({"percent": percent, **counters, "value": schedule(clock, values or {})})
    return rows


def moment(units: UnitConversion, length: RunLength, part: float) -> dict[str, float | None]:
    """Return the counters at a part of the run in [0, 1], None for those not to be known."""
    at = Duration(part * length.amount, length.unit)
    with contextlib.suppress(ValueError):
        at = Duration(round(units.convert(at, "steps")), "steps")
    counters: dict[str, float | None] = {}
    for unit in COUNTERS:
        try:
            counters[unit] = units.convert(at, unit)
        except ValueError:
            counters[unit] = None
    return counters
