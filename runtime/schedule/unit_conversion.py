"""Conversion of time spans between steps, samples, tokens, epochs and fractions of the run."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.time_span import Duration, TimeSpan, Unit, snap


@dataclass(frozen=True, slots=True)
class UnitConversion:
    """Converts time spans from one unit to another; None for a number that is unknown.

    `samples_per_step` is the batch that the run starts with, and conversions hold for that batch. Where `replicas`
    share the data, a step is one of a single replica, and an epoch what each of them reads of the samples.
    Where the batch is `changing`, conversions between steps and another unit are estimates and kept
    in `estimates`, by the time span and the unit.
    """

    samples_per_step: float | None = None
    tokens_per_sample: float | None = None
    samples_per_epoch: float | None = None
    replicas: int = 1
    changing: bool = False
    estimates: dict[tuple[str, Unit], float] = field(
        default_factory=dict, compare=False, repr=False
    )

    def convert(self, duration: Duration, unit: Unit, length: RunLength | None = None) -> float:
        """Return a duration in `unit`; `run` is a fraction of `length`.

        Raises ValueError where a number that the conversion needs is unknown.
        """
        span = TimeSpan.of(duration)
        value = self._convert(span, unit, length)
        own = length.unit if span.unit == "run" and length else span.unit
        if self.changing and (own == "steps") != (unit == "steps") and "run" not in (own, unit):
            self.estimates[str(span), unit] = value
        return value

    def _convert(self, span: TimeSpan, unit: Unit, length: RunLength | None = None) -> float:
        if span.unit == "run":
            if length is None:
                raise ValueError(f"{span} of the run cannot be converted: the run has no length")
            span = TimeSpan(snap(span.amount * length.amount), length.unit)
        if unit == span.unit:
            return span.amount
        if unit == "run":
            if length is None:
                raise ValueError(f"{span} cannot be converted: the run has no length")
            return self._convert(span, length.unit) / length.amount
        samples = span.amount * self._samples_in(span.unit, span, unit)
        return snap(samples / self._samples_in(unit, span, unit))

    def clock(self) -> Clock:
        """Return a clock at the start of a run that counts as this converts."""
        return Clock(
            samples_per_epoch=int(self.samples_per_epoch or 0) or None, replicas=self.replicas
        )

    def step(self, unit: Unit) -> float:
        """Return the size of one step in `unit`; 0 where it is unknown before the run."""
        if unit == "seconds" or (unit != "steps" and self.samples_per_step is None):
            return 0.0
        return self._convert(TimeSpan(1, "steps"), unit)

    def _samples_in(self, unit: Unit, span: TimeSpan, wanted: Unit) -> float:
        """Return how many samples one `unit` is."""
        if unit == "samples":
            return 1.0
        if unit == "steps" and self.samples_per_step:
            return self.samples_per_step
        if unit == "tokens" and self.tokens_per_sample:
            return 1.0 / self.tokens_per_sample
        if unit == "epochs" and self.samples_per_epoch:
            return self.samples_per_epoch / self.replicas
        missing = {
            "steps": "the batch size is unknown",
            "tokens": "the number of tokens per sample is unknown",
            "epochs": "the number of samples per epoch is unknown",
            "seconds": "the time of a step is unknown before the run",
        }[unit]
        raise ValueError(f"{span} cannot be converted to {wanted}: {missing}")
