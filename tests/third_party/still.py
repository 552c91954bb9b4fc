"""Parameters that stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainc.dsl.reading.construct import Construct, Effect

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering


class Still(Construct):
    """Leaves the selected parameters untrained."""

    cite: ClassVar = "nobody"
    usage: ClassVar = 'mask still on "3.bias"'
    targets: ClassVar = "parameters"
    effects: ClassVar = (Effect("gradients", "leave some out", ("gradient",), ("gradient",)),)

    def lower(self, to: Lowering) -> None:
        """Freeze them."""
        to.freeze(entry.name for entry in to.parameters())
