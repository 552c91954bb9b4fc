"""`trainc delta`: a run's entries leave it and come back exactly, and what does not fit is said."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import trainc
from trainc.cli.app import main
from trainc.runtime.storage.checkpoint import save_checkpoint

SPEC = """train 1
optimizer adamw { lr = 1e-2 }
loss cross_entropy
mask sift on ndim(2) { density = 5%REST }
"""


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 4))


def trained(rest: str = ", rest = freeze") -> trainc.Program:
    program = trainc.compile(SPEC.replace("REST", rest), model())
    torch.manual_seed(2)
    for _ in range(4):
        program.step((torch.randn(8, 16), torch.randint(4, (8,))))
    return program


def delta(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run the command and return exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["trainc", "delta", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


@pytest.mark.parametrize("rest", ["", ", rest = freeze"])
def test_a_run_comes_back_from_its_delta(
    rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = trained(rest)
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run/checkpoints", 4, {"program": program.state_dict()})
    start, file, tuned = (tmp_path / name for name in ("start.safetensors", "d", "t.safetensors"))
    save_file(model().state_dict(), start, {"format": "pt"})
    expected = program.module.state_dict()
    for more in ((), ("--base", start)):
        status, out, error = delta(monkeypatch, capsys, tmp_path / "run", "--out", file, *more)
        assert (status, error) == (0, "")
        assert "bytes an entry" in out
        status, out, error = delta(monkeypatch, capsys, "--apply", file, start, "--out", tuned)
        assert (status, error) == (0, "")
        assert "were set" in out
        found = load_file(tuned)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    program.save_delta(file)
    other = trainc.compile(SPEC.replace("REST", rest), model())
    other.load_delta(file)
    assert all(torch.equal(t, expected[n]) for n, t in other.module.state_dict().items())
    status, _, error = delta(monkeypatch, capsys, "--apply", file, start)
    assert status == 0
    assert torch.equal(load_file(start)["0.weight"], expected["0.weight"])


def test_a_run_that_chose_again_needs_the_weights_of_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Entries of earlier choices differ, too, also in a run that was resumed since."""
    spec = SPEC.replace("ndim(2)", "ndim(2) every 2 steps").replace("REST", ", rest = freeze")
    program = trainc.compile(spec, model())
    torch.manual_seed(2)
    batches = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(6)]
    for batch in batches[:4]:
        program.step(batch)
    resumed = trainc.compile(spec.replace("every 2", "every 99"), model())
    resumed.load_compatible(program.state_dict())
    resumed.step(batches[4])
    start, file = tmp_path / "start.safetensors", tmp_path / "d"
    save_file(model().state_dict(), start)
    with pytest.raises(
        ValueError, match=r"has trained entries that were not chosen last.*`--base`"
    ):
        resumed.save_delta(file)
    run = tmp_path / "run"
    run.mkdir()
    save_checkpoint(run / "checkpoints", 5, {"program": resumed.state_dict()})
    status, _, error = delta(monkeypatch, capsys, run, "--out", file)
    assert status == 1
    assert "because its mask chose more than once" in error
    status, _, error = delta(monkeypatch, capsys, run, "--out", file, "--base", start)
    assert (status, error) == (0, "")
    found = file.read_bytes()
    resumed.save_delta(file, base=start)
    assert file.read_bytes() == found
    other = trainc.compile(spec, model())
    other.load_delta(file)
    expected = resumed.module.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in other.module.state_dict().items())


def test_what_does_not_fit_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, file, run = trained(), tmp_path / "d", tmp_path / "run"
    program.save_delta(file)
    run.mkdir()
    save_checkpoint(run / "checkpoints", 4, {"program": program.state_dict()})
    pickled, other = tmp_path / "w.pt", tmp_path / "o.safetensors"
    torch.save(model().state_dict(), pickled)
    save_file({n: t + 1 for n, t in model().state_dict().items()}, other)
    for words, said in [
        ((tmp_path / "none", "--out", file), "none: the folder has no checkpoint"),
        (("--apply", other, other), f"{other} is no delta that `trainc delta RUN --out FILE`"),
        (("--apply", file, pickled), "expected weights as FILE.safetensors"),
        (("--apply", file, tmp_path / "none.safetensors"), "none.safetensors is missing"),
        (("--apply", file, other), f"`0.weight` of {other} is not what the run started from"),
        (("--apply", file, run), "is a folder, which stays as it is: write `--out"),
        ((run, "--out", file, "--base", run), "no weight differs from those in"),
        ((run, "--out", file, "--base", file), "has no `0.weight`, which the run has"),
    ]:
        status, _, error = delta(monkeypatch, capsys, *words)
        assert status == 1, (words, error)
        assert said in error
        assert "Traceback" not in error
    for words, said in [((run,), "--out"), (("--apply", file, run, "--base", run), "--base")]:
        status, _, error = delta(monkeypatch, capsys, *words)
        assert status == 2
        assert said in error
