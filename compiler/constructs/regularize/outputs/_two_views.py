"""What regularizers share that pass every example twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainc.dsl.reading.construct import Effect, Problem, RuleExplanation

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets

RULES = {
    "pair-over-batch-norm": RuleExplanation(
        "Two passes are compared through a layer whose output depends on the whole batch.",
        "The passes then also differ by the statistics of the batch, and running averages are updated twice.",
        "Freeze the BatchNorm layers, or replace them with GroupNorm.",
    ),
}


def two_views(action: str) -> Effect:
    """Return the effect of passing every example twice and adding a term that compares the results."""
    return Effect("forward", action, ("inputs", "clock"), ("views", "forward", "loss"))


def batch_norm_problems(bound: Targets) -> Iterator[Problem]:
    """Yield a warning where a model has BatchNorm layers."""
    norms = [m.name for m in bound.inventory.modules if "_BatchNorm" in m.types]
    if norms:
        message = f"BatchNorm (`{norms[0]}`) takes its statistics over both views of the batch"
        note = f"BatchNorm layers with twice the batch size: {len(norms)}"
        yield Problem("pair-over-batch-norm", message, notes=(note,), severity="warning")


def no_dropout(bound: Targets) -> Iterator[Problem]:
    """Yield a warning where no module of the model is a Dropout."""
    if not any("Dropout" in name for module in bound.inventory.modules for name in module.types):
        message = "no layer of the model is a Dropout: unless it draws random numbers itself, the two passes are equal"
        yield Problem("no-effect", message, severity="warning")
