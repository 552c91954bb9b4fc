"""Lower every active clause, build the optimizers, and order the actions: the lowered method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.effects import step_order
from trainc.compiler.bind.report import labels
from trainc.compiler.errors import RuleRefused
from trainc.compiler.lower.lowering import lower
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.lower.method_checks import problems_between
from trainc.compiler.method.lowered_method import LoweredMethod, OptimizerPart
from trainc.compiler.method.weight_hook import TRAINED, WeightHook
from trainc.compiler.model.import_path import ImportProblem
from trainc.compiler.model.inventory import Inventory
from trainc.dsl.reading.construct import PHASES
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.dsl.text.errors import CompilerBug, SpecError
from trainc.runtime.mask.mask_actions import ZeroGradients
from trainc.runtime.mask.selected_entries import SelectedEntries
from trainc.runtime.soundness.gradient_norm import ModelGradient
from trainc.runtime.step.action import Action, Phase
from trainc.runtime.step.entry_updates import EntryMask, EntryUpdates
from trainc.runtime.step.gradients import (
    Clip,
    DropGradients,
    GradientTransform,
    MeasureChanged,
    Pausing,
    Trained,
)
from trainc.runtime.step.held_updates import HeldUpdates
from trainc.runtime.step.optimizer import (
    LrFactor,
    OptimizerStep,
    OwnOptimizer,
    ParamSlot,
    Rates,
)
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
    optimizers: list[Any] = [clause for clause in active if clause.kind == "optimizer"]
    method.trained_by = {name: one.construct for one in optimizers for name in one.targets}
    for clause in active:
        before = len(method.actions)
        try:
            lower(clause, context, method)
        except ImportProblem as problem:
            at = labels((clause.part_span(problem.field), ""))
            found.append(
                Diagnostic(problem.rule, str(problem), at, tuple(problem.notes), problem.help)
            )
        except RuleRefused as refused:
            at = labels((context.switched_at[refused.label], ""), (clause.span, "of this clause"))
            found.append(Diagnostic("unknown-target", str(refused), at))
        except (ValueError, ImportError) as error:
            message = f"`{clause.title}` cannot be compiled: {error}"
            at = labels((clause.part_span(getattr(error, "field", "")), ""))
            found.append(Diagnostic("bad-value", message, at))
        by_label[clause.label] = method.actions[before:]
    _keep_untrained_entries(method)
    found += problems_between(active, by_label, method, context.inventory)
    if found:
        raise SpecError(found)
    updates = _held_updates(method, context.inventory)
    for part in method.optimizers:
        by_label[part.label] = _optimizer_actions(part, method, context, updates, to_run)
    method.actions = _ordered(active, by_label)
    if not method.optimizers and to_run:
        _leave_gradients(method, context)
    _connect_gradients(method)
    every: tuple[Pausing, ...] = (context.frozen, *method.paused)
    if pausing := [one for one in every if one.names]:
        _drop_paused(method, pausing)
    _measure_gradients(method)
    if updates is not None:
        last = max(i for i, one in enumerate(method.actions) if isinstance(one, UpdateTransform))
        method.actions.insert(last + 1, updates)
    return method


def _keep_untrained_entries(method: LoweredMethod) -> None:
    """Tell what changes weights, and leaves entries that do not train as they are, where masks let entries train."""
    hooks = method.rewrite.hooks
    for at, site in enumerate(hooks):
        if not isinstance(site.hook, WeightHook) or site.hook.of_untrained or site.weight is None:
            continue
        if (mask := method.masks.get(site.weight.name)) is not None:
            name = f"{TRAINED}:{site.weight.name}"
            method.live_tensors[name] = mask.trained_entries
            hooks[at] = replace(site, scalars=(*site.scalars, (TRAINED, name)))


def _leave_gradients(method: LoweredMethod, context: LoweringContext) -> None:
    """Let the user's own optimizer have the gradients of all trainable parameters, where the spec has none."""
    names = [p.name for p in context.inventory.trainable if p.name not in method.frozen]
    own = OwnOptimizer([ParamSlot(name, context.model.get_parameter(name), 0.0) for name in names])
    after = sum(action.phase <= Phase.OPTIMIZER for action in method.actions)
    method.actions.insert(after, own)


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
    return HeldUpdates(
        transforms,
        sum(sizes.values()),
        lambda name: getattr(method.masks.get(name), "index", None),
    )


def _connect_gradients(method: LoweredMethod) -> None:
    """Let what changes gradients find them: where the optimizers read them, and what masks make of them."""
    optimizers = [action for action in method.actions if isinstance(action, OptimizerStep)]

    def trained(names: frozenset[str]) -> Iterator[Trained]:
        return (one for optimizer in optimizers for one in optimizer.trained(names))

    for action in method.actions:
        if isinstance(action, GradientTransform):
            masks = (method.masks.get(name) for name in action.parameters)
            action.trained = trained
            action.before = tuple(mask.zero_gradient for mask in masks if mask is not None)


def _drop_paused(method: LoweredMethod, pausing: Sequence[Pausing]) -> None:
    """Let paused parameters have no gradient; raises SpecError for an optimizer that asks for gradients itself."""
    for one in pausing:
        for part in method.optimizers:
            if part.asks and not one.names.isdisjoint(part.targets):
                message = (
                    f"{one.who} freezes parameters of `{part.label}`, which asks for gradients several times in a step:"
                    " those cannot be frozen during a run"
                )
                raise SpecError([Diagnostic("unknown-target", message, labels((part.span, "")))])
    names = {name for one in pausing for name in one.names}
    steps = [action for action in method.actions if isinstance(action, OptimizerStep)]
    slots = [slot for step in steps for slot in step.slots if slot.name in names]
    before = sum(action.phase < Phase.GRADIENTS for action in method.actions)
    method.actions.insert(before, DropGradients(pausing, slots))


def _measure_gradients(method: LoweredMethod) -> None:
    """Let the norm of the whole gradient be found, again where clauses change gradients, and clip all where asked."""
    steps = [action for action in method.actions if isinstance(action, OptimizerStep)]
    slots = [slot for step in steps for slot in step.slots]
    now = [action for action in method.actions if action.phase == Phase.GRADIENTS]
    changes = [action for action in now if not isinstance(action, Clip | ZeroGradients)]
    later = [action for action in method.actions if action.phase > Phase.GRADIENTS]
    before = method.actions[: len(method.actions) - len(later)]
    clips: list[Action] = [action for action in before if isinstance(action, Clip)]
    before = [action for action in before if not isinstance(action, Clip)]
    if method.clip is not None:
        clips.append(Clip("run clip", method.clip, slots))
    method.model_gradient = ModelGradient(slots, method.masks, each=bool(clips))
    if changes:
        before.append(MeasureChanged(method.model_gradient, changes))
    method.actions = [*before, *clips, *later]


def _optimizer_actions(
    part: OptimizerPart,
    method: LoweredMethod,
    context: LoweringContext,
    updates: HeldUpdates | None,
    to_run: bool,
) -> list[Action]:
    """Return the actions of one optimizer clause: set the rates, clip, step."""
    names = [name for name in part.targets if name not in method.frozen]
    slots = [_slot(part, name, method, context) for name in names]
    label, construct = part.label, part.construct
    form = construct.decay_form
    entries = _entry_updates(part, names, method)
    optimizer = OptimizerStep(
        label,
        slots,
        construct.make,
        form,
        updates,
        asks=part.asks,
        steady=part.steady,
        entries=entries,
    )
    try:
        construct.examine()
        if to_run:
            _ = optimizer.torch
    except Exception as error:  # a class may raise anything
        at = labels((part.span, ""))
        rule, help_ = getattr(error, "rule", "wrong-argument"), getattr(error, "help", None)
        message = f"the optimizer cannot be built: {error}"
        refused = None if isinstance(error, ImportProblem) else optimizer.first_refused()
        message += f" (`{refused}`)" if refused else ""
        raise SpecError([Diagnostic(rule, message, at, help=help_)]) from error
    actions: list[Action] = [Rates(f"{label} rates", optimizer), optimizer]
    if construct.clip is not None:
        alone = len(method.optimizers) == 1
        metric = None if alone else f"{label}.gradient_norm"
        actions.append(Clip(f"{label} clip", construct.clip, slots, metric))
    return actions


def _entry_updates(
    part: OptimizerPart, names: Sequence[str], method: LoweredMethod
) -> EntryUpdates | None:
    """Return what steps the chosen entries of parameters in place, where the optimizer has an operator for them.

    It serves no parameter of which a clause reads weights or updates at the step.
    """
    construct: Any = part.construct
    if part.asks or not getattr(construct, "steps_entries", False):  # one from another package
        return None
    changed = {
        name
        for action in method.actions
        if isinstance(action, UpdateTransform | GradientTransform)
        for name in action.parameters
    }
    found: dict[str, EntryMask] = {}
    for name in names:
        mask = method.masks.get(name)
        if isinstance(mask, SelectedEntries) and name not in changed:
            mask.update_in_place()
            found[name] = mask
    return EntryUpdates(found, construct.update_entries) if found else None


def _slot(
    part: OptimizerPart, name: str, method: LoweredMethod, context: LoweringContext
) -> ParamSlot:
    """Return a parameter as its optimizer sees it."""
    factors: dict[str, tuple[LrFactor, ...]] = {}
    for factor in method.option_factors.get(name, ()):
        factors[factor.of] = (*factors.get(factor.of, ()), factor)
    mask = method.masks.get(name)
    return ParamSlot(
        name,
        context.model.get_parameter(name) if mask is None else mask.values,
        part.option(name, "weight_decay").begin(0.0),
        tuple(method.lr_factors.get(name, ())),
        part.options[name],
        factors,
        isinstance(mask, SelectedEntries) and not mask.is_counted,
    )


def _ordered(clauses: Sequence[BoundClause], by_label: dict[str, list[Action]]) -> list[Action]:
    """Sort the actions as the declared effects say; raises CompilerBug for an action in an undeclared phase."""
    rank = {
        (clause.label, effect.phase): i
        for i, (clause, effect) in reversed(list(enumerate(step_order(clauses))))
    }
    placed: list[tuple[int, int, int, Action]] = []
    for clause in clauses:
        for action in by_label.get(clause.label, ()):
            phase = PHASES[action.phase - 1]
            if (clause.label, phase) not in rank:
                raise CompilerBug(
                    clause.title,
                    f"has an action in phase `{phase}`, which its effects do not declare",
                )
            # What clips gradients must find them changed, and what reads the weights after the optimizer updated ones.
            changes = isinstance(action, GradientTransform | UpdateTransform)
            later = int(getattr(action, "of_rate", False)) if changes else 2
            placed.append((int(action.phase), later, rank[clause.label, phase], action))
    return [action for *_, action in sorted(placed, key=lambda row: row[:3])]
