"""The schedule functions: the arguments of each, and the multiplier it gives at each moment of a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.expressions import Compiled, Function, Values
from trainc.runtime.schedule.time_span import TimeSpan, Unit
from trainc.runtime.schedule.unit_conversion import UnitConversion

ArgumentKind = Literal["duration", "number", "points", "shape"]
Shape = Callable[[float], float]

SHAPES: Mapping[str, Shape] = {
    "linear": lambda part: part,
    "cosine": lambda part: (1 - math.cos(math.pi * part)) / 2,
    "sqrt": math.sqrt,
}


def one(clock: Clock, values: Values) -> float:
    """Return 1."""
    return 1.0


def zero(clock: Clock, values: Values) -> float:
    """Return 0."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Axis:
    """The counter a schedule reads: its unit, the end of the run and the size of one step in it."""

    units: UnitConversion
    length: RunLength
    unit: Unit
    stop: float
    step: float

    @classmethod
    def of(cls, units: UnitConversion, length: RunLength) -> Axis:
        """Return the axis of a run; epochs are counted in samples, which are whole."""
        unit: Unit = (
            "samples" if length.unit == "epochs" and units.samples_per_epoch else length.unit
        )
        return cls(units, length, unit, units.convert(length, unit), units.step(unit))

    def position(self, clock: Clock) -> float:
        """Return the position of the clock."""
        return float(getattr(clock, self.unit))

    def format(self, position: float) -> str:
        """Return a position as text, in the unit of the run's length."""
        if self.unit != self.length.unit:
            position = self.units.convert(TimeSpan(position, self.unit), self.length.unit)
        return f"{position:.6g} {self.length.unit}"

    def ramp(
        self,
        start: float,
        over: float | None,
        begin: Function,
        to: Function,
        shape: Shape,
        lead: float = 0.0,
    ) -> Compiled:
        """Return a ramp from `begin` to `to` over a duration or the rest of the run, then constant.

        `lead` is how far ahead of the clock it reads. Raises ValueError where no time is left.
        """
        end = self.stop if over is None else start + over
        if end <= start:
            raise ValueError(
                f"the schedule that begins at {self.format(start)} ends at {self.format(end)}: give it a"
                " longer `over`"
            )
        position, offset, span = self.position, start - lead, end - start

        def at(clock: Clock, values: Values) -> float:
            part = (position(clock) - offset) / span
            if part <= 0:
                return begin(clock, values)
            if part >= 1:
                return to(clock, values)
            first = begin(clock, values)
            return first + (to(clock, values) - first) * shape(part)

        return Compiled(at, end)


def warmup(axis: Axis, start: float, over: float, begin: Function = zero) -> Compiled:
    """Rise linearly from `from` (0) to 1 over `over`, then stay."""
    if over == 0:
        return Compiled(one, start)
    return axis.ramp(start, over, begin, one, SHAPES["linear"], lead=axis.step)


def constant(
    axis: Axis, start: float, value: Function = one, over: float | None = None
) -> Compiled:
    """Stay at `value` (1), to the end of the run or for `over`."""
    return Compiled(value, math.inf if over is None else start + over)


def cosine(
    axis: Axis, start: float, to: Function = zero, over: float | None = None, begin: Function = one
) -> Compiled:
    """Fall from `from` (1) to `to` (0) on half a cosine, over `over` or the rest of the run."""
    return axis.ramp(start, over, begin, to, SHAPES["cosine"])


def linear(
    axis: Axis, start: float, to: Function = zero, over: float | None = None, begin: Function = one
) -> Compiled:
    """Go from `from` (1) to `to` (0) on a line, over `over` or the rest of the run."""
    return axis.ramp(start, over, begin, to, SHAPES["linear"])


def cubic(
    axis: Axis, start: float, to: Function = zero, over: float | None = None, begin: Function = one
) -> Compiled:
    """Go from `from` (1) to `to` (0), fast at first: what is left of the way is (1 - part)^3 of it."""
    return axis.ramp(start, over, begin, to, lambda part: 1 - (1 - part) ** 3)


def exponential(
    axis: Axis, start: float, to: Function, over: float | None = None, begin: Function = one
) -> Compiled:
    """Fall from `from` (1) to `to` by equal factors, over `over` or the rest of the run."""

    def logarithm(of: Function) -> Function:
        def at(clock: Clock, values: Values) -> float:
            value = of(clock, values)
            if not value > 0:
                raise ValueError(
                    f"`from` or `to` of `exponential` is {value:g}: expected a number above zero"
                )
            return math.log(value)

        return at

    ramp = axis.ramp(start, over, logarithm(begin), logarithm(to), SHAPES["linear"])
    return Compiled(lambda clock, values: math.exp(ramp.at(clock, values)), ramp.end)


def inverse_sqrt(axis: Axis, start: float, over: float) -> Compiled:
    """Fall as sqrt(d / (d + t)), t the time since it began and d = `over`."""
    if over <= 0:
        raise ValueError("`over` of `inverse_sqrt` is 0: expected a longer duration")
    position = axis.position
    return Compiled(
        lambda clock, values: math.sqrt(over / (over + max(0.0, position(clock) - start))), math.inf
    )


def step(axis: Axis, start: float, at: Sequence[float], factor: Function) -> Compiled:
    """Multiply by `factor` at each of the points `at`, counted from the start of the run."""
    for point in at:
        if not start < point < axis.stop:
            raise ValueError(
                f"`step` at {axis.format(point)} has no effect: give points between"
                f" {axis.format(start)} and {axis.format(axis.stop)}"
            )
    position = axis.position

    def value(clock: Clock, values: Values) -> float:
        passed = bisect_right(at, position(clock))
        return factor(clock, values) ** passed if passed else 1.0

    return Compiled(value, math.inf)


def wsd(
    axis: Axis,
    start: float,
    rise: float,
    decay: float,
    to: Function = zero,
    shape: Shape = SHAPES["linear"],
) -> Compiled:
    """Rise over `warmup`, stay at 1, and fall to `to` (0) over the last `decay` of the run."""
    turn = axis.stop - decay
    if start + rise > turn:
        raise ValueError(
            f"`wsd` rises until {axis.format(start + rise)} and its decay begins at"
            f" {axis.format(max(0.0, turn))}: give it a shorter `warmup` or `decay`"
        )
    up = warmup(axis, start, rise)
    down = axis.ramp(turn, decay, one, to, shape)
    position = axis.position
    return Compiled(
        lambda clock, values: (up if position(clock) < turn else down).at(clock, values), axis.stop
    )


@dataclass(frozen=True, slots=True)
class ScheduleFunction:
    """A schedule function: its arguments, how many may be given by position, and which are required.

    `rest` names the argument that takes all arguments given by position, as a list.
    """

    build: Callable[..., Compiled]
    arguments: Mapping[str, ArgumentKind]
    positional: int = 0
    required: tuple[str, ...] = ()
    rest: str | None = None

    def bind_arguments(
        self, name: str, args: Sequence[Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of a call by name; raises ValueError for arguments that do not fit."""
        order = list(self.arguments)
        if self.rest and len(args) > 1:
            args = [["list", *args]]
        if len(args) > self.positional:
            takes = "no argument" if self.positional == 0 else "one argument"
            raise ValueError(f"`{name}` takes {takes} without a name, not {len(args)}")
        given = dict(zip(order, args, strict=False))
        for key, argument in options.items():
            if key not in self.arguments:
                raise ValueError(
                    f"`{name}` has no argument `{key}`: the arguments are {', '.join(order)}"
                )
            if key in given:
                raise ValueError(f"`{name}` is given `{key}` twice")
            given[key] = argument
        for key in self.required:
            if key not in given:
                raise ValueError(f"`{name}` needs `{key}`")
        return given


_DECAY: Mapping[str, ArgumentKind] = {"to": "number", "over": "duration", "from": "number"}

SCHEDULE_FUNCTIONS: Mapping[str, ScheduleFunction] = {
    "warmup": ScheduleFunction(warmup, {"over": "duration", "from": "number"}, 1, ("over",)),
    "constant": ScheduleFunction(constant, {"value": "number", "over": "duration"}, 1),
    "cosine": ScheduleFunction(cosine, _DECAY, 1),
    "linear": ScheduleFunction(linear, _DECAY, 1),
    "cubic": ScheduleFunction(cubic, _DECAY, 1),
    "exponential": ScheduleFunction(exponential, _DECAY, 1, ("to",)),
    "inverse_sqrt": ScheduleFunction(inverse_sqrt, {"over": "duration"}, 1, ("over",)),
    "step": ScheduleFunction(step, {"at": "points", "factor": "number"}, 1, ("at", "factor"), "at"),
    "wsd": ScheduleFunction(
        wsd,
        {"warmup": "duration", "decay": "duration", "to": "number", "shape": "shape"},
        0,
        ("warmup", "decay"),
    ),
}
