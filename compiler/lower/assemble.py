"""Lower every active clause, build the optimizers, and order the actions: the lowered method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.effects import step_order
from trainc.compiler.bind.report import labels
from trainc.compiler.lower.lowering import lower
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.lowered_method import LoweredMethod, OptimizerPart
from trainc.compiler.model.import_path import ImportProblem
from trainc.compiler.model.inventory import Inventory
from trainc.dsl.reading.construct import PHASES
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import CompilerBug, SpecError
from trainc.runtime.step.action import Action
from trainc.runtime.step.held_updates import HeldUpdates
from trainc.runtime.step.optimizer import Clip, OptimizerStep, ParamSlot, Rates
from trainc.runtime.step.updates import UpdateTransform


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
            lower(clause, context, method)
        except (ValueError, ImportError) as error:
            message = f"`{clause.title}` cannot be compiled: {error}"
            found.append(Diagnostic("bad-value", message, labels((clause.span, ""))))
        by_label[clause.label] = method.actions[before:]
    found += _changes_of_nothing(active, by_label, method, context.inventory)
    found += _masked_exchanges(active, method)
    if found:
        raise SpecError(found)
    updates = _held_updates(method, context.inventory)
    for part in method.optimizers:
        by_label[part.label] = _optimizer_actions(part, method, context, updates, to_run)
    method.actions = _ordered(active, by_label)
    if updates is not None:
        last = max(i for i, one in enumerate(method.actions) if isinstance(one, UpdateTransform))
        method.actions.insert(last + 1, updates)
    return method


def _held_updates(method: LoweredMethod, inventory: Inventory) -> HeldUpdates | None:
    """Return what holds the updates that clauses change, between optimizer and weights; None where none does."""
    transforms = [action for action in method.actions if isinstance(action, UpdateTransform)]
    if not transforms:
        return None
    claimed = {name for part in method.optimizers for name in part.targets} - method.frozen
    sizes = {
        name: method.masks[name].values.nbytes
        if name in method.masks
        else inventory.parameter[name].bytes
        for transform in transforms
        for name in transform.parameters
        if name in claimed
    }
    return HeldUpdates(transforms, sum(sizes.values()))


def _changes_of_nothing(
    clauses: Sequence[BoundClause],
    by_label: Mapping[str, list[Action]],
    method: LoweredMethod,
    inventory: Inventory,
) -> Iterator[Diagnostic]:
    """Yield an error for every clause that changes updates of parameters none of which an optimizer trains."""
    claimed = {name for part in method.optimizers for name in part.targets} - method.frozen
    trained = {name for name in claimed if inventory.parameter[name].trainable}
    for clause in clauses:
        for action in by_label.get(clause.label, ()):
            if isinstance(action, UpdateTransform) and trained.isdisjoint(action.parameters):
                yield Diagnostic(
                    "selector-matches-frozen",
                    f"`{clause.title}` changes what an optimizer adds to weights, but no optimizer trains what it"
                    " selects",
                    labels((clause.span, "")),
                    help="select parameters that an `optimizer` clause of this spec trains, or remove the clause",
                )


def _masked_exchanges(
    clauses: Sequence[BoundClause], method: LoweredMethod
) -> Iterator[Diagnostic]:
    """Yield an error for every clause that exchanges weights, if a mask may differ between replicas."""
    for clause in clauses:
        if clause.label in method.exchanges and method.masks:
            name = next(iter(method.masks))
            yield Diagnostic(
                "conflicting-effects",
                f"`{clause.title}` cannot exchange `{name}`, because a mask chooses which entries of it train and"
                " replicas may choose different ones",
                labels((clause.span, "exchanges weights")),
                help=f"remove the `mask` clause, or `{clause.title}`",
            )


def _optimizer_actions(
    part: OptimizerPart,
    method: LoweredMethod,
    context: LoweringContext,
    updates: HeldUpdates | None,
    to_run: bool,
) -> list[Action]:
    """Return the actions of one optimizer clause: set the rates, clip, step."""
    names = [name for name in part.targets if name not in method.frozen]
    slots = [
        ParamSlot(
            name,
            method.masks[name].values
            if name in method.masks
            else context.model.get_parameter(name),
            part.decay[name],
            tuple(method.lr_factors.get(name, ())),
        )
        for name in names
    ]
    label, construct = part.label, part.construct
    optimizer = OptimizerStep(label, slots, construct.make, construct.decay_form, updates)
    try:
        construct.examine()
        if to_run:
            _ = optimizer.torch
    except (ImportProblem, TypeError, ValueError) as error:
        at = labels((part.span, ""))
        rule, help_ = getattr(error, "rule", "wrong-argument"), getattr(error, "help", None)
        message = f"the optimizer cannot be built: {error}"
        raise SpecError([Diagnostic(rule, message, at, help=help_)]) from error
    actions: list[Action] = [Rates(f"{label} rates", part.base, optimizer), optimizer]
    if construct.clip is not None:
        actions.append(Clip(f"{label} clip", construct.clip, slots))
    return actions


def _ordered(clauses: Sequence[BoundClause], by_label: dict[str, list[Action]]) -> list[Action]:
    """Sort the actions as the declared effects say; raises CompilerBug for an action in an undeclared phase."""
    rank = {
        (clause.label, effect.phase): i
        for i, (clause, effect) in reversed(list(enumerate(step_order(clauses))))
    }
    placed: list[tuple[int, bool, int, Action]] = []
    for clause in clauses:
        for action in by_label.get(clause.label, ()):
            phase = PHASES[action.phase - 1]
            if (clause.label, phase) not in rank:
                raise CompilerBug(
                    clause.title,
                    f"has an action in phase `{phase}`, which its effects do not declare",
                )
            # What reads the weights after the optimizer must find them updated.
            later = not isinstance(action, UpdateTransform)
            placed.append((int(action.phase), later, rank[clause.label, phase], action))
    return [action for *_, action in sorted(placed, key=lambda row: row[:3])]
