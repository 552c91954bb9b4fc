"""Assemble: lower every active clause of a binding and order what comes out of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.effects import step_order
from trainc.compiler.lower.lowering import LoweredMethod, Lowering, LoweringContext, OptimizerPart
from trainc.compiler.lower.open_ended import UNBOUNDED
from trainc.dsl.reading.construct import PHASES
from trainc.dsl.text.diagnostic import Diagnostic, Label
from trainc.dsl.text.errors import CompilerBug, SpecError
from trainc.runtime.schedule.clock import Duration as ClockDuration
from trainc.runtime.step.action import Action
from trainc.runtime.step.optimizer import Clip, OptimizerStep, ParamSlot, Rates
from trainc.runtime.step.when_rules import Act, Rule

if TYPE_CHECKING:
    from trainc.dsl.resolve.spec import Rule as RuleClause
    from trainc.dsl.values.value_json import Duration
    from trainc.runtime.schedule.clock import RunLength


def assemble(
    clauses: Sequence[BoundClause], setting: LoweringContext, *, to_run: bool = True
) -> LoweredMethod:
    """Lower the clauses onto the model; raises SpecError for what only lowering can find.

    Not `to_run`, the parts are for reading: optimizers are examined but not built.
    """
    parts = LoweredMethod()
    found: list[Diagnostic] = []
    by_label: dict[str, list[Action]] = {}
    active = [clause for clause in clauses if clause.dropped is None]
    for clause in active:
        before = len(parts.actions)
        try:
            clause.construct.lower(Lowering(clause, setting, parts))
        except (ValueError, ImportError) as error:
            labels = (Label(clause.span),) if clause.span else ()
            found.append(
                Diagnostic("bad-value", f"`{clause.title}` cannot be lowered: {error}", labels)
            )
        by_label[clause.label] = parts.actions[before:]
    if found:
        raise SpecError(found)
    for part in parts.optimizers:
        by_label[part.clause.label] = _optimizer_actions(part, parts, setting, to_run)
    parts.actions = _ordered(active, by_label)
    return parts


def _optimizer_actions(
    part: OptimizerPart, parts: LoweredMethod, setting: LoweringContext, to_run: bool
) -> list[Action]:
    """Build the slots of one optimizer clause and the actions that move them."""
    from trainc.compiler.model.import_path import ImportProblem

    names = [name for name in part.clause.targets if name not in parts.frozen]
    slots = [
        ParamSlot(
            name,
            parts.compacts[name].values
            if name in parts.compacts
            else setting.model.get_parameter(name),
            part.decay[name],
            tuple(parts.lr_factors.get(name, ())),
        )
        for name in names
    ]
    label, clip = part.clause.label, part.construct.clip
    optimizer = OptimizerStep(label, slots, part.construct.make)
    try:
        part.construct.examine()
        if to_run:
            _ = optimizer.torch
    except (ImportProblem, TypeError, ValueError) as error:
        labels = (Label(part.clause.span),) if part.clause.span else ()
        rule, help_ = getattr(error, "rule", "wrong-argument"), getattr(error, "help", None)
        message = f"the optimizer cannot be built: {error}"
        raise SpecError([Diagnostic(rule, message, labels, help=help_)]) from error
    actions: list[Action] = [Rates(f"{label} rates", part.base, optimizer), optimizer]
    if clip is not None:
        actions.append(Clip(f"{label} clip", clip, slots))
    return actions


def _ordered(clauses: Sequence[BoundClause], by_label: dict[str, list[Action]]) -> list[Action]:
    """Sort the actions as the declared effects say; an action in a phase its construct did not declare is our bug."""
    rank = {
        (clause.label, effect.phase): i
        for i, (clause, effect) in reversed(list(enumerate(step_order(clauses))))
    }
    placed: list[tuple[int, int, Action]] = []
    for clause in clauses:
        for action in by_label.get(clause.label, ()):
            phase = PHASES[action.phase - 1]
            if (clause.label, phase) not in rank:
                raise CompilerBug(
                    clause.title, f"acts in phase `{phase}`, which its effects do not declare"
                )
            placed.append((int(action.phase), rank[clause.label, phase], action))
    return [action for *_, action in sorted(placed, key=lambda row: row[:2])]


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


def rules(
    clauses: Sequence[RuleClause],
    setting: LoweringContext,
    clause_signals: Collection[str],
) -> list[Action]:
    """Compile the `when` rules over the signals of the clauses; raises SpecError when one sets what cannot be set."""
    from trainc.dsl.resolve.spec import Assign
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
