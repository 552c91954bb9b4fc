"""What a run recorded of its noise scales: which clauses there are, their course, and the layers at its end.

A clause with the label `gns` writes `gns` and `gns.low`, `gns.signal`, ... into every step's record; NaN there is a
noise scale that was undetermined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainc.runtime.storage.jsonl import Record

PARTS = ("signal", "noise", "low", "high")
"""What every noise scale is recorded with, and nothing else is."""


@dataclass(frozen=True, slots=True)
class Clause:
    """A noise scale clause of a run; `unit` is what its examples are, `level` its intervals' probability."""

    label: str
    unit: str = "samples"
    level: float | None = None


@dataclass(frozen=True, slots=True)
class Course:
    """A noise scale over a run; all lists have one entry for each step, NaN where nothing is known."""

    at: list[float]
    scale: list[float]
    low: list[float]
    high: list[float]

    @property
    def bounded(self) -> list[bool]:
        """Return where the interval says something: an end above zero, or one below infinity."""
        return [low > 0 or high < math.inf for low, high in zip(self.low, self.high, strict=True)]

    def undetermined(self, begin: float = 0.0) -> list[tuple[float, float]]:
        """Return the stretches without a noise scale as from, to; a step reaches back to the one before it."""
        stretches: list[tuple[float, float]] = []
        for at, scale in zip(self.at, self.scale, strict=True):
            if not math.isfinite(scale):
                joins = bool(stretches) and stretches[-1][1] == begin
                stretches.append((stretches.pop()[0] if joins else begin, at))
            begin = at
        return stretches


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer at the end of a run; `share` is its part of all measured layers' tr(Sigma).

    `signal` and `noise` are in squared units of the gradient; NaN is undetermined or not recorded. `gaps` is the part
    of the steps in which the scale was undetermined.
    """

    name: str
    scale: float
    signal: float
    noise: float
    share: float
    gaps: float


def labels(figures: Mapping[str, Any]) -> list[str]:
    """Return the labels of the noise scales among a step's figures."""
    return [name for name in figures if all(f"{name}.{part}" in figures for part in PARTS)]


def clauses(plan: Mapping[str, Any], records: Sequence[Record]) -> list[Clause]:
    """Return the noise scale clauses that a run recorded, by its plan, else by the shape of its records."""
    recorded = {name for record in records for name in record}
    planned = [c for c in plan.get("clauses", []) if c["kind"] == "noise_scale"]
    if planned:
        return [_clause(c) for c in planned if c["label"] in recorded]
    return [Clause(label) for label in dict.fromkeys(n for r in records for n in labels(r))]


def _clause(row: Mapping[str, Any]) -> Clause:
    fields = row["fields"]
    unit = "documents" if fields.get("example") == "document" else "samples"
    return Clause(row["label"], unit, fields.get("level"))


def course(records: Iterable[Record], label: str, counter: str, total: bool = False) -> Course:
    """Return a noise scale over `counter`; `total` gives that of the whole model, by calibration."""
    name = f"{label}.total" if total else label
    low, high = (f"{name}_low", f"{name}_high") if total else (f"{name}.low", f"{name}.high")
    found = Course([], [], [], [])
    for record in records:
        if name in record:
            found.at.append(record[counter])
            found.scale.append(record[name])
            found.low.append(record.get(low, math.nan))
            found.high.append(record.get(high, math.nan))
    return found


def counter(records: Sequence[Record]) -> str:
    """Return what to count a run in: tokens, samples where each is one token, steps where nothing else is there."""
    steps = [record for record in records if "loss" in record]
    if not steps or not all("tokens" in record for record in steps):
        return "step"
    same = all(record["tokens"] == record.get("samples") for record in steps)
    return "samples" if same else "tokens"


def points(records: Iterable[Record], label: str, counter: str) -> list[tuple[float, float, float]]:
    """Return what calibrations measured: position, noise scale of the clause's layers, of the whole model."""
    names = (f"{label}.point", f"{label}.point_total")
    found = [(r[counter], r[names[0]], r[names[1]]) for r in records if all(n in r for n in names)]
    return [point for point in found if all(map(math.isfinite, point))]


def last(records: Sequence[Record], name: str) -> float:
    """Return the last recorded value of a figure; NaN if there is none."""
    return next((float(r[name]) for r in reversed(records) if name in r), math.nan)


def layers(records: Sequence[Record], label: str) -> list[Layer]:
    """Return the layers at the end of a run, in the order of the model."""
    measured = [r for r in records if label in r.get("series", {})]
    if not measured:
        return []
    series = measured[-1]["series"]
    noise = series.get(f"{label}.noise", {})
    signal = series.get(f"{label}.signal", {})
    whole = math.fsum(noise.values())
    gaps = dict.fromkeys(series[label], 0)
    for record in measured:
        for name, value in record["series"][label].items():
            gaps[name] = gaps.get(name, 0) + (not math.isfinite(value))
    return [
        Layer(
            name,
            scale,
            signal.get(name, math.nan),
            noise.get(name, math.nan),
            noise.get(name, math.nan) / whole if whole > 0 else math.nan,
            gaps[name] / len(measured),
        )
        for name, scale in series[label].items()
    ]


def short(value: float) -> str:
    """Return a number in at most three digits, `?` for NaN."""
    if math.isnan(value):
        return "?"
    return f"{value:.0f}" if 1000 <= abs(value) < 10_000 else f"{value:.3g}".replace("e+0", "e")


def told(figures: Mapping[str, Any], label: str) -> str:
    """Return a step's noise scale in few characters: `142 [98, 210]`, or `?` with the reason and what bounds it."""
    scale, low, high = (
        figures.get(name, math.nan) for name in (label, f"{label}.low", f"{label}.high")
    )
    if math.isfinite(scale):
        return _with_interval(scale, low, high)
    signal, noise = (figures.get(f"{label}.{part}", math.nan) for part in ("signal", "noise"))
    if math.isnan(signal):
        return "? no estimate"
    if signal > 0 and not noise > 0:
        return "? tr(Sigma) <= 0" + (f", < {short(high)}" if 0 < high < math.inf else "")
    why = "|G|^2 unsure" if signal > 0 else "|G|^2 <= 0"
    return f"? {why}" + (f", > {short(low)}" if 0 < low < math.inf else "")


def told_total(figures: Mapping[str, Any], label: str) -> str | None:
    """Return the whole model's noise scale in few characters; None where nothing is calibrated."""
    name = f"{label}.total"
    if name not in figures:
        return None
    scale = figures[name]
    if math.isfinite(scale):
        low, high = (figures.get(f"{name}_{end}", math.nan) for end in ("low", "high"))
        return _with_interval(scale, low, high)
    if not math.isnan(figures.get(f"{label}.slope", math.nan)):
        return "?"
    low = figures.get(f"{name}_low", math.nan)
    if math.isnan(low):
        return "? no calibration"
    return "? calibration unsure" + (f", > {short(low)}" if low > 0 else "")


def _with_interval(scale: float, low: float, high: float) -> str:
    """Return a scale with its interval, `[?]` where nothing is known of it."""
    known = low > 0 or high < math.inf
    return f"{short(scale)} [{f'{short(low)}, {short(high)}' if known else '?'}]"
