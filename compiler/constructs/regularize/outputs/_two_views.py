"""What regularizers share that pass every example twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainc.dsl.reading.construct import Effect, Problem

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets


def two_views(action: str) -> Effect:
    """Return the effect of passing every example twice and adding a term that compares the results."""
    return Effect("forward", action, ("inputs", "clock"), ("views", "forward", "loss"))


def no_dropout(bound: Targets) -> Iterator[Problem]:
    """Yield a warning where no module of the model is a Dropout."""
    if not any("Dropout" in name for module in bound.inventory.modules for name in module.types):
        message = "no layer of the model is a Dropout: unless it draws random numbers itself, the two passes are equal"
        yield Problem("no-effect", message, severity="warning")
