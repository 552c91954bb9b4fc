"""Pictures of the frequencies of a probe: errors over a run, and the order beside the target's amplitudes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause, RunRecords

Course = list[tuple[str, float, float, float | None]]
"""Name, amplitude of the target, last error, and the step of the first error below the threshold of each frequency."""


def course_of(label: str, records: Sequence[Mapping[str, Any]]) -> Course:
    """Return what the records of a run have at their end; empty where a clause recorded nothing."""
    found = [r["series"] for r in records if f"{label}.error" in r.get("series", {})]
    if not found:
        return []
    last = found[-1]
    sizes, errors, below = (last.get(f"{label}.{n}", {}) for n in ("amplitude", "error", "below"))
    return [(name, sizes[name], errors[name], below.get(name)) for name in errors]


def frequency_panels(
    clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]
) -> Iterator[Panel]:
    """Yield for each run the errors over time, and the order beside the amplitudes."""
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.families import draw_family, draw_times

    for clause in clauses:
        label, run = clause.label, clause.run
        course = course_of(label, run.records)
        if not course:
            continue
        of = f", {run.name}" if len(runs) > 1 else ""
        covers = tuple(f"{label}.{name}" for name in ("error", "amplitude", "below"))
        series = run.layers()[f"{label}.error"]
        named = {f"{name}, amplitude {size:.3g}": series[name] for name, size, *_ in course}
        draw = partial(
            draw_family,
            series=named,
            limit=clause.construct.threshold,
            label="relative error",
            runs=runs,
        )
        yield Panel(f"{label}: error by frequency{of}", draw, height=3.7, covers=covers)
        order = partial(
            draw_times,
            names=[name.removeprefix("k = ") for name, *_ in course],
            sizes=[size for _, size, *_ in course],
            times=[at for *_, at in course],
            labels=(
                "frequency",
                "amplitude of the target (bars)",
                "step below the threshold (points)",
            ),
        )
        yield Panel(f"{label}: order beside amplitude{of}", order)
