"""Train the model of a spec on its data, as `trainc run` does: from a file to a summary."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from trainc.compiler.bind.report import labels
from trainc.compiler.driver.adaptation import load_weights, origins, started_model
from trainc.compiler.driver.compile import compile_with_data, require_clauses, resolve_spec
from trainc.compiler.driver.distribution import Distribution
from trainc.compiler.driver.hardware import (
    hardware_of,
    hardware_warnings,
    placed,
    require_hardware,
)
from trainc.compiler.driver.preflight import preflight_of, too_large
from trainc.compiler.driver.recorded_clauses import shown_signals
from trainc.compiler.driver.resume import cannot_resume, changed_run
from trainc.compiler.driver.run_logger import run_logger
from trainc.compiler.driver.site_diagnostics import at_field, explained
from trainc.compiler.execution.execution import Executor
from trainc.compiler.model.factories import missing_clause, seeded_model
from trainc.compiler.model.import_path import searching
from trainc.compiler.program.program import Program
from trainc.compiler.program.save import PLAN, json_text
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.text.render import render_text
from trainc.dsl.text.vocabulary import EVALUATED
from trainc.dsl.values.value_json import Name, walk
from trainc.runtime.data.batch import Batch
from trainc.runtime.data.evaluation import read_in_order
from trainc.runtime.data.generators import find_generators, kept
from trainc.runtime.data.order import Data
from trainc.runtime.data.stream import count_samples
from trainc.runtime.device.hardware import Hardware
from trainc.runtime.processes.launch import leaving_no_threads
from trainc.runtime.run.live_display import LiveDisplay
from trainc.runtime.run.loggers import Logger
from trainc.runtime.run.loop import train as loop
from trainc.runtime.run.meetings import BatchesDiffer
from trainc.runtime.run.preflight import DoesNotFit
from trainc.runtime.run.summary import Summary
from trainc.runtime.step.action import IncompatibleState
from trainc.runtime.storage.differences import ChangedRun
from trainc.runtime.storage.random_streams import derive_seed
from trainc.runtime.storage.run_folder import RunFolder

SPEC, SPEC_TEXT = "spec.json", "spec.train"


@leaving_no_threads
def train(
    spec: str | Path,
    out: Path,
    *,
    overrides: Mapping[str, str] | None = None,
    without: Iterable[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    accept: bool = False,
    plain: bool = False,
    quiet: bool = False,
    executor: Executor = "auto",
    device: str | None = None,
    log: str | Logger | None = None,
    preflight: bool = True,
) -> Summary:
    """Train the spec's model on its data and return a summary of the run.

    `out` is the folder of the run; `resume` continues the run in it. `device` and `log` are used in place of the
    spec's; `log` is a name, or an object with `log(metrics, step)` and `finish()`. Raises SpecError for a wrong spec,
    for hardware or a library that is not there, for a resume with a changed spec unless `accept`, and with `preflight`
    for a run that does not fit into memory or on the disk.
    """
    checked, path = resolve_spec(spec, overrides)
    run = checked.one("run")
    if run is None:
        raise missing_clause("the spec has no run", "write `run { length = 1000 steps }`")
    require_clauses(checked, "loss", "optimizer")
    logger, distribution = run_logger(checked, log), Distribution.of(checked)
    hardware = distribution.placed(hardware_of(checked, device))
    with distribution.team(hardware) as team:
        goes_on = resume and not accept and RunFolder(out).has_checkpoint
        program, data = _compiled(
            checked, path, hardware, distribution, without, executor, starts=not goes_on
        )
        shows = team.rank == 0 and not quiet
        warnings = (*program.plan.warnings, *hardware_warnings(program, hardware, checked))
        if warnings and shows:
            print(render_text(warnings).strip("\n"), file=sys.stderr)
        stored = distribution.replicas
        takes = preflight_of(program, hardware, out, checked, stored) if preflight else None
        with _reported(program, checked, out), hardware.products():
            return loop(
                program,
                data,
                out=out,
                resume=resume,
                overwrite=overwrite,
                display=_display(program, str(spec), plain) if shows else None,
                texts=_texts(program, checked, path),
                keep=program.settings.keep,
                accept=accept,
                hardware=hardware,
                logger=logger,
                preflight=takes,
                team=team,
                notes=_notes(distribution, [] if goes_on else origins(checked)),
            )


def _notes(distribution: Distribution, others: Sequence[str]) -> list[tuple[str, str]]:
    """Return what to say when the run begins, each with its kind of event."""
    of_processes = (("processes", text) for text in distribution.notes)
    return [*of_processes, *(("note", text) for text in others)]


def _compiled(
    spec: Spec,
    path: Path | None,
    hardware: Hardware,
    distribution: Distribution,
    without: Iterable[str],
    executor: Executor,
    starts: bool,
) -> tuple[Program, Data]:
    """Return the program of a spec with its model on the hardware, joined with the other processes, and its data.

    Where it `starts`, the model has the weights that the spec names; one that goes on takes those of its checkpoint.
    """
    run: Any = spec.one("run")
    with searching(path):
        model = started_model(spec) if starts else seeded_model(spec)
        start: str | None = run.construct.start
        if starts and start is not None:
            load_weights(model, Path(start), spec)
        program, data = compile_with_data(
            spec,
            placed(model, hardware, spec),
            without,
            executor,
            partial(distribution.prepare, device=hardware.device),
            distribution.replicas,
        )
    require_evaluations(spec, data, program.evaluation_readers)
    program.execution.autocast = hardware.autocast
    require_hardware(program, hardware, spec)
    distribution.join(program, data, hardware.device)
    program.estimate_from(partial(_training_batches, program, data, hardware))
    return program, data


def _training_batches(program: Program, data: Data, hardware: Hardware) -> Iterator[Batch]:
    """Yield the batches of the training data as it stands; what the data draws at random goes on as before."""
    size, seed = program.micro_size or program.batch_size, program.settings.seed
    with kept(find_generators(data)):
        for read in read_in_order(data.train, 0, size, derive_seed(seed, "statistics"), 0):
            yield hardware.place(read.batch)


def require_evaluations(spec: Spec, data: Data, measured_by: Sequence[str] = ()) -> None:
    """Raise SpecError where a rule or a clause reads evaluations, and the data has no samples for them.

    `measured_by` are the labels of the clauses.
    """
    if data.evaluation is not None and count_samples(data.evaluation) != 0:
        return
    for clause in spec.clauses:
        if clause.name in measured_by:
            message = (
                f"`{clause.title}` measures evaluations, and the data has no samples to evaluate on"
            )
            help_ = "give training and held-out samples (`trainc explain data` says how), or remove the clause"
            raise SpecError(
                [Diagnostic("data-failed", message, labels((clause.span, "")), (), help_)]
            )
    for rule in spec.rules:
        for part, value in rule.expressions():
            if any(isinstance(x, Name) and x.id.startswith(EVALUATED) for x in walk(value)):
                message = f"`{value}` reads what evaluations measure, and the data has no samples to evaluate on"
                at = labels((rule.part_span(part), ""))
                raise SpecError([Diagnostic("unknown-signal", message, at)])


def _display(program: Program, title: str, plain: bool) -> LiveDisplay:
    assert program.length is not None
    length, signals = program.length, shown_signals(program.plan.to_json())
    return LiveDisplay(length.amount, length.unit, title=title, signals=signals, plain=plain)


@contextmanager
def _reported(program: Program, spec: Spec, out: Path) -> Iterator[None]:
    """Turn errors of a run that its folder or a clause of the spec explains into a SpecError at this clause."""
    try:
        with explained(program.execution.losses, spec):
            yield
    except ChangedRun as error:
        raise changed_run(out, error, spec) from error
    except IncompatibleState as error:
        raise cannot_resume(out, error) from error
    except DoesNotFit as error:
        raise too_large(error, spec) from error
    except BatchesDiffer as error:
        raise at_field(spec.one("data"), ("batch",), "processes", error) from error


def _texts(program: Program, spec: Spec, path: Path | None) -> dict[str, str]:
    """Return the files that say what a run trains with, by name."""
    texts = {PLAN: json_text(program.plan.to_json()), SPEC: json_text(spec.to_json())}
    return texts if path is None else texts | {SPEC_TEXT: path.read_text()}
