"""The clock of a run, which has five counters, and the length of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainc.runtime.schedule.time_span import TimeSpan, Unit, snap

COUNTERS: tuple[Unit, ...] = ("steps", "samples", "tokens", "epochs", "seconds")


@dataclass(slots=True)
class Clock:
    """Counts optimizer steps, samples, tokens, epochs and seconds of training; all start at 0.

    `before` is the clock one step ago, so that a gate needs nothing but the clock. Where `replicas` share the data,
    each of them reads only so many parts of an epoch, and counts what it reads itself.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    samples_per_epoch: int | None = None
    replicas: int = 1
    before: Clock | None = field(default=None, repr=False, compare=False)

    @property
    def epochs(self) -> float:
        """Return the passes over the training data; 0 where its size is unknown."""
        epoch = self.samples_per_epoch
        return self.samples * self.replicas / epoch if epoch else 0.0

    def advance(self, samples: int, tokens: int, seconds: float) -> None:
        """Count one optimizer step: its samples, its tokens and the seconds it took."""
        self.before = Clock(
            self.steps,
            self.samples,
            self.tokens,
            self.seconds,
            self.samples_per_epoch,
            self.replicas,
        )
        self.steps += 1
        self.samples += samples
        self.tokens += tokens
        self.seconds += seconds

    def before_step(self, samples: int, tokens: int) -> None:
        """Go back by a step of so many samples and tokens, which `advance` counts again."""
        self.steps -= 1
        self.samples -= samples
        self.tokens -= tokens

    def read(self, unit: Unit) -> float:
        """Return the counter of `unit`."""
        if unit == "run":
            raise ValueError(
                "the clock has no counter in `run`: convert to the unit of the run first"
            )
        if unit == "epochs" and not self.samples_per_epoch:
            raise ValueError("epochs cannot be counted: the number of samples per epoch is unknown")
        return float(getattr(self, unit))

    def position(self, span: TimeSpan) -> tuple[float, float]:
        """Return the clock's counter and a time span's amount, both in one unit; epochs are counted in samples."""
        if span.unit == "epochs" and self.samples_per_epoch:
            return self.samples, snap(span.amount * self.samples_per_epoch / self.replicas)
        return self.read(span.unit), span.amount

    def reached(self, span: TimeSpan) -> bool:
        """Return whether at least a time span has passed since the start of the run."""
        now, amount = self.position(span)
        return now >= amount

    def counters(self) -> dict[str, float]:
        """Return the five counters by name."""
        return {name: getattr(self, name) for name in COUNTERS}

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and those of the step before, as JSON."""
        own = {name: getattr(self, name) for name in ("steps", "samples", "tokens", "seconds")}
        return {**own, "before": self.before.state_dict() if self.before else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; `samples_per_epoch` and `replicas` are not part of it."""
        for name in ("steps", "samples", "tokens"):
            setattr(self, name, int(state[name]))
        self.seconds = float(state["seconds"])
        self.before = None
        if state["before"] is not None:
            self.before = Clock(samples_per_epoch=self.samples_per_epoch, replicas=self.replicas)
            self.before.load_state_dict(state["before"])


@dataclass(frozen=True, slots=True)
class RunLength(TimeSpan):
    """How long a run lasts. Raises ValueError for a fraction of the run and for 0."""

    def __post_init__(self) -> None:
        TimeSpan.__post_init__(self)
        if self.unit == "run" or self.amount <= 0:
            raise ValueError(
                f"a run cannot last {self}: write a positive number of steps, samples, tokens, epochs or seconds"
            )

    def progress(self, clock: Clock) -> float:
        """Return the fraction of the run that has passed, in [0, 1]."""
        now, amount = clock.position(self)
        return min(1.0, now / amount)

    def done(self, clock: Clock) -> bool:
        """Return whether the run has reached its length."""
        return clock.reached(self)
