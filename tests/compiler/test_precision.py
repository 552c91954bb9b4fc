"""Runs in a precision and on a device: equal to a loop by hand under autocast, also resumed; and what is refused."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from trainc.cli.app import main
from trainc.compiler.driver import train as driver
from trainc.compiler.driver.compile import resolve_spec
from trainc.compiler.driver.hardware import require_hardware
from trainc.compiler.driver.train import train
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data.order import Order
from trainc.runtime.device.hardware import Hardware
from trainc.runtime.run.loop import train as loop
from trainc.runtime.run.summary import Summary
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.jsonl import read_jsonl
from trainc.runtime.storage.random_streams import seed_step, seeded

SPEC = """
model "tests.compiler.test_precision:net"
data "tests.compiler.test_precision:data" {{ batch = 8 samples, micro = 4 samples }}
loss cross_entropy
run {{ length = {steps} steps, seed = 3, eval = 4 steps, checkpoint = 3 steps, eval_batches = 3, {run} }}
optimizer torch("torch.optim:SGD") {{ lr = 0.1, momentum = 0.9 }}
{more}
"""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Split:
    def __init__(self, seed: int, samples: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 6, generator=g)
        self.y = torch.randint(3, (samples,), generator=g)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        i = torch.as_tensor(list(indices))
        return self.x[i], self.y[i]


class Data:
    tokens_per_sample = 1

    def __init__(self) -> None:
        self.train, self.evaluation = Split(0, 40), Split(1, 12)


def data() -> Data:
    return Data()


class Net(nn.Sequential):
    """Linear layers, which autocast casts, a norm, and dropout."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        SEEN.add((self.training, logits.dtype))
        return logits


SEEN: set[tuple[bool, torch.dtype]] = set()


def net() -> nn.Module:
    return Net(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 3))


def without_values() -> nn.Module:
    return nn.Linear(6, 3, device="meta")


def trained(out: Path, run: str = "", *, steps: int = 10, more: str = "", **given: Any) -> Summary:
    return train(SPEC.format(steps=steps, run=run, more=more), out, quiet=True, **given)


def saved(out: Path, summary: Summary) -> dict[str, Any]:
    return dict(checkpoint.load_checkpoint(out / "checkpoints" / str(summary.checkpoint)))


def by_hand(dtype: torch.dtype, scaler: torch.amp.GradScaler | None) -> tuple[nn.Module, float]:
    """Train as `SPEC` says in a loop of plain PyTorch; return the model and its loss on the held-out samples."""
    with seeded(3):
        model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found, order = data(), Order(3, 40)
    for step in range(10):
        seed_step(3, step, 1)
        indices = order.indices(8 * step, 8)
        for part in (indices[:4], indices[4:]):
            x, y = found.train.batch(part)
            with torch.autocast("cpu", dtype=dtype):
                loss = 0.5 * cross_entropy(model(x), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        losses = [
            float(cross_entropy(model(x), y)) * 4
            for x, y in (found.evaluation.batch(range(at, at + 4)) for at in (0, 4, 8))
        ]
    return model, sum(losses) / 12


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_equals_a_loop_by_hand_under_autocast(tmp_path: Path, precision: str) -> None:
    SEEN.clear()
    summary = trained(tmp_path, f"precision = {precision}")
    dtype = DTYPES[precision]
    assert {(True, dtype), (False, dtype)} == SEEN
    scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None
    model, loss = by_hand(dtype, scaler)
    state = saved(tmp_path, summary)
    for name, value in model.state_dict().items():
        assert torch.equal(state["program"]["model"][name], value), name
    assert summary.eval_loss == loss
    assert state["computation"]["scaler"] == (None if scaler is None else scaler.state_dict())
    plain = trained(tmp_path / "plain")
    assert plain.loss != summary.loss
    assert plain.loss == pytest.approx(summary.loss, rel=0.05)


METHODS = {
    "plain": "",
    "measured": "noise_scale gns on type(LayerNorm) { smooth = 3 steps }",
    "graph": "regularize pace on type(Linear) { sigma = 0.3, weight = 0.1 }",
}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, method: str
) -> None:
    run, more = f"precision = {precision}", METHODS[method]
    whole = trained(tmp_path / "whole", run, more=more)
    stops = iter([None] * 5 + ["interrupted"])
    with monkeypatch.context() as patch:
        patch.setattr(driver, "loop", partial(loop, stop_requested=lambda: next(stops)))
        short = trained(tmp_path / "parts", run, more=more)
    assert (short.reason, short.steps) == ("interrupted", 5)
    parts = trained(tmp_path / "parts", run, more=more, resume=True)
    one, two = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert one == two
    assert parts.lines == whole.lines
    a, b = saved(tmp_path / "whole", whole), saved(tmp_path / "parts", parts)
    assert a["computation"] == b["computation"]
    for name, value in a["program"]["model"].items():
        assert torch.equal(b["program"]["model"][name], value), name


@pytest.mark.parametrize("method", ["measured", "graph"])
def test_graph_and_modules_agree_under_autocast(tmp_path: Path, method: str) -> None:
    """As far as rounding to 8 bits of mantissa lets two orders of additions agree."""
    run, more = "precision = bf16", METHODS[method]
    graph, modules = (
        trained(tmp_path / one, run, more=more, executor=one) for one in ("graph", "module")
    )
    assert not any("bound modules" in line for line in graph.lines)
    assert graph.loss == pytest.approx(modules.loss, rel=0.02)
    assert graph.eval_loss == pytest.approx(modules.eval_loss, rel=0.02)


def test_autocast_is_around_forward_passes_alone(tmp_path: Path) -> None:
    INSIDE.clear()
    spec = SPEC.replace(":net", ":watched").replace("torch.optim:SGD", f"{__name__}:WatchedSGD")
    train(spec.format(steps=2, run="precision = bf16", more=""), tmp_path, quiet=True)
    assert {("forward", True), ("backward", False), ("update", False)} == INSIDE


INSIDE: set[tuple[str, bool]] = set()


class Watched(torch.autograd.Function):
    """Keeps whether passes run inside autocast."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        INSIDE.add(("forward", torch.is_autocast_enabled("cpu")))
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        INSIDE.add(("backward", torch.is_autocast_enabled("cpu")))
        return gradients[0]


class WatchedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Watched.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return found


class WatchedSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        INSIDE.add(("update", torch.is_autocast_enabled("cpu")))
        return super().step(closure)


def watched() -> nn.Module:
    return WatchedLinear(6, 3)


def test_a_scaler_that_finds_its_scale_skips_steps_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large(torch.amp.GradScaler):
        def __init__(self, device: str) -> None:
            super().__init__(device, init_scale=2.0**20)

    monkeypatch.setattr(torch.amp, "GradScaler", Large)
    summary = trained(tmp_path, "precision = fp16")
    assert summary.reason == "finished"
    assert summary.exit_code == 0
    skipped = sum("skipped" in record for record in read_jsonl(tmp_path / "metrics.jsonl"))
    assert 1 <= skipped <= 6
    assert any(f"skipped {skipped} of 10 steps: a gradient overflowed" in x for x in summary.lines)
    assert saved(tmp_path, summary)["computation"]["scaler"]["scale"] == 2.0 ** (20 - skipped)


def test_the_device_is_said_at_the_start_and_in_the_summary(tmp_path: Path) -> None:
    summary = trained(tmp_path, "device = cuda, precision = bf16, matmul = high", device="cpu")
    line = (
        "on cpu (`--device cpu` in place of `device = cuda`) in bf16 with high precision of float32"
        " products"
    )
    assert summary.lines[0] == f"trained {line}"
    events = read_jsonl(tmp_path / "events.jsonl")
    assert [one["message"] for one in events if one["event"] == "hardware"] == [f"trains {line}"]


def test_a_run_resumed_on_another_device_says_what_differs(tmp_path: Path) -> None:
    trained(tmp_path, "device = cpu", steps=3)
    (at,) = (tmp_path / "checkpoints").iterdir()
    state = dict(checkpoint.load_checkpoint(at))
    state["computation"]["device"] = "cuda"
    checkpoint.save_checkpoint(tmp_path / "checkpoints", 3, state)
    trained(tmp_path, "device = auto", steps=3, resume=True)
    notes = [
        one["message"] for one in read_jsonl(tmp_path / "events.jsonl") if one["event"] == "note"
    ]
    assert any("safe: `run.device` was cpu and is auto" in one for one in notes)
    assert any("made on cuda, and the run goes on on cpu" in one for one in notes)


def test_another_precision_at_resume_has_to_be_accepted(tmp_path: Path) -> None:
    trained(tmp_path, "precision = float32", steps=3)
    with pytest.raises(SpecError, match=r"`run.precision` was float32 and is fp16"):
        trained(tmp_path, "precision = fp16", steps=3, resume=True)
    again = trained(tmp_path, "precision = fp16", steps=3, resume=True, accept=True)
    assert saved(tmp_path, again)["computation"]["scaler"]["scale"] == 65536.0


@pytest.mark.parametrize(
    ("run", "more", "match"),
    [
        ("device = cuda", "", "finds no CUDA device here. There is `cpu`"),
        ("device = meta", "", "meta"),
        ("precision = fp16", "mask sift on ndim(2) { density = 20% }", "cannot find the gradients"),
    ],
)
def test_what_cannot_be_done_is_an_error_before_the_run(
    tmp_path: Path, run: str, more: str, match: str
) -> None:
    with pytest.raises(SpecError, match=match):
        trained(tmp_path / "run", run, more=more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "precision", "more", "match"),
    [
        ("mps", "float32", METHODS["measured"], "measures gradients.*MPS has no float64"),
        ("cpu", "fp16", "closure", "asks for the loss and gradients of a step several times"),
    ],
)
def test_a_clause_that_the_hardware_does_not_serve_is_an_error(
    device: str, precision: Any, more: str, match: str
) -> None:
    text = SPEC.format(steps=2, run="device = cpu", more="" if more == "closure" else more)
    if more == "closure":
        text = text.replace("SGD", "LBFGS").replace(", momentum = 0.9", "")
    spec, _ = resolve_spec(text)
    program = trainc.compile(spec, net())
    with pytest.raises(SpecError, match=match):
        require_hardware(program, Hardware(torch.device(device), precision), spec)
    require_hardware(program, Hardware(torch.device("cpu"), "bf16"), spec)


def test_statistics_of_examples_are_brute_forces_under_autocast() -> None:
    """As far as sums of numbers with 8 bits of mantissa agree in two orders."""
    program = trainc.compile(SPEC.format(steps=2, run="", more=METHODS["measured"]), net())
    program.execution.autocast = Hardware(torch.device("cpu"), "bf16").autocast
    program.module[3].p = 0.0  # type: ignore[index]
    batch = data().train.batch(range(8))
    want = program.execution.contributions(batch)
    for executor in ("graph", "module"):
        found = program.execution.trial(batch, executor).squares
        assert found
        assert found.keys() == want.keys()
        for name, squares in found.items():
            torch.testing.assert_close(squares, want[name].to(squares.dtype), rtol=0.1, atol=1e-6)


@pytest.mark.parametrize(("device", "code"), [("cpu", 0), ("meta", 2), ("cuda", 1)])
def test_the_command_line_chooses_the_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    device: str,
    code: int,
) -> None:
    spec = tmp_path / "small.train"
    spec.write_text("train 1\n" + SPEC.format(steps=2, run="precision = bf16", more=""))
    words = ["trainc", "run", str(spec), "-o", str(tmp_path / "run"), "--device", device]
    monkeypatch.setattr("sys.argv", [*words, "--plain"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code
    out, err = capsys.readouterr()
    line = "on cpu (`--device cpu` in place of `device = auto`) in bf16"
    shown = {
        "cpu": f"trains {line}" in out + err and f"trained {line}" in out,
        "meta": "'meta' is not one of 'auto', 'cpu', 'cuda', 'mps'" in " ".join(err.split()),
        "cuda": "finds no CUDA device here. There is `cpu`" in err,
    }
    assert shown[device], out + err


def test_a_model_on_the_meta_device_has_nothing_to_train(tmp_path: Path) -> None:
    spec = SPEC.replace(":net", ":without_values").format(steps=2, run="", more="")
    with pytest.raises(SpecError, match="`weight` is on the meta device and has no values"):
        train(spec, tmp_path, quiet=True)


def test_in_a_loop_of_ones_own_the_precision_is_the_loops(tmp_path: Path) -> None:
    SEEN.clear()
    spec = SPEC.format(steps=2, run="precision = bf16", more="")
    program = trainc.compile(spec, net())
    program.step(data().train.batch(range(8)))
    with torch.autocast("cpu", dtype=torch.float16):
        program.step(data().train.batch(range(8)))
    assert {(True, torch.float32), (True, torch.float16)} == SEEN


def test_the_plan_shows_device_and_precision() -> None:
    spec = SPEC.format(steps=2, run="precision = bf16, matmul = high", more="")
    line = "`trainc run`: device auto, precision bf16, high precision of float32 products"
    assert line in str(trainc.plan(spec))
