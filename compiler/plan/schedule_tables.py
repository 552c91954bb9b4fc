"""The plan's table of scheduled numbers over the run, and its row about a batch that changes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

from trainc.compiler.bind.binding import Binding
from trainc.compiler.errors import ValueOutOfRange
from trainc.compiler.method.lowered_method import LoweredMethod, OptimizerPart, Scheduled
from trainc.compiler.plan.plan import Row
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.timeline import counters_at, counters_under_ramp
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.batch_policy import BatchPolicy, Ramp
from trainc.runtime.step.optimizer import Option, parts_of


def schedule_rows(binding: Binding, method: LoweredMethod) -> list[Row]:
    """Return every scheduled number at 21 points of the run, with the clock in all units."""
    if binding.length is None:
        return []
    rows = []
    ramp = next((action for action in method.actions if isinstance(action, Ramp)), None)
    named = [row for part in method.optimizers for row in _options(part)]
    named += [*method.scalars.items(), *method.schedules.items()]
    if ramp is not None:
        named.append(("batch", ramp.at))
    percents = range(0, 101, 5)
    counters = _counters(ramp, binding.units, binding.length, [p / 100 for p in percents])
    for percent, found in zip(percents, counters, strict=True):
        clock = Clock(samples_per_epoch=int(binding.units.samples_per_epoch or 0) or None)
        for unit in ("steps", "samples", "tokens", "seconds"):
            setattr(clock, unit, found[unit] or 0)
        rows.append(
            {"percent": percent, **found, "values": {n: _value(at, clock) for n, at in named}}
        )
    return rows


def _options(part: OptimizerPart) -> Iterator[tuple[str, Scheduled]]:
    """Yield the learning rates of an optimizer, and those of its other options that change."""
    seen: dict[int, Option] = {}
    for options in part.options.values():
        for field, value in options.items():
            several = isinstance(value, tuple)
            for i, option in enumerate(parts_of(value), 1):
                wanted = field == "lr" or option.constant is None
                if not wanted or id(option) in seen:
                    continue
                seen[id(option)] = option
                number = f"{field.removesuffix('s')}{i}" if several else field
                yield f"{part.label} {number}{option.part}", option.at


def _value(schedule: Callable[[Clock], float], clock: Clock) -> float:
    """Return the number of a schedule, NaN where it depends on what only the run measures."""
    try:
        return schedule(clock)
    except ValueOutOfRange:
        return math.nan


def _counters(
    ramp: Ramp | None, units: UnitConversion, length: RunLength, fractions: Sequence[float]
) -> list[dict[str, float | None]]:
    """Return the clock's counters at fractions of the run: exact under a ramp, else at the starting batch."""
    if ramp is not None:
        with contextlib.suppress(ValueError):
            return counters_under_ramp(ramp.at, units, length, fractions)
    return [counters_at(units, length, fraction) for fraction in fractions]


def batch_row(binding: Binding, method: LoweredMethod) -> Row:
    """Return what sets a batch that changes, its sizes in samples, and which conversions are approximate."""
    units = binding.units
    policy = next((action for action in method.actions if isinstance(action, BatchPolicy)), None)
    notes = [
        f"{given} is taken as {value:,.12g} {unit}, computed for the starting batch"
        for (given, unit), value in sorted(units.estimates.items())
    ]
    if not isinstance(policy, Ramp):
        notes.append(
            "the batch depends on measured signals, so the table of schedules converts between steps and samples"
            " at the starting batch"
        )
    start = None if units.samples_per_step is None else int(units.samples_per_step)
    if policy is None:
        return {"set_by": "when rules", "start": start, "notes": notes}
    sizes = {"start": start, "end": policy.end, "micro_batch": policy.micro}
    return {"set_by": policy.text, **sizes, "notes": notes}
