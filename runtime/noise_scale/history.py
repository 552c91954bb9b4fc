"""Read noise scales from the records of a run: clauses, histories, and the layers at the end.

A clause with the label `gns` writes `gns` and `gns.low`, `gns.signal`, ... into every step's record; NaN there is a
noise scale that was undetermined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainc.runtime.storage.jsonl import Record

SUFFIXES = ("signal", "noise", "low", "high")
"""The names that identify a noise scale in records: each has them, and nothing else has."""


@dataclass(frozen=True, slots=True)
class NoiseScaleClause:
    """A noise scale clause of a run; `unit` is the word for its examples, `level` the probability of its intervals."""

    label: str
    unit: str = "samples"
    level: float | None = None


@dataclass(frozen=True, slots=True)
class History:
    """A noise scale over a run; all lists have one entry for each step, NaN where nothing is known."""

    positions: list[float]
    noise_scale: list[float]
    low: list[float]
    high: list[float]

    @property
    def bounded(self) -> list[bool]:
        """Return for each step whether the interval has a bound: a low end above zero, or a finite high end."""
        return [low > 0 or high < math.inf for low, high in zip(self.low, self.high, strict=True)]

    def undetermined(self) -> list[tuple[float, float]]:
        """Return the intervals (from, to) without a noise scale."""
        missing = (not math.isfinite(value) for value in self.noise_scale)
        return join_steps(zip(self.positions, missing, strict=True))


@dataclass(frozen=True, slots=True)
class LayerNoiseScale:
    """The noise scale of one layer at the end of a run; `share` is its part of all measured layers' tr(Sigma).

    `signal` and `noise` are in squared units of the gradient; NaN is undetermined or not recorded. `undetermined`
    is the fraction of the steps in which the noise scale was undetermined.
    """

    name: str
    noise_scale: float
    signal: float
    noise: float
    share: float
    undetermined: float


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


def find_labels(record: Mapping[str, Any]) -> list[str]:
    """Return the labels of the noise scales in a step's record."""
    return [name for name in record if all(f"{name}.{suffix}" in record for suffix in SUFFIXES)]


def find_clauses(plan: Mapping[str, Any], records: Sequence[Record]) -> list[NoiseScaleClause]:
    """Return the noise scale clauses that a run recorded: by its plan, or by its records where it has none."""
    recorded = {name for record in records for name in record}
    planned = [c for c in plan.get("clauses", []) if c["kind"] == "noise_scale"]
    if planned:
        return [_clause(c) for c in planned if c["label"] in recorded]
    found = dict.fromkeys(label for record in records for label in find_labels(record))
    return [NoiseScaleClause(label) for label in found]


def _clause(row: Mapping[str, Any]) -> NoiseScaleClause:
    fields = row["fields"]
    unit = "documents" if fields.get("example") == "document" else "samples"
    return NoiseScaleClause(row["label"], unit, fields.get("level"))


def read_history(
    records: Iterable[Record], label: str, counter: str, whole_model: bool = False
) -> History:
    """Return a noise scale over `counter`: that of the clause's layers, or of the whole model by calibration."""
    name, joint = (f"{label}.total", "_") if whole_model else (label, ".")
    low, high = f"{name}{joint}low", f"{name}{joint}high"
    found = [record for record in records if name in record]
    positions, noise_scale = [r[counter] for r in found], [r[name] for r in found]
    lows, highs = ([r.get(end, math.nan) for r in found] for end in (low, high))
    return History(positions, noise_scale, lows, highs)


def choose_counter(records: Sequence[Record]) -> str:
    """Return the counter to draw a run over: `tokens`, `samples` where each is one token, `step` without tokens."""
    steps = [record for record in records if "loss" in record]
    if not steps or not all("tokens" in record for record in steps):
        return "step"
    same = all(record["tokens"] == record.get("samples") for record in steps)
    return "samples" if same else "tokens"


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


def last_layers(records: Sequence[Record], label: str) -> list[LayerNoiseScale]:
    """Return the layers at the end of a run, in the order of the model."""
    measured = [r for r in records if label in r.get("series", {})]
    if not measured:
        return []
    series = measured[-1]["series"]
    noise = series.get(f"{label}.noise", {})
    signal = series.get(f"{label}.signal", {})
    total = math.fsum(noise.values())
    undetermined = dict.fromkeys(series[label], 0)
    for record in measured:
        for name, value in record["series"][label].items():
            undetermined[name] = undetermined.get(name, 0) + (not math.isfinite(value))
    return [
        LayerNoiseScale(
            name,
            value,
            signal.get(name, math.nan),
            noise.get(name, math.nan),
            noise.get(name, math.nan) / total if total > 0 else math.nan,
            undetermined[name] / len(measured),
        )
        for name, value in series[label].items()
    ]
