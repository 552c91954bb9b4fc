"""Pictures of replicas that train apart: their losses, how far they are from each other, and what turns did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from trainc.dsl.reading.signal import full_name

if TYPE_CHECKING:
    from trainc.runtime.report.axes import Panel
    from trainc.runtime.report.run_records import RecordedClause, RunRecords
    from trainc.runtime.report.tables import Table

NAMED = 8
"""The most replicas of which each has a name and a colour of its own."""
ROW_INCHES = 0.22
BY_REPLICA = ("loss", "score", "leads")
"""What is recorded of each replica in a turn."""


LEADS_GROUP, LEADS_ALL = 1.0, 2.0
"""What is recorded of a replica in a turn in which it leads its group, or all."""


def replica_panels(
    clauses: Sequence[RecordedClause], runs: Sequence[RunRecords]
) -> Iterator[Panel]:
    """Yield the panels of the clauses of one label that had turns."""
    from trainc.runtime.report.axes import Panel

    label = clauses[0].label
    met = [one.run for one in clauses if one.run.has(full_name(label, "loss"))]
    if not met:
        return
    draw: dict[str, Any] = {"label": label, "measured": met, "runs": runs}
    led = {one.construct.rule == "leader" for one in clauses}
    of = (
        "the mean of all" if led == {False} else "the leader" if led == {True} else "mean or leader"
    )
    covers = tuple(full_name(label, name) for name in BY_REPLICA)
    yield Panel(f"{label}: loss of the replicas", partial(_losses, **draw), 3.9, covers=covers)
    if far := [run for run in met if run.has(full_name(label, "distance"))]:
        title = f"{label}: distance from {of} before turns"
        yield Panel(title, partial(_distances, **draw | {"measured": far}), 3.9)
    if stepped := [run for run in met if run.has(full_name(label, "step"))]:
        panel = partial(_outer_steps, **draw | {"measured": stepped})
        yield Panel(f"{label}: outer step", panel, 3.9)
    for run in met:
        of = f", {run.name}" if len(runs) > 1 else ""
        one: dict[str, Any] = {"label": label, "run": run, "runs": runs}
        if names := _replicas(run, full_name(label, "score")):
            height = 1.5 + ROW_INCHES * len(names)
            yield Panel(f"{label}: scores{of}", partial(_scores, **one), 3.9)
            yield Panel(f"{label}: who leads{of}", partial(_leaders, **one), max(3.0, height))
        if len({*run.series(full_name(label, "replicas"))[1]}) > 1:
            height = 1.5 + ROW_INCHES * len(_replicas(run, full_name(label, "loss")))
            yield Panel(f"{label}: who took part{of}", partial(_members, **one), max(3.0, height))


def replica_tables(label: str, records: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Yield the table of the replicas: their losses in turns, in how many each led, and in how many it was."""
    from trainc.runtime.report.tables import Table

    losses, leads = (_of_turns(records, full_name(label, name)) for name in ("loss", "leads"))
    if not losses:
        return
    names = sorted({name for turn in losses for name in turn}, key=_number)
    last = losses[-max(1, len(losses) // 10) :]
    columns = {"loss in turns, last 10%": [_mean_text(last, name) for name in names]}
    if any(LEADS_GROUP in turn.values() for turn in leads):
        columns["led its group"] = _counts(leads, names, LEADS_GROUP)
    if leads:
        columns["led all"] = _counts(leads, names, LEADS_ALL)
    columns["turns"] = [f"{sum(name in turn for turn in losses)}" for name in names]
    rows = zip(names, *columns.values(), strict=True)
    yield Table((f"{label}: replica", *columns), tuple(rows))


def _of_turns(records: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, float]]:
    """Return the figures of the replicas in each turn that has some."""
    return [record["series"][name] for record in records if name in record.get("series", {})]


def _mean_text(turns: Sequence[Mapping[str, float]], name: str) -> str:
    from trainc.runtime.report.number_text import format_loss

    found = [turn[name] for turn in turns if math.isfinite(turn.get(name, math.nan))]
    return format_loss(math.fsum(found) / len(found)) if found else "-"


def _counts(turns: Sequence[Mapping[str, float]], names: Sequence[str], least: float) -> list[str]:
    return [f"{sum(turn.get(name, 0.0) >= least for turn in turns)}" for name in names]


def _number(name: str) -> int:
    return int(name.rpartition(" ")[2])


def _replicas(run: RunRecords, quantity: str) -> list[str]:
    """Return the replicas of which a run recorded a quantity, in the order of their numbers."""
    return sorted(run.layers().get(quantity, ()), key=_number)


def _losses(
    axes: Any, label: str, measured: Sequence[RunRecords], runs: Sequence[RunRecords]
) -> None:
    """Draw the mean of all replicas with the lowest and highest, and that of the first one, whose model the run has."""
    from trainc.runtime.report.axes import curve, legend_below, set_run_axis
    from trainc.runtime.report.pictures.spread import fill_spread, mark_positions, spread_entry
    from trainc.runtime.report.plots import smooth

    alone = len(runs) == 1
    for run in measured:
        names = ["mean_loss", "min_loss", "max_loss"]
        if not run.has("mean_loss"):  # in a loop of one's own
            names = [full_name(label, name) for name in ("loss", "loss_low", "loss_high")]
        at, means = run.series(names[0])
        span = max(1, len(at) // 50)
        if alone:
            own_at, own = run.series("loss")
            smoothed = smooth(own, max(1, len(own) // 50))
            curve(axes, own_at, smoothed, color="#555555", linewidth=0.9, label="replica 0")
        fill_spread(axes, run, names, span)
        text = "mean of all" if alone else run.name
        curve(axes, at, smooth(means, span), color=run.color, linewidth=1.6, label=text)
        _evaluations(axes, run, "mean of evaluations" if alone else None)
    set_run_axis(axes, runs)
    if alone:
        mark_positions(axes, measured[0].series(full_name(label, "loss"))[0], "turns")
    axes.set_ylabel("loss")
    legend_below(axes, spread_entry(measured))


def _evaluations(axes: Any, run: RunRecords, text: str | None) -> None:
    """Draw the mean loss of evaluations, and a line from the lowest to the highest."""
    from trainc.runtime.report.pictures.spread import values_at
    from trainc.runtime.report.plots import EVALUATION

    at, means = run.series("mean_eval_loss")
    if at:
        low, high = (values_at(run, name, at) for name in ("min_eval_loss", "max_eval_loss"))
        style = EVALUATION | {"color": run.color, "markerfacecolor": "white"}
        axes.plot(at, means, **style, label=text)
        axes.vlines(at, low, high, color=run.color, linewidth=0.9)


def _distances(
    axes: Any, label: str, measured: Sequence[RunRecords], runs: Sequence[RunRecords]
) -> None:
    from trainc.runtime.report.axes import curve, legend_below, set_run_axis
    from trainc.runtime.report.pictures.spread import fill_spread, spread_entry

    names = [full_name(label, f"distance{end}") for end in ("", "_low", "_high")]
    for run in measured:
        at, values = run.series(names[0])
        fill_spread(axes, run, names)
        text = "mean of the replicas" if len(runs) == 1 else run.name
        curve(axes, at, values, color=run.color, linewidth=1.4, **_dots(at), label=text)
    set_run_axis(axes, runs)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("L2 norm")
    legend_below(axes, spread_entry(measured))


def _outer_steps(
    axes: Any, label: str, measured: Sequence[RunRecords], runs: Sequence[RunRecords]
) -> None:
    from trainc.runtime.report.axes import curve, legend_below, set_run_axis

    texts = {"step": "step of the agreed weights", "change": "change of the mean"}
    for run in measured:
        for (name, text), style in zip(texts.items(), ("-", "--"), strict=True):
            at, values = run.series(full_name(label, name))
            named = text if len(runs) == 1 else f"{run.name}: {text}"
            dots = _dots(at)
            curve(axes, at, values, color=run.color, label=named, linestyle=style, **dots)
    set_run_axis(axes, runs)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("L2 norm")
    legend_below(axes)


def _dots(at: Sequence[float]) -> dict[str, Any]:
    """Return the style that marks each of few points."""
    return {"marker": "o", "markersize": 3.5} if len(at) <= 60 else {}


def _scores(axes: Any, label: str, run: RunRecords, runs: Sequence[RunRecords]) -> None:
    """Draw the score of each replica, and that of the leader of all."""
    from trainc.runtime.report.axes import curve, legend_below, set_run_axis
    from trainc.runtime.report.families import shades

    quantity = full_name(label, "score")
    names, series = _replicas(run, quantity), run.layers()[quantity]
    for color, name in zip(shades(len(names)), names, strict=True):
        text = name if len(names) <= NAMED or name in (names[0], names[-1]) else None
        at, values = series[name]
        curve(axes, at, values, color=color, linewidth=1.1, label=text, **_dots(at))
    style: dict[str, Any] = {
        "marker": "o",
        "markersize": 8,
        "markerfacecolor": "none",
        "linestyle": "none",
    }
    axes.plot(*run.series(quantity), color="#555555", label="leads all", **style)
    set_run_axis(axes, runs)
    axes.set_ylabel("mean loss of the last steps")
    legend_below(axes)


def _leaders(axes: Any, label: str, run: RunRecords, runs: Sequence[RunRecords]) -> None:
    """Mark in a row for each replica the turns in which it led its group, or all."""
    quantity = full_name(label, "leads")
    names, series = _replicas(run, quantity), run.layers()[quantity]
    for level, text, filled in (
        (LEADS_GROUP, "leads its group", False),
        (LEADS_ALL, "leads all", True),
    ):
        points = [
            (position, row)
            for row, name in enumerate(names)
            for position, led in zip(*series[name], strict=True)
            if led == level
        ]
        if points:
            _strip(axes, points, run.color, text, filled=filled)
    _rows(axes, names, runs)


def _members(axes: Any, label: str, run: RunRecords, runs: Sequence[RunRecords]) -> None:
    """Mark in a row for each replica the turns in which its weights counted, and the turns that failed."""
    from trainc.runtime.report.axes import NON_FINITE

    quantity = full_name(label, "loss")
    names, series = _replicas(run, quantity), run.layers()[quantity]
    points = [(at, row) for row, name in enumerate(names) for at in series[name][0]]
    _strip(axes, points, run.color, "its weights counted", filled=True)
    failed = [at for at, n in zip(*run.series(full_name(label, "replicas")), strict=True) if not n]
    for number, at in enumerate(failed):
        named = "the turn failed" if number == 0 else None
        axes.axvline(at, color=NON_FINITE, linewidth=1, label=named)
    _rows(axes, names, runs)


def _strip(
    axes: Any, points: Sequence[tuple[float, int]], color: str, text: str, *, filled: bool
) -> None:
    axes.plot(
        [at for at, _ in points],
        [row for _, row in points],
        linestyle="none",
        marker="o",
        markersize=5,
        color=color,
        markerfacecolor=color if filled else "none",
        label=text,
    )


def _rows(axes: Any, names: Sequence[str], runs: Sequence[RunRecords]) -> None:
    """Name the rows, the first replica at the top."""
    from trainc.runtime.report.axes import legend_below, set_run_axis

    every = math.ceil(len(names) / 40)
    axes.set_yticks(range(0, len(names), every), names[::every])
    axes.set_ylim(len(names) - 0.5, -0.5)
    set_run_axis(axes, runs)
    legend_below(axes)
