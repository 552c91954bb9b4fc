"""What all loss constructs share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from trainc.compiler.method.loss import Loss, LossMismatch
from trainc.dsl.reading.construct import Construct, Effect, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.schedule.clock import Clock


class LossConstruct(Construct):
    """Base of the loss constructs; `make_loss` builds the loss that is differentiated."""

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect("forward", "compute the loss", ("forward",), ("loss",)),
    )

    output: str | Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="which part of the model's output it is of, by name or index; the other parts are left out",
    )

    target: str | Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="which part of the data's targets it is of, by name or index, where they are several",
    )
    weight: Schedule | None = Field(
        default=None,
        description="what the loss is multiplied by, in a sum of several; 1 unless given",
    )

    @abstractmethod
    def make_loss(self) -> Loss:
        """Return the loss of one output and one target."""

    def numbers(self, to: Lowering) -> Mapping[str, Callable[[Clock], float]]:
        """Return its numbers that change in the run, by name, which `Loss.now` has in each pass."""
        return {}

    @abstractmethod
    def reference(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by definition."""

    def lower(self, to: Lowering) -> None:
        loss = self.make_loss()
        loss.numbers = self.numbers(to)
        loss.output, loss.target = self.output, self.target
        heads = [one for one in to.inventory.modules if "head" in one.roles]
        loss.linear_head = bool(heads) and all(one.matrix and one.ndim == 2 for one in heads)
        self.equip(loss, to)
        to.loss(loss, self.weight)

    def equip(self, loss: Loss, to: Lowering) -> None:
        """Give the loss what it needs of the mechanisms besides: nothing, unless a construct says more."""


class ElementwiseLoss(Loss):
    """A mean of numbers, one for each entry of output and target, which have one shape."""

    def target_weights(self, targets: Tensor) -> Tensor:
        import torch

        return torch.ones_like(targets, dtype=torch.float64)

    def count(self, targets: Tensor) -> float:
        """Return the number of entries."""
        return targets.numel()

    def weights(self, targets: Tensor) -> Tensor:
        """Return equal weights, shape (examples,), float64."""
        import torch

        return torch.full((len(targets),), 1.0 / len(targets), dtype=torch.float64)

    def counted(self, targets: Tensor) -> Tensor:
        """Return that all entries count."""
        import torch

        return torch.ones_like(targets, dtype=torch.bool)

    def pair(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return both in the wider of their dtypes; raises LossMismatch unless they have one shape."""
        import torch

        if outputs.shape != targets.shape:
            raise LossMismatch(
                f"the model's output has shape {tuple(outputs.shape)} and the targets {tuple(targets.shape)};"
                f" `loss {self.name}` needs equal shapes{_reshaping(outputs, targets)}"
            )
        dtype = torch.promote_types(outputs.dtype, targets.dtype)
        return outputs.to(dtype), targets.to(dtype)


def _reshaping(outputs: Tensor, targets: Tensor) -> str:
    """Return what to write where only axes of size 1 keep two shapes apart."""
    wide, narrow = ([n for n in t.shape[1:] if n != 1] for t in (outputs, targets))
    if outputs.shape[:1] != targets.shape[:1] or wide != narrow:
        return ""
    return f": give targets of the output's shape, as `targets.reshape({list(outputs.shape)})`"
