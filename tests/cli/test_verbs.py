"""The commands that show a program: plan, compile, verify and report, as a user types them."""

import json
import sys
from pathlib import Path

import pytest

import trainc
from trainc.cli.app import main

SPEC = """
train 1
let length = 6 steps
model "examples.models:gpt" { layers = 2, width = 32, heads = 2, context = 16 }
data "examples.data:stdlib" { batch = 4 samples, context = 16, limit_bytes = 30_000 }
loss cross_entropy
run { length = length, seed = 5, eval = 3 steps, eval_batches = 2 }
optimizer adamw { lr = 3e-3 * (warmup(10%) then cosine()) }
noise_scale gns on type(LayerNorm) { smooth = 5 steps }
regularize pace on "blocks.*.mlp.**" & type(Linear) { sigma = 0.2, weight = 0.1 }
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "small.train"
    path.write_text(SPEC)
    return path


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["trainc", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_plan_prints_tables(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", spec) == 0
    out = capsys.readouterr().out
    for words in (
        "blocks.*.ln1.weight",
        "instrument_norms",
        "no CUDA device",
        "adamw lr",
        "probes",
    ):
        assert words in out


def test_plan_says_which_numbers_rules_set(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rule, how in (
        ("stop", "in the whole run"),
        ("pace.weight = 0", "until rules set pace.weight"),
    ):
        spec.write_text(f"{SPEC}when loss < 1 {{ {rule} }}")
        assert call(monkeypatch, "plan", spec) == 0
        assert f"Constant {how}: " in capsys.readouterr().out


def test_plan_says_what_depends_on_the_division_into_micro_batches(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainc.catalog()["noise_scale", "gns"], "division", "one of its own")
    line = "gns: depends on how a step is divided into micro-batches: one of its own"
    spec.write_text(SPEC.replace("batch = 4 samples", "batch = 4 samples, micro = 2 samples"))
    assert call(monkeypatch, "plan", spec) == 0
    assert line in capsys.readouterr().out.splitlines()
    spec.write_text(SPEC)
    assert call(monkeypatch, "plan", spec) == 0
    assert line not in capsys.readouterr().out


def test_plan_as_json_has_the_hash_of_its_content(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainc.compiler.plan.plan import Plan

    assert call(monkeypatch, "plan", spec, "--format", "json") == 0
    data = json.loads(capsys.readouterr().out)
    assert Plan.from_json(data).hash == data["hash"]
    with pytest.raises(ValueError, match=r"another version of trainc \(format 0"):
        Plan.from_json(data | {"format": 0})
    data["settings"]["micro_batch"] = 99
    with pytest.raises(ValueError, match="changed by hand"):
        Plan.from_json(data)


def test_plan_shows_what_a_pass_did(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, operator in (
        ("add_noise", "trainc.multiplicative_noise"),
        ("fuse_loss", "trainc.cross_entropy_consistency"),
    ):
        assert call(monkeypatch, "plan", spec, "--diff", name) == 0
        assert operator in capsys.readouterr().out
    assert call(monkeypatch, "plan", spec, "--diff", "fuse_los") == 1
    assert "did you mean `fuse_loss`" in capsys.readouterr().err


def test_compile_writes_a_program_that_loads(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import trainc
    from examples.models import gpt

    assert call(monkeypatch, "compile", spec, "-o", tmp_path / "saved") == 0
    assert "instrument_norms: 5 sites" in capsys.readouterr().out
    program = trainc.load(tmp_path / "saved", gpt(layers=2, width=32, heads=2, context=16))
    assert program.graph.installed


def test_compile_without_a_pass_says_what_it_did_not_change(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("compile", spec, "-o", tmp_path / "saved", "--without", "instrument_norms")
    assert call(monkeypatch, *words) == 0
    assert "not changed: blocks.0.ln1" in capsys.readouterr().out
    assert call(monkeypatch, *words[:-1], "nonsense") == 1
    assert "there is no pass `nonsense`" in capsys.readouterr().err


def test_verify_compares_three_ways(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "verify", spec, "--double") == 0
    out = capsys.readouterr().out
    assert "strength zero" in out
    assert "DIFFERS" not in out


def test_report_prints_and_draws(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, length in zip(runs, ("6 steps", "4 steps"), strict=True):
        assert (
            call(monkeypatch, "run", spec, "-o", run, "--plain", "--set", f"length={length}") == 0
        )
    capsys.readouterr()
    picture = tmp_path / "picture.png"
    assert call(monkeypatch, "report", *runs, "--plot", picture) == 0
    out = capsys.readouterr().out
    assert "gns" in out
    assert "finished" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_spec_with_a_typo_is_a_message_not_a_traceback(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec.write_text(SPEC.replace("sigma", "sgima"))
    for words in (
        ("plan",),
        ("verify",),
        ("run", "-o", tmp_path / "run"),
        ("compile", "-o", tmp_path / "c"),
    ):
        verb, *rest = words
        assert call(monkeypatch, verb, spec, *rest) == 1
        error = capsys.readouterr().err
        assert "did you mean `sigma`" in error
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


MODELS = """
import torch
from torch import nn
from torch.nn import functional as F


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.words, self.norm = nn.Embedding(256, 8), nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True) if kind == "attends" else None
        linear = nn.Linear(8, 256)
        self.head = nn.utils.parametrizations.weight_norm(linear) if kind == "computed" else linear
        self.kind = kind

    def forward(self, ids):
        x = self.words(ids)
        if self.attend is not None:
            x = x + self.attend(x, x, x)[0]
        if self.kind == "functional":
            return F.linear(self.norm(x), self.words.weight)
        return self.head(self.norm(x))


def model(kind):
    return Model(kind)
"""


def spec_of(kind: str, on: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = f"models_of_{kind}_{on[5:9].lower()}"
    (folder / f"{name}.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(folder))
    lines = [line for line in SPEC.splitlines() if not line.startswith(("model", "regul", "noise"))]
    lines += [f'model "{name}:model" {{ kind = "{kind}" }}', f"noise_scale gns on {on}"]
    (folder / "own.train").write_text("\n".join(lines))
    return folder / "own.train"


@pytest.mark.parametrize("verb", ["run", "verify"])
def test_a_weight_used_elsewhere_is_shown_at_its_clause(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of("functional", "type(Embedding)", tmp_path, monkeypatch)
    assert (
        call(monkeypatch, verb, spec, *(["--out", tmp_path / "run"] if verb == "run" else [])) == 1
    )
    said = capsys.readouterr().err
    assert "error[weight-used-elsewhere]: `words.weight` is also used outside `words`," in said
    assert "| noise_scale gns on type(Embedding)" in said


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("computed", "`head` has a weight that is computed from other parameters"),
        ("attends", "`attend.out_proj` is the output projection of an nn.MultiheadAttention"),
    ],
)
def test_plan_says_what_cannot_be_measured(
    kind: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = spec_of(kind, "type(Linear)", tmp_path, monkeypatch)
    assert call(monkeypatch, "plan", spec) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "| noise_scale gns on type(Linear)" in said
