"""Pictures of noise scales, by what is in their axes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.noise_runs import NAN, SCALES, figures, plan, six_steps, step, write_run
from trainc.runtime.noise_plots import COLUMNS, MISSING, NAMED, heat, noise_panels
from trainc.runtime.plots import draw, list_panels, load

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PLAN = plan(("noise_scale", "gns", {"example": "row", "level": 0.9}))


def drawn(title: str, *folders: Path) -> Axes:
    """Return the axes of one panel, filled."""
    axes = Figure(layout="constrained").subplots()
    (panel,) = [panel for panel in noise_panels(load(folders)) if panel.title == title]
    panel.fill(axes)
    return axes


def names(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    """Return the data of a line."""
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


def stretches(axes: Axes) -> list[tuple[float, float]]:
    boxes = [p for p in axes.patches if isinstance(p, Rectangle)]
    return [(box.get_x(), box.get_x() + box.get_width()) for box in boxes]


def test_the_course_of_a_run(tmp_path: Path) -> None:
    axes = drawn("Noise scale gns and batch size", write_run(tmp_path / "a", six_steps(), PLAN))
    at = [800, 1600, 2400, 3200, 4000, 4800]
    assert line(axes, "batch size") == (at, [8] * 6)
    found = line(axes, "gns")
    assert found[0] == at
    assert found[1] == pytest.approx(SCALES, nan_ok=True)
    assert stretches(axes) == [(800, 2400), (4000, 4800)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "samples")
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert names(axes) == ["batch size", "gns", "undetermined", "90% interval"]
    # The interval goes on through stretches without a noise scale, open to the end of the picture.
    low, high = axes.get_ylim()
    assert low < 2
    assert high > 20
    corners = np.concatenate([p.vertices for band in axes.collections for p in band.get_paths()])
    assert {(800.0, 2.0), (800.0, 8.0), (1600.0, 3.0), (4000.0, 40.0)} <= set(map(tuple, corners))
    assert (1600.0, pytest.approx(high)) in [tuple(corner) for corner in corners]


def test_the_whole_model_is_drawn_with_its_own_interval(tmp_path: Path) -> None:
    records = [
        step(n, figures("gns", 2.0 * n, n, 4.0 * n), {"gns.total": 3.0 * n, "gns.total_low": low})
        | {"gns.total_high": math.inf, "gns.slope": 1.5}
        for n, low in ((1, 0.0), (2, 0.0), (3, 5.0))
    ]
    axes = drawn("Noise scale gns and batch size", write_run(tmp_path / "a", records, PLAN))
    assert line(axes, "whole model, by calibration")[1] == [3, 6, 9]
    unknown = [{**record, "gns.total_low": 0.0} for record in records]
    axes = drawn("Noise scale gns and batch size", write_run(tmp_path / "b", unknown, PLAN))
    assert "whole model, by calibration, no interval" in names(axes)


def test_two_clauses_have_panels_of_their_own(tmp_path: Path) -> None:
    written = plan(
        ("noise_scale", "early", {"example": "row", "level": 0.9}),
        ("noise_scale", "late", {"example": "document", "level": 0.9}),
    )
    layers = {"a": 1.0, "b": 2.0}
    series = {f"{label}{part}": layers for label in ("early", "late") for part in ("", ".signal")}
    records = [
        step(n, figures("early", 1.0 * n), figures("late", 5.0 * n), series=series) for n in (1, 2)
    ]
    run = write_run(tmp_path / "a", records, written)
    assert [panel.title for panel in list_panels(load([run]))] == [
        "Loss",
        "Noise scale early and batch size",
        "Noise scale early by layer",
        "Noise scale late and batch size",
        "Noise scale late by layer",
    ]
    assert line(drawn("Noise scale early and batch size", run), "early")[1] == [1, 2]
    axes = drawn("Noise scale late and batch size", run)
    assert line(axes, "late")[1] == [5, 10]
    assert axes.get_ylabel() == "documents; batch size in samples"
    assert draw([run], tmp_path / "picture.png").stat().st_size > 10_000


def test_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, [step(n, figures("gns", by * n)) for n in (1, 2)], PLAN)
        for name, by in (("a", 1.0), ("b", 3.0))
    ]
    axes = drawn("Noise scale gns and batch size", *runs)
    assert line(axes, "a gns")[1] == [1, 2]
    assert line(axes, "b gns")[1] == [3, 6]
    assert names(axes) == ["a batch size", "a gns", "b batch size", "b gns"]


def test_a_scale_that_is_never_determined_is_drawn(tmp_path: Path) -> None:
    layers = {"gns": {"a": NAN, "b": NAN}}
    records = [step(n, figures("gns", NAN, signal=NAN), series=layers) for n in (1, 2, 3)]
    run = write_run(tmp_path / "a", records, PLAN)
    axes = drawn("Noise scale gns and batch size", run)
    assert stretches(axes) == [(0, 2400)]
    assert names(axes) == ["batch size", "gns", "undetermined"]
    assert draw([run], tmp_path / "picture.png").exists()


def test_layers_are_a_map_in_the_order_of_the_model(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", six_steps(), PLAN)
    axes = drawn("Noise scale gns by layer", run)
    (mesh,) = axes.collections
    values: Any = mesh.get_array()
    assert values.shape == (3, 6)
    assert values[1].tolist() == [2, 4, 6, 8, 10, 12]
    assert values.mask[0].tolist() == [math.isnan(scale) for scale in SCALES]
    assert values.mask[2].all()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.yaxis_inverted()
    assert type(mesh.norm).__name__ == "LogNorm"
    assert mesh.cmap.get_bad().tolist()[:3] == pytest.approx(
        [int(MISSING[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    )
    assert names(axes) == ["undetermined"]
    (bar,) = [other for other in axes.figure.axes if other is not axes]
    assert bar.get_ylabel() == "noise scale, samples"


def test_a_hundred_layers_are_named_and_more_now_and_then(tmp_path: Path) -> None:
    for count, named in ((100, 100), (300, 100)):
        layers = {f"blocks.{i}": 1.0 + i for i in range(count)}
        records = [step(n, figures("gns", 1.0), series={"gns": layers}) for n in (1, 2)]
        run = write_run(tmp_path / str(count), records, PLAN)
        axes = drawn("Noise scale gns by layer", run)
        labels = [text.get_text() for text in axes.get_yticklabels()]
        assert len(labels) == named <= NAMED
        assert labels[:2] == ["blocks.0", f"blocks.{count // named}"]
        # Names do not touch: a row of names is at least as high as its letters, in points.
        (panel,) = [p for p in noise_panels(load([run])) if p.wide]
        assert 72 * (panel.height - 1.1) / named >= 6


def test_a_long_run_has_as_many_columns_as_can_be_seen(tmp_path: Path) -> None:
    series = [{"gns": {"a": float(n), "b": NAN}} for n in range(1, 1002)]
    records = [step(n, figures("gns", 1.0), series=s) for n, s in enumerate(series, 1)]
    run = write_run(tmp_path / "a", records, PLAN)
    found, edges, values = heat(load([run])[0], "gns")
    assert found == ["a", "b"]
    assert len(edges) == len(values[0]) + 1 <= COLUMNS + 1
    assert (edges[0], edges[-1]) == (0, 1001 * 800)
    assert values[0][:2] == [3, 6]
    assert values[0][-1] == 1001
    assert [800 * value for value in values[0]] == edges[1:]


def test_one_layer_has_no_map(tmp_path: Path) -> None:
    records = [step(n, figures("gns", 1.0), series={"gns": {"head": 1.0}}) for n in (1, 2)]
    titles = [
        panel.title for panel in noise_panels(load([write_run(tmp_path / "a", records, PLAN)]))
    ]
    assert titles == ["Noise scale gns and batch size"]


def test_calibration_is_drawn_with_the_line_and_its_interval(tmp_path: Path) -> None:
    line_of = {"gns.slope": 1.5, "gns.slope_low": 1.2, "gns.slope_high": 1.8}
    records = [
        step(n, figures("gns", 1.0), line_of, {"gns.point": x, "gns.point_total": y})
        for n, (x, y) in enumerate([(2.0, 3.5), (NAN, 1.0), (10.0, 14.0)], 1)
    ]
    axes = drawn("Whole model against gns", write_run(tmp_path / "a", records, PLAN))
    (dots,) = [c for c in axes.collections if c.get_label() == "calibrations"]
    assert np.asarray(dots.get_offsets()).tolist() == [[2, 3.5], [10, 14]]
    assert np.asarray(dots.get_array()).tolist() == [800, 2400]
    x, y = line(axes, "1.5 times")
    assert y == pytest.approx([1.5 * value for value in x])
    assert "90% interval, 1.2 to 1.8" in names(axes)
    assert "all layers" in axes.get_ylabel()
    assert "measured layers, samples" in axes.get_xlabel()


def test_an_early_calibration_has_dots_and_no_line(tmp_path: Path) -> None:
    slope = {"gns.slope": NAN, "gns.slope_low": NAN, "gns.slope_high": NAN}
    record = step(1, figures("gns", 1.0), slope, {"gns.point": 2.0, "gns.point_total": 3.0})
    axes = drawn("Whole model against gns", write_run(tmp_path / "a", [record], PLAN))
    assert names(axes) == ["calibrations"]
    assert not axes.lines
