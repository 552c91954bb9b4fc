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
from trainc.runtime.schedule.timeline import BatchSize, counters_at, counters_under_ramp
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.batch_policy import BatchPolicy, Ramp
from trainc.runtime.step.optimizer import OPTION_FACTORS, LrFactor, Option, parts_of


def schedule_rows(binding: Binding, method: LoweredMethod) -> list[Row]:
    """Return every scheduled number at 21 points of the run, with the clock in all units."""
    if binding.length is None:
        return []
    rows = []
    ramp = next((action for action in method.actions if isinstance(action, Ramp)), None)
    size = None if ramp is None else ramp.at
    named = [row for part in method.optimizers for row in _options(part, method, size)]
    named += [*method.scalars.items(), *method.schedules.items()]
    if ramp is not None:
        named.append(("batch", ramp.at))
    percents = range(0, 101, 5)
    counters = _counters(ramp, binding.units, binding.length, [p / 100 for p in percents])
    for percent, found in zip(percents, counters, strict=True):
        clock = binding.units.clock()
        for unit in ("steps", "samples", "tokens", "seconds"):
            setattr(clock, unit, found[unit] or 0)
        rows.append(
            {"percent": percent, **found, "values": {n: _value(at, clock) for n, at in named}}
        )
    return rows


def _options(
    part: OptimizerPart, method: LoweredMethod, batch: BatchSize | None
) -> Iterator[tuple[str, Scheduled]]:
    """Yield the learning rates of an optimizer without factors, those of its other options that change, and factors.

    Factors that follow the batch are known where `batch` gives its size from the clock.
    """
    seen: set[object] = set()
    for name, options in part.options.items():
        factors = [f for f in method.option_factors.get(name, ()) if f.of_batch]
        for field, value in options.items():
            of = [f for f in factors if f.of == OPTION_FACTORS.get(field)]
            for i, option in enumerate(parts_of(value), 1):
                last = option is parts_of(value)[-1]
                own = of if field != "betas" or last else []
                wanted = field == "lr" or option.constant is None or (own and batch)
                if not wanted or (key := (option, *map(id, own))) in seen:
                    continue
                seen.add(key)
                number = f"{field.removesuffix('s')}{i}" if isinstance(value, tuple) else field
                at = option.at if batch is None else _scaled(option, own, batch)
                yield f"{part.label} {number}{option.part}", at
        for factor in method.lr_factors.get(name, ()):
            if factor.of_batch and batch and id(factor) not in seen:
                seen.add(id(factor))
                yield f"{factor.policy} x", _scaled(Option.fixed(1.0), [factor], batch)


def _scaled(option: Option, factors: Sequence[LrFactor], batch: BatchSize) -> Scheduled:
    """Return an option times factors that follow the batch; a half-life is a power."""

    def at(clock: Clock) -> float:
        number = option.at(clock)
        for factor in factors:
            assert factor.of_batch is not None
            own = factor.of_batch(batch(clock))
            number = number ** (1 / own) if factor.of == "half_life" else number * own
        return number

    return at


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
        depends = "measured signals" if policy is None else policy.depends
        notes.append(
            f"the batch depends on {depends}, so the table of schedules converts between steps and samples"
            " at the starting batch"
        )
    start = None if units.samples_per_step is None else int(units.samples_per_step)
    if policy is None:
        return {"set_by": "when rules", "start": start, "notes": notes}
    sizes = {"start": start, "end": policy.end, "micro_batch": policy.micro}
    return {"set_by": policy.text, **sizes, "notes": notes}
