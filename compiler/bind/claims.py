"""Claims: a proof that every trainable parameter is updated by exactly one optimizer, and scaled or masked once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.model.inventory import Inventory
from trainc.compiler.model.select import select
from trainc.dsl.text.diagnostic import Diagnostic, Label

SHOWN = 3


def overlapping_claims(
    clauses: Sequence[BoundClause], inventory: Inventory
) -> Iterator[Diagnostic]:
    """Yield a diagnostic for every parameter claimed twice by one kind of policy, or by no optimizer.

    Rate policies of different constructs multiply, so only those of one construct dispute a parameter; masks always do.
    """
    policies: dict[str, list[BoundClause]] = {}
    for clause in clauses:
        if clause.kind in ("optimizer", "mask"):
            policies.setdefault(clause.kind, []).append(clause)
        elif clause.kind == "lr":
            policies.setdefault(clause.title, []).append(clause)
    for same in policies.values():
        yield from _overlaps(same)
    if "optimizer" in policies:
        yield from _unclaimed(policies["optimizer"], inventory)


def two(
    rule: str, message: str, clause: BoundClause, other: BoundClause, help: str | None = None
) -> Diagnostic:
    """Return a diagnostic that points at both clauses."""
    labels = tuple(
        Label(c.span, text)
        for c, text in ((clause, "again here"), (other, "first here"))
        if c.span is not None
    )
    return Diagnostic(rule, message, labels, help=help)


def _overlaps(clauses: Sequence[BoundClause]) -> Iterator[Diagnostic]:
    owner: dict[str, BoundClause] = {}
    reported: set[tuple[int, int]] = set()
    for clause in clauses:
        for name in clause.targets:
            other = owner.setdefault(name, clause)
            if other is not clause and (id(other), id(clause)) not in reported:
                reported.add((id(other), id(clause)))
                yield two(
                    "claimed-twice",
                    f"`{name}` is claimed by two clauses of one policy",
                    clause,
                    other,
                )


def _unclaimed(optimizers: Sequence[BoundClause], inventory: Inventory) -> Iterator[Diagnostic]:
    claimed = {name for clause in optimizers for name in clause.targets}
    for clause in optimizers:
        freeze = getattr(clause.construct, "freeze", None)
        if freeze is not None:
            claimed.update(select(freeze, inventory, "parameters"))
    left = [p.name for p in inventory.trainable if p.name not in claimed]
    if not left:
        return
    more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
    span = optimizers[0].span
    yield Diagnostic(
        "unclaimed-parameters",
        f"no optimizer trains {', '.join(f'`{name}`' for name in left[:SHOWN])}{more}",
        (Label(span, "this optimizer leaves them out"),) if span else (),
        help="widen the selector, add an optimizer for them, or name them in `freeze`",
    )
