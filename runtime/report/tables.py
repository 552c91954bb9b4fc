"""Tables of finished runs: plain data, and the rows of the signals of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainc.runtime.report.run_records import RecordedClause
from trainc.runtime.report.shown_signal import ShownSignal


@dataclass(frozen=True, slots=True)
class Table:
    """A table: `heads` are those of its columns, the first of which has names; `rows` have a text for each."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def signal_rows(clauses: Sequence[RecordedClause | None]) -> dict[str, list[str]]:
    """Return rows on the signals of a clause, one text a run; `-` for a run without the clause (None) or value.

    They are the values at the end, and of the main signal in how many steps it was undetermined, and its history.
    """
    signals: dict[str, list[ShownSignal]] = {}
    for clause in clauses:
        for signal in () if clause is None else clause.signals:
            signals.setdefault(signal.name, []).append(signal)
    rows: dict[str, list[str]] = {}
    for name, found in signals.items():
        units = " or ".join(dict.fromkeys(signal.unit for signal in found if signal.unit))
        texts = [_last_text(name, clause) for clause in clauses]
        rows[found[0].title + (f", {units}" if units else "")] = texts
    for name, (signal, *_) in signals.items():
        if signal.main:
            histories = [_history(name, clause) for clause in clauses]
            rows[f"{signal.title} undetermined"] = [missing for missing, _ in histories]
            rows[f"{signal.title} over the run"] = [bars for _, bars in histories]
    return {title: texts for title, texts in rows.items() if any(text != "-" for text in texts)}


def _signal(name: str, clause: RecordedClause | None) -> ShownSignal | None:
    return next((s for s in (clause.signals if clause else ()) if s.name == name), None)


def _last_text(name: str, clause: RecordedClause | None) -> str:
    signal = _signal(name, clause)
    if clause is None or signal is None:
        return "-"
    last = next((r for r in reversed(clause.run.records) if name in r), {})
    return signal.text(last) or "-"


def _history(name: str, clause: RecordedClause | None) -> tuple[str, str]:
    signal = _signal(name, clause)
    if clause is None or signal is None:
        return "-", "-"
    count = sum(name in record for record in clause.run.records)
    if not count:
        return "-", "-"
    missing, bars = signal.history(clause.run.records)
    return f"{missing:,} of {count:,} steps", bars
