"""Pictures of runs."""

import json
import math
import random
from pathlib import Path

import pytest

from trainc.runtime.metrics import encode
from trainc.runtime.plots import draw, list_panels, load, smooth

pytest.importorskip("matplotlib")

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
    return folder


def test_one_run_has_a_panel_for_all_it_measured(tmp_path: Path) -> None:
    run = record_run(tmp_path / "a")
    titles = [panel.title for panel in list_panels(load([run]))]
    assert titles == ["Loss", "Learning rate", "Noise scale gns and batch size", "norm by layer"]
    output = draw([run], tmp_path / "pictures/run.png")
    assert output.read_bytes().startswith(PNG)


def test_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    runs = [record_run(tmp_path / name / "seed-1", seed=i) for i, name in enumerate("ab")]
    loaded = load(runs)
    assert [run.name for run in loaded] == ["a/seed-1", "b/seed-1"]
    assert len({run.color for run in loaded}) == 2
    assert [panel.title for panel in list_panels(loaded)][3:] == [
        "norm by layer, a/seed-1",
        "norm by layer, b/seed-1",
    ]
    assert draw(runs, tmp_path / "both.png").read_bytes().startswith(PNG)


def test_a_run_that_measured_little_is_drawn_too(tmp_path: Path) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert [panel.title for panel in list_panels(load([folder]))] == ["Loss"]
    assert draw([folder], tmp_path / "short.png").exists()


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        draw([tmp_path], tmp_path / "x.png")
    with pytest.raises(ValueError, match="no run to draw"):
        draw([], tmp_path / "x.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step was measured"):
        draw([tmp_path], tmp_path / "x.png")


def test_smoothing_starts_unbiased_and_skips_what_is_not_finite() -> None:
    assert smooth([2.0, 2.0, 2.0], 10) == pytest.approx([2, 2, 2])
    found = smooth([1.0, math.nan, 3.0], 2)
    assert math.isnan(found[1])
    assert found[2] == pytest.approx((0.5 * 1 + 3) / 1.5)
    assert smooth([1.0, 5.0], 1) == [1, 5]
