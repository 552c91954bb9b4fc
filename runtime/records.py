"""What pictures are made from: the records of one run, and one panel of a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainc.runtime import noise_figures
from trainc.runtime.metrics import Record, read, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class RunRecords:
    """The metrics of one run and the plan it ran under, with a name and a colour to tell it by."""

    name: str
    records: list[Record]
    color: str
    plan: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, name: str, color: str) -> RunRecords:
        """Read a run's folder; a plan it has not is empty."""
        path = folder / "plan.json"
        plan = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return cls(name, read(folder / "metrics.jsonl"), color, plan)

    @cached_property
    def scales(self) -> list[noise_figures.Clause]:
        """Return the noise scale clauses it recorded."""
        return noise_figures.clauses(self.plan, self.records)

    @cached_property
    def counter(self) -> str:
        """Return what its course is counted in."""
        return noise_figures.counter(self.records)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of one quantity."""
        return series(self.records, name)

    def has(self, name: str) -> bool:
        """Say whether any step measured a quantity."""
        return any(name in record for record in self.records)

    def layers(self) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
        """Return what was measured per layer: quantity -> layer -> steps and values."""
        found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
        for record in self.records:
            for quantity, values in record.get("series", {}).items():
                for layer, value in values.items():
                    steps, kept = found.setdefault(quantity, {}).setdefault(layer, ([], []))
                    steps.append(record["step"])
                    kept.append(value)
        return found


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes: its title and what fills it; `height` in inches, `wide` over all columns."""

    title: str
    fill: Callable[[Axes], None]
    height: float = 3.3
    wide: bool = False
