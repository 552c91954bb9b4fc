"""Pictures of runs."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime import noise_runs
from tests.runtime.noise_runs import figures, plan, write_run
from trainc.runtime.storage.jsonl import encode

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainc.compiler.driver.recorded_clauses import draw_runs, panels_of
from trainc.runtime.report.axes import Panel, round_numbers
from trainc.runtime.report.families import draw_family, draw_times
from trainc.runtime.report.plots import list_panels, read_runs, smooth
from trainc.runtime.report.run_records import RecordedClause, RunRecords
from trainc.runtime.report.shown_signal import ShownSignal
from trainc.runtime.report.signal_panels import signal_panels

PNG = b"\x89PNG\r\n\x1a\n"


def record_run(folder: Path, steps: int = 300, seed: int = 0, layers: int = 3) -> Path:
    noise = random.Random(seed)
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        rate = 3e-4 * min(1, step / 20)
        record = {
            "step": step,
            "loss": math.nan if step == 250 else 4 * step**-0.3 + 0.2 * noise.gauss(0, 1),
            "lr_min": 0.5 * rate,
            "lr_max": 1.5 * rate,
            "gns": step - 10.0 if step > 10 else math.nan,
            **{f"gns.{part}": 1.0 for part in ("signal", "noise", "low", "high")},
            "batch": 32 if step < 100 else 64,
        }
        if step % 10 == 0:
            norms = {f"blocks.{i}": 1 + i * step / steps for i in range(layers)}
            record["series"] = {"norm": norms}
        lines.append(record)
        if step % 50 == 0:
            lines.append({"step": step, "eval_loss": 4 * step**-0.3})
    text = "".join(json.dumps(encode(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "plan.json").write_text(json.dumps(plan(("noise_scale", "gns", {}))))
    return folder


def panels(*folders: Path) -> list[Panel]:
    runs = read_runs(folders)
    return list_panels(runs, [*panels_of(runs)])


def fill(*folders: Path) -> dict[str, Axes]:
    """Return the axes of all panels, filled, by title."""
    filled = {}
    for panel in panels(*folders):
        filled[panel.title] = Figure().subplots()
        panel.draw(filled[panel.title])
    return filled


def growing(folder: Path, first: int = 8, tokens: int = 100) -> Path:
    """Write a run whose batch doubles after every second step, with one evaluation after the fourth."""
    records = []
    samples = 0
    for n in range(1, 7):
        batch = first * 2 ** ((n - 1) // 2)
        samples += batch
        layers = {"gns": {"a": 1.0, "b": 2.0}, "norm": {"a": 1.0}}
        one = noise_runs.step(
            n, figures("gns", 2.0), {"lr_min": 1e-3, "lr_max": 1e-3}, series=layers
        )
        records.append(one | {"batch": batch, "samples": samples, "tokens": tokens * samples})
        if n == 4:
            records.append({"step": 4, "eval_loss": 0.5})
    return write_run(folder, records, plan(("noise_scale", "gns", {"level": 0.9})))


def positions(axes: Axes, label: str) -> list[float]:
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return [float(at) for at in np.asarray(found.get_xdata())]


def test_all_panels_over_a_run_have_the_same_axis(tmp_path: Path) -> None:
    axes = fill(growing(tmp_path / "a"))
    at = [800, 1600, 3200, 4800, 8000, 11200]
    assert positions(axes["Loss"], "training") == at
    assert positions(axes["Loss"], "evaluation") == [4800]
    assert positions(axes["Noise scale gns and batch size"], "gns") == at
    assert positions(axes["norm by layer"], "a") == at
    assert {one.get_xlabel() for one in axes.values()} == {"tokens"}
    narrow = [one for title, one in axes.items() if title != "Noise scale gns by layer"]
    assert {one.get_xlim() for one in narrow} == {(-112, 11312)}
    assert axes["Noise scale gns by layer"].get_xlim() == (0, 11200)


def test_runs_are_drawn_over_a_counter_that_all_have(tmp_path: Path) -> None:
    text, images = growing(tmp_path / "text"), growing(tmp_path / "images", tokens=1)
    assert {one.get_xlabel() for one in fill(images).values()} == {"samples"}
    both = fill(text, images)
    assert {one.get_xlabel() for one in both.values()} == {"samples"}
    assert positions(both["Loss"], "text") == positions(both["Loss"], "images")
    # A run that counts no tokens has only its steps in common with others.
    steps = record_run(tmp_path / "steps")
    assert {one.get_xlabel() for one in fill(text, steps).values()} == {"step"}
    assert fill(text, steps)["Loss"].get_xlim()[1] == pytest.approx(303)


def test_ticks_of_counts_are_integers(tmp_path: Path) -> None:
    for steps in (1, 2, 3, 5, 30, 3000):
        axes = fill(record_run(tmp_path / str(steps), steps=steps))["Loss"]
        ticks = axes.get_xticks()
        assert [float(tick).is_integer() for tick in ticks] == [True] * len(ticks)
        assert len(ticks) > 1


def test_steps_with_a_non_finite_loss_are_marked(tmp_path: Path) -> None:
    records = [
        noise_runs.step(n) | {"loss": math.nan if n in (2, 3, 5) else 1.0} for n in range(1, 7)
    ]
    axes = fill(write_run(tmp_path / "a", records))["Loss"]
    boxes = [(box.get_x(), box.get_x() + box.get_width()) for box in axes.patches]  # type: ignore[attr-defined]
    assert boxes == [(800, 2400), (3200, 4000)]
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["training", "not finite, first at step 2"]


def test_rates_are_written_in_full(tmp_path: Path) -> None:
    axes = fill(growing(tmp_path / "a"))["Learning rate"]
    axes.set_yticks([0.00025, 0.001])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0.00025", "0.001"]


def test_round_numbers_are_few() -> None:
    assert round_numbers(0.9, 60, 12) == pytest.approx([1, 2, 5, 10, 20, 50])
    assert round_numbers(0.9, 60, 4) == pytest.approx([1, 3, 10, 30])
    assert round_numbers(0.9, 60, 3) == pytest.approx([1, 10])
    assert round_numbers(1e-6, 1e6, 5) == pytest.approx([1e-6, 1e-3, 1, 1e3, 1e6])
    assert round_numbers(1.13, 1.44, 5) == pytest.approx([1.2, 1.4])
    assert len(round_numbers(1, 1.01, 5)) > 1


def test_one_run_has_a_panel_for_all_it_measured(tmp_path: Path) -> None:
    run = record_run(tmp_path / "a")
    titles = [panel.title for panel in panels(run)]
    assert titles == ["Loss", "Learning rate", "Noise scale gns and batch size", "norm by layer"]
    output = draw_runs([run], tmp_path / "pictures/run.png")
    assert output.read_bytes().startswith(PNG)


def test_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    runs = [record_run(tmp_path / name / "seed-1", seed=i) for i, name in enumerate("ab")]
    loaded = read_runs(runs)
    assert [run.name for run in loaded] == ["a/seed-1", "b/seed-1"]
    assert len({run.color for run in loaded}) == 2
    assert [panel.title for panel in panels(*runs)][3:] == [
        "norm by layer, a/seed-1",
        "norm by layer, b/seed-1",
    ]
    assert draw_runs(runs, tmp_path / "both.png").read_bytes().startswith(PNG)


def test_a_run_with_few_records_is_drawn_too(tmp_path: Path) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert [panel.title for panel in panels(folder)] == ["Loss"]
    assert draw_runs([folder], tmp_path / "short.png").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        draw_runs([tmp_path], tmp_path / "x.png")
    with pytest.raises(ValueError, match="expected the folder of at least one run"):
        draw_runs([], tmp_path / "x.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no records yet"):
        draw_runs([tmp_path], tmp_path / "x.png")


def test_smoothing_starts_unbiased_and_skips_what_is_not_finite() -> None:
    assert smooth([2.0, 2.0, 2.0], 10) == pytest.approx([2, 2, 2])
    found = smooth([1.0, math.nan, 3.0], 2)
    assert math.isnan(found[1])
    assert found[2] == pytest.approx((0.5 * 1 + 3) / 1.5)
    assert smooth([1.0, 5.0], 1) == [1, 5]


def test_a_clause_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    run = record_run(tmp_path / "a")
    planned = plan(("noise_scale", "gns", {}))
    for key, value in (("fields", {"no_such": 1}), ("construct", "no_such"), ("dropped", "why")):
        changed = {"clauses": [{**planned["clauses"][0], key: value}]}
        (run / "plan.json").write_text(json.dumps(changed))
        titles = [panel.title for panel in panels(run)]
        assert titles == ["Loss", "Learning rate", "norm by layer"]


def test_a_signal_has_a_panel_in_the_general_form(tmp_path: Path) -> None:
    written = plan(("observe", "norm_growth", {}))
    runs = [
        write_run(
            tmp_path / name,
            [noise_runs.step(n, {"norm_growth.norm": by * n}) for n in (1, 2)],
            written,
        )
        for name, by in (("a", 1.0), ("b", 3.0))
    ]
    axes = fill(*runs)["norm_growth norm"]
    assert [positions(axes, name) for name in ("a", "b")] == [[800, 1600]] * 2
    (one,) = [line for line in axes.lines if line.get_label() == "b"]
    assert np.asarray(one.get_ydata()).tolist() == [3, 6]
    assert axes.get_yscale() == "linear"


def test_the_general_form_draws_intervals_and_units(tmp_path: Path) -> None:
    run = growing(tmp_path / "a")
    (records,) = read_runs([run])
    signal = ShownSignal("gns", "gns", "samples", ("gns.low", "gns.high"), logarithmic=True)
    records = replace(
        records, records=[r | {"gns.low": 1.0, "gns.high": 4.0} for r in records.records]
    )
    (panel,) = signal_panels([RecordedClause(records, "gns", None, (signal,))], [records])
    axes = Figure().subplots()
    panel.draw(axes)
    assert axes.get_ylabel() == "samples"
    assert axes.get_yscale() == "log"
    assert len(axes.collections) == 1
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["gns", "interval"]


@pytest.mark.parametrize("counter", ["step", "tokens"])
def test_what_is_measured_in_evaluations_is_drawn_at_the_steps_before_them(
    counter: str, tmp_path: Path
) -> None:
    lines: list[dict[str, Any]] = []
    for step in range(1, 7):
        lines.append({"step": step, "loss": 1.0, "samples": 8 * step, "tokens": 100 * step})
        if step % 3 == 0:
            lines.append({"step": step, "eval_loss": 1.0, "calibration.ece": 0.1 * step})
    if counter == "step":
        lines = [{k: v for k, v in line.items() if k != "tokens"} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clause = {"kind": "observe", "label": "calibration", "construct": "calibration", "fields": {}}
    (tmp_path / "plan.json").write_text(json.dumps({"clauses": [clause]}))
    (panel,) = [p for p in panels(tmp_path) if p.title == "calibration error"]
    axes = Figure().add_subplot()
    panel.draw(axes)
    (line,) = axes.lines
    at = [3.0, 6.0] if counter == "step" else [300.0, 600.0]
    assert np.array_equal(line.get_xdata(), at)
    assert np.allclose(line.get_ydata(), [0.3, 0.6])


def test_times_that_are_not_reached_are_marked_once_in_words() -> None:
    """Words at each of them ran into each other."""
    axes = Figure().add_subplot()
    names = [*map(str, range(40))]
    draw_times(axes, names, [1.0] * 40, [3.0, *[None] * 39], ("frequency", "size", "step"))
    (points,) = [one for one in axes.figure.axes if one is not axes]
    assert not points.texts
    reached, missing = points.lines
    assert np.array_equal(reached.get_xydata(), [[0, 3]])
    assert np.array_equal(missing.get_xdata(), range(1, 40))
    legend = points.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["not yet"]
    assert not any(line.get_visible() for line in points.get_ygridlines())


@pytest.mark.parametrize(("count", "named"), [(3, [0, 1, 2]), (40, [0, 39])])
def test_a_family_of_curves_is_named_with_its_limit(count: int, named: list[int]) -> None:
    axes = Figure().add_subplot()
    series = {f"k = {k}": ([0.0, 1.0], [1.0, 0.5]) for k in range(count)}
    draw_family(axes, series, 0.1, "error", [RunRecords("a", [], "red")])
    legend = axes.get_legend()
    assert legend is not None
    told = [text.get_text() for text in legend.get_texts()]
    assert told == [*(f"k = {k}" for k in named), "limit, 0.1"]
