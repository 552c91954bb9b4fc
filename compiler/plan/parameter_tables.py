"""The plan's tables of parameters: what acts on each, and how much of the weights each clause reaches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainc.compiler.bind.binding import Binding
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.plan.plan import Row


def parameter_rows(binding: Binding, method: LoweredMethod) -> list[Row]:
    """Return one row per parameter: its optimizer, decay, rate factors, mask, and the other clauses that select it."""
    claimed = {n: part for part in method.optimizers for n in part.targets}
    factors_of = {factor.policy for found in method.lr_factors.values() for factor in found}
    shown = ("optimizer", "mask")  # in columns of their own, as are factors on rates
    others = [c for c in binding.active if c.kind not in shown and c.label not in factors_of]
    rows = []
    for p in binding.inventory.parameters:
        part = None if p.name in method.frozen else claimed.get(p.name)
        mask = method.masks.get(p.name)
        factors = [] if part is None else method.lr_factors.get(p.name, [])
        selecting = [c.label for c in others if not {p.name, *p.modules}.isdisjoint(c.targets)]
        rows.append(
            {
                "name": p.name,
                "shape": list(p.shape),
                "aliases": list(p.aliases),
                "depth": round(p.place.depth, 4),
                "level": p.place.level,
                "optimizer": part and part.label,
                "decay": part and part.decay[p.name],
                "lr_factors": [factor.policy for factor in factors],
                "lr_units": [factor.unit for factor in factors],
                "mask": mask and mask.describe(),
                "clauses": selecting,
            }
        )
    return rows


def share_rows(binding: Binding, method: LoweredMethod) -> list[Row]:
    """Return how many parameters and entries each clause reaches, and what fraction of the trained entries that is.

    Each weight decay of an optimizer has a row of its own.
    """
    inventory = binding.inventory
    trained = {n for part in method.optimizers for n in part.targets} - method.frozen
    total = sum(inventory.parameter[name].numel for name in trained)
    rows = []
    for clause, what, names in _reached(binding, method):
        reached = [p for p in inventory.parameters if p.name in names]
        entries = sum(p.numel for p in reached)
        of_trained = sum(p.numel for p in reached if p.name in trained)
        rows.append(
            {
                "clause": clause,
                "what": what,
                "parameters": len(reached),
                "entries": entries,
                "share": round(of_trained / total, 6) if total else 0.0,
            }
        )
    return rows


def _reached(binding: Binding, method: LoweredMethod) -> Iterator[tuple[str, str, set[str]]]:
    """Yield each clause, what it does, and the parameters that it reaches."""
    for part in method.optimizers:
        own = [name for name in part.targets if name not in method.frozen]
        yield part.label, "trains", set(own)
        for value in sorted({part.decay[name] for name in own} - {0.0}):
            yield part.label, f"weight decay {value:g}", {n for n in own if part.decay[n] == value}
    if method.frozen:
        yield "", "frozen", set(method.frozen)
    for clause in binding.active:
        if clause.kind != "optimizer" and clause.construct.targets != "none":
            yield clause.label, clause.title, _parameters(binding, clause.targets)


def _parameters(binding: Binding, targets: Iterable[str]) -> set[str]:
    """Return the parameters among the targets of a clause, and those that its modules hold themselves."""
    chosen = set(targets)
    return {
        p.name for p in binding.inventory.parameters if not chosen.isdisjoint((p.name, *p.modules))
    }
