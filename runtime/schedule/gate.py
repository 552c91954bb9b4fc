"""Gates: when a part of a step happens, as a function of the clock alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.time_span import Duration, TimeSpan, Unit
from trainc.runtime.schedule.unit_conversion import UnitConversion


@dataclass(frozen=True, slots=True)
class Gate:
    """When something happens: from `start` on, before `stop`, once in `every`; None: no bound.

    A gate reads the clock and the clock one step ago, nothing else, so that it fires in a resumed
    run when it does in an uninterrupted one. It fires at `start`, then whenever the counter of
    `every` has crossed a multiple, counted from `start`: with steps at start, start + n,
    start + 2n. Raises ValueError for fractions of the run, for an `every` of 0, and where `start`
    is not in the unit of `every`: `resolve` converts these.
    """

    start: TimeSpan | None = None
    stop: TimeSpan | None = None
    every: TimeSpan | None = None

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.start, self.stop, self.every) if bound is not None]
        if any(bound.unit == "run" for bound in bounds):
            raise ValueError("a gate has no fractions of the run: `Gate.resolve` converts them")
        if self.every is not None and self.every.amount <= 0:
            raise ValueError(f"`every` = {self.every}: expected more than 0")
        if self.every and self.start and self.start.unit != self.every.unit:
            raise ValueError(
                f"`start` is in {self.start.unit} and `every` in {self.every.unit}:"
                " `Gate.resolve` converts `start`"
            )

    @classmethod
    def resolve(
        cls,
        units: UnitConversion,
        length: RunLength | None = None,
        start: Duration | None = None,
        stop: Duration | None = None,
        every: Duration | None = None,
    ) -> Gate:
        """Return the gate with fractions of the run converted, `start` in the unit of `every`."""

        def convert(duration: Duration | None, unit: Unit | None = None) -> TimeSpan | None:
            if duration is None:
                return None
            if unit is None:
                unit = duration.unit if duration.unit != "run" or length is None else length.unit
            return TimeSpan(units.convert(duration, unit, length), unit)

        period = convert(every)
        return cls(convert(start, period.unit if period else None), convert(stop), period)

    def span(self) -> Gate:
        """Return the gate without `every`: open from `start` to `stop`."""
        return Gate(self.start, self.stop)

    def fires(self, clock: Clock) -> bool:
        """Return whether the gate fires at a clock; inside a step that is the clock before the step."""
        if not self._open(clock) or (self.stop is not None and clock.reached(self.stop)):
            return False
        if self.every is None or clock.before is None or not self._open(clock.before):
            return True
        return self._periods(clock, self.every) > self._periods(clock.before, self.every)

    def _open(self, clock: Clock) -> bool:
        return self.start is None or clock.reached(self.start)

    def _periods(self, clock: Clock, every: TimeSpan) -> int:
        """Return how many periods have passed since the start."""
        now, period = clock.position(every)
        origin = clock.position(self.start)[1] if self.start else 0.0
        # The small term undoes rounding where a period is a fraction of a unit, such as 0.1 epochs.
        return math.floor((now - origin) / period + 1e-9)


@dataclass(frozen=True, slots=True)
class UntilDone(Gate):
    """Another gate, closed while something is done: of a run that is resumed, what is done is in its state."""

    other: Gate = field(default_factory=Gate)
    done: Callable[[], bool] = lambda: False

    def fires(self, clock: Clock) -> bool:
        return not self.done() and self.other.fires(clock)
