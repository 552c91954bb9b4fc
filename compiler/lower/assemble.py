"""Lower every active clause, build the optimizers, and order the actions: the lowered method."""

from __future__ import annotations

from collections.abc import Sequence

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.effects import step_order
from trainc.compiler.bind.report import labels
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.lowered_method import LoweredMethod, OptimizerPart
from trainc.compiler.model.import_path import ImportProblem
from trainc.dsl.reading.construct import PHASES
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import CompilerBug, SpecError
from trainc.runtime.step.action import Action
from trainc.runtime.step.optimizer import Clip, OptimizerStep, ParamSlot, Rates


def assemble(
    clauses: Sequence[BoundClause], context: LoweringContext, *, to_run: bool = True
) -> LoweredMethod:
    """Lower the clauses for the model; raises SpecError for mistakes that only lowering can find.

    Without `to_run` the method is only read: optimizers are checked but not built.
    """
    method = LoweredMethod()
    found: list[Diagnostic] = []
    by_label: dict[str, list[Action]] = {}
    active = [clause for clause in clauses if clause.dropped is None]
    for clause in active:
        before = len(method.actions)
        try:
            clause.construct.lower(Lowering(clause, context, method))
        except (ValueError, ImportError) as error:
            message = f"`{clause.title}` cannot be compiled: {error}"
            found.append(Diagnostic("bad-value", message, labels((clause.span, ""))))
        by_label[clause.label] = method.actions[before:]
    if found:
        raise SpecError(found)
    for part in method.optimizers:
        by_label[part.label] = _optimizer_actions(part, method, context, to_run)
    method.actions = _ordered(active, by_label)
    return method


def _optimizer_actions(
    part: OptimizerPart, method: LoweredMethod, context: LoweringContext, to_run: bool
) -> list[Action]:
    """Return the actions of one optimizer clause: set the rates, clip, step."""
    names = [name for name in part.targets if name not in method.frozen]
    slots = [
        ParamSlot(
            name,
            method.selected_entries[name].values
            if name in method.selected_entries
            else context.model.get_parameter(name),
            part.decay[name],
            tuple(method.lr_factors.get(name, ())),
        )
        for name in names
    ]
    label, clip = part.label, part.construct.clip
    optimizer = OptimizerStep(label, slots, part.construct.make)
    try:
        part.construct.examine()
        if to_run:
            _ = optimizer.torch
    except (ImportProblem, TypeError, ValueError) as error:
        at = labels((part.span, ""))
        rule, help_ = getattr(error, "rule", "wrong-argument"), getattr(error, "help", None)
        message = f"the optimizer cannot be built: {error}"
        raise SpecError([Diagnostic(rule, message, at, help=help_)]) from error
    actions: list[Action] = [Rates(f"{label} rates", part.base, optimizer), optimizer]
    if clip is not None:
        actions.append(Clip(f"{label} clip", clip, slots))
    return actions


def _ordered(clauses: Sequence[BoundClause], by_label: dict[str, list[Action]]) -> list[Action]:
    """Sort the actions as the declared effects say; raises CompilerBug for an action in an undeclared phase."""
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
                    clause.title,
                    f"has an action in phase `{phase}`, which its effects do not declare",
                )
            placed.append((int(action.phase), rank[clause.label, phase], action))
    return [action for *_, action in sorted(placed, key=lambda row: row[:2])]
