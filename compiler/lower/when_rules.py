"""Compile `when` rules into actions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from trainc.compiler.bind.binding import Binding
from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.report import labels
from trainc.compiler.bind.rule_selectors import selected_by
from trainc.compiler.lower.lowering_context import LoweringContext, refuse_places
from trainc.dsl.resolve.statements import Assign, Do
from trainc.dsl.resolve.statements import Rule as RuleClause
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import SpecError
from trainc.dsl.text.vocabulary import EVALUATED
from trainc.dsl.values.functions import REMEMBERING
from trainc.dsl.values.value_json import Call, Expr, Name, expr_from_json, to_json, walk
from trainc.runtime.rules.actions import (
    Evaluate,
    Freeze,
    GoBack,
    RuleAction,
    Save,
    SetBatch,
    SetField,
    Stop,
    Switch,
    Warn,
)
from trainc.runtime.rules.history import Best, History, Window
from trainc.runtime.rules.rule import Rule
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.expressions import Compiled, names_read
from trainc.runtime.schedule.schedules import Condition, Schedules
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.action import Action


def when_rules(
    binding: Binding,
    context: LoweringContext,
    clause_signals: Collection[str],
    exchanges: Sequence[str] = (),
) -> list[Action]:
    """Compile the `when` rules of a spec; raises SpecError with every rule that is not valid.

    The clauses are lowered. `clause_signals` are the names of what clauses measure, without what every run has;
    `exchanges` those of clauses between whose turns each replica trains on its own.
    """
    history = History(context.fields)
    rules = [
        _RuleCompiler(f"rule {i}", rule, binding, context, history)
        for i, rule in enumerate(binding.spec.rules, 1)
    ]
    made: list[Action] = [rule.compiled(clause_signals) for rule in rules]
    for rule in rules if exchanges else ():
        rule.refuse_apart(exchanges[0])
    if found := [problem for rule in rules for problem in rule.found]:
        raise SpecError(found)
    kept: list[tuple[Action, object]] = [
        (history, history.memories),
        (context.fields, context.fields.settable),
        (context.switches, context.switches.names),
        (context.frozen, context.frozen.names),
    ]
    return [*(action for action, needed in kept if needed), *made]


class _RuleCompiler:
    """Compiles one rule; `found` are its mistakes."""

    def __init__(
        self,
        name: str,
        rule: RuleClause,
        binding: Binding,
        context: LoweringContext,
        history: History,
    ) -> None:
        self.name, self.rule, self.binding, self.context = name, rule, binding, context
        self.history = history
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
        waits = {"for": self.rule.hold, "cooldown": self.rule.cooldown}
        hold, cooldown = (
            None if wait is None else self._try(part, partial(self.context.counted, wait))
            for part, wait in waits.items()
        )
        acts = [action for action in actions if action is not None]
        read = dict.fromkeys(names_read(to_json(self.rule.condition)))
        needs = [n for n in read if n in clause_signals or n.startswith(EVALUATED)]
        self._read_fields()
        text, fields = _text(self.rule), self.context.fields
        return Rule(self.name, text, str(self.rule), condition, hold, acts, needs, cooldown, fields)

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

    def refuse_apart(self, exchange: str) -> None:
        """Report what replicas that train on their own would decide each in another way, and must do alike."""
        for i, action in enumerate(self.rule.actions, 1):
            if isinstance(action, Do) and action.verb in ("stop", "save", "warn"):
                continue
            value = [to_json(action.value)] if isinstance(action, Assign) else []
            read = {n for one in (to_json(self.rule.condition), *value) for n in names_read(one)}
            same = {"step", "batch", "micro_batch", *self.context.fields.schedules}
            differs = sorted(n for n in read - same if not n.startswith(EVALUATED))
            if differs:
                message = (
                    f"with `{exchange}` each replica has a `{differs[0]}` of its own, so that this rule would act on"
                    " some of them only: let it read the clock or evaluations, such as `steps` or `eval_loss`"
                )
                at = labels((self.rule.part_span(f"action {i}"), ""))
                self.found.append(Diagnostic("bad-value", message, at))

    def _condition(self) -> Condition:
        refuse_places(to_json(self.rule.condition), str(self.rule.condition))
        return cast("Condition", self._compile(self.rule.condition).at)

    def _action(self, action: Assign | Do) -> RuleAction:
        """Return what an action does; raises ValueError where it has no meaning for this model."""
        if isinstance(action, Do):
            return self._verb(action)
        refuse_places(to_json(action.value), str(action.value))
        value = self._compile(action.value)
        plain = not any(isinstance(part, Name | Call) for part in walk(action.value))
        if not action.label:
            size = value.at(Clock(), {}) if plain else 1.0
            if not 0 < size < math.inf:
                raise ValueError(f"it sets `batch` to {size:g} samples: write one or more")
            return SetBatch(value.at)
        if value.unit not in (None, "run"):
            raise ValueError(
                f"`{action.target}` is a plain number, and `{action.value}` counts {value.unit}: divide it by"
                f" `1 {value.unit}`"
            )
        self._refuse_unread(action.target)
        if plain:
            self.context.fields.check(action.target, value.at(Clock(), {}))
        return SetField(self.context.fields, action.target, value.at)

    def _verb(self, action: Do) -> RuleAction:
        context, argument = self.context, action.argument
        match action.verb:
            case "warn":
                return Warn(str(argument or ""))
            case "stop":
                return Stop()
            case "save":
                return Save()
            case "evaluate":
                return Evaluate()
            case "rollback":
                return GoBack()
            case "open" | "close":
                self._clause(str(argument))
                return Switch(context.switches, str(argument), action.verb == "open")
        names = selected_by(action, context.inventory)
        return Freeze(context.frozen, names, action.verb == "freeze", str(argument))

    def _clause(self, label: str) -> BoundClause:
        """Return the clause of a name; raises ValueError for one that is not in the program."""
        clause = next(c for c in self.binding.clauses if c.label == label)
        if clause.dropped is not None:
            raise ValueError(f"`{clause.title}` is not in the program: {clause.dropped}")
        return clause

    def _compile(self, expression: Expr) -> Compiled:
        """Return an expression as a function of the clock and of what rules read."""
        return rule_expressions(self.context, self.history).compile(to_json(expression))

    def _refuse_unread(self, name: str) -> None:
        """Raise ValueError for a field that no clause in the program reads as a schedule."""
        if name in self.context.fields.schedules:
            return
        label, _, field = name.rpartition(".")
        clause = self._clause(label)
        raise ValueError(
            f"`{clause.title}` does not read `{field}` with these fields, so that setting it has no effect: remove the"
            " action, or give the field a value in the clause"
        )

    def _read_fields(self) -> None:
        """Let the fields that the rule reads be known when it looks; report one with a number for each layer."""
        fields = self.context.fields
        for part, value in self.rule.expressions():
            for name in names_read(to_json(value)):
                if name in fields.placed:
                    message = (
                        f"`{name}` has a number for each layer, so that it has no value in a rule"
                    )
                    at = labels((self.rule.part_span(part), ""))
                    help = "give the field one number for all, or write a number in its place"
                    self.found.append(Diagnostic("bad-value", message, at, (), help))
                elif name in fields.schedules:
                    fields.read_by_rules.add(name)


def _text(clause: RuleClause) -> str:
    """Return a rule's text without its actions: `when loss < 2 for 10 steps`."""
    waits = (("for", clause.hold), ("cooldown", clause.cooldown))
    return f"when {clause.condition}" + "".join(f" {w} {d}" for w, d in waits if d is not None)


@dataclass
class RuleExpressions(Schedules):
    """Schedules, and calls of `best`, `since_best` and `mean`, for which `history` remembers numbers."""

    context: LoweringContext = field(kw_only=True)
    history: History = field(kw_only=True)

    def call(
        self, name: str, args: Sequence[Any], options: Mapping[str, Any], start: float
    ) -> Compiled:
        """Compile a call."""
        if name not in REMEMBERING:
            return super().call(name, args, options, start)
        read = self._number(args[0], start)
        memories, number = self.history.memories, expr_from_json(args[0])
        if name == "mean":
            span = self._window(args[1])
            made = Window(f"mean({number}, {expr_from_json(args[1])})", read.at, span)
            window = memories.setdefault(made.text, made)
            assert isinstance(window, Window)
            return Compiled(lambda clock, values: window.mean(clock), unit=read.unit)
        lowest = Best(f"best({number})", read.at)
        best = memories.setdefault(lowest.text, lowest)
        assert isinstance(best, Best)
        if name == "best":
            return Compiled(lambda clock, values: best.lowest, unit=read.unit)
        return Compiled(lambda clock, values: clock.steps - best.step, unit="steps")

    def _window(self, duration: Any) -> TimeSpan:
        """Return the window of a mean as the clock counts it."""
        span = TimeSpan(float(duration[1]), duration[2])
        if not span.amount > 0:
            raise ValueError("the window of a mean must be longer than 0")
        return self.context.counted(span)


def rule_expressions(context: LoweringContext, history: History) -> RuleExpressions:
    """Return what compiles the rules of one spec."""
    known = context.units, context.schedule_length, context.signal_units
    return RuleExpressions(*known, context=context, history=history)
