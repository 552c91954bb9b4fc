"""Adapt the model of a spec before it is bound, and put it back where the spec turns out to be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from trainc.compiler.bind.binding import bind_adapters
from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.lower.adapting import adapt_model
from trainc.compiler.model.adapters import base_of, restored_on_error
from trainc.compiler.model.inventory import Inventory, build_inventory
from trainc.dsl.resolve.spec import Spec


@contextmanager
def adapted(
    spec: Spec, model: nn.Module, clauses: Sequence[BoundClause] | None = None
) -> Iterator[Inventory | None]:
    """Adapt the model in place, and yield its inventory as it was before; None for a spec that adapts nothing.

    `clauses` are the bound ones, if they are known. When the block raises, the model is as it was. Raises SpecError for
    what cannot be adapted.
    """
    if not any(clause.construct.adapts for clause in spec.clauses):
        yield None
        return
    with restored_on_error(model):
        base = base_inventory(model)
        bound = bind_adapters(spec, base) if clauses is None else clauses
        run = spec.one("run")
        adapt_model(model, bound, base, run.construct.seed if run else 0)  # type: ignore[attr-defined]
        yield base


def base_inventory(model: nn.Module) -> Inventory:
    """Return the inventory of a model without its adapters."""
    with base_of(model):
        return build_inventory(model)
