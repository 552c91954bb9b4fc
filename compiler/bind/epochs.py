"""Epochs that nothing can count: the training data has said to nobody how many samples it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trainc.dsl.resolve.statements import Clause, Rule
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.record import Record
from trainc.dsl.text.source import Span
from trainc.dsl.values.value_json import Duration, Name

# What only `trainc run` reads, which has the data that the spec names.
OF_RUNS = ("length", "eval", "checkpoint")


def uncounted_epochs(clauses: Sequence[Clause], rules: Sequence[Rule]) -> Iterator[Diagnostic]:
    """Yield an error for every part of these that is in epochs, for a run that does not know how long one is."""
    data = next((clause for clause in clauses if clause.kind == "data"), None)
    help = "write steps or samples, or add a `data` clause whose callable has a `describe`"
    if data is not None:
        source: Any = data.construct
        help = source.count_help
    for clause in clauses:
        names: Iterator[str] = iter(type(clause.construct).model_fields)
        parts = {name: getattr(clause.construct, name) for name in names}
        if clause.kind == "run" and data is None:
            parts = {name: value for name, value in parts.items() if name not in OF_RUNS}
        times = {"from": clause.start, "until": clause.stop, "every": clause.every}
        for name, value in parts.items():
            yield from _uncounted(f"`{name} = {value}`", value, clause.part_span(name), help)
        for name, value in times.items():
            yield from _uncounted(f"`{name} {value}`", value, clause.part_span(name), help)
    for rule in rules:
        yield from _uncounted(
            f"`{rule.condition}`", rule.condition, rule.part_span("condition"), help
        )
        for name, value in {"for": rule.hold, "cooldown": rule.cooldown}.items():
            yield from _uncounted(f"`{name} {value}`", value, rule.part_span(name), help)
        for action in rule.actions:
            yield from _uncounted(f"`{action}`", action, rule.span, help)


def _uncounted(written: str, value: Any, span: Span | None, help: str) -> Iterator[Diagnostic]:
    if _reads_epochs(value):
        message = f"{written} counts epochs, but how many samples an epoch has is not known"
        yield Diagnostic("wrong-unit", message, (Label(span),) if span else (), (), help)


def _reads_epochs(value: Any) -> bool:
    """Say whether a value has a duration in epochs in it, or reads their number."""
    match value:
        case Duration():
            return value.unit == "epochs"
        case Name():
            return value.id == "epochs"
        case dict():
            return any(map(_reads_epochs, value.values()))
        case tuple() | list():
            return any(map(_reads_epochs, value))
        case Record():
            return any(map(_reads_epochs, vars(value).values()))
    return False
