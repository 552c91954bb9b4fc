"""`trainc influence`: what it prints and draws, and what it says where there is nothing to measure."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.influenced import REFERENCE, reference_run, run, spec
from trainc.cli.app import main
from trainc.runtime.memory.usable import Usable

TEXT = """train 1
model "examples.models:gpt" { layers = 1, width = 8, heads = 2, context = 16 }
data "examples.data:stdlib" { batch = 4 samples, context = 16, limit_bytes = 2_000 }
loss cross_entropy
optimizer adamw { lr = 1e-2 }
run { length = 4 steps, checkpoint = 2 steps, device = cpu }
"""


def influence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run the command and return exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["trainc", "influence", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_the_table_has_proponents_and_opponents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = reference_run(tmp_path)
    status, out, error = influence(monkeypatch, capsys, folder, "--on", "0", "--last-layer")
    assert (status, error) == (0, "")
    assert "2 checkpoints (step 1 at rate 0.1, step 2 at rate 0.05)" in out
    assert "gradients of 2 parameters: weight, bias" in out
    lines = out.splitlines()
    assert next(line for line in lines if line.startswith("train 2")).split()[2] == "2.77"
    assert "no opponents" in lines
    status, out, _ = influence(monkeypatch, capsys, folder)
    assert status == 0
    first = next(line for line in out.splitlines() if line.startswith("train 2"))
    assert first.split()[2] == "7.64"


def test_json_has_all_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (reference_run(tmp_path), "--on", "0", "--json", "--among", "2,0")
    status, out, _ = influence(monkeypatch, capsys, *words)
    assert status == 0
    told = json.loads(out)
    assert told["train"] == [2, 0]
    assert told["checkpoints"][1] == {"step": 2, "rates": [0.05, 0.05]}
    wanted = [REFERENCE["manual_tracincp"][0][i] for i in (2, 0)]
    assert told["on"]["influence"] == [pytest.approx(wanted)]
    assert told["on"]["proponents"] == [[2, 0]]
    assert told["on"]["opponents"] == [[]]
    assert told["self_influence"] == pytest.approx(
        [REFERENCE["manual_self_influence"][i] for i in (2, 0)]
    )


def test_tokens_are_shown_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, TEXT)
    status, out, error = influence(
        monkeypatch, capsys, folder, "--on", "0", "--projected", "50", "--top", "2"
    )
    assert (status, error) == (0, "")
    from examples.data import stdlib

    data = stdlib(context=16, limit_bytes=2_000)
    ids, _ = data.evaluation.batch([0])
    assert repr(bytes(ids[0].tolist()).decode("utf-8", "replace")) in out
    status, _, error = influence(
        monkeypatch, capsys, folder, "--on", "0", "--last-layer", "--plot", tmp_path / "x.png"
    )
    assert status == 1
    assert "--plot draws samples whose inputs are images" in error


def test_images_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder = run(tmp_path, spec())
    for more in (("--on", "0..1"), ("--on", "train:3"), ()):
        picture = tmp_path / "new/found.png"
        words = (folder, *more, "--last-layer", "--plot", picture)
        status, _, error = influence(monkeypatch, capsys, *words)
        assert (status, error) == (0, f"drew {picture}\n")
        assert picture.read_bytes()[:4] == b"\x89PNG"
        picture.unlink()


WRONG = {
    "--projected 5": "each gradient is compared with itself alone",
    "--on 0 --projected 10000000000000": "the gradients have 47 entries",
    "--on 7": "there is no sample 7: the evaluation data has samples 0 to 3",
    "--on first": "names no samples: expected numbers and ranges",
    "--on test:1": "before `:` write `evaluation` or `train`",
    "--on 3..1": "is empty, because it ends before it begins",
    "--on 0 --among 0..99": "there is no sample 99: the train data has samples 0 to 8",
    "--on 0 --among evaluation:1": "leave `evaluation:` out",
    "--on 0 --layers tail.*": "`tail.*` matches no layer and no parameter of this Net",
    "--on 0 --layers ndim(1": "ndim",
    "--on 0 --layers body --last-layer": "write one of --last-layer and --layers",
    "--on 0 --layers conv.*": "`conv.*` was not trained in this run",
}


def test_what_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, spec(optimizer='sgd { lr = 0.1, freeze = "conv.*" }'))
    for words, message in WRONG.items():
        status, out, error = influence(monkeypatch, capsys, folder, *words.split(" "))
        assert status in (1, 2), words
        assert message in " ".join(error.replace("│", "").split()), (words, error)
        assert not out
    status, _, error = influence(monkeypatch, capsys, tmp_path, "--on", "0")
    assert status == 1
    assert "holds no run: there is no spec.json" in error
    shutil.rmtree(folder / "checkpoints")
    status, _, error = influence(monkeypatch, capsys, folder, "--on", "0")
    assert status == 1
    assert "has no checkpoint, and influence is measured at those of a run" in error


def test_data_that_changed_since_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests import influenced

    folder = run(tmp_path, spec())
    before = influenced.images()
    before.train = influenced.Samples(before.train.inputs[:8], before.train.targets[:8])
    monkeypatch.setattr(influenced, "images", lambda positions: before)
    status, _, error = influence(monkeypatch, capsys, folder, "--on", "0")
    assert status == 1
    assert "was made with another model or data" in error
    assert "the number of training samples was 9 and is 8" in error


def test_what_is_no_image_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = (reference_run(tmp_path), "--plot", tmp_path / "x.png")
    status, out, error = influence(monkeypatch, capsys, *words)
    assert (status, out) == (1, "")
    assert "--plot draws samples whose inputs are images" in error


def test_json_has_no_number_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = torch.full((1, 2), 1e300, dtype=torch.float64)
    weights = {"weight": weight, "bias": torch.zeros(1, dtype=torch.float64)}
    folder = reference_run(tmp_path, [(weights, 0.1)])
    status, out, _ = influence(monkeypatch, capsys, folder, "--on", "0", "--json")
    assert status == 0

    def refuse(word: str) -> None:
        raise AssertionError(word)

    told = json.loads(out, parse_constant=refuse)
    assert None in told["self_influence"]
    assert None in told["train_losses"]


def test_checkpoints_without_a_rate_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {n: torch.ones(s, dtype=torch.float64) for n, s in (("weight", (1, 2)), ("bias", 1))}
    folder = reference_run(tmp_path / "a", [(weights, 0.1), (weights, 0.0)])
    status, out, _ = influence(monkeypatch, capsys, folder, "--on", "0")
    assert status == 0
    assert "1 checkpoints (step 1 at rate 0.1)" in out
    assert "left out, as no rate was above 0 in the step before: step 2" in out
    folder = reference_run(tmp_path / "b", [(weights, 0.0)])
    status, out, error = influence(monkeypatch, capsys, folder, "--on", "0")
    assert (status, out) == (1, "")
    assert "at its checkpoints (step 1) no rate is above 0" in error


def test_gradients_that_do_not_fit_into_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, spec())
    place = "trainc.compiler.influence.tracin"
    monkeypatch.setattr(f"{place}.used_memory", lambda device: 2000)
    monkeypatch.setattr(f"{place}.usable_memory", lambda device: Usable(3000, "a test"))
    status, out, error = influence(monkeypatch, capsys, folder, "--on", "0..3")
    assert (status, out) == (1, "")
    assert "the gradients of 4 samples take" in error
    assert "with `--projected 8`" in error
    status, *_ = influence(monkeypatch, capsys, folder, "--on", "0..3", "--projected", "8")
    assert status == 0
