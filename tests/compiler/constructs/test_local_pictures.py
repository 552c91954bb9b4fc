"""What a report shows of replicas that train apart, from records that are given."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.figure import Figure

from trainc.compiler.constructs.distribute.local import Local
from trainc.dsl.values.expressions import called
from trainc.dsl.values.value_json import Number
from trainc.runtime.report.axes import Panel
from trainc.runtime.report.plots import list_panels
from trainc.runtime.report.run_records import RecordedClause, RunRecords

OUTER = Local(rule=called("outer", called("sgd", Number(0.7))))
LEADER = Local(rule="leader", groups=2)


def replicas(**figures: float) -> dict[str, float]:
    return {f"replica {name.removeprefix('r')}": value for name, value in figures.items()}


def turn(at: int, series: dict[str, Any] | None = None, **signals: float) -> dict[str, Any]:
    """Return the record of a step with a turn, of three replicas."""
    losses = replicas(r0=3.0 / at, r1=2.0 / at, r10=4.0 / at)
    found = {"loss": 3.0 / at, "loss_low": 2.0 / at, "loss_high": 4.0 / at, "replicas": 3.0}
    found |= {"distance": 1.0 * at, "distance_low": 0.5 * at, "distance_high": 2.0 * at}
    named = {f"local.{name}": value for name, value in (found | signals).items()}
    return {
        "step": at,
        "loss": 3.0 / at,
        "series": {"local.loss": losses, **(series or {})},
        **named,
    }


def run_of(*records: dict[str, Any], name: str = "run") -> RunRecords:
    return RunRecords(name, list(records), "#0072B2")


def panels(construct: Local, *runs: RunRecords) -> dict[str, Panel]:
    clauses = [RecordedClause(run, "local", construct) for run in runs]
    return {panel.title: panel for panel in Local.panels(clauses, runs)}


def lines(panel: Panel) -> dict[str, tuple[list[float], list[float]]]:
    """Return what is drawn, by its text in the legend."""
    axes = Figure().add_subplot()
    panel.draw(axes)
    found = {str(line.get_label()): line for line in axes.lines}
    return {text: ([*line.get_xdata()], [*line.get_ydata()]) for text, line in found.items()}  # type: ignore[misc]


def test_losses_are_those_of_all_beside_that_of_the_first() -> None:
    steps = [
        {"step": n, "loss": 1.0 * n, "mean_loss": 2.0 * n, "min_loss": 0.5 * n, "max_loss": 4.0 * n}
        for n in (1, 2, 3)
    ]
    steps[1] = turn(2) | steps[1]
    steps.append({"step": 3, "mean_eval_loss": 7.0, "min_eval_loss": 6.0, "max_eval_loss": 9.0})
    panel = panels(Local(), run_of(*steps))["local: loss of the replicas"]
    drawn = lines(panel)
    assert drawn["replica 0"] == ([1, 2, 3], [1, 2, 3])
    assert drawn["mean of all"] == ([1, 2, 3], [2, 4, 6])
    assert drawn["turns"][0] == [2]
    assert drawn["mean of evaluations"] == ([3], [7])
    axes = Figure().add_subplot()
    panel.draw(axes)
    corners = axes.collections[0].get_paths()[0].get_extents()
    assert (corners.y0, corners.y1) == (0.5, 12.0)
    (ends,) = axes.collections[1].get_segments()  # type: ignore[attr-defined]
    assert ends.tolist() == [[3, 6], [3, 9]]


def test_in_a_loop_of_ones_own_losses_are_those_of_turns() -> None:
    drawn = lines(panels(Local(), run_of(turn(2), turn(4)))["local: loss of the replicas"])
    assert drawn["mean of all"] == ([2, 4], [1.5, 0.75])


@pytest.mark.parametrize(
    ("construct", "of"),
    [(Local(), "the mean of all"), (OUTER, "the mean of all"), (LEADER, "the leader")],
)
def test_the_distance_says_from_what_it_is(construct: Local, of: str) -> None:
    panel = panels(construct, run_of(turn(2), turn(4)))[f"local: distance from {of} before turns"]
    assert lines(panel)["mean of the replicas"] == ([2, 4], [2, 4])


def test_an_outer_step_is_beside_the_change_of_the_mean() -> None:
    run = run_of(turn(2), turn(4, step=3.0, change=1.0))  # the first turn only averaged
    drawn = lines(panels(OUTER, run)["local: outer step"])
    assert drawn == {"step of the agreed weights": ([4], [3]), "change of the mean": ([4], [1])}
    other = run_of(turn(2), name="other")
    assert {text[:3] for text in lines(panels(OUTER, run, other)["local: outer step"])} == {"run"}
    assert "local: outer step" not in panels(OUTER, other)


def leading(step: int, r0: float, r1: float, r10: float, **signals: float) -> dict[str, Any]:
    scores = replicas(r0=3.0, r1=2.0 * step, r10=math.inf)
    series = {"local.score": scores, "local.leads": replicas(r0=r0, r1=r1, r10=r10)}
    return turn(step, series, **signals)


def test_leaders_are_in_a_row_for_each_replica_in_the_order_of_their_ranks() -> None:
    run = run_of(leading(1, 0, 1, 0), leading(2, 2, 0, 1, leader=0, score=3.0))
    found = panels(LEADER, run)
    drawn = lines(found["local: who leads"])
    assert drawn["leads its group"] == ([1, 2], [1, 2])
    assert drawn["leads all"] == ([2], [0])
    axes = Figure().add_subplot()
    found["local: who leads"].draw(axes)
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "replica 0",
        "replica 1",
        "replica 10",
    ]
    scores = lines(found["local: scores"])
    assert scores["replica 1"] == ([1, 2], [2, 4])
    assert scores["leads all"] == ([2], [3])


def test_figures_of_replicas_have_no_panels_of_layers_besides() -> None:
    run = run_of(leading(1, 0, 1, 0))
    clause = RecordedClause(run, "local", LEADER)
    titles = [panel.title for panel in list_panels([run], [*Local.panels([clause], [run])])]
    assert not [title for title in titles if "by layer" in title]


def test_who_took_part_is_shown_where_replicas_left_or_turns_failed() -> None:
    fewer = turn(4, {"local.loss": replicas(r0=1.0, r10=2.0)}, replicas=2.0)
    failed = {"step": 6, "loss": 0.5, "local.replicas": 0.0, "local.bytes": 9.0}
    drawn = lines(panels(Local(), run_of(turn(2), fewer, failed))["local: who took part"])
    assert drawn["its weights counted"] == ([2, 4, 2, 2, 4], [0, 0, 1, 2, 2])
    assert drawn["the turn failed"][0] == [6, 6]
    assert "local: who took part" not in panels(Local(), run_of(turn(2), turn(4)))


def test_a_run_without_a_turn_has_no_panels() -> None:
    alone = {"step": 2, "loss": 1.0, "local.bytes": 0.0, "local.replicas": 1.0}
    assert not panels(Local(), run_of(alone))
    assert not [*Local().tables("local", [alone])]


def test_the_table_has_losses_and_leaders_of_each_replica() -> None:
    turns = [
        leading(1, 0, 1, 0),
        leading(2, 2, 0, 1),
        turn(3, {"local.loss": replicas(r0=0.5, r1=math.nan)}),
    ]
    (table,) = LEADER.tables("local", turns)
    assert table.heads == (
        "local: replica", "loss in turns, last 10%", "led its group", "led all", "turns"
    )  # fmt: skip
    assert table.rows == (
        ("replica 0", "0.5000", "1", "1", "3"),
        ("replica 1", "-", "1", "0", "3"),
        ("replica 10", "-", "1", "0", "2"),
    )
