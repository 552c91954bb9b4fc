"""The hardware of a run as its spec and the command line say it, and its model there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from trainc.compiler.bind.report import labels
from trainc.compiler.program.program import Program
from trainc.compiler.program.step_totals import require_unscalable, usable_scaler
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.runtime.device.choice import NoDevice
from trainc.runtime.device.hardware import Hardware, NoPrecision, find_hardware


def hardware_of(spec: Spec, device: str | None = None) -> Hardware:
    """Return the hardware of the spec's `run`, on `device` in place of the spec's where it is given.

    Raises SpecError, at the field, for what this machine does not have.
    """
    clause = spec.one("run")
    assert clause is not None
    run: Any = clause.construct
    try:
        found = find_hardware(device or run.device, run.precision, run.matmul)
    except NoDevice as error:
        raise _at(spec, "" if device else "device", error) from error
    except NoPrecision as error:
        raise _at(spec, "precision", error) from error
    if device in (None, run.device):
        return found
    instead = f"`--device {device}` in place of `device = {run.device}`"
    return replace(found, about=f"{found.about}, {instead}" if found.about else instead)


def placed(model: nn.Module, hardware: Hardware, spec: Spec) -> nn.Module:
    """Return the model on the hardware's device; raises SpecError where it holds no values there are to move.

    Its initial weights were made on the CPU, so that they are the same on every device.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    if empty := [name for name, one in tensors if one.is_meta]:
        error = ValueError(
            f"`{empty[0]}` is on the meta device and has no values, so there is nothing to train: build the model"
            " without `torch.device('meta')`, or give it values with `to_empty` and an initialization"
        )
        clause = spec.one("model")
        at = labels((clause.part_span("path") if clause else None, ""))
        raise SpecError([Diagnostic("model-failed", str(error), at)])
    return model.to(hardware.device)


def require_hardware(program: Program, hardware: Hardware, spec: Spec) -> None:
    """Raise SpecError where a clause cannot do its work on the hardware: without float64, or with scaled losses."""
    method = program.execution.method
    if hardware.device.type == "mps" and (method.rewrite.measured or method.batch_gradients):
        error = ValueError(
            "a clause of the spec measures gradients, for which sums are in float64, and MPS has no float64: write"
            " `device = cpu`, or `--device cpu`"
        )
        raise _at(spec, "device", error)
    if hardware.precision != "fp16":
        return
    try:
        require_unscalable(method)
        asking = next((part.label for part in method.optimizers if part.asks), None)
        scaler = hardware.scaler()
        assert scaler is not None
        usable_scaler(scaler, asking, program.execution.executor)
    except ValueError as error:
        raise _at(spec, "precision", error) from error


def hardware_warnings(program: Program, hardware: Hardware, spec: Spec) -> Iterator[Diagnostic]:
    """Yield a warning where the spec asks for CUDA graphs, and the hardware that was found has none."""
    clause, device = spec.one("run"), hardware.device.type
    assert clause is not None
    run: Any = clause.construct
    if not run.graphs or device == "cuda" or run.device in ("cpu", "mps"):  # then the plan says it
        return
    message = f"`graphs` has no effect: the run is on {device}, and only CUDA has CUDA graphs"
    yield Diagnostic(
        "no-effect", message, labels((clause.part_span("graphs"), "")), severity="warning"
    )


def _at(spec: Spec, field: str, error: Exception) -> SpecError:
    """Return the error at a field of `run`."""
    clause = spec.one("run")
    at = labels((clause.part_span(field) if clause and field else None, ""))
    return SpecError([Diagnostic("hardware", str(error), at)])
