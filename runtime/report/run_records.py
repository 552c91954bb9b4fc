"""What pictures are made from: the records of one run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainc.runtime.noise_scale import figures
from trainc.runtime.storage.jsonl import Record, read


@dataclass(frozen=True)
class RunRecords:
    """The metrics of one run and the plan it ran under, with a name and a colour to tell it by.

    `counter` is what its course is counted in: `tokens`, `samples` or `step`.
    """

    name: str
    records: list[Record]
    color: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    counter: str = "step"

    @classmethod
    def of(cls, folder: Path, name: str, color: str) -> RunRecords:
        """Read a run's folder; a plan it has not is empty."""
        path = folder / "plan.json"
        plan = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return cls(name, read(folder / "metrics.jsonl"), color, plan)

    @cached_property
    def scales(self) -> list[figures.Clause]:
        """Return the noise scale clauses it recorded."""
        return figures.clauses(self.plan, self.records)

    @cached_property
    def positions(self) -> list[float]:
        """Return where on the counter each record stands: one that is not a step's, at the step before it."""
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

    def stretches(self, holds: Callable[[Record], bool]) -> list[tuple[float, float]]:
        """Return where a condition holds of the steps, as from, to; a step reaches back to the one before it."""
        found: list[tuple[float, float]] = []
        begin = 0.0
        for at, record in zip(self.positions, self.records, strict=True):
            if "loss" in record:
                if holds(record):
                    joins = bool(found) and found[-1][1] == begin
                    found.append((found.pop()[0] if joins else begin, at))
                begin = at
        return found

    def has(self, name: str) -> bool:
        """Say whether any step measured a quantity."""
        return any(name in record for record in self.records)

    def layers(self) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
        """Return what was measured per layer: quantity -> layer -> positions and values."""
        found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for at, record in zip(self.positions, self.records, strict=True):
            for quantity, values in record.get("series", {}).items():
                for layer, value in values.items():
                    reached, kept = found.setdefault(quantity, {}).setdefault(layer, ([], []))
                    reached.append(at)
                    kept.append(value)
        return found


def without_loss(record: Record) -> bool:
    """Say whether a step's loss was not finite."""
    return not math.isfinite(record.get("loss", 0.0))


def common_counter(runs: Sequence[Sequence[Record]]) -> str:
    """Return what all panels of a picture count in, so that they line up: what every run has in common."""
    counters = {figures.counter(records) for records in runs}
    if len(counters) == 1:
        return counters.pop()
    return "step" if "step" in counters else "samples"
