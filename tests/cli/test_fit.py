"""`trainc fit` on runs of its own: what it reads of them, and errors that name a run and what it lacks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from tests.cli.test_app import command
from trainc.cli.fit import fit_batch_of, losses_of, reached, trained
from trainc.compiler.driver.train import train
from trainc.runtime.report.run_records import RunRecords

SPEC = """train 1
model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 16 }
data "examples.data:stdlib" { batch = BATCH samples, context = 16, limit_bytes = 30_000 }
loss cross_entropy
noise_scale gns on type(LayerNorm) { smooth = 4 steps }
optimizer adamw { lr = 1e-2 }
run { length = 24 steps, device = cpu, eval = 4 steps, eval_batches = 2START }
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs of two batch sizes, and one that began with the weights of another."""
    folder = tmp_path_factory.mktemp("runs")
    for name, batch, start in (("b4", 4, ""), ("b16", 16, ""), ("tuned", 4, "b4")):
        spec = folder / f"{name}.train"
        begun = f', start = "{folder / start}"' if start else ""
        spec.write_text(SPEC.replace("BATCH", str(batch)).replace("START", begun))
        train(spec, folder / name, quiet=True, preflight=False)
    return folder


def records(folder: Path) -> RunRecords:
    return RunRecords.of(folder, str(folder), "")


def test_a_run_says_its_size_its_data_and_whether_it_began_pretrained(runs: Path) -> None:
    one, other = (trained(records(runs / name)) for name in ("b4", "tuned"))
    block = 16 * 48 + 48 + 16 * 16 + 16 + 16 * 64 + 64 + 64 * 16 + 16 + 3 * 32
    assert one.size == block + 256 * 16  # the head counts, the embeddings do not
    assert one.data == 24 * 4 * 16  # less than an epoch: what it has seen
    assert not one.pretrained
    assert other.pretrained
    losses = [r["eval_loss"] for r in records(runs / "b4").records if "eval_loss" in r]
    assert one.loss == min(losses)


def test_the_batch_law_is_of_the_loss_that_all_reached(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    law, of = fit_batch_of([runs / "b4", runs / "b16"])
    assert of == "evaluation"
    assert law.loss == max(trained(records(runs / name)).loss for name in ("b4", "b16"))
    assert [round(point.batch) for point in law.points] == [4, 16]
    assert all(dict(point.noise)["gns"] > 0 for point in law.points)
    assert command(monkeypatch, "fit", "batch", str(runs / "b4"), str(runs / "b16")) == 0
    assert "critical batch" in capsys.readouterr().out


def test_a_loss_between_two_evaluations_is_interpolated(runs: Path) -> None:
    run = records(runs / "b4")
    course = losses_of(run, True)
    (at, samples, high), (then, _, low) = course[:2]
    found = reached(run, course, (high + low) / 2)
    assert found.steps == pytest.approx((at + then) / 2)
    assert found.samples == pytest.approx(samples + 4 * (then - at) / 2)


def test_training_losses_are_running_means(runs: Path) -> None:
    run = records(runs / "b4")
    steps = [r["loss"] for r in run.steps]
    assert [loss for *_, loss in losses_of(run, False)] == pytest.approx(steps)  # of 24 / 20 steps


@pytest.mark.parametrize(
    ("damage", "verb", "said"),
    [
        ("evaluations", "transfer", "lacks an evaluation"),
        ("sizes", "transfer", "lacks the number of its parameters"),
        ("units", "transfer", "lacks the size of its data"),
        ("loss", "batch", "lacks the loss 0.001"),
        ("empty", "batch", "no step is recorded"),
    ],
)
def test_what_a_run_lacks_is_told_with_its_name(
    runs: Path,
    tmp_path: Path,
    damage: str,
    verb: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(runs / "b4", bad)
    plan = json.loads((bad / "plan.json").read_text())
    plan["settings"].pop(damage, None)
    (bad / "plan.json").write_text(json.dumps(plan))
    lines = (bad / "metrics.jsonl").read_text().splitlines()
    if damage == "evaluations":
        lines = [line for line in lines if "eval_loss" not in line]
    (bad / "metrics.jsonl").write_text("" if damage == "empty" else "\n".join(lines) + "\n")
    more = ["--loss", "0.001"] if damage == "loss" else []
    assert command(monkeypatch, "fit", verb, str(bad), str(runs / "b16"), *more) == 1
    shown = capsys.readouterr().err
    assert str(bad) in shown
    assert said in shown


def smooth(folder: Path, batch: int, length: int, losses: str = "", weights: int = 9) -> Path:
    """Write a run with the loss exp(-s / (100 + 6000 / batch)), which is not finite in no, some or all steps."""
    folder.mkdir()
    settings = {"sizes": {"weights": weights}, "units": {"tokens_per_sample": 1.0}}
    (folder / "plan.json").write_text(json.dumps({"settings": settings}))
    rows = []
    for step in range(1, length + 1):
        loss = math.exp(-step / (100 + 6000 / batch))
        if losses == "never" or (losses == "sevenths" and step % 7 == 0):
            loss = math.nan
        rows.append({"step": step, "samples": step * batch, "loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("losses", ["", "sevenths"])
def test_training_losses_of_runs_of_any_length_give_the_law(tmp_path: Path, losses: str) -> None:
    """A mean is a little more than the loss at its middle; at the end of its steps it would be 10% late in S_min."""
    lengths = {8: 4000, 32: 700, 128: 600, 512: 1200}
    folders = [smooth(tmp_path / str(b), b, n, losses) for b, n in lengths.items()]
    law, of = fit_batch_of(folders, math.exp(-1))
    assert of == "training"
    assert law.steps.value == pytest.approx(100, rel=0.02)
    assert law.samples.value == pytest.approx(6000, rel=0.02)
    assert law.critical.value == pytest.approx(60, rel=0.02)


def test_odd_runs_of_the_batch_law_are_named(tmp_path: Path) -> None:
    good = [smooth(tmp_path / str(b), b, 900) for b in (32, 64, 128)]
    never = smooth(tmp_path / "never", 16, 20, "never")
    larger = smooth(tmp_path / "larger", 16, 900, weights=10)
    for loss in (None, 0.5):
        with pytest.raises(ValueError, match="never has no finite loss: leave it out"):
            fit_batch_of([*good, never], loss)
    with pytest.raises(
        ValueError, match=r"128 has 9 weights, and .*larger has 10: the law is of one model"
    ):
        fit_batch_of([good[2], good[0], larger])
    with pytest.raises(ValueError, match="no run comes to a loss of nan"):
        fit_batch_of(good, math.nan)
    with pytest.raises(ValueError, match="32 lacks the loss 1e-09"):
        fit_batch_of(good, 1e-9)
    with pytest.raises(ValueError, match="two different batch sizes"):
        fit_batch_of(good[:1])


def recorded(folder: Path, size: float, data: float, loss: float, start: str | None) -> str:
    """Write what a run would leave, and return its folder."""
    folder.mkdir()
    clause = {"kind": "run", "construct": "run", "label": "run", "fields": {"start": start}}
    units = {"samples_per_epoch": data / 16, "tokens_per_sample": 16.0}
    settings = {"sizes": {"without_embeddings": size}, "units": units}
    (folder / "plan.json").write_text(json.dumps({"clauses": [clause], "settings": settings}))
    rows = [
        {"step": 1, "samples": 2 * data / 16, "loss": loss},
        {"step": 1, "eval_loss": loss},
        {"step": 2, "samples": 4 * data / 16, "loss": loss},
        {"step": 2, "eval_loss": 1.5 * loss},  # it overfits: the lowest counts
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_transfer_of_recorded_runs_is_the_law_that_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folders = []
    for size in (1e5, 1e6, 1e7):
        for i, data in enumerate((1e4, 1e6, 1e8, 1e10)):
            name = tmp_path / f"scratch-{size:g}-{i}"
            folders.append(recorded(name, size, data, (1e13 / data) ** 0.09, None))
        for i, data in enumerate((1e4, 1e5, 1e6)):
            effective = data + 1.9e4 * data**0.18 * size**0.38
            name = tmp_path / f"tuned-{size:g}-{i}"
            folders.append(recorded(name, size, data, (1e13 / effective) ** 0.09, "weights"))
    plot = tmp_path / "transfer.png"
    assert command(monkeypatch, "fit", "transfer", *folders, "--plot", str(plot)) == 0
    shown = capsys.readouterr().out
    for line in ("k      1.9e+04", "alpha  0.18", "beta   0.38", "r2     1.0000", "9 runs"):
        assert line in shown
    assert "N 100,000 to 10,000,000 and D_F 10,000 to 1,000,000" in shown
    assert plot.exists()


def test_a_run_that_is_given_twice_is_an_error(runs: Path) -> None:
    again = runs / "b16" / ".." / "b4"
    with pytest.raises(ValueError, match=r"b4 is given twice, as .*b4 before"):
        fit_batch_of([runs / "b4", runs / "b16", again])


def test_a_loss_that_runs_begin_with_is_an_error(runs: Path) -> None:
    with pytest.raises(ValueError, match=r"b4 has the loss .* already where its records begin"):
        fit_batch_of([runs / "b4", runs / "b16"], 1e9)


@pytest.mark.parametrize("law", ["batch", "transfer"])
def test_a_run_of_replicas_that_trained_apart_is_an_error(
    runs: Path, law: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = runs / f"apart-{law}"
    shutil.copytree(runs / "b16", apart)
    lines = [json.loads(line) for line in (apart / "metrics.jsonl").read_text().splitlines()]
    told = [{**line, "mean_loss": line["loss"]} if "loss" in line else line for line in lines]
    (apart / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    assert command(monkeypatch, "fit", law, str(runs / "b4"), str(apart)) == 1
    assert f"apart-{law} is of replicas" in " ".join(capsys.readouterr().err.split())
