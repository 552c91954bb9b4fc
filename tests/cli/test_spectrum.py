"""`trainc spectrum`: the numbers by definition, what it reads, what it says of what it cannot measure, the picture."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainc.cli.app import main
from trainc.kernels.parameter.spectral_null import null_distance
from trainc.runtime.storage.checkpoint import save_checkpoint

GPT = "examples.models:gpt { layers = 1, width = 16, heads = 2, context = 8 }"


def spectrum(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run the command and return exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["trainc", "spectrum", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    """A file of tensors: good ones, and such as have no exponent or no spectrum."""
    source = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    found = {
        "tall": drawn(48, 16),
        "wide": drawn(16, 64),
        "kernel": drawn(8, 12, 3, 3),
        "rounded": drawn(32, 20).bfloat16(),
        "low": drawn(20, 2) @ drawn(2, 20),
        "zero": torch.zeros(12, 12),
        "lost": torch.full((12, 12), math.nan),
        "ids": torch.ones(9, 9, dtype=torch.int64),
        "stack": drawn(2, 8, 8),
        "bias": drawn(8),
    }
    save_file(found, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


def test_the_numbers_are_those_of_singular_values(
    tensors: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = spectrum(monkeypatch, capsys, tensors, "--json")
    assert status == 0
    rows = {row["name"]: row for row in json.loads(out)}
    held = load_file(tensors)
    for name in ("tall", "wide", "kernel", "rounded"):
        w = held[name].double()
        matrices = w.flatten(2).permute(2, 0, 1) / math.sqrt(2) if w.dim() == 4 else w
        values = torch.linalg.svdvals(matrices).square().flatten().sort().values
        n = len(values)
        tail = values[n // 2 :]
        parts = values / values.sum()
        row = rows[name]
        assert row["shape"] == ([9, 8, 12] if name == "kernel" else list(w.shape))
        assert row["alpha"] == pytest.approx(
            1 + len(tail) / float((tail / tail[0]).log().sum()), rel=1e-5
        )
        assert row["stable_rank"] == pytest.approx(float(values.sum() / values[-1]), rel=1e-5)
        assert row["spectral_norm"] == pytest.approx(float(values[-1].sqrt()), rel=1e-5)
        assert row["entropy"] == pytest.approx(
            float(-(parts * parts.log()).sum()) / math.log(n), rel=1e-5
        )
        assert row["distance"] == pytest.approx(null_distance(row["alpha"], tuple(w.shape)))
        assert row["null"] + row["distance"] * row["spread"] == pytest.approx(row["alpha"])
    assert [rows[name]["alpha"] for name in ("low", "zero", "lost")] == [None] * 3


def test_what_has_no_exponent_or_no_spectrum_is_said(
    tensors: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new/picture.png"
    status, out, said = spectrum(monkeypatch, capsys, tensors, "--plot", picture)
    assert status == 0
    assert "? zero, not finite, of low rank or orthogonal: " in out
    assert "without a spectrum: 1 vector, " in out
    assert "ids [9, 9]" in out
    assert "stack [2, 8, 8]" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert str(picture) in said


def test_a_model_a_spec_and_a_run_give_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(*words: object) -> Any:
        status, out, said = spectrum(monkeypatch, capsys, *words, "--json")
        assert status == 0, said
        return json.loads(out)

    path, _, arguments = GPT.partition(" ")
    spec = tmp_path / "a.train"
    spec.write_text(f'train 1\nlet width = 4\nmodel "{path}" {arguments.replace("16", "width")}\n')
    found = rows(GPT)
    assert rows(spec, "--set", "width=16") == found
    from examples.models import gpt

    torch.manual_seed(0)
    model = gpt(layers=1, width=16, heads=2, context=8)
    signature = [[name, list(p.shape), "float32"] for name, p in model.named_parameters()]
    held = {**dict(model.named_parameters()), "a buffer": torch.eye(8)}
    state = {"program": {"made_by": {"signature": signature}, "model": held}}
    (tmp_path / "run").mkdir()
    checkpoint = save_checkpoint(tmp_path / "run/checkpoints", 3, state)
    assert rows(tmp_path / "run") == rows(checkpoint)
    exact = {row["name"]: row["alpha"] for row in rows(checkpoint)}
    own = {row["name"]: row["alpha"] for row in found}
    qkv = "blocks.0.attn.qkv.weight"
    assert own.keys() - exact.keys() == {f"{qkv}[{part}]" for part in "qkv"}
    assert exact.keys() - own.keys() == {qkv}
    assert {n: own[n] for n in exact.keys() & own.keys()} == pytest.approx(
        {n: exact[n] for n in exact.keys() & own.keys()}
    )
    (one,) = rows(GPT, "--only", "*.fc.*")
    assert one["name"] == "blocks.0.mlp.fc.weight"
    for part in checkpoint.glob("*.safetensors"):
        part.write_bytes(b"x")
    status, _, said = spectrum(monkeypatch, capsys, tmp_path / "run")
    assert status == 1
    assert "there are no weights of the run in" in said
    assert "its checksum differs" in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere", "there is no `nowhere`: expected a .train file"),
        ("gone.safetensors", "gone.safetensors is missing"),
        (".", "is a folder without a run, a checkpoint or a program: expected"),
        (__file__, "cannot be read for weights: expected"),
        ("examples.models:gtp", "did you mean `gpt`?"),
        ("examples.models:gpt { layer = 1 }", "takes no argument `layer`"),
        ("torch.nn:Identity", "has no weight with a spectrum"),
    ],
)
def test_what_gives_no_weights_is_a_message(
    given: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, said = spectrum(monkeypatch, capsys, given)
    assert status == 1
    assert words in said
    assert "Traceback" not in said


def test_a_setting_of_what_has_none_and_a_file_of_nothing_are_errors(
    tensors: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in (tensors, GPT):
        status, out, error = spectrum(monkeypatch, capsys, given, "--set", "width=4")
        assert (status, out) == (1, "")
        assert "`--set width=4` sets a `let` of a spec" in error
    save_file({}, tensors)
    status, _, error = spectrum(monkeypatch, capsys, tensors)
    assert status == 1
    assert error.endswith("Its tensors: none\n")
