"""Check that every trainable parameter has exactly one optimizer, and at most one mask and one clause of each `lr`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.bind.report import labels, shared_note
from trainc.compiler.model.inventory import Inventory
from trainc.compiler.model.select import select
from trainc.dsl.reading.construct import Construct
from trainc.dsl.text.diagnostic import Diagnostic

SHOWN = 3


def overlapping_claims(
    clauses: Sequence[BoundClause], inventory: Inventory
) -> Iterator[Diagnostic]:
    """Yield a diagnostic for two clauses that share a parameter but may not, and for parameters without an optimizer.

    Optimizers may not share one, nor masks. Factors of different `lr` constructs multiply; two clauses of one
    construct may not share a parameter.
    """
    exclusive: dict[str, list[BoundClause]] = {}
    for clause in clauses:
        if clause.kind in ("optimizer", "mask", "lr"):
            what = clause.title if clause.kind == "lr" else clause.kind
            exclusive.setdefault(what, []).append(clause)
    for what, same in exclusive.items():
        yield from _overlaps(what, same, inventory)
    if "optimizer" in exclusive:
        yield from _unclaimed(exclusive["optimizer"], inventory)


def _overlaps(
    what: str, clauses: Sequence[BoundClause], inventory: Inventory
) -> Iterator[Diagnostic]:
    owner: dict[str, BoundClause] = {}
    reported: set[tuple[int, int]] = set()
    for clause in clauses:
        for name in clause.targets:
            other = owner.setdefault(name, clause)
            if other is not clause and (id(other), id(clause)) not in reported:
                reported.add((id(other), id(clause)))
                yield Diagnostic(
                    "claimed-twice",
                    f"two `{what}` clauses select `{name}`",
                    labels(
                        (clause.span, "selected again here"), (other.span, "first selected here")
                    ),
                    notes=shared_note(inventory.parameter[name]),
                    help=f"change one of the two selectors so that it does not match `{name}`",
                )


def frozen_by_fields(constructs: Iterable[Construct], inventory: Inventory) -> set[str]:
    """Return the parameters that the `freeze` of optimizers selects: they train at no time."""
    freeze = (getattr(construct, "freeze", None) for construct in constructs)
    return {n for one in freeze if one is not None for n in select(one, inventory, "parameters")}


def _unclaimed(optimizers: Sequence[BoundClause], inventory: Inventory) -> Iterator[Diagnostic]:
    claimed = {name for clause in optimizers for name in clause.targets}
    claimed |= frozen_by_fields((clause.construct for clause in optimizers), inventory)
    left = [p.name for p in inventory.trainable if p.name not in claimed]
    if not left:
        return
    more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
    yield Diagnostic(
        "unclaimed-parameters",
        f"no optimizer trains {', '.join(f'`{name}`' for name in left[:SHOWN])}{more}",
        labels((optimizers[0].span, "this optimizer does not select them")),
        help="extend the selector, add an optimizer, or select these parameters in `freeze`",
    )
