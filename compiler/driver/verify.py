"""Compare the compiled model with the original on real input, as `trainc verify` does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trainc.compiler.driver.compile import resolve_spec
from trainc.compiler.driver.inspect import program_and_batch
from trainc.compiler.driver.site_diagnostics import clause_diagnostic, site_diagnostic
from trainc.compiler.errors import SiteError, SiteMissing, SiteUnfit
from trainc.compiler.execution.capture import CaptureFailed
from trainc.compiler.method.total_loss import losses_of_views
from trainc.compiler.model.import_path import searching
from trainc.compiler.model.undisturbed import keep_buffers
from trainc.compiler.program.program import Program
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data.batch import Batch, map_tensors
from trainc.runtime.step.action import ClauseFailed

ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison: the largest error, relative to the largest expected value."""

    title: str
    what: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is within what rounding allows."""
        return self.error <= self.allowed


def verify(
    spec: str | Path,
    overrides: Mapping[str, str] | None = None,
    without: Iterable[str] = (),
    *,
    double: bool = False,
) -> list[Comparison]:
    """Compare the program of a spec with its model on the first micro-batch of its data.

    Dropout is turned off, since two runs of a random model differ by themselves. Raises SpecError for a wrong spec,
    and where the model cannot be captured or measured.
    """
    checked, path = resolve_spec(spec, overrides)
    with searching(path):
        program, batch = program_and_batch(checked, without, "graph")
    if double:
        program.module.double()
        batch = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
    try:
        return compare(program, batch)
    except SiteError as error:
        raise SpecError([site_diagnostic(error, checked)]) from error
    except ClauseFailed as error:
        raise SpecError([clause_diagnostic(error, checked)]) from error
    except (CaptureFailed, SiteMissing, SiteUnfit) as error:
        raise SpecError([Diagnostic("capture-failed", str(error))]) from error


def compare(program: Program, batch: Batch) -> list[Comparison]:
    """Compare a program with its own model on one batch; gradients and the clock stay as they are."""
    _silence_dropout(program.module)
    batch = program.execution.prepare(batch)
    dtype = next(p.dtype for p in program.module.parameters())
    allowed = ALLOWED.get(dtype, 3e-2)
    rewrite = program.execution.method.rewrite
    executor: Literal["graph", "module"] = "graph"
    if rewrite.modules_only is not None or any(site.tied is not None for site in rewrite.layers):
        executor = "module"
    rows: list[Comparison] = []
    if rewrite.zero_is_identity:
        rows += _against_original(program, batch, allowed, executor)
    if executor == "graph":
        rows += _against_modules(program, batch, allowed)
    if rewrite.example_units is None:  # documents and groups have no backward pass of their own
        rows += _against_examples(program, batch, allowed, executor)
    return rows


def _against_original(
    program: Program, batch: Batch, allowed: float, executor: Literal["graph", "module"]
) -> Iterator[Comparison]:
    """Compare the program with every strength at zero with the original model."""
    targets = batch[1]
    with program.sites.inactive(), keep_buffers(program.module):
        losses, weights = program.execution.losses, program.loss_weights
        read = losses.run(program.module, batch)
        losses.use(losses.numbers_now(program.execution.clock))
        found = losses_of_views(losses, read.of, targets, 1, False)
        loss = torch.stack([weights.get(name, 1.0) * one for name, one in found.items()]).sum()
        want = _gradients(program, loss)
    with keep_buffers(program.module):
        got = program.execution.trial(batch, executor, strength=0.0)
    title = f"{executor} at strength zero, original"
    yield Comparison(title, "loss", _error(got.loss, loss.detach()), allowed)
    yield Comparison(title, "gradients", _worst(got.gradients, want), allowed)


def _against_modules(program: Program, batch: Batch, allowed: float) -> Iterator[Comparison]:
    with keep_buffers(program.module):
        want = program.execution.trial(batch, "module")
    with keep_buffers(program.module):
        got = program.execution.trial(batch, "graph")
    yield Comparison("graph, bound modules", "loss", _error(got.loss, want.loss), allowed)
    yield Comparison(
        "graph, bound modules", "gradients", _worst(got.gradients, want.gradients), allowed
    )


def _against_examples(
    program: Program, batch: Batch, allowed: float, executor: Literal["graph", "module"]
) -> Iterator[Comparison]:
    """Compare the measured squared norms with those of one backward pass per example."""
    squares = program.execution.trial(batch, executor).squares
    if not squares:
        return
    with keep_buffers(program.module):
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


def _silence_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.AlphaDropout):
            module.p = 0.0


def _error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    scale = max(float(want.abs().max()), floor) or 1.0
    return float((got.double() - want.double()).abs().max()) / scale


FLOOR = 1e-6
"""Errors are relative to at least this fraction of the largest tensor: a tensor smaller than that is rounding."""


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
