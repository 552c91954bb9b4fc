"""Compile `when` rules into actions."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from trainc.compiler.bind.report import labels
from trainc.compiler.lower.lowering_context import LoweringContext, refuse_places
from trainc.dsl.resolve.statements import Assign
from trainc.dsl.resolve.statements import Rule as RuleClause
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.values.value_json import Duration, to_json
from trainc.runtime.schedule.expressions import names_read
from trainc.runtime.schedule.schedules import compile_condition, compile_schedule
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.action import Action
from trainc.runtime.step.when_rules import Rule, RuleAction


def when_rules(
    clauses: Sequence[RuleClause], context: LoweringContext, clause_signals: Collection[str]
) -> list[Action]:
    """Compile the `when` rules of a spec; raises SpecError with every rule that is not valid.

    `clause_signals` are the names_read of what clauses measure, without what every run has.
    """
    made: list[Action] = []
    found: list[Diagnostic] = []
    for i, clause in enumerate(clauses):
        try:
            made.append(_rule(f"rule {i + 1}", clause, context, clause_signals))
        except ValueError as error:
            message = f"this rule cannot be compiled: {error}"
            found.append(Diagnostic("bad-value", message, labels((clause.span, ""))))
    if found:
        raise SpecError(found)
    return made


def _rule(
    name: str, clause: RuleClause, context: LoweringContext, clause_signals: Collection[str]
) -> Rule:
    units, length, counts = context.units, context.schedule_length, context.signal_units
    acts = [
        RuleAction("set", compile_schedule(to_json(action.value), units, length, counts))
        if isinstance(action, Assign)
        else RuleAction(action.verb, text=str(action.argument or ""))
        for action in clause.actions
    ]
    condition = to_json(clause.condition)
    refuse_places(condition, str(clause.condition))
    for action in clause.actions:
        if isinstance(action, Assign):
            refuse_places(to_json(action.value), str(action.value))
    evaluate = compile_condition(condition, units, length, counts)
    hold, cooldown = (_wait(wait, context) for wait in (clause.hold, clause.cooldown))
    needs = sorted({name for name in names_read(condition) if name in clause_signals})
    return Rule(name, _text(clause), evaluate, hold, acts, needs, cooldown)


def _wait(given: Duration | None, context: LoweringContext) -> TimeSpan | None:
    """Return a rule's `for` or `cooldown` as the clock counts it."""
    if given is None:
        return None
    wait, length = TimeSpan.of(given), context.schedule_length
    if wait.unit != "run":
        return wait
    return TimeSpan(context.units.convert(wait, length.unit, context.length), length.unit)


def _text(clause: RuleClause) -> str:
    """Return a rule's text without its actions: `when loss < 2 for 10 steps`."""
    waits = (("for", clause.hold), ("cooldown", clause.cooldown))
    return f"when {clause.condition}" + "".join(f" {w} {d}" for w, d in waits if d is not None)
