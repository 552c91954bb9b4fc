"""Verify: the compiled model against the original, on real input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from trainc.compiler.driver.compile import compile, resolve_spec
from trainc.compiler.driver.inspect import first_batch
from trainc.compiler.driver.site_diagnostics import of_site
from trainc.compiler.errors import SiteError, SiteMissing, SiteUnfit
from trainc.compiler.model.import_path import searching
from trainc.compiler.program.capture import CaptureFailed
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data import batch as batches

if TYPE_CHECKING:
    from trainc.compiler.program.program import Program
    from trainc.runtime.data.batch import Batch

Road = Literal["graph", "module"]
ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One thing compared: the largest error, relative to the largest magnitude of what it should be."""

    title: str
    what: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


def verify(
    spec: str | Path,
    overrides: Mapping[str, str] | None = None,
    without: Iterable[str] = (),
    *,
    double: bool = False,
) -> list[Comparison]:
    """Compare the program of a spec with its model on the first micro-batch of its data.

    The model is put in train mode with dropout off, since two runs of a random model differ by themselves.
    """
    checked, path = resolve_spec(spec, overrides)
    with searching(path):
        program = compile(checked, without=without, executor="graph")
    if double:
        program.module.double()
    batch = first_batch(spec, overrides, program.micro_size)
    if double:
        batch = (_doubled(batch[0]), _doubled(batch[1]))
    try:
        return compare(program, batch)
    except SiteError as error:
        raise SpecError([of_site(error, checked)]) from error
    except (CaptureFailed, SiteMissing, SiteUnfit) as error:
        raise SpecError([Diagnostic("capture-failed", str(error))]) from error


def compare(program: Program, batch: Batch) -> list[Comparison]:
    """Compare a program with its own model on one batch; gradients and the clock are left as they were."""
    _silence_dropout(program.module)
    dtype = next(p.dtype for p in program.module.parameters())
    allowed = ALLOWED.get(dtype, 3e-2)
    rewrite = program.execution.method.rewrite
    road: Road = "graph"
    if rewrite.modules_only is not None or any(site.tied is not None for site in rewrite.layers):
        road = "module"
    rows: list[Comparison] = []
    if not rewrite.ghosts:  # BatchNorm over groups is another model
        rows += _against_original(program, batch, allowed, road)
    if road == "graph":
        rows += _against_modules(program, batch, allowed)
    if rewrite.example_units is None:  # documents and groups have no backward pass of their own
        rows += _against_examples(program, batch, allowed, road)
    return rows


def _against_original(
    program: Program, batch: Batch, allowed: float, road: Road
) -> Iterator[Comparison]:
    """Everything at strength zero is the model as it was."""
    inputs, targets = batch
    with program.sites.inactive(), _buffers_kept(program):
        loss = program.loss_fn(batches.call(program.module, inputs), targets)
        want = _gradients(program, loss)
    with _buffers_kept(program):
        got_loss, got, _ = program.execution.trial(batch, road, strength=0.0)
    title = f"{road} at strength zero, original"
    yield Comparison(title, "loss", _error(got_loss, loss.detach()), allowed)
    yield Comparison(title, "gradients", _worst(got, want), allowed)


def _against_modules(program: Program, batch: Batch, allowed: float) -> Iterator[Comparison]:
    with _buffers_kept(program):
        want_loss, want, _ = program.execution.trial(batch, "module")
    with _buffers_kept(program):
        got_loss, got, _ = program.execution.trial(batch, "graph")
    yield Comparison("graph, bound modules", "loss", _error(got_loss, want_loss), allowed)
    yield Comparison("graph, bound modules", "gradients", _worst(got, want), allowed)


def _against_examples(
    program: Program, batch: Batch, allowed: float, road: Road
) -> Iterator[Comparison]:
    """The measured squared norms are those of one backward pass per example."""
    _, _, squares = program.execution.trial(batch, road)
    if not squares:
        return
    with _buffers_kept(program):
        want = program.execution.contributions(batch)
    yield Comparison(
        "per-example norms, one pass per example",
        f"{len(squares)} parameters",
        _worst(squares, want),
        allowed,
    )


def _gradients(program: Program, loss: Tensor) -> dict[str, Tensor | None]:
    named = {n: p for n, p in program.module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


class _buffers_kept:
    """Restore buffers (running means) after a trial."""

    def __init__(self, program: Program) -> None:
        self.module = program.module

    def __enter__(self) -> None:
        self.saved = {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(self.saved[name])


def _silence_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.AlphaDropout):
            module.p = 0.0


def _error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    scale = max(float(want.abs().max()), floor) or 1.0
    return float((got.double() - want.double()).abs().max()) / scale


FLOOR = 1e-6
"""A tensor that is smaller than this part of the largest one is rounding, and compared on the scale of that part."""


def _worst(got: Mapping[str, Tensor | None], want: Mapping[str, Tensor | None]) -> float:
    worst = 0.0
    largest = max((float(w.abs().max()) for w in want.values() if w is not None), default=0.0)
    for name, value in want.items():
        other = got.get(name)
        if value is None or other is None:
            missing = other if value is None else value
            worst = max(worst, 0.0 if missing is None or not missing.any() else float("inf"))
            continue
        worst = max(worst, _error(other, value, FLOOR * largest))
    return worst


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: _doubled(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_doubled(v) for v in value)
    return value
