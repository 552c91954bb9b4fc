"""Capture a program on a batch of its data, and show what a single pass changed in its graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from trainc.compiler.driver.adaptation import started_model
from trainc.compiler.driver.compile import compile_with_data, require_clauses, resolve_spec
from trainc.compiler.errors import SiteMissing, SiteUnfit
from trainc.compiler.execution.capture import CaptureFailed
from trainc.compiler.execution.execution import Executor
from trainc.compiler.model.import_path import searching
from trainc.compiler.passes.pipeline import check_names
from trainc.compiler.program.program import Program
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data.batch import Batch
from trainc.runtime.data.reader import first_batch


def program_and_batch(
    spec: Spec, without: Iterable[str], executor: Executor
) -> tuple[Program, Batch]:
    """Return the program of a checked spec on its own model, and the first micro-batch of its training samples."""
    require_clauses(spec, "loss")
    program, data = compile_with_data(spec, started_model(spec), without, executor)
    program.execution.method.rewrite.ignore_times()
    return program, first_batch(data, program.micro_size)


def capture_program(
    spec: str | Path, overrides: Mapping[str, str] | None, without: Iterable[str]
) -> Program:
    """Return a program with the graph of one micro-batch of its data; raises SpecError where none can be captured."""
    _check_names(without)
    checked, path = resolve_spec(spec, overrides)
    with searching(path):
        program, batch = program_and_batch(checked, without, "graph")
    try:
        program.execution.capture(program.execution.prepare(batch))
    except (CaptureFailed, SiteMissing, SiteUnfit) as error:
        raise SpecError([Diagnostic("capture-failed", str(error))]) from error
    return program


def pass_diff(spec: str | Path, name: str, overrides: Mapping[str, str] | None) -> str:
    """Return what the pass `name` changed in the graph, as a unified diff; raises SpecError for an unknown pass."""
    _check_names([name])
    program = capture_program(spec, overrides, ())
    report = next(report for report in program.graph.reports if report.name == name)
    return (
        report.diff
        or f"the pass `{name}` changed nothing, because no clause of the spec needs this pass"
    )


def _check_names(passes: Iterable[str]) -> None:
    """Raise SpecError for a pass that does not exist."""
    try:
        check_names(frozenset(passes))
    except ValueError as error:
        raise SpecError([Diagnostic("wrong-argument", str(error))]) from error
