"""What is known of a run before it runs: lines that cannot act in it, and the steps of a clause."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from trainc.dsl.resolve.never_acts import RunTime, never_acting
from trainc.dsl.resolve.statements import Clause, Rule
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.values.value_json import Duration, Unit
from trainc.dsl.values.value_ranges import Bounds
from trainc.runtime.schedule.clock import RunLength
from trainc.runtime.schedule.unit_conversion import UnitConversion


def run_problems(
    clauses: Sequence[Clause], rules: Sequence[Rule], units: UnitConversion
) -> Iterator[Diagnostic]:
    """Yield a diagnostic for every line that cannot act in the run, with what is known of data and batch."""
    run = RunTime.of(clauses)
    data: Any = next((c.construct for c in clauses if c.kind == "data"), None)
    if data is not None and not units.changing:
        sizes = (Bounds(size, size, "samples") for size in (data.start_size, data.micro_size))
        run = run.replace(more=lambda *given: _convert(units, *given))
        run = run.replace(**dict(zip(("batch", "micro_batch"), sizes, strict=True)))
    yield from never_acting(clauses, rules, run)


def steps_left(clause: Clause, units: UnitConversion, length: RunLength | None) -> float | None:
    """Return the steps between `from` and `until` of a clause, None where they are not known before the run."""
    if length is None or units.changing:
        return None
    whole = Duration(1, "run")
    ends = (clause.start or Duration(0, "steps"), clause.stop or whole, whole)
    try:
        start, stop, end = (units.convert(one, "steps", length) for one in ends)
    except ValueError:
        return None
    return max(0.0, min(stop, end) - start)


def _convert(units: UnitConversion, amount: float, unit: str, wanted: str) -> float | None:
    try:
        return units.convert(Duration(amount, cast(Unit, unit)), cast(Unit, wanted))
    except ValueError:
        return None
