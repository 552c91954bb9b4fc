"""Capture a program on a batch of its data, and show what a single pass changed in its graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from trainc.compiler.driver.compile import compile, resolve_spec
from trainc.compiler.errors import SiteMissing, SiteUnfit
from trainc.compiler.model.factories import build_data
from trainc.compiler.model.import_path import searching
from trainc.compiler.passes.pipeline import check_names
from trainc.compiler.program.capture import CaptureFailed
from trainc.compiler.program.program import Program
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data.batch import Batch


def first_batch(spec: str | Path, overrides: Mapping[str, str] | None, size: int) -> Batch:
    """Return the first `size` training samples as a batch."""
    checked, path = resolve_spec(spec, overrides)
    with searching(path):
        data = build_data(checked)
    inputs, targets = data.train.batch(list(range(min(size, len(data.train)))))
    return inputs, targets


def capture_program(
    spec: str | Path, overrides: Mapping[str, str] | None, without: Iterable[str]
) -> Program:
    """Return a program with the graph of one micro-batch of its data; raises SpecError where none can be captured."""
    try:
        program = compile(spec, overrides=overrides, without=without, executor="graph")
    except ValueError as error:
        raise SpecError([Diagnostic("wrong-argument", str(error))]) from error
    program.execution.method.ignore_times()
    batch = first_batch(spec, overrides, program.micro_size)
    try:
        program.execution.capture(batch)
    except (CaptureFailed, SiteMissing, SiteUnfit) as error:
        raise SpecError([Diagnostic("capture-failed", str(error))]) from error
    return program


def pass_diff(spec: str | Path, name: str, overrides: Mapping[str, str] | None) -> str:
    """Return what the pass `name` changed in the graph, as a unified diff; raises SpecError for an unknown pass."""
    try:
        check_names(frozenset([name]))
    except ValueError as error:
        raise SpecError([Diagnostic("wrong-argument", str(error))]) from error
    program = capture_program(spec, overrides, ())
    report = next(report for report in program.graph.reports if report.name == name)
    return (
        report.diff
        or f"the pass `{name}` changed nothing, because no clause of the spec needs this pass"
    )
