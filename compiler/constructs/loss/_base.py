"""What all loss constructs share."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from trainc.dsl.reading.construct import Construct, Effect

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.loss import Loss


class LossConstruct(Construct):
    """Base of the loss constructs; `make_loss` builds the loss that is differentiated."""

    effects: ClassVar = (Effect("forward", "compute the loss", ("forward",), ("loss",)),)

    @abstractmethod
    def make_loss(self) -> Loss:
        """Return the loss."""

    @abstractmethod
    def reference(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition."""

    def lower(self, to: Lowering) -> None:
        to.loss(self.make_loss())
