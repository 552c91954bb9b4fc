"""What a run of a program takes, compared with this machine before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from trainc.compiler.bind.report import labels
from trainc.compiler.plan.needs import needs_of
from trainc.compiler.program.program import Program
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.runtime.device.hardware import Hardware
from trainc.runtime.memory.needs import Of
from trainc.runtime.processes.replica_group import world_size
from trainc.runtime.processes.sharded import local
from trainc.runtime.run.preflight import DoesNotFit, Preflight

_FIELDS = {"memory": (("data", "micro"), ("data", "batch")), "disk": (("run", "keep"), ("run", ""))}


def preflight_of(
    program: Program, hardware: Hardware, out: Path, spec: Spec, replicas: int = 1
) -> Preflight:
    """Return what says how much a run takes; raises SpecError where its plan tells that it does not fit.

    A checkpoint holds as many `replicas`.
    """
    needs, length = needs_of(program.plan), program.length
    assert length is not None
    buffers = sum(buffer.nbytes for buffer in program.module.buffers())
    needs = replace(needs, checkpoint=replicas * (needs.checkpoint + buffers))
    if program.is_sharded:
        needs = needs.of_one(_parts(program), world_size())
    if world_size() > 1:  # a process may have a part of each tensor only: its first step tells
        needs = replace(needs, memory=tuple(replace(need, sure=False) for need in needs.memory))
    samples = program.fitting_size or program.micro_size
    compiled = program.execution.compiler is not None or program.execution.replays.wanted
    found = Preflight(needs, length, hardware.device, out, samples, compiled=compiled)
    try:
        found.check()
    except DoesNotFit as error:
        raise too_large(error, spec) from error
    return found


def _parts(program: Program) -> dict[Of, float]:
    """Return which part of the weights, and of those that train, this process has."""
    every = [*program.module.parameters()]
    of: dict[Of, list[nn.Parameter]] = {
        "weights": every,
        "trained": [p for p in every if p.requires_grad],
    }
    return {
        name: sum(local(p).nbytes for p in some)
        / max(1, sum(p.numel() * p.element_size() for p in some))
        for name, some in of.items()
    }


def too_large(error: DoesNotFit, spec: Spec) -> SpecError:
    """Return the error of a run that does not fit, at the field that may change it."""
    clauses = ((spec.one(kind), name) for kind, name in _FIELDS[error.of])
    spans = (
        clause.part_span(name) or (None if name else clause.span)
        for clause, name in clauses
        if clause
    )
    at = labels((next(filter(None, spans), None), ""))
    return SpecError([Diagnostic("does-not-fit", str(error), at)])
