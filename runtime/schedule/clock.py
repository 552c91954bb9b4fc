"""The clock of a run: five counters, durations in any of them, and gates on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast, get_args

Unit = Literal["steps", "samples", "tokens", "epochs", "seconds", "run"]
UNITS: tuple[Unit, ...] = get_args(Unit)


def tidy(value: float) -> float:
    """Return the whole number that `value` misses only by rounding, else `value`."""
    nearest = round(value) if math.isfinite(value) else value
    return float(nearest) if abs(value - nearest) <= 1e-9 * max(1.0, abs(value)) else float(value)


@dataclass(frozen=True, slots=True)
class Duration:
    """An amount of one unit; `run` is a fraction of the run."""

    amount: float
    unit: Unit

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"`{self.unit}` is no unit of time: use one of {', '.join(UNITS)}")
        if not (math.isfinite(self.amount) and self.amount >= 0):
            raise ValueError(
                f"a duration is a finite number from 0 on, not {self.amount:g} {self.unit}"
            )

    def __str__(self) -> str:
        if self.unit == "run":
            return f"{self.amount * 100:g}%"
        return f"{self.amount:.12g} {self.unit}"

    def to_json(self) -> dict[str, Any]:
        """Return `{"amount": .., "unit": ..}`."""
        return {"amount": self.amount, "unit": self.unit}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(float(data["amount"]), cast("Unit", data["unit"]))


@dataclass(slots=True)
class Clock:
    """Counts optimizer steps, samples, tokens, epochs and seconds of training; all start at 0.

    `before` holds the counters as they were one step ago, so that a gate needs nothing but the
    clock.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    samples_per_epoch: int | None = None
    before: Clock | None = field(default=None, repr=False, compare=False)

    @property
    def epochs(self) -> float:
        """Passes over the training data; 0 where its size is not known."""
        return self.samples / self.samples_per_epoch if self.samples_per_epoch else 0.0

    def advance(self, samples: int, tokens: int, seconds: float) -> None:
        """Count one optimizer step: its samples, its tokens and the seconds it took."""
        self.before = Clock(
            self.steps, self.samples, self.tokens, self.seconds, self.samples_per_epoch
        )
        self.steps += 1
        self.samples += samples
        self.tokens += tokens
        self.seconds += seconds

    def read(self, unit: Unit) -> float:
        """Return the counter of `unit`."""
        if unit == "run":
            raise ValueError(
                "a fraction of the run is no counter: convert it to the run's unit first"
            )
        if unit == "epochs" and not self.samples_per_epoch:
            raise ValueError(
                "epochs cannot be counted: the number of samples per epoch is not known"
            )
        return float(getattr(self, unit))

    def position(self, duration: Duration) -> tuple[float, float]:
        """Return counter and amount of `duration` in one scale; epochs are counted in samples."""
        if duration.unit == "epochs" and self.samples_per_epoch:
            return self.samples, tidy(duration.amount * self.samples_per_epoch)
        return self.read(duration.unit), duration.amount

    def reached(self, duration: Duration) -> bool:
        """Say whether at least `duration` has passed since the start of the run."""
        now, amount = self.position(duration)
        return now >= amount

    def counters(self) -> dict[str, float]:
        """Return the five counters by name."""
        return {
            "steps": self.steps,
            "samples": self.samples,
            "tokens": self.tokens,
            "epochs": self.epochs,
            "seconds": self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and those of the step before, as JSON."""
        own = {name: getattr(self, name) for name in ("steps", "samples", "tokens", "seconds")}
        return {**own, "before": self.before.state_dict() if self.before else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; the size of an epoch stays as it is."""
        self.steps, self.samples, self.tokens = (
            int(state[name]) for name in ("steps", "samples", "tokens")
        )
        self.seconds = float(state["seconds"])
        self.before = None
        if state["before"] is not None:
            self.before = Clock(samples_per_epoch=self.samples_per_epoch)
            self.before.load_state_dict(state["before"])


@dataclass(frozen=True, slots=True)
class RunLength(Duration):
    """How long a run lasts."""

    def __post_init__(self) -> None:
        Duration.__post_init__(self)
        if self.unit == "run" or self.amount <= 0:
            raise ValueError(f"a run lasts a positive number of steps, samples, ..., not {self}")

    def progress(self, clock: Clock) -> float:
        """Return the part of the run that has passed, in [0, 1]."""
        now, amount = clock.position(self)
        return min(1.0, now / amount)

    def done(self, clock: Clock) -> bool:
        """Say whether the run has reached its length."""
        return clock.reached(self)


@dataclass(frozen=True, slots=True)
class UnitConversion:
    """What converts one unit to another; None where a number is not known.

    `samples_per_step` is the batch the run starts with: conversions hold for that batch. Where the
    batch is `changing`, those between steps and anything else are estimates and kept as such.
    """

    samples_per_step: float | None = None
    tokens_per_sample: float | None = None
    samples_per_epoch: float | None = None
    changing: bool = False
    estimates: dict[tuple[str, Unit], float] = field(
        default_factory=dict, compare=False, repr=False
    )

    def convert(self, duration: Duration, unit: Unit, length: RunLength | None = None) -> float:
        """Return `duration` in `unit`; a fraction of the run is one of `length`."""
        value = self._convert(duration, unit, length)
        own = length.unit if duration.unit == "run" and length else duration.unit
        if self.changing and (own == "steps") != (unit == "steps") and "run" not in (own, unit):
            self.estimates[str(duration), unit] = value
        return value

    def _convert(self, duration: Duration, unit: Unit, length: RunLength | None = None) -> float:
        if duration.unit == "run":
            if length is None:
                raise ValueError(
                    f"{duration} of the run cannot be converted: the run has no length"
                )
            duration = Duration(tidy(duration.amount * length.amount), length.unit)
        if unit == duration.unit:
            return duration.amount
        if unit == "run":
            if length is None:
                raise ValueError(f"{duration} is no fraction of a run without a length")
            return self._convert(duration, length.unit) / length.amount
        samples = duration.amount * self._samples_in(duration.unit, duration, unit)
        return tidy(samples / self._samples_in(unit, duration, unit))

    def step(self, unit: Unit) -> float:
        """Return the size of one step in `unit`, 0 where it is not known before the run."""
        if unit == "seconds" or (unit != "steps" and self.samples_per_step is None):
            return 0.0
        return self._convert(Duration(1, "steps"), unit)

    def _samples_in(self, unit: Unit, duration: Duration, wanted: Unit) -> float:
        """Return how many samples one `unit` is."""
        if unit == "samples":
            return 1.0
        if unit == "steps" and self.samples_per_step:
            return self.samples_per_step
        if unit == "tokens" and self.tokens_per_sample:
            return 1.0 / self.tokens_per_sample
        if unit == "epochs" and self.samples_per_epoch:
            return self.samples_per_epoch
        missing = {
            "steps": "the batch size is not known",
            "tokens": "the number of tokens per sample is not known",
            "epochs": "the number of samples per epoch is not known",
            "seconds": "how long a step takes is not known before the run",
        }[unit]
        raise ValueError(f"{duration} cannot be converted to {wanted}: {missing}")


@dataclass(frozen=True, slots=True)
class Gate:
    """When something is due: from `start` on, before `stop`, once in `every`; None: no bound.

    A gate looks at the clock and the clock one step ago, at nothing else, so a resumed run is due
    as the uninterrupted one. It is due at `start`, then whenever the counter of `every` has
    crossed a multiple, counted from `start`: with steps at start, start + n, start + 2n.
    """

    start: Duration | None = None
    stop: Duration | None = None
    every: Duration | None = None

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.start, self.stop, self.every) if bound is not None]
        if any(bound.unit == "run" for bound in bounds):
            raise ValueError("a gate takes no fractions of the run: use `Gate.resolve`")
        if self.every is not None and self.every.amount <= 0:
            raise ValueError(f"`every` is a positive duration, not {self.every}")
        if self.every and self.start and self.start.unit != self.every.unit:
            raise ValueError(
                f"`start` is in {self.start.unit}, `every` in {self.every.unit}: use `Gate.resolve`"
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

        def plain(duration: Duration | None, unit: Unit | None = None) -> Duration | None:
            if duration is None:
                return None
            if unit is None:
                unit = duration.unit if duration.unit != "run" or length is None else length.unit
            return Duration(units.convert(duration, unit, length), unit)

        every = plain(every)
        return cls(plain(start, every.unit if every else None), plain(stop), every)

    def to_json(self) -> dict[str, Any]:
        """Return the bounds by name, None where there is none."""
        bounds = {"start": self.start, "stop": self.stop, "every": self.every}
        return {name: bound.to_json() if bound else None for name, bound in bounds.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Gate:
        """Read what `to_json` wrote; a missing bound is none."""
        return cls(
            *(
                Duration.from_json(data[name]) if data.get(name) else None
                for name in ("start", "stop", "every")
            )
        )

    def fires(self, clock: Clock) -> bool:
        """Say whether it is due at a clock; within a step that is the clock before it."""
        if not self._open(clock) or (self.stop is not None and clock.reached(self.stop)):
            return False
        if self.every is None or clock.before is None or not self._open(clock.before):
            return True
        return self._periods(clock, self.every) > self._periods(clock.before, self.every)

    def _open(self, clock: Clock) -> bool:
        return self.start is None or clock.reached(self.start)

    def _periods(self, clock: Clock, every: Duration) -> int:
        """Return how many periods have passed since the start."""
        now, period = clock.position(every)
        origin = clock.position(self.start)[1] if self.start else 0.0
        # The small term undoes rounding where a period is a fraction of a unit, such as 0.1 epochs.
        return math.floor((now - origin) / period + 1e-9)
