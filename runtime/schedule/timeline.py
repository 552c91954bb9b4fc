"""When a run is where, under a batch that is a function of the clock alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from trainc.runtime.schedule.clock import Clock, Duration, RunLength, UnitConversion, tidy

Size = Callable[[Clock], int]


def moments(
    size: Size, units: UnitConversion, length: RunLength, parts: Sequence[float]
) -> list[dict[str, float | None]]:
    """Return the counters at rising parts of the run in [0, 1], stepping with the batch `size` gives.

    Rows stand at whole steps: at the first that has reached the part, so that the last row is the
    end of the run. Counters not to be known are None. Raises ValueError where the steps cannot be
    told from the length, as in a run measured in seconds.
    """
    clock = Clock(samples_per_epoch=int(units.samples_per_epoch or 0) or None)
    rows: list[dict[str, float | None]] = []
    for part in parts:
        _advance(clock, size, units, Duration(tidy(part * length.amount), length.unit))
        known = {"steps": True, "samples": True, "tokens": units.tokens_per_sample is not None}
        known |= {"epochs": clock.samples_per_epoch is not None}
        rows.append(
            {unit: value if known.get(unit) else None for unit, value in clock.counters().items()}
        )
    return rows


def _advance(clock: Clock, size: Size, units: UnitConversion, to: Duration) -> None:
    """Move the clock by whole steps until it has reached `to`; all steps of one size at once."""
    while not clock.reached(to):
        batch = size(clock)
        now, target = clock.position(to)
        steps = max(1, math.ceil((target - now) / _per_step(batch, units, clock, to)))
        # Sizes come and go once: the last step of this size is found by halving.
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


def _per_step(batch: int, units: UnitConversion, clock: Clock, to: Duration) -> float:
    """Return by how much a step of `batch` samples moves the counter that `to` is read on."""
    now, _ = clock.position(to)
    move = _later(clock, batch, units, 1).position(to)[0] - now
    if move <= 0:
        raise ValueError(f"it is not known how many steps {to} are")
    return move
