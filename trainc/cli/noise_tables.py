"""Noise scales of finished runs as tables: the values at the end, and those by layer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from trainc.runtime.noise_scale.format import (
    format_noise_scale,
    format_number,
    format_whole_model,
)
from trainc.runtime.noise_scale.history import NoiseScaleClause, find_clauses, last_layers
from trainc.runtime.run.live_display import sparkline
from trainc.runtime.storage.jsonl import Record


def noise_scale_rows(
    runs: Sequence[tuple[Mapping[str, Any], Sequence[Record]]],
) -> dict[str, list[str]]:
    """Return table rows with a text for each run, `-` for no value; a run is its plan and its records of steps."""
    clauses = [
        {clause.label: clause for clause in find_clauses(plan, records)} for plan, records in runs
    ]
    rows: dict[str, list[str]] = {}
    for label in dict.fromkeys(label for found in clauses for label in found):
        units = dict.fromkeys(found[label].unit for found in clauses if label in found)
        for name in ("at the end", "of the whole model", "undetermined", "over the run"):
            texts = [
                _text(name, label, records) if label in found else "-"
                for found, (_, records) in zip(clauses, runs, strict=True)
            ]
            if any(text != "-" for text in texts):
                head = f", {' or '.join(units)}" if name == "at the end" else f" {name}"
                rows[label + head] = texts
    return rows


def _text(name: str, label: str, records: Sequence[Record]) -> str:
    measured = [record for record in records if label in record]
    if not measured:
        return "-"
    values = [record[label] for record in measured]
    if name == "at the end":
        return format_noise_scale(measured[-1], label)
    if name == "of the whole model":
        return format_whole_model(measured[-1], label) or "-"
    if name == "undetermined":
        missing = sum(not math.isfinite(value) for value in values)
        return f"{missing:,} of {len(values):,} steps"
    # Logarithmic: on a linear scale all but the largest values would look the same.
    return sparkline([math.log(value) if value > 0 else math.nan for value in values])


def layer_table(clause: NoiseScaleClause, records: Sequence[Record]) -> Table | None:
    """Return the table of a clause's layers at the end of a run; None where the run recorded none."""
    found = last_layers(records, clause.label)
    if not found:
        return None
    heads = (clause.unit, "|G|^2", "tr(Sigma)", "share of tr(Sigma)", "undetermined")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"{clause.label} by layer", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right")
    for layer in found:
        table.add_row(
            layer.name,
            format_number(layer.noise_scale),
            format_number(layer.signal),
            format_number(layer.noise),
            "?" if math.isnan(layer.share) else f"{layer.share:.1%}",
            f"{layer.undetermined:.0%} of steps",
        )
    return table
