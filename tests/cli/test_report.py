"""`trainc report` on noise scales: the figures side by side, layers at the end, and without matplotlib."""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.noise_runs import NAN, figures, plan, six_steps, step, write_run
from trainc.cli.app import main
from trainc.compiler.constructs.noise_scale.gns import Gns
from trainc.compiler.driver.recorded_clauses import panels_of
from trainc.runtime.report.axes import Panel
from trainc.runtime.report.plots import read_runs

PLAN = plan(("noise_scale", "gns", {"example": "row", "level": 0.9}))


def report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run the command and return exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["trainc", "report", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def row(out: str, name: str) -> list[str]:
    """Return the cells of the first row with a name."""
    (found, *_) = [line for line in out.splitlines() if line.startswith(name)]
    return re.split(r"\s{2,}", found[len(name) :].strip())


def test_a_report_has_the_noise_scale_and_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", six_steps(), PLAN)
    status, out, _ = report(monkeypatch, capsys, run)
    assert status == 0
    assert row(out, "gns, samples") == ["? |G|^2 uncertain, > 3"]
    assert row(out, "gns undetermined") == ["3 of 6 steps"]
    assert row(out, "gns over the run") == ["▁!!▅█!"]
    heads = ["samples", "|G|^2", "tr(Sigma)", "share of tr(Sigma)", "undetermined"]
    assert row(out, "gns by layer") == heads
    layers = out[out.index("gns by layer") :]
    assert row(layers, "a ") == ["?", "1", "3", "30.0%", "50% of steps"]
    assert row(layers, "b ") == ["12", "2", "5", "50.0%", "0% of steps"]
    assert row(layers, "c ") == ["?", "-1", "2", "20.0%", "100% of steps"]
    assert "of the whole model" not in out


def test_runs_with_and_without_calibration_are_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    total = {"gns.total": 15.0, "gns.total_low": 9.0, "gns.total_high": 21.0, "gns.slope": 1.5}
    runs = [
        write_run(tmp_path / "a", [step(1, figures("gns", 10.0, 8.0, 14.0), total)], PLAN),
        write_run(tmp_path / "b", [step(1, figures("gns", 20.0))], PLAN),
        write_run(tmp_path / "c", [step(1)], plan()),
    ]
    status, out, _ = report(monkeypatch, capsys, *runs)
    assert status == 0
    assert row(out, "gns, samples") == ["10 [8, 14]", "20 [?]", "-"]
    assert row(out, "gns of the whole model, samples") == ["15 [9, 21]", "-", "-"]


def test_runs_that_measure_different_examples_share_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = plan(("noise_scale", "gns", {"example": "document", "separator": 0, "level": 0.5}))
    runs = [
        write_run(tmp_path / name, [step(1, figures("gns", scale))], written)
        for name, scale, written in (("a", 10.0, PLAN), ("b", 20.0, other))
    ]
    status, out, _ = report(monkeypatch, capsys, *runs)
    assert status == 0
    assert row(out, "gns, samples or documents") == ["10 [?]", "20 [?]"]


def test_two_clauses_have_rows_and_tables_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = plan(
        ("noise_scale", "early", {"example": "row", "level": 0.9}),
        ("noise_scale", "late", {"example": "document", "separator": 0, "level": 0.9}),
    )
    series = {"early": {"x": 4.0}, "late": {"y": 5.0}}
    record = step(
        1, figures("early", 4.0, 3.0, 5.0), figures("late", NAN, signal=NAN), series=series
    )
    status, out, _ = report(monkeypatch, capsys, write_run(tmp_path / "a", [record], written))
    assert status == 0
    assert row(out, "early, samples") == ["4 [3, 5]"]
    assert row(out, "late, documents") == ["? no estimate"]
    assert row(out, "early by layer")[0] == "samples"
    assert row(out, "late by layer")[0] == "documents"
    # LoweredMethod that an older run did not record by layer are unknown, not zero.
    assert row(out[out.index("early by layer") :], "x ") == ["4", "?", "?", "?", "0% of steps"]


@pytest.mark.parametrize(
    ("name", "begins"),
    [("a", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")],
)
def test_a_picture_has_the_format_of_its_name(
    name: str,
    begins: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run(tmp_path / "run", six_steps(), PLAN)
    assert report(monkeypatch, capsys, run, "--plot", tmp_path / name)[0] == 0
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_picture_of_another_format_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", six_steps(), PLAN)
    status, out, err = report(monkeypatch, capsys, run, "--plot", tmp_path / "a.webp")
    assert (status, out) == (2, "")
    assert "end its name in .png, .pdf or .svg" in " ".join(err.replace("│", " ").split())
    assert "--plot" in err
    assert not (tmp_path / "a.webp").exists()


def test_a_picture_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", six_steps(), PLAN)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = tmp_path / "picture.png"
    status, out, err = report(monkeypatch, capsys, run, "--plot", picture)
    assert status == 1
    assert "pip install trainc[plots]" in err
    assert "gns by layer" in out
    assert not picture.exists()


def test_a_real_run_records_what_the_report_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainc.runtime.noise_scale.pictures.layer_table import last_layers
    from trainc.runtime.storage.jsonl import read_jsonl

    spec = tmp_path / "small.train"
    spec.write_text(
        """
        train 1
        model "examples.models:gpt" { layers = 2, width = 32, heads = 2, context = 16 }
        data "examples.data:stdlib" { batch = 4 samples, context = 16, limit_bytes = 30_000 }
        loss cross_entropy
        run { length = 6 steps, seed = 5 }
        optimizer adamw { lr = 3e-3 }
        noise_scale gns as scale on type(LayerNorm) { smooth = 5 steps, calibrate = 2 steps }
        """
    )
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["trainc", "run", str(spec), "-o", str(run), "--plain"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    assert "scale of the whole model" in capsys.readouterr().out
    records = [record for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]
    layers = last_layers(records, "scale")
    assert len(layers) == 5
    for layer in layers:
        if layer.signal > 0 and layer.noise > 0:
            assert layer.noise_scale == pytest.approx(layer.noise / layer.signal)
    # All layers are averaged alike, so their parts add up to those of the clause.
    assert math.fsum(layer.noise for layer in layers) == pytest.approx(records[-1]["scale.noise"])
    assert math.fsum(layer.signal for layer in layers) == pytest.approx(records[-1]["scale.signal"])
    # A layer is as sure as the steps it was averaged over, and not as all layers together.
    series = records[-1]["series"]
    for layer in layers:
        low, high = (series[f"scale.{end}"][layer.name] for end in ("low", "high"))
        assert 0 <= low < high
        assert math.isnan(layer.noise_scale) or low <= layer.noise_scale <= high
    calibrated = [record["step"] for record in records if "scale.point" in record]
    assert len(calibrated) == 3
    assert all("scale.slope_high" in records[number - 1] for number in calibrated)
    status, out, _ = report(monkeypatch, capsys, run)
    assert status == 0
    assert "scale of the whole model" in out
    assert "scale by layer" in out


def test_a_clause_whose_construct_is_not_here_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = plan(("observe", "gone", {}), ("noise_scale", "gns", {"level": 0.5, "older": 1}))
    gone["clauses"][0]["construct"] = "gone"
    run = write_run(tmp_path / "a", [step(1, figures("gns", 10.0))], gone)
    status, out, _ = report(monkeypatch, capsys, run)
    assert status == 0
    unseen = "its signals, tables and panels are not shown"
    assert f"gone: {unseen}: `observe gone` is not installed here" in out
    assert f"gns: {unseen}: `noise_scale gns` has other fields here than when" in out
    assert "older" in out


def test_what_a_construct_fails_to_show_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("boom")

    def late(*_: Any) -> Iterator[Panel]:
        yield Panel("Own", fail)
        raise KeyError("boom")

    for name, value in (("signal_text", fail), ("tables", fail), ("panels", classmethod(late))):
        monkeypatch.setattr(Gns, name, value)
    run = write_run(tmp_path / "a", six_steps(), PLAN)
    status, out, _ = report(monkeypatch, capsys, run, "--plot", tmp_path / "a.png")
    assert status == 0
    assert row(out, "gns, samples") == ["KeyError: 'boom'"]
    assert "gns: its tables cannot be made: KeyError: 'boom'" in out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    own, failed = panels_of(read_runs([run]))
    assert (own.title, failed.title) == ("Own", "gns")


DEEP = "[" * 100_000
WRONG: dict[str, list[str]] = {
    "metrics.jsonl": [
        "oops\n", "[1]\n", f"{DEEP}\n", '{"step": 1, "loss": "high"}\n', '{"loss": 1.0}\n',
        '{"step": 1, "eval_loss": null}\n',
        '{"step": 1, "samples": 1, "tokens": 1, "epochs": 1, "batch": 1, "loss": 1, "series": {"a": 3}}\n',
    ],
    "plan.json": ["{", "[]", DEEP, '{"clauses": 3}', '{"clauses": [3]}', '{"clauses": [{"kind": "run"}]}'],
    "summary.json": ["", "3", '{"lines": 3}', '{"lines": [3]}', '{"reason": 3}', '{"message": {}}'],
    "timing.jsonl": ["{}\n", "oops\n", '{"seconds": "long"}\n'],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in WRONG.items() for t in texts])
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
) -> None:
    run = write_run(tmp_path / "a", six_steps(), PLAN)
    (run / name).write_text(text)
    status, _, err = report(monkeypatch, capsys, run)
    assert status in (1, 2)
    assert name in err
    assert "Traceback" not in err
    (run / name).unlink()
    os.mkfifo(run / name)
    status, _, err = report(monkeypatch, capsys, run)
    assert status == 1
    assert err == f"trainc: {run / name} is not a plain file\n"


def test_a_report_imports_nothing_that_a_plan_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "optimizer_of_others.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    fields = {"path": ["path", "optimizer_of_others:Adam"], "lr": ["num", 1.0]}
    written = plan(("observe", "torch", fields))
    written["clauses"][0] |= {"kind": "optimizer", "construct": "torch"}
    run = write_run(tmp_path / "a", six_steps(), written)
    assert report(monkeypatch, capsys, run)[0] == 0
    assert "optimizer_of_others" not in sys.modules
