"""What a run takes is said before its first step and once that is measured, and refused where it cannot fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainc.compiler.driver.compile import compile, plan
from trainc.compiler.driver.train import train
from trainc.compiler.execution.compiled import Compiler
from trainc.compiler.plan.needs import needs_of
from trainc.dsl.text.errors import SpecError
from trainc.runtime.memory.usable import Usable
from trainc.runtime.run import preflight
from trainc.runtime.step.optimizer import OptimizerStep
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.jsonl import read_jsonl

ROOT = Path(__file__).parents[2]
SPEC = """train 1
model "examples.models:gpt" { layers = LAYERS, width = WIDTH, heads = 2, context = 16, dropout = 0.1 }
data "examples.data:stdlib" { batch = 4 samples, context = 16, limit_bytes = 30_000 }
loss cross_entropy
optimizer OPTIMIZER { lr = 1e-3 }
run { length = 4 steps, checkpoint = 2 steps, keep = 2 }
"""


def spec(more: str = "", layers: int = 1, width: int = 16, optimizer: str = "adamw") -> str:
    sizes = SPEC.replace("LAYERS", str(layers)).replace("WIDTH", str(width))
    return sizes.replace("OPTIMIZER", optimizer) + more


def said(out: Path) -> list[str]:
    found = read_jsonl(out / "events.jsonl")
    return [one["message"] for one in found if one["event"] == "preflight"]


GNS = "noise_scale gns on type(LayerNorm)"


def test_the_run_has_the_same_numbers_with_it_and_without(tmp_path: Path) -> None:
    for name, on in (("with", True), ("without", False)):
        train(spec(GNS), tmp_path / name, quiet=True, preflight=on)
    files = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("with", "without")]
    assert files[0] == files[1]
    states = [
        checkpoint.load_checkpoint(tmp_path / name / "checkpoints/step-00000004")["program"][
            "model"
        ]
        for name in ("with", "without")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    firsts = [" ".join(text.split()[:2]) for text in said(tmp_path / "with")]
    assert [first.split(":")[0] for first in firsts] == [
        "memory",
        "disk",
        "the first",
        "the second",
    ]
    assert not said(tmp_path / "without")


def test_it_is_said_before_the_first_step_and_measured_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(spec(), tmp_path / "run", plain=True)
    shown = capsys.readouterr().out
    said_of = ("memory: ", "disk: ", "the first step took", "1/4 steps", "the second step took")
    places = [shown.index(text) for text in said_of]
    assert places == sorted(places)
    assert shown.count(" step took") == 2


def test_of_what_processes_share_one_has_its_part() -> None:
    whole = needs_of(plan(spec(GNS)))
    one = whole.of_one({"weights": 0.5, "trained": 0.25}, 4)
    parts = {
        need.what: (need.bytes, own.bytes)
        for need, own in zip(whole.memory, one.memory, strict=True)
    }
    weights, gradients, state, *others = parts.values()
    assert weights[1] == weights[0] / 2
    assert (gradients[1], state[1]) == (gradients[0] / 4, round(state[0] / 4))
    assert one.state == state[1]
    assert others
    assert all(before == after for before, after in others)
    assert one.disk == whole.disk
    assert "in this process, one of 4 that share the weights (weights" in one.memory_text()


def test_a_compiled_run_tells_its_pace_when_it_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiler, "backend", "aot_eager")
    train(spec().replace("keep = 2", "compile = inductor"), tmp_path / "run", quiet=True)
    torch._dynamo.reset()
    told = [text for text in said(tmp_path / "run") if "step took" in text]
    assert [text.split(" step took")[0] for text in told] == ["the first", "the third"]


def few(device: torch.device) -> Usable:
    return Usable(2**14, "limit of the container (its control group)")


def test_a_model_that_cannot_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "usable_memory", few)
    with pytest.raises(SpecError) as found:
        train(spec(), tmp_path / "run", quiet=True)
    text = str(found.value)
    assert re.search(
        r"error\[does-not-fit\]: the run needs \S+ KiB of memory before any activation", text
    )
    assert "16.0 KiB (limit of the container" in text
    assert re.search(r"\(weights .*, gradients .*, adamw: optimizer state", text)
    assert "`--no-preflight`" in text
    assert not (tmp_path / "run").exists()
    assert train(spec(), tmp_path / "run", quiet=True, preflight=False).reason == "finished"


def test_the_first_step_tells_that_the_next_ones_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "usable_memory", lambda _: Usable(2**22, "test"))
    monkeypatch.setattr(preflight, "peak_memory", lambda _: 2**23)
    with pytest.raises(SpecError) as found:
        train(spec(), tmp_path / "run", quiet=True)
    text = str(found.value)
    assert "error[does-not-fit]: the first step took 8.0 MiB of memory" in text
    assert "`micro = 2 samples`" in text
    assert not (tmp_path / "run/checkpoints").exists()


def test_checkpoints_that_do_not_fit_are_refused_and_the_message_says_how_many_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = needs_of(plan(spec())).checkpoint
    monkeypatch.setattr(preflight, "free_disk", lambda _: round(2.5 * size))
    text = spec().replace("keep = 2", "keep = 4").replace("length = 4", "length = 20")
    with pytest.raises(SpecError) as found:
        train(text, tmp_path / "run", quiet=True)
    assert "of disk (checkpoints have" in str(found.value)
    assert "up to 5 of them, of which one is written" in str(found.value)
    assert "write `keep = 1` in `run`, which needs" in str(found.value)
    kept = text.replace("keep = 4", "keep = 1")
    assert train(kept, tmp_path / "run", quiet=True).reason == "finished"


def test_a_resumed_run_counts_the_checkpoints_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(spec(), tmp_path / "run", quiet=True)
    monkeypatch.setattr(preflight, "free_disk", lambda _: needs_of(plan(spec())).checkpoint)
    longer = spec().replace("length = 4", "length = 6")
    summary = train(longer, tmp_path / "run", quiet=True, resume=True, accept=True)
    assert summary.steps == 6


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        ("adamw", 2.0),
        ("sgd", 0.0),
        ("sgd { momentum = 0.9, lr = 0.1 } #", 1.0),
        ('torch("torch.optim:RMSprop")', 1.0),
        ('torch("torch.optim:Adafactor")', 0.125),
    ],
)
def test_the_plan_knows_what_optimizers_keep(optimizer: str, states: float) -> None:
    text = spec(optimizer=optimizer)
    found, program = needs_of(plan(text)), compile(text)
    x = torch.randint(0, 256, (4, 16))
    program.step((x, x))
    weights = sum(p.nbytes for p in program.module.parameters())
    assert found.memory[0].bytes == found.memory[1].bytes == weights
    (own,) = (a for a in program._machine.actions if isinstance(a, OptimizerStep))
    kept = [
        value.nbytes
        for entries in own.torch.state.values()
        for value in entries.values()
        if isinstance(value, torch.Tensor) and value.dim()
    ]
    assert found.state == pytest.approx(states * weights, rel=0.01)
    assert sum(kept) == pytest.approx(
        found.state, rel=0.3, abs=2**12
    )  # rows and columns of Adafactor


def test_the_checkpoint_has_the_size_that_the_plan_tells(tmp_path: Path) -> None:
    text = spec("regularize ema { decay = 0.9 }", layers=2, width=64)
    train(text, tmp_path / "run", quiet=True)
    folder = tmp_path / "run/checkpoints/step-00000004"
    real = sum(path.stat().st_size for path in folder.iterdir())
    assert needs_of(plan(text)).checkpoint == pytest.approx(real, rel=0.1)


MEASURE = """
import sys
from pathlib import Path
from trainc.compiler.driver.train import train
summary = train(sys.argv[1], Path(sys.argv[2]), quiet=True)
status = Path("/proc/self/status").read_text()  # ru_maxrss would have that of the process that started this one
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.parametrize(
    "more", ["", f"{GNS} regularize ema {{ decay = 0.9 }} perturb sam {{ rho = 0.1 }}"]
)
def test_the_estimate_after_one_step_is_near_the_peak_of_the_run(tmp_path: Path, more: str) -> None:
    """Twenty million parameters: much more than what Python and torch take of themselves."""
    text = spec(more, layers=6, width=512).replace("checkpoint = 2 steps, ", "")
    text = text.replace("batch = 4", "batch = 2").replace("length = 4", "length = 3")
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE, text, str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    peak = int(done.stdout.split()[-1])
    text = next(line for line in said(tmp_path / "run") if line.startswith("the first step"))
    number = re.search(r"about ([\d.]+) (MiB|GiB) of memory", text)
    assert number is not None
    estimate = float(number[1]) * (2**30 if number[2] == "GiB" else 2**20)
    assert 0.75 * peak < estimate < 1.4 * peak
