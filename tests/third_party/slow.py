"""A smaller rate for some parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering


class Slow(Construct):
    """Multiplies learning rates by `factor`."""

    cite: ClassVar = "nobody"
    usage: ClassVar = "lr slow on ndim(1) until 6 steps { factor = 0.5 }"
    targets: ClassVar = "parameters"
    identity: ClassVar = {"factor": "1"}
    effects: ClassVar = (Effect("rates", "slow down", writes=("rate",)),)

    factor: float = Field(gt=0, description="what the rate is multiplied by")

    def lower(self, to: Lowering) -> None:
        """Give the selected parameters one factor."""
        to.lr_factor("slow", [entry.name for entry in to.parameters()]).factor = self.factor
