"""The table of a noise scale by layer, at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainc.runtime.report.number_text import format_number
from trainc.runtime.report.tables import Table


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


def layer_tables(label: str, unit: str, records: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Yield the table of a clause's layers at the end of a run; none where the run recorded none."""
    if found := last_layers(records, label):
        heads = (unit, "|G|^2", "tr(Sigma)", "share of tr(Sigma)", "undetermined")
        yield Table((f"{label} by layer", *heads), tuple(_row(layer) for layer in found))


def _row(layer: LayerNoiseScale) -> tuple[str, ...]:
    return (
        layer.name,
        format_number(layer.noise_scale),
        format_number(layer.signal),
        format_number(layer.noise),
        "?" if math.isnan(layer.share) else f"{layer.share:.1%}",
        f"{layer.undetermined:.0%} of steps",
    )


def last_layers(records: Sequence[Mapping[str, Any]], label: str) -> list[LayerNoiseScale]:
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
