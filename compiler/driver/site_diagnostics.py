"""Turn errors raised at run time into diagnostics on the clause that they are about: layers, optimizers, the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trainc.compiler.bind.effects import measures_gradients
from trainc.compiler.bind.report import labels
from trainc.compiler.errors import SiteError
from trainc.compiler.method.loss import LossMismatch
from trainc.compiler.method.losses import Losses
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.errors import SpecError
from trainc.runtime.data.batch import WrongBatch, WrongOutput, WrongPick
from trainc.runtime.memory.failure import OutOfMemory
from trainc.runtime.step.action import ClauseFailed
from trainc.runtime.torch_optimizer.problem import OptimizerProblem


@contextmanager
def explained(losses: Losses, spec: Spec) -> Iterator[None]:
    """Turn errors of steps and evaluations that a clause of the spec explains into a SpecError at this clause."""
    try:
        yield
    except SiteError as error:
        raise SpecError([site_diagnostic(error, spec)]) from error
    except ClauseFailed as error:
        raise SpecError([clause_diagnostic(error, spec)]) from error
    except OptimizerProblem as error:
        raise SpecError([optimizer_diagnostic(error, spec)]) from error
    except OutOfMemory as error:
        raise at_field(spec.one("data"), ("micro", "batch"), "out-of-memory", error) from None
    except WrongBatch as error:
        raise at_field(spec.one("data"), ("path",), "data-failed", error) from error
    except WrongPick as error:
        named = (one for one in spec.of_kind("loss") if one.name == error.label)
        clause = next(named, spec.one("loss"))
        at = labels((clause.part_span("output") or clause.span if clause else None, ""))
        raise SpecError([Diagnostic("loss-mismatch", str(error), at)]) from error
    except WrongOutput as error:
        raise at_field(spec.one("model"), ("path",), "model-failed", error) from error
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if (found := loss_diagnostic(error, losses, spec)) is None:
            raise
        raise SpecError([found]) from error


def at_field(clause: Clause | None, names: Sequence[str], rule: str, error: Exception) -> SpecError:
    """Return an error at the first of these fields that the clause has."""
    spans = (clause.part_span(name) for name in names) if clause else ()
    at = labels((next(filter(None, spans), None), ""))
    return SpecError([Diagnostic(rule, str(error), at)])


def site_diagnostic(error: SiteError, spec: Spec) -> Diagnostic:
    """Return the diagnostic of a SiteError, on its clause, or the first of the spec that may have requested the site.

    Those that measure come before those that change the forward pass.
    """
    clauses = [clause for clause in spec.clauses if clause.name == error.clause]
    clauses += [clause for clause in spec.clauses if measures_gradients(clause.construct)]
    clauses += [c for c in spec.clauses if any("forward" in e.writes for e in c.construct.effects)]
    spans = [span for clause in clauses if (span := clause.part_span(error.field))]
    return Diagnostic(error.rule, str(error), tuple(Label(span) for span in spans[:1]))


def clause_diagnostic(error: ClauseFailed, spec: Spec) -> Diagnostic:
    """Return the diagnostic of what a clause cannot do in a step, at this clause."""
    clause = next((clause for clause in spec.clauses if clause.name == error.clause), None)
    span = clause.part_span(error.field) if clause else None
    return Diagnostic("clause-failed", str(error), (Label(span),) if span else ())


def optimizer_diagnostic(error: OptimizerProblem, spec: Spec) -> Diagnostic:
    """Return the diagnostic of what an optimizer does, at its clause."""
    clause = next((clause for clause in spec.clauses if clause.name == error.clause), None)
    span = clause.part_span(error.field) if clause else None
    return Diagnostic("optimizer-failed", str(error), (Label(span),) if span else ())


def loss_diagnostic(error: Exception, losses: Losses, spec: Spec) -> Diagnostic | None:
    """Return the diagnostic of an error that was raised while a loss was computed; None for any other error."""
    if isinstance(error, LossMismatch) and error.label is not None:
        return Diagnostic("loss-mismatch", str(error), _at(spec, error.label, error.field))
    trace, label = error.__traceback__, losses.parts[0].label
    codes = {getattr(type(p.loss).__call__, "__code__", None): p.label for p in losses.parts}
    while trace is not None and trace.tb_frame.f_code not in codes:
        trace = trace.tb_next
    if trace is not None:
        own, label = trace.tb_frame.f_locals.get("self"), codes[trace.tb_frame.f_code]
        label = next((p.label for p in losses.parts if p.loss is own), label)
    by_graph = isinstance(error, IndexError) and str(error).startswith("Target ")
    if trace is None and not by_graph:
        return None
    known = {} if trace is None else trace.tb_frame.f_locals
    given = [_form(known[name]) for name in ("outputs", "targets") if name in known]
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"outputs {given[0]} and targets {given[1]}" if len(given) == 2 else "these targets"
    message = f"the loss cannot be computed from {what}: {reason}"
    return Diagnostic("loss-mismatch", message, _at(spec, label))


def _at(spec: Spec, label: str, field: str = "") -> tuple[Label, ...]:
    """Return a label at a field of the loss clause of a name, or at the whole clause."""
    clause = next((c for c in spec.of_kind("loss") if c.name == label), spec.one("loss"))
    span = None if clause is None else clause.part_span(field) or clause.span
    return (Label(span),) if span else ()


def _form(value: object) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return f"of type {type(value).__name__}"
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
