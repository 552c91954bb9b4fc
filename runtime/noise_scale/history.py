"""Read noise scales from the records of a run: their histories and calibrations.

A clause with the label `gns` writes `gns` and `gns.low`, `gns.signal`, ... into every step's record; NaN there is a
noise scale that was undetermined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainc.runtime.storage.jsonl import Record


@dataclass(frozen=True, slots=True)
class NoiseScaleClause:
    """A noise scale clause of a run; `unit` is the word for its examples, `level` the probability of its intervals."""

    label: str
    unit: str
    level: float


def calibration_points(
    records: Iterable[Record], label: str, counter: str
) -> list[tuple[float, float, float]]:
    """Return the calibrations: position, noise scale of the clause's layers, noise scale of the whole model."""
    names = (f"{label}.point", f"{label}.point_total")
    found = [(r[counter], r[names[0]], r[names[1]]) for r in records if all(n in r for n in names)]
    return [point for point in found if all(map(math.isfinite, point))]


def last_value(records: Sequence[Record], name: str) -> float:
    """Return the last recorded value of a quantity; NaN if there is none."""
    return next((float(r[name]) for r in reversed(records) if name in r), math.nan)
