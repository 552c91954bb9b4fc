"""How often predictions are right, over how sure they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes

from trainc.runtime.report.axes import Panel
from trainc.runtime.report.run_records import RecordedClause

Bin = tuple[float, float, float]
"""Predictions of a bin, their mean confidence, and their accuracy."""


def reliability_panel(
    clauses: Sequence[RecordedClause], names: tuple[str, str, str]
) -> Iterator[Panel]:
    """Yield a panel of the bins that runs recorded last, as `label.bin3.size` and so on by `names`; none without."""
    found = [(one, bins) for one in clauses if (bins := last_bins(one, names))]
    if found:
        yield Panel(
            f"{found[0][0].label} reliability", partial(_draw, found=found, alone=len(clauses) == 1)
        )


def last_bins(clause: RecordedClause, names: tuple[str, str, str]) -> list[Bin]:
    """Return the bins in the last record that has some, in their order."""
    form = re.compile(rf"{re.escape(clause.label)}\.bin(\d+)\.{names[0]}")
    for record in reversed(clause.run.records):
        numbers = sorted(int(match[1]) for name in record if (match := form.fullmatch(name)))
        if numbers:
            rows = [[record[f"{clause.label}.bin{i}.{name}"] for name in names] for i in numbers]
            return [(size, confidence, accuracy) for size, confidence, accuracy in rows]
    return []


def _draw(
    axes: Axes, found: Sequence[tuple[RecordedClause, Sequence[Bin]]], *, alone: bool
) -> None:
    axes.plot([0, 1], [0, 1], color="#555555", linewidth=0.9, linestyle="--", label="calibrated")
    for clause, bins in found:
        color = clause.run.color
        most = max(size for size, _, _ in bins)
        confidence = [one for _, one, _ in bins]
        accuracy = [one for _, _, one in bins]
        label = "last evaluation" if alone else clause.run.name
        axes.plot(confidence, accuracy, color=color, linewidth=1.2, label=label)
        areas = [8 + 60 * size / most for size, _, _ in bins]
        axes.scatter(confidence, accuracy, s=areas, color=color, alpha=0.7, linewidths=0, zorder=3)
        # The spread that as many predictions have by chance.
        for size, one, right in bins:
            error = math.sqrt(max(0.0, right * (1 - right)) / size)
            axes.plot([one, one], [right - error, right + error], color=color, linewidth=0.8)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("confidence (dots: one bin each, its area by predictions)")
    axes.set_ylabel("accuracy")
