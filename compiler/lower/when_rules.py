"""Compile `when` rules into actions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from trainc.compiler.lower.open_ended import UNBOUNDED
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.errors import SpecError
from trainc.runtime.schedule.clock import Duration as ClockDuration
from trainc.runtime.step.action import Action
from trainc.runtime.step.when_rules import Act, Rule

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering_context import LoweringContext
    from trainc.dsl.resolve.statements import Rule as RuleClause
    from trainc.dsl.values.value_json import Duration
    from trainc.runtime.schedule.clock import RunLength


def _wait(
    given: Duration | None, setting: LoweringContext, length: RunLength
) -> ClockDuration | None:
    """Return a rule's `for` or `cooldown` as the clock counts it."""
    if given is None:
        return None
    wait = ClockDuration(given.amount, given.unit)
    if wait.unit != "run":
        return wait
    return ClockDuration(setting.units.convert(wait, length.unit, setting.length), length.unit)


def _told(clause: RuleClause) -> str:
    """Return a rule's text up to what it does."""
    waits = (("for", clause.hold), ("cooldown", clause.cooldown))
    return f"when {clause.condition}" + "".join(f" {w} {d}" for w, d in waits if d is not None)


def when_rules(
    clauses: Sequence[RuleClause],
    setting: LoweringContext,
    clause_signals: Collection[str],
) -> list[Action]:
    """Compile the `when` rules over the signals of the clauses; raises SpecError when one sets what cannot be set."""
    from trainc.dsl.resolve.statements import Assign
    from trainc.dsl.values.value_json import to_json
    from trainc.runtime.schedule.expressions import names
    from trainc.runtime.schedule.schedules import compile_condition, compile_schedule

    made: list[Action] = []
    found: list[Diagnostic] = []
    length = setting.length or UNBOUNDED
    for i, clause in enumerate(clauses):
        acts = []
        labels = (Label(clause.span),) if clause.span else ()
        try:
            for action in clause.actions:
                if not isinstance(action, Assign):
                    acts.append(Act(action.verb, text=str(action.argument or "")))
                else:
                    value = compile_schedule(
                        to_json(action.value), setting.units, length, setting.signal_units
                    )
                    acts.append(Act("set", value))
            condition = compile_condition(
                to_json(clause.condition), setting.units, length, setting.signal_units
            )
            hold, cooldown = (
                _wait(wait, setting, length) for wait in (clause.hold, clause.cooldown)
            )
        except ValueError as error:
            found.append(Diagnostic("bad-value", f"this rule cannot be compiled: {error}", labels))
            continue
        needs = {name for name in names(to_json(clause.condition)) if name in clause_signals}
        name, text = f"rule {i + 1}", _told(clause)
        made.append(Rule(name, text, condition, hold, acts, sorted(needs), cooldown))
    if found:
        raise SpecError(found)
    return made
