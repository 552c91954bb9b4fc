"""Whole steps of a GPT, for `benchmarks/gpu.py`: plain `torch.compile` beside programs with `compile = inductor`, each
as it is and with its passes in CUDA graphs.

Each case is checked first, on a small GPT: in float32 weights and noise after three steps against float64, by hand
where the spec changes no step and by the uncompiled modules elsewhere; in the precision that is timed, the losses. Then
steps are timed whole, from the batch on the device to the loss that is read, and memory is the peak of these steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.device import Cuda
from benchmarks.measure import Json
from benchmarks.on_gpu.record import Row

NEEDS = ("lark", "pydantic", "safetensors")
"""What compiling a spec imports beside torch and numpy."""
SPEC = """train 1
run { length = 100k steps, seed = 1, compile = %s, graphs = %s }
loss cross_entropy
optimizer adamw { lr = 1e-4, weight_decay = 0.1 }
"""
PLAIN = "plain"
CLAUSES = {
    "gns on norms": "noise_scale gns on role(norm)",
    "pace": 'regularize pace on "blocks.*.mlp.**" & type(Linear) { sigma = 0.1, weight = 0.5 }',
    "sift": "mask sift on ndim(2) - type(Embedding) { density = 1% }",
}
CHANGES_NO_STEP = ("gns on norms",)
SIGNALS = ("gns.signal", "gns.noise")
GRAPHS = ", graphs"
"""Of a case: its compiled passes are replayed as CUDA graphs, plain ones by inductor and ours by `graphs = true`."""
FIRST = (PLAIN, "gns on norms", f"plain{GRAPHS}", f"gns on norms{GRAPHS}")
CASES = (*FIRST, *(one for one in CLAUSES if one not in FIRST))
SECONDS = 60.0
STEPS = 3
"""Steps of a check."""
TOLERANCE = 1e-2
"""Of the change of all weights, by its norm, in float32; and of the losses in 16 bits."""
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """A GPT with its embedding tied to its head, and a batch of `samples` times `context` tokens."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    samples: int


SHAPES = {
    "124m": Shape(layers=12, width=768, heads=12, context=1024, vocabulary=50304, samples=16),
    "1b": Shape(layers=18, width=2048, heads=16, context=1024, vocabulary=50304, samples=8),
}
TINY = {name: Shape(2, 32, 2, 16, 64, samples=4) for name in SHAPES}
CHECKED = Shape(layers=2, width=64, heads=4, context=32, vocabulary=256, samples=4)


@dataclass(frozen=True, slots=True)
class Way:
    """Where and how the steps of all cases are computed."""

    device: str
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = torch.bfloat16
    backend: str | None = "inductor"
    """What torch.compile is given; None compiles nothing."""
    graphs: bool = False


def missing() -> list[str]:
    """Return the packages that compiling a spec needs and that are not here."""
    found = []
    for name in NEEDS:
        try:
            import_module(name)
        except ImportError:
            found.append(name)
    return found


def rows(models: Sequence[str], cases: Sequence[str], weights: str, backend: str) -> Iterator[Row]:
    """Yield a row for every case of every model."""
    for model in models:
        for case in cases:
            yield Row(
                "steps", f"{model} {case}", SECONDS, partial(_row, model, case, weights, backend)
            )


def _row(model: str, case: str, weights: str, backend: str, device: Cuda, until: float) -> Json:
    """Check and time the steps of a case, or say why not."""
    if case.removesuffix(GRAPHS) != PLAIN and (absent := missing()):
        return {"passed": True, "not measured": f"needs {', '.join(absent)}"}
    autocast = torch.bfloat16 if weights == "float32" else None
    way = Way(device.kind, getattr(torch, weights), autocast, backend, case.endswith(GRAPHS))
    shape = SHAPES[model] if device.large else TINY[model]
    row = {"model": model, "case": case, "way": {k: str(v) for k, v in asdict(way).items()}}
    row |= {"shape": asdict(shape), **checked(way, case.removesuffix(GRAPHS))}
    return row | _timed(device, way, shape, case.removesuffix(GRAPHS), 20 if device.large else 2)


def heading() -> str:
    """Return the names of the columns of `line`."""
    return (
        f"{'whole steps':11} {'case':22}{'tokens/s':>12}{'of plain':>10}{'ms a step':>11}{'peak GiB':>10}"
        f"{'first, s':>10}{'off by':>10}"
    )


def line(row: Json, rows: Sequence[Json]) -> str:
    """Return one row of the table; `rows` has the plain steps that it is compared with."""
    if "not measured" in row:
        return f"{row['name']:34} not measured: {row['not measured']}"
    begin = f"{row['model']:11} {row['case']:22}"
    verdict = f"{row['off by']:10.1e} {'ok' if row['passed'] else 'WRONG'}"
    if (why := row.get("failed") or row.get("does not fit")) is not None:
        what = "FAILED" if "failed" in row else "does not fit"
        return f"{begin} {what}: {why} {verdict.strip()}"
    plain = next(
        (
            r["tokens/s"]
            for r in rows
            if r["key"] == f"steps: {row['model']} {PLAIN}" and "tokens/s" in r
        ),
        math.nan,
    )
    peak = f"{row['peak bytes'] / 2**30:10.2f}" if row["peak bytes"] else f"{'-':>10}"
    uncompiled = f" not compiled: {row['uncompiled']}" if row["uncompiled"] else ""
    if row["graphs refused"]:
        uncompiled += f" no graphs: {row['graphs refused']}"
    return (
        f"{begin}{row['tokens/s']:12.0f}{row['tokens/s'] / plain:10.3f}"
        f"{row['seconds a step']['median'] * 1e3:11.1f}{peak}"
        f"{row['seconds of the first steps']:10.1f}{verdict}{uncompiled}"
    )


def checked(way: Way, case: str) -> Json:
    """Return how far three steps of the small GPT are from float64."""
    exact = replace(way, device="cpu", weights=torch.float64, autocast=None, backend=None)
    single = replace(way, weights=torch.float32, autocast=None)
    reference = PLAIN if case in CHANGES_NO_STEP else case
    try:
        want, want_losses, _ = _trained(exact, reference)
        got, _, measured = _trained(single, case)
        _, losses, _ = _trained(way, case)
        signals = {} if reference == case else _trained(exact, case)[2]
    except Exception as error:  # a case that fails leaves the others to measure
        return {"off by": math.inf, "passed": False, "check failed": _first_line(error)}
    off = math.hypot(*(float((got[n] - want[n]).norm()) for n in want))
    whole = math.hypot(*(float(change.norm()) for change in want.values()))
    apart = (abs(measured[name] - value) / abs(value) for name, value in signals.items())
    worst = max([off / whole, *apart])
    timed = max(abs(a - b) / abs(b) for a, b in zip(losses, want_losses, strict=True))
    passed = worst <= TOLERANCE and timed <= TOLERANCE
    return {"off by": worst, "losses as timed off by": timed, "passed": passed}


def _trained(way: Way, case: str) -> tuple[dict[str, Tensor], list[float], Mapping[str, float]]:
    """Train the small GPT; return the change of each weight in float64, the losses, and what the last step measured."""
    model = _model(CHECKED, replace(way, device="cpu")).to(way.device)
    before = copy.deepcopy(model.state_dict())
    step = trained_by(way, case, model)
    losses = [step.step(_text(CHECKED, way.device, seed)) for seed in range(STEPS)]
    torch._dynamo.reset()
    after = model.state_dict()
    changes = {n: after[n].double().cpu() - before[n].double().cpu() for n in before}
    return changes, losses, step.measured


class Plain:
    """The loop anybody writes, around a compiled model."""

    measured: Mapping[str, float] = {}
    uncompiled: str | None = None

    @property
    def refused(self) -> str | None:
        """Why not all passes are replayed where a case says so; None where they are."""
        skips = int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])
        return f"inductor skipped {skips}" if skips and self.way.graphs else None

    def __init__(self, way: Way, model: nn.Module) -> None:
        self.way = way
        self.forward: Any = (
            model if way.backend is None else torch.compile(model, backend=_backend(way))
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)

    def step(self, batch: Batch) -> float:
        """Train on a batch and return its loss."""
        inputs, targets = batch
        torch.compiler.cudagraph_mark_step_begin()
        with _autocast(self.way):
            loss = cross_entropy(self.forward(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class Ours:
    """A program with the clauses of a case."""

    def __init__(self, way: Way, case: str, model: nn.Module) -> None:
        import trainc

        graphs = "true" if way.graphs else "false"
        text = SPEC % ("off" if way.backend is None else "inductor", graphs) + CLAUSES[case]
        executor: Any = "module" if way.backend is None else "auto"
        self.way, self.program = way, trainc.compile(text, model, executor=executor)
        self.measured: Mapping[str, float] = {}
        if (compiler := self.program.execution.compiler) is not None and way.backend is not None:
            compiler.backend = way.backend

    def step(self, batch: Batch) -> float:
        """Train on a batch and return the loss of its targets."""
        with _autocast(self.way):
            metrics = self.program.step(batch)
        self.measured = {n: metrics[n] for n in SIGNALS if n in metrics}
        return metrics.get("data_loss", metrics["loss"])

    @property
    def uncompiled(self) -> str | None:
        """Why nothing is compiled any more; None where all is."""
        compiler = self.program.execution.compiler
        return None if compiler is None else compiler.refused

    @property
    def refused(self) -> str | None:
        """Why not all passes are replayed where a case says so; None where they are."""
        replays = self.program.execution.replays
        if not self.way.graphs or (replays.recorded and not replays.reasons):
            return None
        return "; ".join(replays.reasons) or "none was recorded"


def _backend(way: Way) -> Any:
    """Return what torch.compile is given: inductor's passes as CUDA graphs where a case says so."""
    if not way.graphs or way.backend != "inductor":
        return way.backend
    patches = {"fallback_random": True, "triton.cudagraphs": True}
    inductor: Any = torch._dynamo.lookup_backend("inductor")
    return partial(inductor, config_patches=patches)


def trained_by(way: Way, case: str, model: nn.Module) -> Plain | Ours:
    """Return what trains the model in a case."""
    return Plain(way, model) if case == PLAIN else Ours(way, case, model)


def _timed(device: Cuda, way: Way, shape: Shape, case: str, rounds: int) -> Json:
    """Return the times and the memory of whole steps; what does not fit into memory is said, and is no error."""
    try:
        return _steps(device, way, shape, case, rounds)
    except Exception as error:  # a case that fails leaves the others to measure
        if any(isinstance(one, torch.OutOfMemoryError) for one in _causes(error)):
            return {"does not fit": _first_line(error)}
        return {"failed": _first_line(error)}
    finally:
        torch._dynamo.reset()
        device.clear()


def _steps(device: Cuda, way: Way, shape: Shape, case: str, rounds: int) -> Json:
    torch._dynamo.utils.counters.clear()
    model = _model(shape, way)
    step = trained_by(way, case, model)
    batches = [_text(shape, way.device, seed) for seed in range(4)]
    begin = time.perf_counter()
    for batch in batches[:3]:  # compiles; a mask chooses its entries; averages begin
        step.step(batch)
    first = time.perf_counter() - begin
    device.clear()
    if on_gpu := way.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(rounds):
        begin = time.perf_counter()
        step.step(batches[number % len(batches)])  # reads the loss
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    low, _, high = quantiles(times, n=4)
    tokens = shape.samples * shape.context
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens a step": tokens,
        "tokens/s": round(tokens / median(times), 1),
        "seconds a step": {"median": median(times), "quartiles": [low, high], "steps": rounds},
        "peak bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "seconds of the first steps": round(first, 1),
        "uncompiled": step.uncompiled,
        "graphs refused": step.refused,
    }


def _model(shape: Shape, way: Way) -> nn.Module:
    """Return the model of a shape, the same for a device each time; large ones are made on it."""
    sizes = {key: value for key, value in asdict(shape).items() if key != "samples"}
    torch.manual_seed(0)
    with torch.device(way.device):
        model: nn.Module = import_module("examples.models").gpt(**sizes, tied=True)
    return model.to(way.weights)


def _text(shape: Shape, device: str, seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    size = (shape.samples, shape.context + 1)
    ids = torch.randint(0, shape.vocabulary, size, generator=draw).to(device)
    return ids[:, :-1], ids[:, 1:]


def _autocast(way: Way) -> Any:
    return torch.autocast(way.device, dtype=way.autocast, enabled=way.autocast is not None)


def _causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]
