"""Use the declared effects of clauses: order the actions of a step, and find clauses that conflict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.report import labels
from trainc.compiler.model.inventory import Inventory
from trainc.dsl.reading.construct import PHASES, Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic

SINGLE = ("views",)
"""Resources that at most one clause may write."""


def changes_batch(spec: Spec) -> bool:
    """Say whether the batch may change during the run: a clause or a rule sets it."""
    actions = (action for rule in spec.rules for action in rule.actions)
    return any("batch" in _writes(clause.construct) for clause in spec.clauses) or any(
        getattr(action, "target", None) == "batch" for action in actions
    )


def conflicts(clauses: Sequence[BoundClause]) -> Iterator[Diagnostic]:
    """Yield a diagnostic with both lines for two clauses that write a resource that only one may write."""
    for i, clause in enumerate(clauses):
        for other in clauses[:i]:
            both = _writes(clause.construct) & _writes(other.construct)
            for resource in both.intersection(SINGLE):
                yield Diagnostic(
                    "conflicting-effects",
                    f"`{clause.title}` and `{other.title}` both set `{resource}`, but only one clause may set it",
                    labels((clause.span, _actions(clause)), (other.span, _actions(other))),
                    help="remove one of the two clauses",
                )
    for clause in clauses:
        for resource, (together, setting) in clause.construct.opt_in().items():
            for other in clauses:
                if other is not clause and resource in _writes(other.construct):
                    yield Diagnostic(
                        "conflicting-effects",
                        f"`{clause.title}` and `{other.title}` {together}",
                        labels((clause.span, _actions(clause)), (other.span, _actions(other))),
                        help=f"write `{setting}` in `{clause.title}` to accept this, or remove one of the two clauses",
                    )


def penalised_measurements(
    clauses: Sequence[BoundClause], inventory: Inventory
) -> Iterator[Diagnostic]:
    """Yield a warning for every clause that measures gradients of parameters that a penalty acts on."""
    penalties = [
        c for c in clauses if c.construct.targets == "parameters" and "loss" in _writes(c.construct)
    ]
    for clause in clauses:
        if not measures_gradients(clause.construct):
            continue
        measured = set(clause.targets)
        if clause.construct.targets == "modules":
            measured = {name for m in clause.modules(inventory) for name in m.parameters}
        for penalty in penalties:
            shared = [name for name in penalty.targets if name in measured]
            if shared:
                yield Diagnostic(
                    "statistic-sees-penalty",
                    f"`{clause.title}` also measures the penalty `{penalty.title}`, because both select `{shared[0]}`",
                    labels(
                        (clause.span, "measures this parameter"),
                        (penalty.span, "adds to its gradient"),
                    ),
                    help="exclude the measured parameters from the selector of the penalty",
                    severity="warning",
                )


def measures_gradients(construct: Construct) -> bool:
    """Say whether a construct, with its fields, measures gradients of examples, micro-batches or replicas."""
    performed = (effect for effect in construct.effects if construct.performs(effect))
    return any("probe" in (*effect.reads, *effect.writes) for effect in performed)


def _actions(clause: BoundClause) -> str:
    construct = clause.construct
    return "; ".join(construct.describe(e) for e in construct.effects if construct.performs(e))


def _writes(construct: Construct) -> set[str]:
    """Return the resources that a construct, with its fields, writes."""
    return {r for e in construct.effects if construct.performs(e) for r in e.writes}


def step_order(clauses: Sequence[BoundClause]) -> list[tuple[BoundClause, Effect]]:
    """Return the effects of all clauses in the order in which a step performs them.

    Ordered by phase. In one phase, a writer of a resource comes before those that only read it; those that both
    read and write it keep the order of lowering, in which the optimizer's clipping is last.
    """
    rows = [(clause, effect) for clause in clauses for effect in clause.construct.effects]
    ordered: list[tuple[BoundClause, Effect]] = []
    for phase in PHASES:
        waiting = [row for row in rows if row[1].phase == phase]
        while waiting:
            free = (row for row in waiting if not any(_feeds(b[1], row[1]) for b in waiting))
            ready = next(free, waiting[0])
            waiting.remove(ready)
            ordered.append(ready)
    return ordered


def _feeds(first: Effect, second: Effect) -> bool:
    """Say whether `second` reads what `first` writes without writing it itself."""
    return any(r in second.reads and r not in second.writes for r in first.writes)
