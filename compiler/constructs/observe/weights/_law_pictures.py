"""Pictures and tables of a norm that is fitted by laws: from the recorded points, which are fitted once more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from trainc.compiler.constructs.observe.weights._laws import LAWS, Fits, slope_text
from trainc.dsl.reading.signal import full_name

if TYPE_CHECKING:
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.pictures.fitted_curves import Fitted
    from trainc.runtime.report.run_records import RecordedClause, RunRecords
    from trainc.runtime.report.tables import Table


def law_panel(
    clauses: Sequence[RecordedClause],
    runs: Sequence[RunRecords],
    signal: str,
    laws: Sequence[str],
    *,
    from_first: bool = False,
) -> Iterator[Panel]:
    """Yield a panel of a signal over the run: with the curves of all laws for one run, of the best for several.

    Time counts updates of the run, or, with `from_first`, the first of those that were observed is 1.
    """
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.pictures.fitted_curves import draw_fitted

    measured = [
        _fitted_curve(clause.run, full_name(clause.label, signal), laws, from_first)
        for clause in clauses
        if clause.run.has(full_name(clause.label, signal))
    ]
    if measured:
        title = f"{clauses[0].label} {signal}".rstrip()
        yield Panel(title, partial(draw_fitted, measured=measured, runs=runs))


def _fitted_curve(run: RunRecords, name: str, laws: Sequence[str], from_first: bool) -> Fitted:
    from trainc.runtime.report.pictures.fitted_curves import Fitted

    at, values = run.series(name)
    points = _points(run.placed, name, from_first)
    fits = _fitted(points, laws)
    r2, curves, best = fits.r2, {}, ""
    for law in r2:
        text = f"{law}, r2 {r2[law]:.4f}"
        fit = fits.of[law]
        curves[text] = [fit.intercept + fit.slope * LAWS[law](t) for t, _ in points]
        best = text if law == fits.best else best
    return Fitted(run, at, values, curves, best)


def _points(
    records: Iterable[Mapping[str, Any]], name: str, from_first: bool
) -> list[tuple[float, float]]:
    """Return the number of updates and the value of each record that has one."""
    found = [(float(r["step"]), float(r[name])) for r in records if name in r]
    before = found[0][0] - 1 if found and from_first else 0.0
    return [(t - before, value) for t, value in found]


def _fitted(points: Iterable[tuple[float, float]], laws: Sequence[str]) -> Fits:
    fits = Fits(laws)
    for t, value in points:
        fits.add(t, value)
    return fits


def law_table(
    label: str,
    signal: str,
    laws: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    *,
    from_first: bool = False,
) -> Iterator[Table]:
    """Yield the table of the fits of a signal at the end of a run; none where it has too few points."""
    from trainc.runtime.report.tables import Table

    fits = _fitted(_points(records, full_name(label, signal), from_first), laws)
    rows = tuple((law, f"{r2:.4f}", slope_text(fits.of[law])) for law, r2 in fits.r2.items())
    if rows:
        yield Table((f"{f'{label} {signal}'.rstrip()}: law", "r2", "slope [95%]"), rows)


def cosine_panel(
    clauses: Sequence[RecordedClause], runs: Sequence[RunRecords], signals: Sequence[str]
) -> Iterator[Panel]:
    """Yield a panel of cosines over the run."""
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.pictures.fitted_curves import draw_cosines

    measured = []
    for clause in clauses:
        named = {signal: full_name(clause.label, signal) for signal in signals}
        if any(map(clause.run.has, named.values())):
            measured.append((clause.run, named))
    if measured:
        title = f"{clauses[0].label} {' and '.join(signals)}"
        yield Panel(title, partial(draw_cosines, measured=measured, runs=runs))
