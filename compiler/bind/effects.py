"""Declared effects: the order of actions inside a phase, and the combinations that are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from trainc.dsl.reading.construct import PHASES
from trainc.dsl.text.diagnostic import Diagnostic, Label

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import BoundClause
    from trainc.compiler.model.inventory import Inventory
    from trainc.dsl.reading.construct import Effect

SINGLE = ("views",)
"""Resources that one clause at most may write: there is no meaning to doing it twice."""


def conflicts(clauses: Sequence[BoundClause]) -> Iterator[Diagnostic]:
    """Yield a diagnostic with both lines for every pair of clauses whose effects contradict each other."""
    for i, clause in enumerate(clauses):
        for other in clauses[:i]:
            doubled = [r for r in SINGLE if r in _writes(clause) and r in _writes(other)]
            if doubled:
                yield _refusal(
                    clause,
                    other,
                    f"`{clause.title}` and `{other.title}` both decide `{doubled[0]}`",
                )


def penalised_measurements(
    clauses: Sequence[BoundClause], inventory: Inventory
) -> Iterator[Diagnostic]:
    """Yield a warning for every noise scale measured on parameters whose gradient holds a penalty too."""
    penalties = [c for c in clauses if c.construct.targets == "parameters" and "loss" in _writes(c)]
    for clause in clauses:
        if clause.kind != "noise_scale":
            continue
        measured = {name for module in clause.modules(inventory) for name in module.parameters}
        for penalty in penalties:
            shared = [name for name in penalty.targets if name in measured]
            if shared:
                labels = ((clause, "measured here"), (penalty, "the penalty"))
                yield Diagnostic(
                    "noise-scale-sees-penalty",
                    f"the gradient of `{shared[0]}` holds `{penalty.title}`, which no example contributes",
                    tuple(Label(c.span, text) for c, text in labels if c.span is not None),
                    help="leave what is measured out of the penalty's selector",
                    severity="warning",
                )


def _refusal(clause: BoundClause, other: BoundClause, message: str) -> Diagnostic:
    labels = tuple(
        Label(c.span, text)
        for c, text in ((clause, _what(clause)), (other, _what(other)))
        if c.span is not None
    )
    return Diagnostic(
        "conflicting-effects",
        message,
        labels,
        help="drop one of the two, or give them separate runs",
    )


def _what(clause: BoundClause) -> str:
    return "; ".join(effect.action for effect in clause.construct.effects)


def _writes(clause: BoundClause) -> set[str]:
    return {resource for effect in clause.construct.effects for resource in effect.writes}


def step_order(clauses: Sequence[BoundClause]) -> list[tuple[BoundClause, Effect]]:
    """Return every clause's effects in the order in which a step performs them.

    By phase; inside a phase who writes a resource comes before who only reads it; what rewrites one resource keeps
    the order of lowering, in which the optimizer's clipping is last.
    """
    rows = [(clause, effect) for clause in clauses for effect in clause.construct.effects]
    ordered: list[tuple[BoundClause, Effect]] = []
    for phase in PHASES:
        waiting = [row for row in rows if row[1].phase == phase]
        while waiting:
            ready = next(
                (
                    row
                    for row in waiting
                    if not any(_feeds(b[1], row[1]) for b in waiting if b is not row)
                ),
                waiting[0],
            )
            waiting.remove(ready)
            ordered.append(ready)
    return ordered


def _feeds(first: Effect, second: Effect) -> bool:
    """Say whether `second` reads what `first` writes without writing it itself."""
    return any(r in second.reads and r not in second.writes for r in first.writes)
