"""The records of one run, as pictures need them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainc.runtime.noise_scale.history import (
    NoiseScaleClause,
    choose_counter,
    find_clauses,
    join_steps,
)
from trainc.runtime.storage.jsonl import Record, read_jsonl


@dataclass(frozen=True)
class RunRecords:
    """The metrics of one run and its plan, with the name and the colour that it is drawn with.

    `counter` is the quantity of the horizontal axis: `tokens`, `samples` or `step`.
    """

    name: str
    records: list[Record]
    color: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    counter: str = "step"

    @classmethod
    def of(cls, folder: Path, name: str, color: str) -> RunRecords:
        """Read a run's folder; without a plan in it the plan is empty."""
        path = folder / "plan.json"
        plan = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return cls(name, read_jsonl(folder / "metrics.jsonl"), color, plan)

    @cached_property
    def noise_scales(self) -> list[NoiseScaleClause]:
        """Return the noise scale clauses that the run recorded."""
        return find_clauses(self.plan, self.records)

    @cached_property
    def positions(self) -> list[float]:
        """Return the counter at each record; a record that is not of a step is at the step before it."""
        found, last = [], 0.0
        for record in self.records:
            last = record.get(self.counter, last)
            found.append(last)
        return found

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


def has_non_finite_loss(record: Record) -> bool:
    """Return whether a step's loss is not finite."""
    return not math.isfinite(record.get("loss", 0.0))


def common_counter(runs: Sequence[Sequence[Record]]) -> str:
    """Return the counter that every run has, so that all panels share one horizontal axis."""
    counters = {choose_counter(records) for records in runs}
    if len(counters) == 1:
        return counters.pop()
    return "step" if "step" in counters else "samples"
