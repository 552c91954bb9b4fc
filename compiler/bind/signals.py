"""Check the signals in expressions: they must be measured, and compared numbers must count the same thing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.report import labels
from trainc.dsl.reading.signal import full_name
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.source import Span
from trainc.dsl.values import value_json as v

_SIZES = ("batch", "micro_batch", "samples")


@dataclass(frozen=True, slots=True)
class _Use:
    """One expression of a spec, its place, and whether its value is a batch size."""

    expression: v.Expr
    span: Span | None
    sets_batch: bool = False

    def names(self) -> list[str]:
        """Return every name in it, each once."""
        found = (x.id for x in v.walk(self.expression) if isinstance(x, v.Name))
        return list(dict.fromkeys(found))


def signal_units(clauses: Sequence[BoundClause]) -> dict[str, Literal["samples"]]:
    """Return the signals that count samples; the others are plain numbers."""
    return {
        name: "samples"
        for clause in clauses
        for name, signal in measured_signals(clause)
        if clause.construct.unit_of(signal) == "samples"
        and _unmeasured_reason(clause, signal) is None
    }


def signal_problems(spec: Spec, clauses: Sequence[BoundClause]) -> Iterator[Diagnostic]:
    """Yield an error for every use of a signal that is never measured, and for samples mixed with other counts."""
    known = {
        name: (clause, signal) for clause in clauses for name, signal in measured_signals(clause)
    }
    for use in _expressions(spec):
        counts: dict[str, str] = {}
        for name in use.names():
            if name in known:
                clause, signal = known[name]
                if (why := _unmeasured_reason(clause, signal)) is not None:
                    message = f"`{name}` is never measured, so this expression has no effect"
                    yield Diagnostic(
                        "unknown-signal", message, labels((use.span, "")), (why[0],), why[1]
                    )
                elif (unit := clause.construct.unit_of(signal)) is not None:
                    counts[name] = unit
        yield from _unlike(use, counts)


def measured_signals(clause: BoundClause) -> Iterator[tuple[str, str]]:
    """Yield name and signal of all that a clause measures; its main signal is the empty string."""
    for signal in clause.construct.signals:
        yield full_name(clause.label, signal), signal


def _expressions(spec: Spec) -> Iterator[_Use]:
    for clause in spec.clauses:
        for name in type(clause.construct).model_fields:
            value: Any = getattr(clause.construct, name)
            for expression in v.expressions_in(value):
                sets = clause.kind == "data" and name == "batch"
                yield _Use(expression, clause.part_span(name), sets)
    for rule in spec.rules:
        yield _Use(rule.condition, rule.span)
        for action in rule.actions:
            value = getattr(action, "value", None)
            if isinstance(value, v.Expr):
                yield _Use(value, rule.span, getattr(action, "target", None) == "batch")


def _unmeasured_reason(clause: BoundClause, signal: str) -> tuple[str, str] | None:
    """Return why a signal is never measured, and what would help; None where it is."""
    if clause.dropped is not None:
        help = "remove the expression, or correct the selector of the clause"
        return f"`{clause.title}` is not in the program: {clause.dropped}", help
    if signal in clause.construct.repeated and clause.every is None:
        why = (
            f"`{clause.title}` measures it from its second time on, and without `every` it has one"
        )
        return (
            why,
            "write how often the clause acts, as `every 100 steps`, or remove the expression",
        )
    return clause.construct.unmeasured_reason(signal)


def _unlike(use: _Use, counts: dict[str, str]) -> Iterator[Diagnostic]:
    """Yield an error if a signal that does not count samples is combined with a number of samples."""
    odd = next((name for name, unit in counts.items() if unit != "samples"), None)
    if odd is None:
        return
    sized = [x for x in use.names() if x in _SIZES or counts.get(x) == "samples"]
    amounts = (x for x in v.walk(use.expression) if isinstance(x, v.Quantity))
    sized += [str(x) for x in amounts if x.duration.unit == "samples"]
    if not sized and not use.sets_batch:
        return
    what = "the batch" if use.sets_batch else f"`{sized[0]}`"
    yield Diagnostic(
        "bad-value",
        f"`{odd}` counts {counts[odd]}, but {what} counts samples",
        labels((use.span, "")),
        (f"a sample contains several {counts[odd]}, and their number varies",),
        "add a second such clause with another name (`as`) that counts samples, and use its signal"
        if use.sets_batch
        else f"compare `{odd}` with a plain number, or let its clause count samples",
    )
