"""Mistakes of what reads the passes of a step: classes where there are none, and views that a layer mixes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.report import labels
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.inventory import Inventory
from trainc.dsl.text.diagnostic import Diagnostic
from trainc.runtime.step.action import Action
from trainc.runtime.step.batches import BatchTransform
from trainc.runtime.step.observer import Observer


def reading_problems(
    clauses: Sequence[BoundClause],
    by_label: Mapping[str, list[Action]],
    method: LoweredMethod,
    inventory: Inventory,
) -> Iterator[Diagnostic]:
    """Yield the problems of clauses that read passes, with the loss, the model and each other."""
    yield from _terms_without_classes(clauses, method)
    yield from _mixed_classes(clauses, by_label)
    yield from _mixed_views(clauses, method, inventory)


def _mixed_views(
    clauses: Sequence[BoundClause], method: LoweredMethod, inventory: Inventory
) -> Iterator[Diagnostic]:
    """Yield an error for clauses that compare views where a BatchNorm mixes them; by groups it keeps them apart."""
    apart = {site.module for site in method.rewrite.hooks if site.hook.replaces}
    apart |= {site.module for site in method.rewrite.measured}
    norms = [m.name for m in inventory.modules if m.batch_statistics and m.name not in apart]
    asking = {request.label for request in method.rewrite.view_requests}
    for clause in clauses if norms else ():
        if clause.label in asking:
            yield Diagnostic(
                "views-over-batch-norm",
                f"`{clause.title}` compares passes of the same examples, which the BatchNorm `{norms[0]}` would"
                " normalize together, in train mode",
                labels((clause.span, "")),
                (f"BatchNorm layers in train mode: {len(norms)}",),
                help="keep them in eval mode, also in the model's own `train()`, or use GroupNorm or LayerNorm",
            )


def _terms_without_classes(
    clauses: Sequence[BoundClause], method: LoweredMethod
) -> Iterator[Diagnostic]:
    """Yield an error for every clause whose loss term or observer reads classes where the loss has none."""
    loss = method.loss
    if loss is None or loss.of_classes:
        return
    readers = [*method.rewrite.observers, *method.evaluation_observers]
    of_classes = {one.name for one in readers if one.of_classes} | {
        term.clause for term in method.rewrite.terms.values() if term.of_classes
    }
    for clause in clauses:
        if clause.label in of_classes:
            yield Diagnostic(
                "bad-value",
                f"`{clause.title}` reads probabilities of classes, and the targets of `loss {loss.name}` are no"
                " classes",
                labels((clause.span, "needs logits of classes")),
                help="use a loss of classes, such as cross-entropy, or remove the clause",
            )


def _mixed_classes(
    clauses: Sequence[BoundClause], by_label: Mapping[str, list[Action]]
) -> Iterator[Diagnostic]:
    """Yield an error for a clause that reads class indices in every step, where another one always mixes classes."""
    always = [(c, one) for c in clauses for one in by_label.get(c.label, []) if one.gate is None]
    mixing = [c for c, one in always if isinstance(one, BatchTransform) and one.mixes_classes]
    for clause, one in always if mixing else ():
        if isinstance(one, Observer) and one.of_classes and one.of == "training":
            mixes = mixing[0]
            yield Diagnostic(
                "conflicting-effects",
                f"`{clause.title}` reads the class of each target in training steps, where `{mixes.title}` makes"
                " mixtures of classes of them",
                labels((clause.span, "needs one class"), (mixes.span, "mixes classes")),
                help="read evaluations in place of training steps, or remove one of the two clauses",
            )
