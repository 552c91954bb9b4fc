"""Losses: a mean over counted targets, with what exact accumulation and evaluation need."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from trainc.dsl.reading.construct import Construct, Effect

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering, Task


class Loss(Construct):
    """What every loss clause declares; `make_task` builds the function that is differentiated."""

    effects: ClassVar = (Effect("forward", "task loss", ("forward",), ("loss",)),)

    @abstractmethod
    def make_task(self) -> Task:
        """Return the task."""

    @abstractmethod
    def reference(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition."""

    def lower(self, to: Lowering) -> None:
        to.task(self.make_task())
