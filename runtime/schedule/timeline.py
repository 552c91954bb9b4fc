"""The counters of the clock at fractions of a run, before it runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from trainc.runtime.schedule.clock import COUNTERS, Clock, RunLength
from trainc.runtime.schedule.time_span import TimeSpan, snap
from trainc.runtime.schedule.unit_conversion import UnitConversion

BatchSize = Callable[[Clock], int]


def counters_at(
    units: UnitConversion, length: RunLength, fraction: float
) -> dict[str, float | None]:
    """Return the counters at a fraction of the run in [0, 1], None for those that are unknown."""
    at = TimeSpan(fraction * length.amount, length.unit)
    with contextlib.suppress(ValueError):
        at = TimeSpan(round(units.convert(at, "steps")), "steps")
    counters: dict[str, float | None] = {}
    for unit in COUNTERS:
        try:
            counters[unit] = units.convert(at, unit)
        except ValueError:
            counters[unit] = None
    return counters


def counters_under_ramp(
    size: BatchSize, units: UnitConversion, length: RunLength, fractions: Sequence[float]
) -> list[dict[str, float | None]]:
    """Return the counters at rising fractions of the run in [0, 1], where `size` gives the batch of each step.

    A row is at the first step that has reached its fraction, so that the last row is the end of the
    run. Unknown counters are None. Raises ValueError where the number of steps does not follow from
    the length, as in a run measured in seconds.
    """
    clock = units.clock()
    rows: list[dict[str, float | None]] = []
    for fraction in fractions:
        _advance(clock, size, units, TimeSpan(snap(fraction * length.amount), length.unit))
        known = {"steps": True, "samples": True, "tokens": units.tokens_per_sample is not None}
        known |= {"epochs": clock.samples_per_epoch is not None}
        rows.append(
            {unit: value if known.get(unit) else None for unit, value in clock.counters().items()}
        )
    return rows


def _advance(clock: Clock, size: BatchSize, units: UnitConversion, to: TimeSpan) -> None:
    """Move the clock by whole steps until it has reached `to`; all steps of one size at once."""
    while not clock.reached(to):
        batch = size(clock)
        now, target = clock.position(to)
        steps = max(1, math.ceil((target - now) / _per_step(batch, units, clock, to)))
        # A size that has changed never comes back: the last step of this size is found by bisection.
        low, high = 1, steps
        while low < high:
            middle = (low + high + 1) // 2
            if size(_later(clock, batch, units, middle - 1)) == batch:
                low = middle
            else:
                high = middle - 1
        after = _later(clock, batch, units, low)
        clock.steps, clock.samples, clock.tokens = after.steps, after.samples, after.tokens


def _later(clock: Clock, batch: int, units: UnitConversion, steps: int) -> Clock:
    samples = clock.samples + steps * batch
    tokens = int(samples * (units.tokens_per_sample or 0))
    return replace(clock, steps=clock.steps + steps, samples=samples, tokens=tokens)


def _per_step(batch: int, units: UnitConversion, clock: Clock, to: TimeSpan) -> float:
    """Return by how much a step of `batch` samples moves the counter that `to` is read on."""
    now, _ = clock.position(to)
    move = _later(clock, batch, units, 1).position(to)[0] - now
    if move <= 0:
        raise ValueError(
            f"{to} cannot be converted to steps: how far a step moves this counter is unknown before the run"
        )
    return move
