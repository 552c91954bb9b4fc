"""Compile `when` rules into actions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

from trainc.compiler.bind.binding import Binding
from trainc.compiler.bind.report import labels
from trainc.compiler.lower.lowering_context import LoweringContext, refuse_places
from trainc.dsl.resolve.statements import Assign, Do
from trainc.dsl.resolve.statements import Rule as RuleClause
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.values.value_json import Duration, Expr, to_json
from trainc.runtime.rules.actions import RuleAction, Save, SetBatch, SetField, Stop, Value, Warn
from trainc.runtime.rules.rule import Rule
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.expressions import names_read
from trainc.runtime.schedule.schedules import Schedules, compile_condition
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.action import Action


def when_rules(
    binding: Binding, context: LoweringContext, clause_signals: Collection[str]
) -> list[Action]:
    """Compile the `when` rules of a spec; raises SpecError with every rule that is not valid.

    The clauses are lowered. `clause_signals` are the names of what clauses measure, without what every run has.
    """
    rules = [
        _RuleCompiler(f"rule {i}", rule, binding, context)
        for i, rule in enumerate(binding.spec.rules, 1)
    ]
    made: list[Action] = [rule.compiled(clause_signals) for rule in rules]
    if found := [problem for rule in rules for problem in rule.found]:
        raise SpecError(found)
    return [context.fields, *made] if context.fields.settable else made


class _RuleCompiler:
    """Compiles one rule; `found` are its mistakes."""

    def __init__(
        self, name: str, rule: RuleClause, binding: Binding, context: LoweringContext
    ) -> None:
        self.name, self.rule, self.binding, self.context = name, rule, binding, context
        self.found: list[Diagnostic] = []

    def compiled(self, clause_signals: Collection[str]) -> Rule:
        """Return the rule; one with mistakes does nothing."""
        condition = self._try("condition", self._condition) or (lambda clock, values: False)
        actions = [
            self._try(f"action {i}", partial(self._action, action))
            for i, action in enumerate(self.rule.actions, 1)
        ]
        needs = sorted(
            {name for name in names_read(to_json(self.rule.condition)) if name in clause_signals}
        )
        waits = (self._wait(wait) for wait in (self.rule.hold, self.rule.cooldown))
        hold, cooldown = waits
        acts = [action for action in actions if action is not None]
        return Rule(
            self.name, _text(self.rule), condition, hold, acts, needs, cooldown, self._fields_read()
        )

    def _try(self, part: str, compile: Any) -> Any:
        """Return what is compiled; report a mistake in it, at its place, and return None."""
        try:
            return compile()
        except ValueError as error:
            message = f"this rule cannot be compiled: {error}"
            self.found.append(
                Diagnostic("bad-value", message, labels((self.rule.part_span(part), "")))
            )
        return None

    def _condition(self) -> Any:
        condition, context = to_json(self.rule.condition), self.context
        refuse_places(condition, str(self.rule.condition))
        return compile_condition(
            condition, context.units, context.schedule_length, context.signal_units
        )

    def _action(self, action: Assign | Do) -> RuleAction:
        """Return what an action does; raises ValueError where it has no meaning for this model."""
        if isinstance(action, Do):
            if action.verb == "warn":
                return Warn(str(action.argument or ""))
            return Stop() if action.verb == "stop" else Save()
        refuse_places(to_json(action.value), str(action.value))
        if not action.label:
            return SetBatch(self._value(action.value)[0])
        value, unit = self._value(action.value)
        if unit not in (None, "run"):
            raise ValueError(
                f"`{action.target}` is a plain number, and `{action.value}` counts {unit}: divide it by `1 {unit}`"
            )
        self._refuse_unread(action.target)
        return SetField(self.context.fields, action.target, value)

    def _value(self, expression: Expr) -> tuple[Value, str | None]:
        """Return an expression as a function of clock and signals, and what it counts."""
        context = self.context
        schedules = Schedules(context.units, context.schedule_length, context.signal_units)
        found = schedules.compile(to_json(expression))
        if found.condition:
            raise ValueError("expected a number, found a condition")
        return found.at, found.unit

    def _refuse_unread(self, name: str) -> None:
        """Raise ValueError for a field that no clause in the program reads as a schedule."""
        if name in self.context.fields.schedules:
            return
        label, _, field = name.rpartition(".")
        clause = next(c for c in self.binding.clauses if c.label == label)
        if clause.dropped is not None:
            raise ValueError(f"`{clause.title}` is not in the program: {clause.dropped}")
        raise ValueError(
            f"`{clause.title}` does not read `{field}` with these fields, so that setting it has no effect: remove the"
            " action, or give the field a value in the clause"
        )

    def _fields_read(self) -> Any:
        """Return a function that gives the numbers of the fields that the rule reads."""
        fields = self.context.fields
        parts = [
            self.rule.condition,
            *(a.value for a in self.rule.actions if isinstance(a, Assign)),
        ]
        read = self._readable(dict.fromkeys(n for part in parts for n in names_read(to_json(part))))

        def now(clock: Clock) -> dict[str, float]:
            return {name: fields.read(name, clock) for name in read}

        return now

    def _readable(self, names: Iterable[str]) -> list[str]:
        """Return the names that are fields; report one that has a number for each layer."""
        schedules, placed = self.context.fields.schedules, self.context.fields.placed
        for name in names:
            if name in placed:
                message = f"`{name}` has a number for each layer, so that it has no value in a rule"
                self.found.append(Diagnostic("bad-value", message, labels((self.rule.span, ""))))
        return [name for name in names if name in schedules and name not in placed]

    def _wait(self, given: Duration | None) -> TimeSpan | None:
        """Return a rule's `for` or `cooldown` as the clock counts it."""
        if given is None:
            return None
        wait, length = TimeSpan.of(given), self.context.schedule_length
        if wait.unit != "run":
            return wait
        return TimeSpan(
            self.context.units.convert(wait, length.unit, self.context.length), length.unit
        )


def _text(clause: RuleClause) -> str:
    """Return a rule's text without its actions: `when loss < 2 for 10 steps`."""
    waits = (("for", clause.hold), ("cooldown", clause.cooldown))
    return f"when {clause.condition}" + "".join(f" {w} {d}" for w, d in waits if d is not None)
