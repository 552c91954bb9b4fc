"""The records of one run, as pictures need them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainc.runtime.report.recorded_files import check_plan, read_metrics
from trainc.runtime.report.shown_signal import ShownSignal
from trainc.runtime.storage.foreign_files import interpreting, read_json
from trainc.runtime.storage.jsonl import Record


@dataclass(frozen=True)
class RunRecords:
    """The metrics of one run and its plan, with the name and the colour that it is drawn with.

    `counter` is the quantity of the horizontal axis: `tokens`, `samples` or `step`; `folder` is where the run lies.
    """

    name: str
    records: list[Record]
    color: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    counter: str = "step"
    folder: Path | None = None

    @classmethod
    def of(cls, folder: Path, name: str, color: str) -> RunRecords:
        """Read a run's folder; without a plan in it the plan is empty. Raises UnreadableFile for a damaged file."""
        path = folder / "plan.json"
        plan = read_json(path) if path.exists() else {}
        with interpreting(path):
            check_plan(plan)
        return cls(name, read_metrics(folder / "metrics.jsonl"), color, plan, folder=folder)

    @property
    def steps(self) -> list[Record]:
        """Return the records of steps."""
        return [record for record in self.records if "loss" in record]

    @cached_property
    def positions(self) -> list[float]:
        """Return the counter at each record; a record that is not of a step is at the step before it."""
        found, last = [], 0.0
        for record in self.records:
            last = record.get(self.counter, last)
            found.append(last)
        return found

    @cached_property
    def placed(self) -> list[Record]:
        """Return the records, each with the counter at its position, those of evaluations included."""
        rows = zip(self.positions, self.records, strict=True)
        return [{**record, self.counter: at} for at, record in rows]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return positions and values of one quantity."""
        rows = zip(self.positions, self.records, strict=True)
        found = [(at, record[name]) for at, record in rows if name in record]
        return [at for at, _ in found], [value for _, value in found]

    def intervals_where(self, holds: Callable[[Record], bool]) -> list[tuple[float, float]]:
        """Return the intervals (from, to) of steps where a condition holds."""
        rows = zip(self.positions, self.records, strict=True)
        return join_steps((at, holds(record)) for at, record in rows if "loss" in record)

    def has(self, name: str) -> bool:
        """Return whether any record has a quantity."""
        return any(name in record for record in self.records)

    def layers(self) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
        """Return the figures per layer: quantity -> layer -> positions and values."""
        found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for at, record in zip(self.positions, self.records, strict=True):
            for quantity, values in record.get("series", {}).items():
                for layer, value in values.items():
                    reached, kept = found.setdefault(quantity, {}).setdefault(layer, ([], []))
                    reached.append(at)
                    kept.append(value)
        return found


@dataclass(frozen=True)
class RecordedClause:
    """A clause of a run: its construct, with the values of its fields, and the signals of it that are shown."""

    run: RunRecords
    label: str
    construct: Any
    signals: tuple[ShownSignal, ...] = ()


def has_non_finite_loss(record: Record) -> bool:
    """Return whether a step's loss is not finite."""
    return not math.isfinite(record.get("loss", 0.0))


def join_steps(steps: Iterable[tuple[float, bool]]) -> list[tuple[float, float]]:
    """Return the intervals (from, to) of steps where a condition holds; a step begins where the last one ends.

    Each step is given by its position and whether the condition holds for it.
    """
    found: list[tuple[float, float]] = []
    begin = 0.0
    for at, holds in steps:
        if holds:
            joins = bool(found) and found[-1][1] == begin
            found.append((found.pop()[0] if joins else begin, at))
        begin = at
    return found


def choose_counter(records: Sequence[Record]) -> str:
    """Return the counter to draw a run over: `tokens`, `samples` where each is one token, `step` without tokens."""
    steps = [record for record in records if "loss" in record]
    if not steps or not all("tokens" in record for record in steps):
        return "step"
    same = all(record["tokens"] == record.get("samples") for record in steps)
    return "samples" if same else "tokens"


def common_counter(runs: Sequence[Sequence[Record]]) -> str:
    """Return the counter that every run has, so that all panels share one horizontal axis."""
    counters = {choose_counter(records) for records in runs}
    if len(counters) == 1:
        return counters.pop()
    return "step" if "step" in counters else "samples"
