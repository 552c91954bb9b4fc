"""A pull of every weight towards zero, with a diagnostic of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Problem, RuleExplanation, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward


class Pull(Construct):
    """Adds `weight * sum |w|` over the selected parameters to the loss."""

    cite: ClassVar = "Tibshirani, J. R. Stat. Soc. B 58 (1996) 267"
    usage: ClassVar = "regularize pull on ndim(2) from 3 steps { weight = 0.01 }"
    targets: ClassVar = "parameters"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (Effect("forward", "pull", ("params",), ("loss",)),)
    rules: ClassVar = {
        "pull-on-bias": RuleExplanation(
            "A bias is pulled towards zero.",
            "A bias has no reason to be small.",
            "Select `ndim(2)`.",
        )
    }

    weight: Schedule = Field(description="strength, per unit of the summed magnitudes")

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Warn of biases."""
        if any(p.name.endswith("bias") for p in bound.parameters):
            yield Problem("pull-on-bias", "a bias is selected", severity="warning")

    def lower(self, to: Lowering) -> None:
        """Add the term."""
        names = [p.name for p in to.parameters()]

        def value(forward: Forward) -> Tensor:
            import torch

            return torch.stack([forward.parameters[name].abs().sum() for name in names]).sum()

        to.term(value, over="parameters", weight=self.weight)
