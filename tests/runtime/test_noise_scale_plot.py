"""Pictures of noise scales, by what is in their axes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.noise_runs import NAN, SCALES, figures, plan, six_steps, step, write_run

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from trainc.compiler.driver.recorded_clauses import draw_runs, panels_of
from trainc.runtime.noise_scale.pictures.panels import WHOLE_MODEL
from trainc.runtime.report.axes import Panel
from trainc.runtime.report.interval_curves import BEYOND
from trainc.runtime.report.layer_map import COLUMNS, MISSING, NAMED, heat_map
from trainc.runtime.report.plots import COLORS, list_panels, read_runs

PLAN = plan(("noise_scale", "gns", {"example": "row", "level": 0.9}))


def noise_panels(*folders: Path) -> list[Panel]:
    return [*panels_of(read_runs(folders))]


def drawn(title: str, *folders: Path) -> Axes:
    """Return the axes of one panel, filled."""
    axes = Figure(layout="constrained").subplots()
    (panel,) = [panel for panel in noise_panels(*folders) if panel.title == title]
    panel.draw(axes)
    return axes


def names(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    """Return the data of a line."""
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


def intervals(axes: Axes, label: str) -> list[tuple[float, float]]:
    """Return the marked stretches of a kind."""
    boxes = [p for p in axes.patches if isinstance(p, Rectangle)]
    return [
        (box.get_x(), box.get_x() + box.get_width())
        for box in boxes
        if str(box.get_label()).lstrip("_") == label
    ]


def corners(axes: Axes) -> set[tuple[float, ...]]:
    """Return the corners of all bands."""
    paths = [path for band in axes.collections for path in band.get_paths()]
    return {tuple(corner) for path in paths for corner in np.asarray(path.vertices).tolist()}


def test_a_noise_scale_over_a_run(tmp_path: Path) -> None:
    axes = drawn("Noise scale gns and batch size", write_run(tmp_path / "a", six_steps(), PLAN))
    at = [800, 1600, 2400, 3200, 4000, 4800]
    assert line(axes, "batch size") == ([0, *at], [8] * 7)
    found = line(axes, "gns")
    assert found[0] == at
    assert found[1] == pytest.approx(SCALES, nan_ok=True)
    assert intervals(axes, "undetermined") == [(800, 2400), (4000, 4800)]
    assert not intervals(axes, "loss or gradient not finite")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "samples")
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    known = ["batch size", "undetermined", "gns", "90% interval", "interval without a bound"]
    assert names(axes) == known
    assert {(800, 2), (800, 8), (3200, 5), (3200, 20), (4000, 10), (4000, 40)} <= corners(axes)


def test_an_unbounded_end_is_an_arrow_and_fills_nothing(tmp_path: Path) -> None:
    ends = [(0.0, math.inf), (0.0, 12.0), (5.0, math.inf), (4.0, 16.0)]
    records = [step(n, figures("gns", 8.0, *end)) for n, end in enumerate(ends, 1)]
    axes = drawn("Noise scale gns and batch size", write_run(tmp_path / "a", records, PLAN))
    assert line(axes, "_gns up") == ([800, 2400], [8, 8])
    assert line(axes, "_gns down") == ([800, 1600], [8, 8])
    assert line(axes, "_gns low")[1] == pytest.approx([NAN, NAN, 5, 4], nan_ok=True)
    assert line(axes, "_gns high")[1] == pytest.approx([NAN, 12, NAN, 16], nan_ok=True)
    # The band ends at the curve where it has no end of its own.
    assert {(1600, 8), (1600, 12), (2400, 5), (2400, 8), (3200, 4), (3200, 16)} <= corners(axes)
    assert max(y for _, y in corners(axes)) == 16


def test_a_bound_without_a_noise_scale_is_drawn(tmp_path: Path) -> None:
    records = [step(n, figures("gns", NAN, 310.0, math.inf, signal=-1.0)) for n in (1, 2)]
    axes = drawn("Noise scale gns and batch size", write_run(tmp_path / "a", records, PLAN))
    assert line(axes, "_gns low")[1] == [310, 310]
    assert line(axes, "_gns up") == ([800, 1600], [310, 310])
    assert axes.get_ylim()[1] > 310


def test_intervals_extend_the_axis_by_a_limited_factor(tmp_path: Path) -> None:
    def limits(folder: str, low: float, high: float) -> tuple[float, float]:
        records = [step(n, figures("gns", 8.0, low, high)) for n in (1, 2, 3)]
        title = "Noise scale gns and batch size"
        return drawn(title, write_run(tmp_path / folder, records, PLAN)).get_ylim()

    assert limits("near", 4.0, 20.0) == pytest.approx((4 / 1.5, 20 * 1.5))
    far = limits("far", 1e-6, 1e6)
    assert far == pytest.approx((8 / BEYOND / 1.5, 8 * BEYOND * 1.5))
    assert limits("open", 0.0, math.inf) == pytest.approx((8 / 1.5, 8 * 1.5))


def whole(low: float, high: float, total: float = 3.0) -> dict[str, float]:
    ends = {"gns.total_low": low, "gns.total_high": high}
    return {"gns.total": total, "gns.slope": 1.5, **ends}


def test_the_whole_model_is_drawn_with_its_own_interval(tmp_path: Path) -> None:
    records = [
        step(n, figures("gns", 2.0 * n, n, 4.0 * n), whole(low, math.inf, 3.0 * n))
        for n, low in ((1, 0.0), (2, 0.0), (3, 5.0))
    ]
    axes = drawn("Noise scale gns and batch size", write_run(tmp_path / "a", records, PLAN))
    assert line(axes, "whole model, by calibration")[1] == [3, 6, 9]
    assert line(axes, "_whole model, by calibration down") == ([800, 1600], [3, 6])
    assert line(axes, "_whole model, by calibration up") == ([800, 1600, 2400], [3, 6, 9])
    assert line(axes, "_whole model, by calibration low")[1] == pytest.approx(
        [NAN, NAN, 5], nan_ok=True
    )


def test_calibrations_of_the_whole_model_are_drawn_beside_the_prediction(
    tmp_path: Path,
) -> None:
    point = {"gns.point": 1.0, "gns.point_total": 40.0}
    records = [
        step(1, figures("gns", 2.0), whole(1.0, 9.0)),
        step(2, figures("gns", 2.0), whole(1.0, 9.0), point),
    ]
    axes = drawn("Noise scale gns and batch size", write_run(tmp_path / "a", records, PLAN))
    assert line(axes, "whole model, measured") == ([1600], [40])
    assert axes.get_ylim()[1] > 40


def test_the_legend_of_intervals_has_the_colours_of_the_bands(tmp_path: Path) -> None:
    records = [step(n, figures("gns", 2.0, 1.0, 4.0), whole(2.0, 5.0)) for n in (1, 2)]
    axes = drawn("Noise scale gns and batch size", write_run(tmp_path / "a", records, PLAN))
    legend = axes.get_legend()
    assert legend is not None
    swatches = [to_rgb(patch.get_facecolor()) for patch in legend.findobj(Rectangle)]
    assert swatches == [to_rgb(COLORS[0]), to_rgb(WHOLE_MODEL)]
    assert {to_rgb(band.get_facecolor()[0]) for band in axes.collections} == set(swatches)
    assert "interval without a bound" not in names(axes)


def test_steps_whose_loss_or_gradient_was_not_finite_are_marked_and_leave_a_gap(
    tmp_path: Path,
) -> None:
    series = {"gns": {"a": 2.0, "b": 3.0}}
    records = [step(n, figures("gns", 2.0, 1.0, 4.0), series=series) for n in range(1, 8)]
    # A skipped step records nothing of a noise scale; one that was not may record the norm.
    records[1] = step(2) | {"loss": NAN, "skipped": 1.0}
    records[2] = step(3) | {"loss": NAN, "skipped": 1.0}
    records[4] |= {"gradient_norm": math.inf}
    records[5] |= figures("gns", NAN, signal=NAN, noise=NAN)
    run = write_run(tmp_path / "a", records, PLAN)
    axes = drawn("Noise scale gns and batch size", run)
    assert intervals(axes, "loss or gradient not finite") == [(800, 2400), (3200, 4800)]
    assert intervals(axes, "undetermined") == [(800, 2400), (4000, 4800)]
    known = [2, NAN, NAN, 2, 2, NAN, 2]
    assert line(axes, "gns")[1] == pytest.approx(known, nan_ok=True)
    # What stands alone between gaps would not be seen without a dot.
    (scale,) = [one for one in axes.lines if one.get_label() == "gns"]
    assert (scale.get_marker(), scale.get_markevery()) == (".", [0, 6])
    (mesh, *_) = drawn("Noise scale gns by layer", run).collections
    values: Any = mesh.get_array()
    assert values.mask[0].tolist() == [False, True, True, False, False, False, False]


def test_steps_before_the_first_estimate_are_not_marked_as_non_finite(tmp_path: Path) -> None:
    early = figures("gns", NAN, signal=NAN, noise=NAN)
    records = [step(1, early), step(2, early), step(3, figures("gns", 2.0))]
    axes = drawn("Noise scale gns and batch size", write_run(tmp_path / "a", records, PLAN))
    assert intervals(axes, "undetermined") == [(0, 1600)]
    assert not intervals(axes, "loss or gradient not finite")


def test_two_clauses_have_panels_of_their_own(tmp_path: Path) -> None:
    written = plan(
        ("noise_scale", "early", {"example": "row", "level": 0.9}),
        ("noise_scale", "late", {"example": "document", "separator": 0, "level": 0.9}),
    )
    layers = {"a": 1.0, "b": 2.0}
    series = {f"{label}{part}": layers for label in ("early", "late") for part in ("", ".signal")}
    records = [
        step(n, figures("early", 1.0 * n), figures("late", 5.0 * n), series=series) for n in (1, 2)
    ]
    run = write_run(tmp_path / "a", records, written)
    assert [panel.title for panel in list_panels(read_runs([run]), noise_panels(run))] == [
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
    assert draw_runs([run], tmp_path / "picture.png").stat().st_size > 10_000


def test_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, [step(n, figures("gns", by * n)) for n in (1, 2)], PLAN)
        for name, by in (("a", 1.0), ("b", 3.0))
    ]
    axes = drawn("Noise scale gns and batch size", *runs)
    assert line(axes, "a gns")[1] == [1, 2]
    assert line(axes, "b gns")[1] == [3, 6]
    assert names(axes) == ["a batch size", "b batch size", "a gns", "b gns"]


def test_a_noise_scale_that_is_never_determined_is_drawn(tmp_path: Path) -> None:
    layers = {"gns": {"a": NAN, "b": NAN}}
    records = [step(n, figures("gns", NAN, signal=NAN), series=layers) for n in (1, 2, 3)]
    run = write_run(tmp_path / "a", records, PLAN)
    axes = drawn("Noise scale gns and batch size", run)
    assert intervals(axes, "undetermined") == [(0, 2400)]
    assert names(axes) == ["batch size", "undetermined", "gns"]
    assert draw_runs([run], tmp_path / "picture.png").exists()


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
    assert bar.get_ylabel() == "samples"


def test_layers_at_the_end_have_intervals_with_arrows_where_they_have_no_bound(
    tmp_path: Path,
) -> None:
    known = {
        "gns": {"a": 4.0, "b": 5.0, "c": NAN, "d": NAN},
        "gns.low": {"a": 2.0, "b": 0.0, "c": 7.0, "d": NAN},
        "gns.high": {"a": 9.0, "b": math.inf, "c": math.inf, "d": NAN},
    }
    lost = {name: dict.fromkeys("abcd", NAN) for name in known}
    records = [step(n, figures("gns", 1.0), series=s) for n, s in ((1, known), (2, lost))]
    run = write_run(tmp_path / "a", records, PLAN)
    axes = drawn("Noise scale gns by layer at the end", run)
    at, rows = line(axes, "_value")
    assert at == pytest.approx([4, 5, NAN, NAN], nan_ok=True)
    assert rows == [0, 1, 2, 3]
    assert line(axes, "_known ends") == ([2, 7, 9], [0, 2, 0])
    bars = [
        np.asarray(one.get_xydata()).tolist()
        for one in axes.lines
        if one.get_label() == "_interval"
    ]
    assert bars == [[[2, 0], [9, 0]], [[5, 1], [5, 1]], [[7, 2], [7, 2]]]
    assert line(axes, "_b left") == line(axes, "_b right") == ([5], [1])
    assert line(axes, "_c right") == ([7], [2])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c", "d"]
    assert axes.yaxis_inverted()
    assert axes.get_xlabel() == "samples, 90% interval"
    # What is drawn here is not drawn again as a figure by layer.
    assert not [
        p.title for p in list_panels(read_runs([run]), noise_panels(run)) if "gns.low" in p.title
    ]


def test_layers_without_any_bound_have_no_panel_at_the_end(tmp_path: Path) -> None:
    for low, high in ((0.0, math.inf), (NAN, NAN)):
        series = {"gns": NAN, "gns.low": low, "gns.high": high}
        layers = {name: dict.fromkeys("ab", value) for name, value in series.items()}
        run = write_run(tmp_path / str(low), [step(1, figures("gns", 1.0), series=layers)], PLAN)
        titles = [panel.title for panel in noise_panels(run) if panel.wide]
        assert titles == ["Noise scale gns by layer"]


def test_labels_of_the_colour_scale_do_not_overlap(tmp_path: Path) -> None:
    for count in (2, 5, 30):
        layers = {str(i): 10.0 ** (6 * i / (count - 1) - 3) for i in range(count)}
        run = write_run(
            tmp_path / str(count), [step(1, figures("gns", 1.0), series={"gns": layers})], PLAN
        )
        axes = drawn("Noise scale gns by layer", run)
        (bar,) = [other for other in axes.figure.axes if other is not axes]
        ticks = bar.get_yticks()
        (panel,) = [p for p in noise_panels(run) if p.wide]
        apart = np.diff(np.log10(ticks)) / np.ptp(np.log10(bar.get_ylim())) * (panel.height - 1)
        assert len(ticks) >= 2
        assert min(apart) > 0.15


def test_a_hundred_layers_are_named_and_of_more_only_some(tmp_path: Path) -> None:
    for count, named in ((100, 100), (300, 100)):
        layers = {f"blocks.{i}": 1.0 + i for i in range(count)}
        records = [step(n, figures("gns", 1.0), series={"gns": layers}) for n in (1, 2)]
        run = write_run(tmp_path / str(count), records, PLAN)
        axes = drawn("Noise scale gns by layer", run)
        labels = [text.get_text() for text in axes.get_yticklabels()]
        assert len(labels) == named <= NAMED
        assert labels[:2] == ["blocks.0", f"blocks.{count // named}"]
        # Names do not touch: a row of names is at least as high as its letters, in points.
        (panel,) = [p for p in noise_panels(run) if p.wide]
        assert 72 * (panel.height - 1.1) / named >= 6


def test_a_long_run_has_as_many_columns_as_can_be_seen(tmp_path: Path) -> None:
    series = [{"gns": {"a": float(n), "b": NAN}} for n in range(1, 1002)]
    records = [step(n, figures("gns", 1.0), series=s) for n, s in enumerate(series, 1)]
    run = write_run(tmp_path / "a", records, PLAN)
    found, edges, values = heat_map(read_runs([run])[0], "gns")
    assert found == ["a", "b"]
    assert len(edges) == len(values[0]) + 1 <= COLUMNS + 1
    assert (edges[0], edges[-1]) == (0, 1001 * 800)
    assert values[0][:2] == [3, 6]
    assert values[0][-1] == 1001
    assert [800 * value for value in values[0]] == edges[1:]


def test_one_layer_has_no_map(tmp_path: Path) -> None:
    records = [step(n, figures("gns", 1.0), series={"gns": {"head": 1.0}}) for n in (1, 2)]
    titles = [panel.title for panel in noise_panels(write_run(tmp_path / "a", records, PLAN))]
    assert titles == ["Noise scale gns and batch size"]


SLOPE = {"gns.slope": 1.5, "gns.slope_low": 1.2, "gns.slope_high": 1.8}
POINTS = [(2.0, 3.5), (NAN, 1.0), (10.0, 14.0)]


def calibrated(
    folder: Path,
    points: list[tuple[float, float]],
    slope: dict[str, float],
    total: dict[str, float] | None = None,
) -> Axes:
    """Return the panel of a run whose every step has a calibration."""
    records = [
        step(n, figures("gns", 4.0), total or {}, slope, {"gns.point": x, "gns.point_total": y})
        for n, (x, y) in enumerate(points, 1)
    ]
    return drawn("Noise scale of the whole model over gns", write_run(folder, records, PLAN))


def test_calibration_is_drawn_with_the_line_and_its_interval(tmp_path: Path) -> None:
    axes = calibrated(tmp_path / "a", POINTS, SLOPE)
    (dots,) = [c for c in axes.collections if c.get_label() == "measured"]
    assert np.asarray(dots.get_offsets()).tolist() == [[2, 3.5], [10, 14]]
    # The colour is the age, over the whole run.
    assert np.asarray(dots.get_array()).tolist() == [800, 2400]
    assert dots.get_clim() == (0, 2400)
    x, y = line(axes, "slope 1.5")
    assert y == pytest.approx([1.5 * value for value in x])
    assert names(axes) == ["measured", "slope 1.5", "90% interval, 1.2 to 1.8"]
    assert "whole model" in axes.get_ylabel()
    assert "measured layers, samples" in axes.get_xlabel()
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
    assert axes.get_ylim() == pytest.approx((0, 1.1 * 14))


def test_calibrations_over_decades_have_logarithmic_axes(tmp_path: Path) -> None:
    points = [(0.1, 0.5), (1.0, 2.0), (30.0, 50.0)]
    axes = calibrated(tmp_path / "a", points, SLOPE)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim() == pytest.approx((0.1 / 1.5, 30 * 1.5))
    assert axes.get_ylim() == pytest.approx((0.5 / 1.5, 50 * 1.5))
    assert [text.get_text() for text in axes.get_xticklabels()][:3] == ["0.1", "0.2", "0.5"]
    x, _ = line(axes, "slope 1.5")
    assert x == pytest.approx([0.1 / 1.5, 30 * 1.5])


def test_the_prediction_at_the_end_is_among_the_calibrations(tmp_path: Path) -> None:
    total = whole(4.0, math.inf, 6.0)
    axes = calibrated(tmp_path / "a", POINTS, SLOPE, total)
    assert line(axes, "predicted at the end") == ([4], [6])
    assert line(axes, "_predicted up") == ([4], [6])
    (bar,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    assert bar.get_segments()[0].tolist() == [[4, 4], [4, 6]]


def ends_of(axes: Axes) -> tuple[list[float], list[float]]:
    """Return the one end that a slope's interval has."""
    found = [line for line in axes.lines if line.get_label() == "_end"]
    data = [np.asarray(one.get_xydata()).tolist() for one in found]
    assert all(one == data[0] for one in data)
    return [x for x, _ in data[0]], [y for _, y in data[0]]


def test_the_line_is_that_of_the_last_calibration_with_an_estimate(tmp_path: Path) -> None:
    records = [
        step(1, figures("gns", 4.0), SLOPE, {"gns.point": 2.0, "gns.point_total": 3.0}),
        step(2, figures("gns", NAN, signal=NAN), SLOPE | {"gns.slope": NAN, "gns.slope_low": 9.0}),
    ]
    axes = drawn(
        "Noise scale of the whole model over gns", write_run(tmp_path / "a", records, PLAN)
    )
    assert names(axes) == ["measured", "slope 1.5", "90% interval, 1.2 to 1.8"]


def test_a_slope_without_a_bound_has_arrows(tmp_path: Path) -> None:
    from_below = {"gns.slope": 1.5, "gns.slope_low": 1.2, "gns.slope_high": math.inf}
    axes = calibrated(tmp_path / "a", POINTS, from_below)
    assert names(axes)[-1] == "90% interval, above 1.2"
    x, y = line(axes, "_slope up")
    assert y == pytest.approx([1.5 * value for value in x])
    # Where only a lower end is known there is no line to start from.
    axes = calibrated(tmp_path / "b", POINTS, {**from_below, "gns.slope": NAN})
    x, y = line(axes, "_slope up")
    assert y == pytest.approx([1.2 * value for value in x])
    _, y = ends_of(axes)
    assert y == pytest.approx([1.2 * value for value in axes.get_xlim()])
    # Zero is on a linear axis, and not on a logarithmic one.
    to_zero = {"gns.slope": 1.5, "gns.slope_low": -3.0, "gns.slope_high": 6.0}
    axes = calibrated(tmp_path / "c", POINTS, to_zero)
    assert names(axes)[-1] == "90% interval, 0 to 6"
    assert not [one for one in axes.lines if str(one.get_label()).startswith("_slope")]
    axes = calibrated(tmp_path / "d", [(0.1, 0.5), (30.0, 50.0)], to_zero)
    x, y = line(axes, "_slope down")
    assert y == pytest.approx([1.5 * value for value in x])


def test_an_early_calibration_has_dots_and_no_line(tmp_path: Path) -> None:
    axes = calibrated(tmp_path / "a", [(2.0, 3.0)], dict.fromkeys(SLOPE, NAN))
    assert names(axes) == ["measured"]
    assert [one.get_label() for one in axes.lines] == ["_history"]
