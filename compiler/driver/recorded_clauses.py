"""The clauses of runs with what they show: signals on the display, rows and tables of a report, panels of a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainc.compiler.catalog import catalog
from trainc.dsl.reading.construct import Construct
from trainc.dsl.reading.signal import full_name
from trainc.runtime.report.run_records import RecordedClause, RunRecords
from trainc.runtime.report.shown_signal import ShownSignal
from trainc.runtime.report.tables import Table, signal_rows

if TYPE_CHECKING:
    from trainc.runtime.report.axes import Panel


def shown_signals(plan: Mapping[str, Any]) -> list[ShownSignal]:
    """Return the signals that the clauses of a plan, given as JSON, show."""
    clauses = constructs_of(plan)
    return [signal for label, construct in clauses for signal in _signals(label, construct)]


def constructs_of(plan: Mapping[str, Any]) -> Iterator[tuple[str, Construct]]:
    """Yield label and construct of the clauses in a plan; `unread_clauses` says which are left out."""
    for row in _rows(plan):
        if not isinstance(found := _construct(row), str):
            yield row["label"], found


def unread_clauses(plan: Mapping[str, Any]) -> list[str]:
    """Return a line for each clause of which nothing is shown, because its construct is not here as it was then."""
    found = ((row, _construct(row)) for row in _rows(plan))
    return [
        f"{row['label']}: its signals, tables and panels are not shown: {reason}"
        for row, reason in found
        if isinstance(reason, str)
    ]


def _rows(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (row for row in plan.get("clauses", ()) if row.get("dropped") is None)


def _construct(row: Mapping[str, Any]) -> Construct | str:
    """Return the construct of a clause, or why there is none."""
    key = (row["kind"], row["construct"])
    if key not in catalog():
        return f"`{' '.join(key)}` is not installed here"
    try:
        return catalog()[key].model_validate(row["fields"])
    except ValueError as error:
        reason = " ".join(str(error).split())
        return f"`{' '.join(key)}` has other fields here than when the run was made: {reason}"


def _signals(label: str, construct: Construct) -> tuple[ShownSignal, ...]:
    return tuple(
        ShownSignal(
            full_name(label, name),
            f"{label} {signal.title}".rstrip(),
            construct.unit_of(name),
            signal.ends and (full_name(label, signal.ends[0]), full_name(label, signal.ends[1])),
            signal.logarithmic,
            not name,
            partial(construct.signal_text, name, label),
        )
        for name, signal in construct.declared_signals().items()
        if signal.title is not None
    )


def side_by_side(runs: Sequence[RunRecords]) -> list[list[RecordedClause | None]]:
    """Return the clauses of runs: for each label and construct one for each run, None for a run without it."""
    found: dict[tuple[str, type[Construct]], list[RecordedClause | None]] = {}
    for i, run in enumerate(runs):
        for label, construct in constructs_of(run.plan):
            clause = RecordedClause(run, label, construct, _signals(label, construct))
            found.setdefault((label, type(construct)), [None] * len(runs))[i] = clause
    return [*found.values()]


def figure_rows(runs: Sequence[RunRecords]) -> Iterator[tuple[str, list[str]]]:
    """Yield titles and texts of the signals of all clauses, one text a run; `-` for no value."""
    for clauses in side_by_side(runs):
        yield from signal_rows(clauses).items()


def tables_of(run: RunRecords) -> Iterator[Table]:
    """Yield the tables of a run's clauses."""
    for label, construct in constructs_of(run.plan):
        try:
            yield from construct.tables(label, run.steps)
        except Exception as error:
            yield Table((f"{label}: its tables cannot be made: {_text(error)}",), ())


def panels_of(runs: Sequence[RunRecords]) -> Iterator[Panel]:
    """Yield the panels of the clauses of runs; needs matplotlib."""
    from trainc.runtime.report.axes import Panel, write
    from trainc.runtime.report.signal_panels import signal_panels

    for one_a_run in side_by_side(runs):
        clauses = [clause for clause in one_a_run if clause is not None]
        try:
            own = type(clauses[0].construct).panels(clauses, runs)
            yield from signal_panels(clauses, runs) if own is None else own
        except Exception as error:
            yield Panel(clauses[0].label, partial(write, text=f"no panels: {_text(error)}"))


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def draw_runs(run_folders: Sequence[Path], output: Path) -> Path:
    """Draw runs over each other into a PNG file and return its path; needs matplotlib.

    Raises ValueError where a folder holds no run.
    """
    from trainc.runtime.report.plots import draw, read_runs

    runs = read_runs(run_folders)
    return draw(runs, [*panels_of(runs)], output)
