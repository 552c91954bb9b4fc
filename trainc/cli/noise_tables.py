"""Noise scales of finished runs as text: how each ended, and its layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from trainc.runtime.noise_scale import figures as noise_figures
from trainc.runtime.noise_scale.figures import Clause
from trainc.runtime.run.live_display import sparkline
from trainc.runtime.storage.jsonl import Record


def figures(runs: Sequence[tuple[Mapping[str, Any], Sequence[Record]]]) -> dict[str, list[str]]:
    """Return rows of a table of runs, given as plan and records of steps: a text a run by name, `-` for nothing."""
    known = [
        {clause.label: clause for clause in noise_figures.clauses(plan, records)}
        for plan, records in runs
    ]
    rows: dict[str, list[str]] = {}
    for label in dict.fromkeys(label for found in known for label in found):
        units = dict.fromkeys(found[label].unit for found in known if label in found)
        for name in ("at the end", "of the whole model", "undetermined", "over the run"):
            texts = [
                _figure(name, label, records) if label in found else "-"
                for found, (_, records) in zip(known, runs, strict=True)
            ]
            if any(text != "-" for text in texts):
                head = f", {' or '.join(units)}" if name == "at the end" else f" {name}"
                rows[label + head] = texts
    return rows


def _figure(name: str, label: str, records: Sequence[Record]) -> str:
    measured = [record for record in records if label in record]
    if not measured:
        return "-"
    values = [record[label] for record in measured]
    if name == "at the end":
        return noise_figures.told(measured[-1], label)
    if name == "of the whole model":
        return noise_figures.told_total(measured[-1], label) or "-"
    if name == "undetermined":
        missing = sum(not math.isfinite(value) for value in values)
        return f"{missing:,} of {len(values):,} steps"
    # Over decades: on a linear scale all but the end would be flat.
    return sparkline([math.log(value) if value > 0 else math.nan for value in values])


def layers(clause: Clause, records: Sequence[Record]) -> Table | None:
    """Return the table of a clause's layers at the end of a run; None where none was recorded."""
    found = noise_figures.layers(records, clause.label)
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
            noise_figures.short(layer.scale),
            noise_figures.short(layer.signal),
            noise_figures.short(layer.noise),
            "?" if math.isnan(layer.share) else f"{layer.share:.1%}",
            f"{layer.gaps:.0%} of steps",
        )
    return table
