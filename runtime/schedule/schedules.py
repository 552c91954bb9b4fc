"""Schedules: pure functions of the clock, compiled from expressions.

A schedule function is a multiplier. It begins where the one before it ended (the first at the start
of the run) and reads its durations from there; `a then b` is a until its end, then b, which does
not begin at the value of a: give `from` where b should not begin at 1. All durations are converted to the
unit of the run's length when the schedule is compiled, so a schedule stays exact in that unit when
the batch changes.

A ramp of d steps has the value (t + 1) / d at its step t, counted from 0, so that the first step
is not lost; in another unit the 1 is the size of one step, and 0 in seconds. A decay has the
progress t / d: it begins at its full value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.expressions import Compiled, Expressions
from trainc.runtime.schedule.functions import SCHEDULE_FUNCTIONS, SHAPES, ArgumentKind, Axis
from trainc.runtime.schedule.operations import MATHS
from trainc.runtime.schedule.time_span import TimeSpan, Unit
from trainc.runtime.schedule.unit_conversion import UnitConversion

Schedule = Callable[[Clock, Mapping[str, float]], float]
Condition = Callable[[Clock, Mapping[str, float]], bool]

# Arguments that are keywords of Python or the name of another function have another name in Python.
_RENAMED = {"from": "begin", "warmup": "rise"}


@dataclass
class Schedules(Expressions):
    """Compiles expressions that may hold schedule functions and `then`."""

    def __post_init__(self) -> None:
        self.axis = Axis.of(self.units, self.length)

    def call(
        self, name: str, args: Sequence[Any], options: Mapping[str, Any], start: float
    ) -> Compiled:
        """Compile the call of a schedule function from `start` on, or of a mathematical one."""
        if name in MATHS:
            return super().call(name, args, options, start)
        if name not in SCHEDULE_FUNCTIONS:
            known = ", ".join([*SCHEDULE_FUNCTIONS, *MATHS])
            raise ValueError(f"there is no function `{name}`: use one of {known}")
        function = SCHEDULE_FUNCTIONS[name]
        arguments = {
            _RENAMED.get(key, key): self._argument(
                f"`{key}` of `{name}`", function.arguments[key], given
            )
            for key, given in function.bind_arguments(name, args, options).items()
        }
        return function.build(self.axis, start, **arguments)

    def then(self, left: Any, right: Any, start: float) -> Compiled:
        """Compile `left then right`; `right` begins where `left` ends."""
        if left[0] == "*" and right[0] == "call":
            raise ValueError(
                "`*` binds tighter than `then`: write `3e-4 * (warmup(5%) then cosine())`, "
                "or give the right side of `then` a factor of its own"
            )
        first = self._number(left, start)
        end, stop = first.end, self.axis.stop
        if end is None:
            raise ValueError(
                "the left side of `then` has no end: write one that ends, such as `warmup(5%)`"
            )
        if end >= stop:
            ends = "never ends" if math.isinf(end) else f"ends at {self.axis.format(end)}"
            raise ValueError(
                f"the left side of `then` {ends} in a run of {self.axis.format(stop)}, so its right"
                " side is never reached: give the left side a shorter `over`"
            )
        following = self._number(right, end)
        position, before, after = self.axis.position, first.at, following.at
        return Compiled(
            lambda clock, values: (before if position(clock) < end else after)(clock, values),
            following.end,
            first.unit or following.unit,
        )

    def _argument(self, where: str, kind: ArgumentKind, expression: Any) -> Any:
        """Compile one argument of a schedule function: to a function, a number or a list of numbers."""
        if kind == "duration":
            return self._duration(where, expression)
        if kind == "points":
            points = [self._duration(where, item) for item in _items(expression)]
            if not points or sorted(set(points)) != points:
                raise ValueError(f"{where}: expected rising points")
            return points
        if kind == "shape":
            shape = expression[1] if isinstance(expression, list | tuple) else expression
            if shape not in SHAPES:
                raise ValueError(f"{where} is `{shape}`: use one of {', '.join(SHAPES)}")
            return SHAPES[shape]
        value = self._number(expression, 0.0)
        if value.unit not in (None, "run"):
            raise ValueError(
                f"{where} is in {value.unit}: expected a number such as `0.1` or `10%`"
            )
        return value.at

    def _duration(self, where: str, expression: Any) -> float:
        """Return a duration in the unit of the axis."""
        value = self._number(expression, 0.0)
        if not value.constant or value.unit is None:
            raise ValueError(f"{where}: expected a duration such as `100 steps` or `5%`")
        return self.units.convert(
            TimeSpan(value.constant_value(), value.unit), self.axis.unit, self.length
        )


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
    """Compile a number to a function of the clock and of named values; raises ValueError.

    The values give `depth`, `block`, `blocks` and signals; `signal_units` is the unit of each signal.
    """
    value = Schedules(units, length, signal_units or {}).compile(expression)
    if value.condition:
        raise ValueError("expected a schedule, found a condition")
    return value.at


def compile_condition(
    expression: Any,
    units: UnitConversion,
    length: RunLength,
    signal_units: Mapping[str, Unit] | None = None,
) -> Condition:
    """Compile a condition to a function of the clock and of named values; a comparison with NaN is false."""
    value = Schedules(units, length, signal_units or {}).compile(expression)
    if not value.condition:
        raise ValueError("expected a condition such as `loss > 2`, found a number")
    return cast("Condition", value.at)
