"""Mistakes that only the lowered method shows: what clauses ask for does not go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.report import labels
from trainc.compiler.lower.factor_checks import factor_problems
from trainc.compiler.lower.reading_checks import reading_problems
from trainc.compiler.method.lowered_method import LoweredMethod, OptimizerPart
from trainc.compiler.model.inventory import Inventory
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.runtime.mask.mask_actions import ChooseZeros, WriteBack
from trainc.runtime.step.action import Action, Phase
from trainc.runtime.step.around import Around
from trainc.runtime.step.gradients import GradientTransform
from trainc.runtime.step.updates import UpdateTransform


def problems_between(
    clauses: Sequence[BoundClause],
    by_label: Mapping[str, list[Action]],
    method: LoweredMethod,
    inventory: Inventory,
) -> Iterator[Diagnostic]:
    """Yield the problems of what the clauses ask for together; `by_label` are the actions of each clause."""
    if any(clause.kind == "optimizer" for clause in clauses):
        yield from _changes_of_nothing(clauses, by_label, method, inventory)
    else:
        yield from _without_optimizer(clauses, method)
    yield from _masked_exchanges(clauses, method)
    yield from _evaluations(clauses, method)
    yield from reading_problems(clauses, by_label, method, inventory)
    yield from _replaced_layers(clauses, method)
    yield from _changed_weights(clauses, method)
    yield from _equal_clips(clauses, method)
    yield from factor_problems(clauses, by_label, method)
    yield from _masked_wholes(clauses, method)
    for part in method.optimizers:
        if part.asks:
            yield from _asked_once(part, clauses, by_label, method)
        if part.has_modes:
            yield from _second_weights(part, clauses, by_label, method)


def _without_optimizer(
    clauses: Sequence[BoundClause], method: LoweredMethod
) -> Iterator[Diagnostic]:
    """Yield an error for every clause that acts on rates or updates of an optimizer, in a spec that has none."""
    scaling = {factor.policy for found in method.lr_factors.values() for factor in found}
    for clause in clauses:
        phases = {e.phase for e in clause.construct.effects if clause.construct.performs(e)}
        acts = phases & {"rates", "deltas", "exchange"} or clause.kind in ("lr", "mask")
        acts = acts or clause.label in scaling
        if acts:
            yield Diagnostic(
                "missing-clause",
                f"`{clause.title}` acts on what an optimizer does, and the spec has none",
                labels((clause.span, "needs an optimizer of the spec")),
                help="write an `optimizer` clause, or remove this clause",
            )


def _changes_of_nothing(
    clauses: Sequence[BoundClause],
    by_label: Mapping[str, list[Action]],
    method: LoweredMethod,
    inventory: Inventory,
) -> Iterator[Diagnostic]:
    """Yield an error for every clause that acts on parameters in training, if no optimizer trains what it selects."""
    claimed = {name for part in method.optimizers for name in part.targets} - method.frozen
    trained = {name for name in claimed if inventory.parameter[name].trainable}
    for clause in clauses:
        acts_on = set(clause.targets) - method.frozen_by.get(clause.label, set())
        if method.optimizers and _trains(clause) and acts_on and trained.isdisjoint(acts_on):
            yield Diagnostic(
                "selector-matches-frozen",
                f"`{clause.title}` has no effect, because no optimizer trains what it selects",
                labels((clause.part_span("on"), "none of these parameters trains")),
                help="select parameters that an `optimizer` clause of this spec trains, or remove the clause",
            )
            continue
        for action in by_label.get(clause.label, ()):
            if not isinstance(action, GradientTransform | UpdateTransform):
                continue
            if trained.isdisjoint(action.parameters):
                of_updates = isinstance(action, UpdateTransform)
                what = "what an optimizer adds to weights" if of_updates else "gradients"
                yield Diagnostic(
                    "selector-matches-frozen",
                    f"`{clause.title}` changes {what}, but no optimizer trains what it selects",
                    labels((clause.span, "")),
                    help="select parameters that an `optimizer` clause of this spec trains, or remove the clause",
                )


_TRAINING = frozenset(("loss", "rate", "gradient", "delta", "params"))


def _trains(clause: BoundClause) -> bool:
    """Say whether a clause changes how the parameters that it selects train."""
    construct = clause.construct
    if construct.targets != "parameters" or clause.kind == "optimizer":
        return False
    performed = (e for e in construct.effects if construct.performs(e) and e.phase != "exchange")
    return any(_TRAINING.intersection(effect.writes) for effect in performed)


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


def _evaluations(clauses: Sequence[BoundClause], method: LoweredMethod) -> Iterator[Diagnostic]:
    """Yield an error for a clause that sets the weights of evaluation for none that train, and for a second clause."""
    setting = [clause for clause in clauses if clause.label in method.evaluated_with]
    trained = {name for part in method.optimizers for name in part.targets} - method.frozen
    for clause in setting:
        if not trained.intersection(method.evaluated_with[clause.label].names()):
            yield Diagnostic(
                "selector-matches-frozen",
                f"`{clause.title}` sets the weights that evaluation uses, but no optimizer trains what it selects",
                labels((clause.span, "")),
                help="select parameters that an `optimizer` clause of this spec trains, or remove the clause",
            )
    for clause in setting[1:]:
        first = setting[0]
        yield Diagnostic(
            "conflicting-effects",
            f"`{clause.title}` and `{first.title}` both set the weights that evaluation and saving use, but only one"
            " clause may set them",
            labels((clause.span, "sets them again here"), (first.span, "first set here")),
            help="remove one of the two clauses",
        )


def _replaced_layers(clauses: Sequence[BoundClause], method: LoweredMethod) -> Iterator[Diagnostic]:
    """Yield an error for every clause that replaces how a layer computes which another clause measures."""
    replaced = {site.label: site.module for site, done in method.rewrite.replaced() if not done}
    for clause in clauses:
        if clause.label in replaced:
            yield Diagnostic(
                "conflicting-effects",
                f"`{clause.title}` replaces how `{replaced[clause.label]}` computes its result, and another clause"
                " measures the gradients of this layer's examples",
                labels((clause.span, "replaces the layer")),
                help="exclude the layer from one of the two clauses",
            )


def _changed_weights(clauses: Sequence[BoundClause], method: LoweredMethod) -> Iterator[Diagnostic]:
    """Yield an error for every clause that changes a weight of a layer whose examples' gradients are measured."""
    measured = {name for site in method.rewrite.measured for name in site.parameters}
    weights = ((site.label, site.weight) for site in method.rewrite.hooks)
    changed = {label: w.name for label, w in weights if w is not None and w.name in measured}
    for clause in clauses:
        if (name := changed.get(clause.label)) is not None:
            yield Diagnostic(
                "conflicting-effects",
                f"`{clause.title}` changes `{name}` where its layer computes, and another clause measures the gradients"
                " that examples give it: they would be those of the changed weight",
                labels((clause.span, "changes the weight")),
                help=f"exclude `{name}` from one of the two clauses",
            )


def _equal_clips(clauses: Sequence[BoundClause], method: LoweredMethod) -> Iterator[Diagnostic]:
    """Yield an error where two clauses clip to the same norm, which is not the norm of their gradients together."""
    by_label = {clause.label: clause for clause in clauses}
    first: dict[float, OptimizerPart] = {}
    for part in method.optimizers:
        limit = part.construct.clip
        if limit is None or method.clip is not None:
            continue
        other = first.setdefault(limit, part)
        if other is not part:
            here, there = by_label[part.label], by_label[other.label]
            yield Diagnostic(
                "ambiguous-clip",
                f"`{there.label}` and `{here.label}` both clip to the norm {limit:g}, each the gradients of its own"
                f" parameters: all gradients together can then have a norm of {limit * 2**0.5:.3g}",
                labels(
                    (here.part_span("clip"), "clips the parameters of this clause"),
                    (there.part_span("clip"), "clips the parameters of this clause"),
                ),
                help=f"write `run {{ clip = {limit:g} }}` in place of both to clip all gradients together, or give the"
                " clauses different limits",
            )


def _masked_wholes(clauses: Sequence[BoundClause], method: LoweredMethod) -> Iterator[Diagnostic]:
    """Yield an error for every mask on parameters whose optimizer updates their entries together."""
    for part in method.optimizers:
        whole = set() if getattr(part.construct, "entrywise", True) else set(part.targets)
        own = next((clause for clause in clauses if clause.label == part.label), None)
        for clause in clauses:
            masked = [name for name in clause.targets if name in whole and name in method.masks]
            if clause.kind != "mask" or own is None or not masked:
                continue
            name = masked[0]
            yield Diagnostic(
                "conflicting-effects",
                f"`{clause.title}` lets entries of `{name}` train by themselves, but `{own.title}` makes each entry of"
                " an update from all gradients of the tensor",
                labels((clause.span, "chooses entries"), (own.span, "updates whole tensors")),
                help=f"exclude `{name}` from one of the two clauses",
            )


def _asked_once(
    part: OptimizerPart,
    clauses: Sequence[BoundClause],
    by_label: Mapping[str, list[Action]],
    method: LoweredMethod,
) -> Iterator[Diagnostic]:
    """Yield an error for all that changes what an optimizer asks for, but only once in a step."""
    own = next(clause for clause in clauses if clause.label == part.label)
    asks = f"`{own.title}` asks for the loss and gradients several times in a step"
    if part.construct.clip is not None:
        yield Diagnostic(
            "conflicting-effects",
            f"{asks}, and clipped gradients would not be those of the loss: remove `clip`",
            labels((own.span, "clips gradients")),
        )
    for clause in clauses:
        actions = by_label.get(clause.label, ())
        if clause.kind == "run" and method.clip is not None:
            yield Diagnostic(
                "conflicting-effects",
                f"{asks}, and clipped gradients would not be those of the loss: remove `clip`",
                labels(
                    (clause.part_span("clip"), "clips gradients"), (own.span, "asks several times")
                ),
            )
        what = next((text for one in actions if (text := _once(one)) is not None), None)
        if clause is not own and any(clause.label == one.label for one in method.optimizers):
            what = "is a second optimizer, which moves other weights in between"
        if what is not None:
            yield Diagnostic(
                "conflicting-effects",
                f"{asks}, but `{clause.title}` {what}",
                labels((clause.span, ""), (own.span, "asks several times")),
                help=f"remove `{clause.title}`, or use an optimizer that steps from the gradients alone",
            )


def _second_weights(
    part: OptimizerPart,
    clauses: Sequence[BoundClause],
    by_label: Mapping[str, list[Action]],
    method: LoweredMethod,
) -> Iterator[Diagnostic]:
    """Yield an error for what changes the weights, but not those that an optimizer keeps for evaluation."""
    own = next(clause for clause in clauses if clause.label == part.label)
    for clause in clauses:
        actions = by_label.get(clause.label, ())
        what = None
        if any(isinstance(one, UpdateTransform) for one in actions):
            what = "changes its updates of the trained weights alone"
        elif any(isinstance(one, WriteBack) for one in actions):
            what = "lets it train chosen entries, which evaluation would not see"
        elif clause.label in method.exchanges:
            what = "exchanges the trained weights alone"
        elif clause.label in method.evaluated_with:
            what = "sets the weights that evaluation uses, too"
        if what is not None:
            yield Diagnostic(
                "conflicting-effects",
                f"`{own.title}` keeps weights of its own for evaluation (`train()` and `eval()`), but"
                f" `{clause.title}` {what}",
                labels((clause.span, ""), (own.span, "keeps weights for evaluation")),
                help=f"remove `{clause.title}`, or use an optimizer without `train()` and `eval()`",
            )


def _once(action: Action) -> str | None:
    """Say what an action changes once in a step; None if an optimizer that asks again would not miss it."""
    if isinstance(action, Around):
        return "changes weights or inputs for the first passes alone"
    if isinstance(action, ChooseZeros | WriteBack):
        return "chooses which entries train, which such an optimizer does not know"
    if action.phase == Phase.GRADIENTS:
        return "changes the gradients of the first passes alone"
    if isinstance(action, UpdateTransform):
        return "changes its update, from which it computes the next one"
    return None
